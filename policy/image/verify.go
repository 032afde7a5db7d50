package image

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"unicode/utf8"
)

// Verify derives everything that must hold of an image from the image alone, and
// returns the first thing that does not. It believes neither the compiler nor
// the signer: the numbers are hashed again, the classes are split again, and the
// rules are made again from the crossings and compared one by one.
//
// An image that Verify accepts fits the kernel's maps, and looking a question up
// in its tables gives the answer that its crossings declare.
func Verify(img *Image) error {
	v := verifier{img: img, budget: MaxExpansion}
	err := v.bounds()
	numbered := make(chan error, 1)
	if err == nil {
		go func() { numbered <- v.numbers() }() // nothing else depends on them
		for _, step := range []func() error{
			v.policy, v.zones, v.workloads, v.networks, v.crossings, v.selectors,
			v.portClasses, v.addressClasses, v.rules,
		} {
			if err = step(); err != nil {
				break
			}
		}
		if bad := <-numbered; err == nil {
			err = bad
		}
	}
	if err != nil {
		return fmt.Errorf("verify image: %w", err)
	}
	return nil
}

type verifier struct {
	img    *Image
	budget int // combinations that may still be looked at

	classesOf   [][]uint16 // crossing -> port classes it covers, ascending
	addressesOf [][]uint16 // network -> address classes inside it, ascending

	crossingsOf []uint32 // room for those of a subject
	peersOf     []Peer   // room for those of a crossing
}

// spend takes n combinations from the budget. It bounds the time that an image
// can make Verify take.
func (v *verifier) spend(n int) error {
	if v.budget -= n; v.budget < 0 {
		return fmt.Errorf("more than %d combinations of subject, peer, ports and crossing", MaxExpansion)
	}
	return nil
}

func (v *verifier) bounds() error {
	for _, b := range []struct {
		what     string
		n, limit int
	}{
		{"zones", len(v.img.Zones), MaxZones},
		{"workloads", len(v.img.Workloads), MaxWorkloads},
		{"networks", len(v.img.Networks), MaxNetworks},
		{"crossings", len(v.img.Crossings), MaxCrossings},
		{"selectors", len(v.img.Selectors), MaxSelectors},
		{"address blocks", len(v.img.Addresses), MaxPrefixes},
		{"rules", len(v.img.Rules), MaxRules},
	} {
		if b.n > b.limit {
			return fmt.Errorf("%d %s, at most %d fit", b.n, b.what, b.limit)
		}
	}
	return nil
}

func (v *verifier) policy() error {
	img := v.img
	switch {
	case !validName(img.Name):
		return fmt.Errorf("policy name %q is not valid", img.Name)
	case img.Version == 0:
		return errors.New("version is 0")
	case !validTrustDomain(img.TrustDomain):
		return fmt.Errorf("trust domain %q is not valid", img.TrustDomain)
	case img.NotAfter < 0:
		return fmt.Errorf("not-after %d is before 1970", img.NotAfter)
	case img.Mode > Observe:
		return fmt.Errorf("mode %d is unknown", img.Mode)
	case int(img.UnmanagedZone) >= len(img.Zones):
		return fmt.Errorf("unmanaged: zone %d of %d", img.UnmanagedZone, len(img.Zones))
	}
	return nil
}

func (v *verifier) zones() error {
	for i, z := range v.img.Zones {
		if err := nextName("zone", z.Name, i, func() string { return v.img.Zones[i-1].Name }); err != nil {
			return err
		}
	}
	return nil
}

var roles = []string{"bastion", "management", "monitor", "proxy", "scanner"}

func (v *verifier) workloads() error {
	taken := make(map[ID]bool, len(v.img.Workloads))
	for i := range v.img.Workloads {
		w := &v.img.Workloads[i]
		if err := nextName("workload", w.Name, i, func() string { return v.img.Workloads[i-1].Name }); err != nil {
			return err
		}
		if int(w.Zone) >= len(v.img.Zones) {
			return fmt.Errorf("workload %q: zone %d of %d", w.Name, w.Zone, len(v.img.Zones))
		}
		want := v.identity(w, taken)
		if w.ID != want || want == None {
			return fmt.Errorf("workload %q: identity %d, its name gives %d", w.Name, w.ID, want)
		}
		taken[want] = true
		for j, r := range w.Roles {
			if _, known := slices.BinarySearch(roles, r.Name); !known || r.Until < 0 {
				return fmt.Errorf("workload %q: role %q until %d is not valid", w.Name, r.Name, r.Until)
			}
			if j > 0 && w.Roles[j-1].Name >= r.Name {
				return fmt.Errorf("workload %q: role %q is out of order", w.Name, r.Name)
			}
		}
	}
	return nil
}

// identity is the first 24 bits of the SHA-256 of the SPIFFE ID that are neither
// reserved nor taken by a workload earlier in name order; None when all are.
func (v *verifier) identity(w *Workload, taken map[ID]bool) ID {
	sum := sha256.Sum256([]byte("spiffe://" + v.img.TrustDomain + "/" + v.img.Zones[w.Zone].Name + "/" + w.Name))
	for at := 0; at+3 <= len(sum); at += 3 {
		id := ID(sum[at])<<16 | ID(sum[at+1])<<8 | ID(sum[at+2])
		if id >= FirstID && !taken[id] {
			return id
		}
	}
	return None
}

func (v *verifier) networks() error {
	for i := range v.img.Networks {
		n := &v.img.Networks[i]
		if err := nextName("network", n.Name, i, func() string { return v.img.Networks[i-1].Name }); err != nil {
			return err
		}
		if int(n.Zone) >= len(v.img.Zones) {
			return fmt.Errorf("network %q: zone %d of %d", n.Name, n.Zone, len(v.img.Zones))
		}
		for j, p := range n.CIDRs {
			if !validBlock(p) {
				return fmt.Errorf("network %q: address block %s is not valid", n.Name, p)
			}
			if j > 0 && comparePrefixes(n.CIDRs[j-1], p) >= 0 {
				return fmt.Errorf("network %q: address block %s is out of order", n.Name, p)
			}
		}
	}
	return nil
}

// numbers checks that the names of crossings are unique, and what they give.
func (v *verifier) numbers() error {
	names := make(map[string]bool, len(v.img.Crossings))
	numbers := make(map[uint32]bool, len(v.img.Crossings))
	for i := range v.img.Crossings {
		c := &v.img.Crossings[i]
		if names[c.Name] {
			return fmt.Errorf("crossing %d: name %q is not valid or not unique", i, c.Name)
		}
		names[c.Name] = true
		want := number(c.Name, numbers)
		if c.Number != want || want == 0 {
			return fmt.Errorf("crossing %q: number %d, its name gives %d", c.Name, c.Number, want)
		}
		numbers[want] = true
	}
	return nil
}

func (v *verifier) crossings() error {
	for i := range v.img.Crossings {
		c := &v.img.Crossings[i]
		if !validName(c.Name) {
			return fmt.Errorf("crossing %d: name %q is not valid or not unique", i, c.Name)
		}
		if err := v.crossing(c); err != nil {
			return fmt.Errorf("crossing %q: %w", c.Name, err)
		}
	}
	return nil
}

// number is the first 32 bits of the SHA-256 of "crossing/" and the name that
// are neither zero nor taken by an earlier crossing; 0 when all are.
func number(name string, taken map[uint32]bool) uint32 {
	sum := sha256.Sum256([]byte("crossing/" + name))
	for at := 0; at < len(sum); at += 4 {
		n := binary.BigEndian.Uint32(sum[at:])
		if n != 0 && !taken[n] {
			return n
		}
	}
	return 0
}

func (v *verifier) crossing(c *Crossing) error {
	if err := v.terms("from", c.From); err != nil {
		return err
	}
	if err := v.terms("to", c.To); err != nil {
		return err
	}
	if len(c.Ports) == 0 {
		return errors.New("no ports")
	}
	for i, s := range c.Ports {
		last, known := s.Proto.Last()
		if !known || s.Low > s.High || s.High > last {
			return fmt.Errorf("ports %d-%d of protocol %d are not valid", s.Low, s.High, s.Proto)
		}
		if i == 0 || c.Ports[i-1].Proto < s.Proto {
			continue
		}
		if p := c.Ports[i-1]; p.Proto > s.Proto || uint32(p.High)+1 >= uint32(s.Low) {
			return fmt.Errorf("ports %d-%d of protocol %d are out of order", s.Low, s.High, s.Proto)
		}
	}
	switch {
	case c.Need > NoProof, c.NAT > NATDestination, c.Log > LogNone, c.Refuse > RefuseDrop, c.Side > IngressSide:
		return fmt.Errorf("identity %d, nat %d, log %d, refuse %d, side %d: unknown value", c.Need, c.NAT, c.Log, c.Refuse, c.Side)
	case c.Need == NoProof && provable(c.From) && provable(c.To):
		return errors.New("asks no proof between workloads")
	case c.Rate > MaxRate, (c.Rate == 0) != (c.Burst == 0):
		return fmt.Errorf("limit of %d an hour with burst %d is not valid", c.Rate, c.Burst)
	case c.Rate > 0 && c.Burst-1 > math.MaxInt64/(MaxRate/c.Rate):
		return fmt.Errorf("burst %d takes longer than the kernel's clock can count", c.Burst)
	case c.Since < 0, c.Until < 0, c.Until != 0 && c.Until <= c.Since:
		return fmt.Errorf("window from %d until %d is not valid", c.Since, c.Until)
	case !validText(c.Purpose, MaxText):
		return errors.New("purpose is not plain text")
	}
	return nil
}

func (v *verifier) terms(side string, terms []Term) error {
	if len(terms) == 0 {
		return fmt.Errorf("%s is empty", side)
	}
	for i, t := range terms {
		var n int
		switch t.Kind {
		case TermWorkload:
			n = len(v.img.Workloads)
		case TermZone:
			n = len(v.img.Zones)
		case TermNetwork:
			n = len(v.img.Networks)
		case TermUnmanaged, TermAny:
			n = 1
		}
		if int64(t.Index) >= int64(n) {
			return fmt.Errorf("%s: term of kind %d names %d of %d", side, t.Kind, t.Index, n)
		}
		if i > 0 && compareTerms(terms[i-1], t) >= 0 {
			return fmt.Errorf("%s: term %d is out of order", side, i)
		}
	}
	return nil
}

// provable says whether a side names somebody who can prove an identity.
func provable(terms []Term) bool {
	return slices.ContainsFunc(terms, func(t Term) bool { return t.Kind == TermWorkload || t.Kind == TermZone })
}

func compareTerms(a, b Term) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Index, b.Index))
}

// comparePrefixes orders by address, IPv4 as v4-mapped, then by length.
func comparePrefixes(a, b netip.Prefix) int {
	x, y := a.Addr().As16(), b.Addr().As16()
	return cmp.Or(slices.Compare(x[:], y[:]), cmp.Compare(a.Bits(), b.Bits()))
}

// validBlock refuses host bits, and IPv6 blocks of v4-mapped addresses, which
// would be a second way to write an IPv4 block.
func validBlock(p netip.Prefix) bool {
	return p.IsValid() && p == p.Masked() && !p.Addr().Is4In6()
}

// nextName checks the name of element i of a list sorted by name.
func nextName(kind, name string, i int, before func() string) error {
	if !validName(name) {
		return fmt.Errorf("%s %d: name %q is not valid", kind, i, name)
	}
	if i > 0 && before() >= name {
		return fmt.Errorf("%s %q is out of order", kind, name)
	}
	return nil
}

// validName: lowercase letters, digits and inner hyphens, at most MaxName bytes.
func validName(s string) bool {
	for i := range len(s) {
		inner := s[i] == '-' && i > 0 && i < len(s)-1
		if !inner && !lowerAlnum(s[i]) {
			return false
		}
	}
	return s != "" && len(s) <= MaxName
}

// validTrustDomain as the SPIFFE ID standard says, section 2.1.
func validTrustDomain(s string) bool {
	for i := range len(s) {
		if c := s[i]; !lowerAlnum(c) && c != '.' && c != '-' && c != '_' {
			return false
		}
	}
	return s != "" && len(s) <= 255
}

func lowerAlnum(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }

// validText is UTF-8 without control characters.
func validText(s string, limit int) bool {
	for _, r := range s {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return false
		}
	}
	return utf8.ValidString(s) && len(s) <= limit
}
