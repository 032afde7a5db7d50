package core

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// Bounds of the self-test. Larger images are sampled at even distances.
const (
	maxQuestions = 1 << 20
	maxPackets   = 20_000
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
	known     map[image.ID]bool // workloads
	questions []image.Query
	stale     bool // the boot is so recent that a SYN's tag could be from before it
}

func runSelftest(o *objects, g *generation) error {
	t, err := newSelftest(o, g)
	if err != nil {
		return err
	}
	return t.run()
}

func newSelftest(o *objects, g *generation) (*selftest, error) {
	state, err := readState(o)
	if err != nil {
		return nil, err
	}
	t := &selftest{objects: o, gen: g, index: g.image.Index(), now: time.Unix(time.Now().Unix(), 0)}
	t.stale = (g.clock.now()+state.Wall)>>abi.TagSlotShift <= state.Wall>>abi.TagSlotShift
	t.representatives()
	t.askRules()
	t.askSubjects()
	return t, nil
}

func (t *selftest) run() error {
	if len(t.questions) == 0 {
		return errors.New("self-test: nothing to ask")
	}
	for batch := range slices.Chunk(t.questions, abi.Questions) {
		if err := t.judge(batch); err != nil {
			return err
		}
	}
	for i := 0; i < len(t.questions); i += 1 + len(t.questions)/maxPackets {
		if err := t.packets(t.questions[i]); err != nil {
			return err
		}
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
	t.classes, t.known = map[uint16]netip.Addr{}, map[image.ID]bool{}
	for i := range t.gen.image.Workloads {
		t.known[t.gen.image.Workloads[i].ID] = true
	}
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

// askRules puts to each rule the question that it answers, and one beside it: from
// the other side, of another port, or of a peer who proved something else.
func (t *selftest) askRules() {
	rules := t.gen.image.Rules
	for i := 0; i < len(rules); i += 1 + len(rules)/(maxQuestions/4) {
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
		other, next, stranger := q, q, q
		other.Direction = abi.Egress + abi.Ingress - q.Direction
		if q.Proof == abi.ProofUnknown { // it cannot arise there
			other.Proof = abi.ProofNone
		}
		beside := t.gen.image.Ports[i%len(t.gen.image.Ports)]
		next.Port = image.Port{Proto: beside.Proto, Number: beside.Low}
		stranger.Proof, stranger.Peer = abi.ProofIdentity, rules[(i+1)%len(rules)].Subject
		t.questions = append(t.questions, q, [...]image.Query{other, next, stranger}[i%3])
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

// judge puts questions to the decision itself.
func (t *selftest) judge(batch []image.Query) error {
	asked := make([]abi.Query, len(batch))
	for i, q := range batch {
		asked[i] = abi.Query{
			Slot: t.gen.slot, Subject: uint32(q.Subject), Peer: uint32(q.Peer), Port: q.Port.Number, Proto: kernelProto(q.Port.Proto),
			Direction: q.Direction, Proof: q.Proof, Bad: q.Bad, Now: t.gen.clock.at(q.Now.Unix()), Address: q.Address.As16(),
			Crossing: abi.TablesAlone,
		}
	}
	if err := ask(t.objects, asked); err != nil {
		return fmt.Errorf("self-test: %w", err)
	}
	for i, q := range batch {
		got := image.Decision{Verdict: asked[i].Verdict, Reason: asked[i].Reason, Crossing: -1}
		if asked[i].Crossing != abi.NoCrossing {
			got.Crossing = int(asked[i].Crossing)
		}
		if want := t.index.Decide(q); got != want {
			return t.wrong(q, want, got)
		}
		if got.Verdict == abi.Allow {
			t.gen.known = asked[i]
		}
	}
	return nil
}

// ask has the loaded decision answer questions in place, abi.Questions at most.
func ask(o *objects, questions []abi.Query) error {
	places := indexes(len(questions))
	if err := putAll(o.Maps["questions"], places, questions); err != nil {
		return fmt.Errorf("write questions: %w", err)
	}
	if _, err := o.Programs["judge"].Run(&ebpf.RunOptions{Context: uint32(len(questions))}); err != nil {
		return fmt.Errorf("run judge: %w", err)
	}
	var from ebpf.MapBatchCursor
	n, err := o.Maps["questions"].BatchLookup(&from, places, questions, nil)
	if n != len(questions) {
		return fmt.Errorf("read %d of %d answers: %w", n, len(questions), err)
	}
	return nil
}

// packets sends what the question is about through the packet programs: TCP or
// UDP, from or to the peer's address. Other protocols are asked of judge only. Who
// proves itself by TCP does so by a tag that the kernel makes and verifies; and the
// same tag with one bit changed must be refused.
func (t *selftest) packets(q image.Query) error {
	if q.Port.Proto != image.TCP && q.Port.Proto != image.UDP {
		return nil
	}
	pass := t.index.Decide(q).Verdict != abi.Deny
	if q.Port.Proto != image.TCP || q.Proof != abi.ProofIdentity || !t.known[q.Peer] {
		return t.packet(q, segmentOf(q, false), q.Proof, pass)
	}
	answer := q.Direction == abi.Egress
	p := segmentOf(q, answer)
	sealed := abi.Seal{Sender: p.tuple, Identity: uint32(q.Peer), Seq: segmentSeq, Acked: segmentAck}
	if answer {
		sealed.Claim = abi.TagAnswer
	}
	if _, err := t.objects.Programs["seal"].Run(&ebpf.RunOptions{Context: sealed, ContextOut: &sealed}); err != nil {
		return fmt.Errorf("self-test: run seal: %w", err)
	}
	if sealed.Claim == 0 { // no key: nobody proves anything, and status says so
		return t.packet(q, p, q.Proof, pass)
	}
	if err := t.packet(q, p.tagged(sealed), abi.ProofUnknown, pass && (answer || !t.stale)); err != nil {
		return err
	}
	sealed.MAC ^= 1
	return t.packet(q, p.tagged(sealed), abi.ProofUnknown, false)
}

// packet sends one packet through the packet programs.
func (t *selftest) packet(q image.Query, p segment, proof abi.Proof, want bool) error {
	who := [4]uint32{uint32(q.Subject), t.gen.slot, uint32(q.Peer), uint32(proof)}
	if err := t.objects.Maps["selftest"].Put(uint32(0), who); err != nil {
		return fmt.Errorf("self-test: %w", err)
	}
	name := "selftest_egress"
	if q.Direction == abi.Ingress {
		name = "selftest_ingress"
	}
	passed, err := t.objects.Programs[name].Run(&ebpf.RunOptions{Data: p.frame()})
	if err != nil {
		return fmt.Errorf("self-test: run %s: %w", name, err)
	}
	if got := passed == 1; got != want {
		return t.wrong(q, fmt.Sprintf("the packet %x to pass: %v", p.frame(), want), got)
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

// segment is the packet that a question is about.
type segment struct {
	tuple   abi.Tuple
	flags   byte // of TCP
	options []byte
}

// Numbers of the segments, and the port that callers have.
const (
	segmentSeq  = 0x01020304
	segmentAck  = 0x05060708
	segmentPort = 40000
)

// segmentOf opens the flow, or answers the SYN that the subject sent.
func segmentOf(q image.Query, answer bool) segment {
	own, peer := netip.IPv6Unspecified(), q.Address
	if peer.Unmap().Is4() {
		own = netip.IPv4Unspecified()
	}
	p := segment{flags: 0x02, tuple: abi.Tuple{
		Source: own.As16(), Destination: peer.As16(), SourcePort: segmentPort, DestinationPort: q.Port.Number, Proto: uint8(q.Port.Proto),
	}}
	if q.Direction == abi.Ingress {
		p.tuple.Source, p.tuple.Destination = p.tuple.Destination, p.tuple.Source
	}
	if answer {
		p.flags = 0x12
		p.tuple.Source, p.tuple.Destination = p.tuple.Destination, p.tuple.Source
		p.tuple.SourcePort, p.tuple.DestinationPort = p.tuple.DestinationPort, p.tuple.SourcePort
	}
	return p
}

// tagged is the segment with a tag.
func (p segment) tagged(s abi.Seal) segment {
	p.options = append(make([]byte, 0, abi.TagLength), abi.TagKind, abi.TagLength)
	p.options = binary.BigEndian.AppendUint16(p.options, abi.TagExID)
	p.options = binary.BigEndian.AppendUint32(p.options, s.Claim)
	p.options = binary.NativeEndian.AppendUint64(p.options, s.MAC)
	return p
}

// frame is the segment in an Ethernet frame.
func (p segment) frame() []byte {
	body := binary.BigEndian.AppendUint16(nil, p.tuple.SourcePort)
	body = binary.BigEndian.AppendUint16(body, p.tuple.DestinationPort)
	if image.Proto(p.tuple.Proto) == image.TCP {
		body = binary.BigEndian.AppendUint32(body, segmentSeq)
		body = binary.BigEndian.AppendUint32(body, segmentAck)
		body = append(body, byte(20+len(p.options))<<2, p.flags, 0xff, 0xff, 0, 0, 0, 0) // window 65535
		body = append(body, p.options...)
	} else {
		body = append(body, 0, 8, 0, 0) // length 8, no payload
	}
	source, destination := netip.AddrFrom16(p.tuple.Source).Unmap(), netip.AddrFrom16(p.tuple.Destination).Unmap()
	frame := make([]byte, 12, 112)
	if source.Is4() {
		frame = append(frame, 0x08, 0x00, 0x45, 0)
		frame = binary.BigEndian.AppendUint16(frame, uint16(20+len(body)))
		frame = append(frame, 0, 0, 0, 0, 64, p.tuple.Proto, 0, 0)
	} else {
		frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0)
		frame = binary.BigEndian.AppendUint16(frame, uint16(len(body)))
		frame = append(frame, p.tuple.Proto, 64)
	}
	frame = append(frame, source.AsSlice()...)
	frame = append(frame, destination.AsSlice()...)
	return append(frame, body...)
}
