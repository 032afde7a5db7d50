package core

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// Bounds of the self-test. Larger images are sampled at even distances.
const (
	maxQuestions = 20_000
	maxPackets   = 400
)

// selftest asks the loaded programs, about the filled slot, what the image
// answers, and compares. One wrong answer refuses the image. It looks at each
// rule, and for each subject at what no rule admits.
type selftest struct {
	objects   *objects
	gen       *generation
	index     *image.Index
	now       time.Time // whole seconds, so that both clocks mean the same instant
	ports     map[uint16]image.Port
	classes   map[uint16]netip.Addr
	questions []image.Query
}

func runSelftest(o *objects, g *generation) error {
	t := selftest{objects: o, gen: g, index: g.image.Index(), now: time.Unix(time.Now().Unix(), 0)}
	t.representatives()
	t.askRules()
	t.askSubjects()
	for _, q := range t.questions {
		if err := t.judge(q); err != nil {
			return err
		}
	}
	packets := 0
	step := 1 + len(t.questions)/maxPackets
	for i := 0; i < len(t.questions); i += step {
		if err := t.packet(t.questions[i]); err != nil {
			return err
		}
		packets++
	}
	if len(t.questions) == 0 || packets == 0 {
		return fmt.Errorf("self-test: nothing to ask")
	}
	return nil
}

// nowhere is an address that few networks contain (RFC 6666, discard only).
var nowhere = netip.MustParseAddr("100::1")

// representatives picks a port for each port class and an address for each
// address class.
func (t *selftest) representatives() {
	t.ports = map[uint16]image.Port{}
	for _, r := range t.gen.image.Ports {
		if _, known := t.ports[r.Class]; !known {
			t.ports[r.Class] = image.Port{Proto: r.Proto, Number: r.Low}
		}
	}
	t.classes = map[uint16]netip.Addr{}
	for _, p := range t.gen.image.Addresses {
		for _, a := range [...]netip.Addr{p.Prefix.Addr(), lastAddr(p.Prefix)} {
			if t.index.AddressClass(a) == p.Class {
				t.classes[p.Class] = a
			}
		}
	}
}

// lastAddr is the highest address of a block.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// askRules puts to each rule the question that it answers.
func (t *selftest) askRules() {
	rules := t.gen.image.Rules
	for i := 0; i < len(rules); i += 1 + len(rules)/(maxQuestions/2) {
		r := &rules[i]
		q := image.Query{Subject: r.Subject, Direction: abi.Direction(r.Direction), Port: t.ports[r.Class], Address: nowhere, Now: t.now}
		switch r.Peer.Kind() {
		case image.PeerIdentity:
			q.Proof, q.Peer = abi.ProofIdentity, image.ID(r.Peer.Value())
		case image.PeerZone:
			q.Proof, q.Peer = abi.ProofIdentity, t.resident(r.Peer.Value())
		case image.PeerAddress:
			if a, found := t.classes[uint16(r.Peer.Value())]; found {
				q.Address = a
			}
		case image.PeerProven:
			if q.Direction == abi.Egress { // who accepts knows what the caller proved
				q.Proof = abi.ProofUnknown
			}
		}
		t.questions = append(t.questions, q)
	}
}

// resident is some workload of the zone; None if it has none.
func (t *selftest) resident(zone uint32) image.ID {
	for i := range t.gen.image.Workloads {
		if uint32(t.gen.image.Workloads[i].Zone) == zone {
			return t.gen.image.Workloads[i].ID
		}
	}
	return image.None
}

// askSubjects asks for each subject, and for some that must not be known, what a
// stranger, a liar and another workload may do.
func (t *selftest) askSubjects() {
	subjects := []image.ID{image.None, image.Unmanaged, image.Kernel, image.Pending, image.MaxID}
	for i := range t.gen.image.Workloads {
		subjects = append(subjects, t.gen.image.Workloads[i].ID)
	}
	proofs := [...]image.Query{
		{Proof: abi.ProofBad, Bad: abi.TagBadMAC},
		{Proof: abi.ProofNone},
		{Proof: abi.ProofUnknown},
		{Proof: abi.ProofIdentity, Peer: image.Unmanaged},
		{Proof: abi.ProofIdentity, Peer: image.MaxID},
		{Proof: abi.ProofIdentity}, // the next subject
	}
	addresses := [...]netip.Addr{nowhere, netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
	for i := 0; i < len(subjects); i += 1 + len(subjects)*2*len(proofs)/(maxQuestions/2) {
		for j, q := range proofs {
			// Unknown is asked only of who opens a flow; elsewhere it cannot arise.
			for d := abi.Egress; d <= abi.Ingress && (d == abi.Egress || q.Proof != abi.ProofUnknown); d++ {
				n := len(t.questions)
				if q.Proof == abi.ProofIdentity && j == len(proofs)-1 {
					q.Peer = subjects[(i+1)%len(subjects)]
				}
				q.Subject, q.Direction, q.Now = subjects[i], d, t.now
				q.Address = addresses[n%len(addresses)]
				r := t.gen.image.Ports[n%len(t.gen.image.Ports)]
				q.Port = image.Port{Proto: r.Proto, Number: r.High}
				t.questions = append(t.questions, q)
			}
		}
	}
}

// judge puts one question to the decision itself.
func (t *selftest) judge(q image.Query) error {
	want := t.index.Decide(q)
	address := q.Address.As16()
	in := abi.Query{
		Slot: t.gen.slot, Subject: uint32(q.Subject), Peer: uint32(q.Peer), Port: q.Port.Number, Proto: kernelProto(q.Port.Proto),
		Direction: q.Direction, Proof: q.Proof, Bad: q.Bad, Now: t.gen.clock.at(q.Now.Unix()), Address: address,
	}
	var out abi.Query
	if _, err := t.objects.Programs["judge"].Run(&ebpf.RunOptions{Context: &in, ContextOut: &out}); err != nil {
		return fmt.Errorf("self-test: run judge: %w", err)
	}
	got := image.Decision{Verdict: out.Verdict, Reason: out.Reason, Crossing: -1}
	if out.Crossing != abi.NoCrossing {
		got.Crossing = int(out.Crossing)
	}
	if got != want {
		return t.wrong(q, want, got)
	}
	if got.Verdict == abi.Allow && t.gen.known[1].Verdict != abi.Allow {
		t.gen.known = [2]abi.Query{in, out}
	}
	return nil
}

// packet sends one packet through the packet programs: TCP SYN or UDP, from or to
// the peer's address. Other protocols are asked of judge only.
func (t *selftest) packet(q image.Query) error {
	if q.Port.Proto != image.TCP && q.Port.Proto != image.UDP {
		return nil
	}
	want := t.index.Decide(q).Verdict != abi.Deny
	who := [4]uint32{uint32(q.Subject), t.gen.slot, uint32(q.Peer), uint32(q.Proof)}
	if err := t.objects.Maps["selftest"].Put(uint32(0), who); err != nil {
		return fmt.Errorf("self-test: %w", err)
	}
	name := "selftest_egress"
	if q.Direction == abi.Ingress {
		name = "selftest_ingress"
	}
	passed, err := t.objects.Programs[name].Run(&ebpf.RunOptions{Data: frame(q)})
	if err != nil {
		return fmt.Errorf("self-test: run %s: %w", name, err)
	}
	if got := passed == 1; got != want {
		return t.wrong(q, fmt.Sprintf("a packet that passes: %v", want), got)
	}
	return nil
}

func (t *selftest) wrong(q image.Query, want, got any) error {
	return proto.Refuse("report this: the kernel's tables do not mean what the image says",
		"self-test: %v of identity %d on protocol %d port %d, peer %v identity %d proof %v: expected %+v, got %+v",
		q.Direction, q.Subject, q.Port.Proto, q.Port.Number, q.Address, q.Peer, q.Proof, want, got)
}

// kernelProto is a protocol number for the questions: image.Other stands for all
// that policies do not name, so any of them will do.
func kernelProto(p image.Proto) uint8 {
	if p == image.Other {
		return 47 // GRE
	}
	return uint8(p)
}

// frame is an Ethernet frame with the packet that the question is about.
func frame(q image.Query) []byte {
	own := netip.IPv6Unspecified()
	peer := q.Address.Unmap()
	kind := []byte{0x86, 0xdd}
	if peer.Is4() {
		own, kind = netip.IPv4Unspecified(), []byte{0x08, 0x00}
	}
	source, destination := own, peer
	if q.Direction == abi.Ingress {
		source, destination = peer, own
	}
	segment := binary.BigEndian.AppendUint16(nil, 40000)
	segment = binary.BigEndian.AppendUint16(segment, q.Port.Number)
	if q.Port.Proto == image.TCP {
		// Sequence and acknowledgement 0, five words long, SYN, window 65535.
		segment = append(segment, 0, 0, 0, 0, 0, 0, 0, 0, 5<<4, 2, 0xff, 0xff, 0, 0, 0, 0)
	} else {
		segment = append(segment, 0, 8, 0, 0) // length 8, no payload
	}
	packet := append(make([]byte, 12, 80), kind...)
	if peer.Is4() {
		packet = append(packet, 0x45, 0)
		packet = binary.BigEndian.AppendUint16(packet, uint16(20+len(segment)))
		packet = append(packet, 0, 0, 0, 0, 64, byte(q.Port.Proto), 0, 0)
	} else {
		packet = append(packet, 0x60, 0, 0, 0)
		packet = binary.BigEndian.AppendUint16(packet, uint16(len(segment)))
		packet = append(packet, byte(q.Port.Proto), 64)
	}
	packet = append(packet, source.AsSlice()...)
	packet = append(packet, destination.AsSlice()...)
	return append(packet, segment...)
}
