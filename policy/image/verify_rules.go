package image

import (
	"cmp"
	"fmt"
	"slices"
)

// A justification is a key and a crossing that admits it, in one word that sorts
// as RuleKey does for one subject: peer kind 3 bits, value 24, class 15,
// direction 1, crossing 20. The bounds above keep each in its bits.
type justification uint64

const crossingBits = 20

func justify(peer Peer, class uint16, d Direction, crossing uint32) justification {
	key := uint64(peer.Kind())<<24 | uint64(peer.Value())
	return justification((key<<15|uint64(class))<<1|uint64(d))<<crossingBits | justification(crossing)
}

func (j justification) crossing() uint32 { return uint32(j & (1<<crossingBits - 1)) }

func (j justification) key(subject ID) RuleKey {
	return RuleKey{
		Subject:   subject,
		Peer:      MakePeer(PeerKind(j>>60), uint32(j>>36)),
		Class:     uint16(j>>21) & (1<<15 - 1),
		Direction: Direction(j >> crossingBits & 1),
	}
}

// rules makes every rule again, subject by subject, and compares: then the rules
// admit exactly what the crossings declare. Two do so at once, each half of the subjects
// with the rules up to those of the other half, or behind them.
func (v *verifier) rules() error {
	sides, subjects := v.sides(), v.subjects()
	half := len(subjects) / 2
	at, _ := slices.BinarySearchFunc(v.img.Rules, subjects[half].id, func(r Rule, id ID) int { return cmp.Compare(r.Subject, id) })
	other := *v
	done := make(chan error, 1)
	go func() { done <- other.rulesOf(subjects[half:], sides, v.img.Rules[at:]) }()
	before := v.budget
	err := v.rulesOf(subjects[:half], sides, v.img.Rules[:at])
	if bad := <-done; err == nil {
		err = bad
	}
	if err == nil {
		err = v.spend(before - other.budget)
	}
	return err
}

// rulesOf makes the rules of some subjects, and compares.
func (v *verifier) rulesOf(subjects []subject, sides [2][][]uint32, rules []Rule) error {
	var have []justification
	var want Rule
	at := 0
	for _, s := range subjects {
		var err error
		if have, err = v.justifications(have[:0], sides, s); err != nil {
			return err
		}
		slices.Sort(have)
		for rest := have; len(rest) > 0; at++ {
			if rest = v.first(&want, rest, s.id); len(want.Crossings) > MaxAlternatives {
				return fmt.Errorf("rule for %s needs %d crossings, at most %d fit",
					want.RuleKey, len(want.Crossings), MaxAlternatives)
			}
			if at == len(rules) {
				return fmt.Errorf("rule for %s is missing", want.RuleKey)
			}
			got := &rules[at]
			switch order := got.Compare(want.RuleKey); {
			case order < 0:
				return fmt.Errorf("rule for %s: no crossing declares it", got.RuleKey)
			case order > 0:
				return fmt.Errorf("rule for %s is missing", want.RuleKey)
			case !slices.Equal(got.Crossings, want.Crossings):
				return fmt.Errorf("rule for %s lists crossings %d, declared are %d", got.RuleKey, got.Crossings, want.Crossings)
			}
		}
	}
	if at < len(rules) {
		return fmt.Errorf("rule for %s: no crossing declares it", rules[at].RuleKey)
	}
	return nil
}

// first takes the justifications of the first key and makes its rule: up to the
// first crossing that is always open, because none after it can decide.
func (v *verifier) first(rule *Rule, all []justification, subject ID) (rest []justification) {
	rule.RuleKey, rule.Crossings = all[0].key(subject), rule.Crossings[:0]
	key := all[0] >> crossingBits
	open := false
	for len(all) > 0 && all[0]>>crossingBits == key {
		i := all[0].crossing()
		if !open {
			rule.Crossings = append(rule.Crossings, i)
		}
		open = open || v.img.Crossings[i].Since == 0 && v.img.Crossings[i].Until == 0
		all = all[1:]
	}
	return all
}

// subject is one end that rules speak for.
type subject struct {
	id    ID
	terms []Term // how a crossing can name it
}

// subjects are the workloads and the unmanaged processes, by identity.
func (v *verifier) subjects() []subject {
	out := []subject{{Unmanaged, []Term{{Kind: TermUnmanaged}, {Kind: TermAny}}}}
	for i := range v.img.Workloads {
		w := &v.img.Workloads[i]
		out = append(out, subject{w.ID, []Term{
			{TermWorkload, uint32(i)}, {TermZone, uint32(w.Zone)}, {Kind: TermAny},
		}})
	}
	slices.SortFunc(out, func(a, b subject) int { return cmp.Compare(a.id, b.id) })
	return out
}

// place is where a term is in lists of all there can be.
func (v *verifier) place(t Term) int {
	at := int(t.Index)
	for i, n := range [...]int{len(v.img.Workloads), len(v.img.Zones), len(v.img.Networks), 1, 1} {
		if i+int(TermWorkload) < int(t.Kind) {
			at += n
		}
	}
	return at
}

// sides lists for each direction and term, by its place, the crossings that have the
// term on the subject's side.
func (v *verifier) sides() (sides [2][][]uint32) {
	for d := range sides {
		sides[d] = make([][]uint32, v.place(Term{Kind: TermAny})+1)
	}
	for i := range v.img.Crossings {
		c := &v.img.Crossings[i]
		for d, terms := range [...][]Term{Egress: c.From, Ingress: c.To} {
			if !c.Side.HoldsAt(Direction(d)) {
				continue
			}
			for _, t := range terms {
				at := v.place(t)
				sides[d][at] = append(sides[d][at], uint32(i))
			}
		}
	}
	return sides
}

// justifications lists everything that admits something to or from the subject.
func (v *verifier) justifications(out []justification, sides [2][][]uint32, s subject) ([]justification, error) {
	for d, side := range sides {
		crossings := v.crossingsOf[:0]
		for _, t := range s.terms {
			crossings = append(crossings, side[v.place(t)]...)
		}
		v.crossingsOf = crossings
		slices.Sort(crossings)
		for _, i := range slices.Compact(crossings) {
			others := v.img.Crossings[i].To
			if Direction(d) == Ingress {
				others = v.img.Crossings[i].From
			}
			peers := v.peers(others)
			if err := v.spend(len(others) + len(peers)*len(v.classesOf[i])); err != nil {
				return nil, err
			}
			for _, class := range v.classesOf[i] {
				for _, p := range peers {
					out = append(out, justify(p, class, Direction(d), i))
				}
			}
		}
	}
	return out, nil
}

// peers are the look-ups that find the terms of a crossing's other side, until it is
// called again.
func (v *verifier) peers(terms []Term) []Peer {
	out := v.peersOf[:0]
	for _, t := range terms {
		switch t.Kind {
		case TermWorkload:
			out = append(out, MakePeer(PeerIdentity, uint32(v.img.Workloads[t.Index].ID)))
		case TermZone:
			out = append(out, MakePeer(PeerZone, t.Index))
		case TermNetwork:
			for _, class := range v.addressesOf[t.Index] {
				out = append(out, MakePeer(PeerAddress, uint32(class)))
			}
		case TermUnmanaged:
			out = append(out, MakePeer(PeerIdentity, uint32(Unmanaged)))
		case TermAny:
			out = append(out, MakePeer(PeerAny, 0))
		}
	}
	if provable(terms) {
		out = append(out, MakePeer(PeerProven, 0))
	}
	v.peersOf = out
	slices.Sort(out)
	return slices.Compact(out) // an address class can lie in two networks of one crossing
}

// Compare says which of two keys comes first in an image.
func (k RuleKey) Compare(b RuleKey) int {
	return cmp.Or(cmp.Compare(k.Subject, b.Subject), cmp.Compare(k.Peer, b.Peer),
		cmp.Compare(k.Class, b.Class), cmp.Compare(k.Direction, b.Direction))
}

func (k RuleKey) String() string {
	return fmt.Sprintf("subject %d, peer %d/%d, port class %d, direction %d",
		k.Subject, k.Peer.Kind(), k.Peer.Value(), k.Class, k.Direction)
}
