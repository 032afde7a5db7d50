package core

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
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
	maxSample    = 1024 // rules that have not changed and are asked about before the flip
	bootSample   = 128  // rules that are asked about before it after a boot
	maxUrgent    = 128  // packets before it, where there are more rules than that
)

// selftest asks the loaded programs, about the filled slot, what the image
// answers, and compares. One wrong answer refuses the image. It looks at each
// rule, and for each subject at what no rule admits.
//
// What is not as it was in the generation in force is asked about before anything is
// judged by the image, and with it a sample of the rest; so is all of a small image.
// The rest of a large one is asked right after the flip, before anybody is told that
// the image is in force: the same programs have answered the same about the generation
// in force. After a boot, too: what nobody has asked about yet is in force a moment
// earlier then, in the place of nothing.
type selftest struct {
	objects *objects
	gen     *generation
	index   *image.Index
	now     time.Time // whole seconds, so that both clocks mean the same instant
	sites   sites
	zones   map[image.ID]uint16 // of workloads
	former  former
	fresh   []bool        // rules that the generation in force has not
	asked   []image.Query // before the flip
	stride  int           // one rule of so many, and of so many subjects, is asked about before it
	offset  int
	stale   bool // the boot is so recent that a SYN's tag could be from before it
}

// former is what the image in force says; nothing if there is none.
type former struct {
	sites
	image *image.Image
	zones map[image.ID]uint16
	gone  []*image.Rule // that the new image has not
}

func newSelftest(o *objects, g, inForce *generation, boot bool) (*selftest, error) {
	index := g.image.Index()
	t := &selftest{objects: o, gen: g, index: index, now: time.Unix(time.Now().Unix(), 0), sites: newSites(g.image, index), zones: zonesOf(g.image)}
	if err := t.date(); err != nil {
		return nil, err
	}
	if inForce != nil {
		img := inForce.image
		t.former = former{sites: newSites(img, img.Index()), image: img, zones: zonesOf(img)}
	}
	t.compare()
	switch t.stride = 1; {
	case inForce != nil:
		t.stride += len(t.gen.image.Rules) / maxSample
	case boot:
		t.stride += len(t.gen.image.Rules) / bootSample
	}
	t.offset = rand.IntN(t.stride)
	return t, nil
}

// before asks what has to be known before the flip. Of a nil self-test, everything was
// asked already.
func (t *selftest) before() error {
	if t == nil {
		return nil
	}
	for i := range t.former.gone {
		t.asked = append(t.asked, t.about(t.former.gone[i], t.former.sites))
	}
	t.asked = t.askWindows(t.askEdges(t.askSubjects(t.askRules(t.asked, true), true)))
	most := maxPackets
	if t.stride > 1 {
		most = maxUrgent
	}
	if err := t.put(t.asked, t.asked, most); err != nil {
		return err
	}
	return t.readBack()
}

// after asks the rest, and sends packets of all.
func (t *selftest) after() error {
	if t == nil || t.stride == 1 {
		return nil
	}
	if err := t.date(); err != nil { // it may have waited for the flip
		return err
	}
	rest := t.askSubjects(t.askRules(nil, false), false)
	return t.put(rest, slices.Concat(rest, t.asked), maxPackets)
}

// date sets what depends on when questions are asked.
func (t *selftest) date() error {
	state, err := readState(t.objects)
	t.stale = (t.gen.clock.now()+state.Wall)>>abi.TagSlotShift <= state.Wall>>abi.TagSlotShift
	return err
}

// put asks questions, and sends so many of others as packets meanwhile: neither uses
// what the other does.
func (t *selftest) put(questions, packets []image.Query, most int) error {
	sent := make(chan error, 1)
	go func() { sent <- t.send(packets, most) }()
	err, bad := t.judge(questions), <-sent
	if err == nil {
		err = bad
	}
	return err
}

// send sends so many questions as packets.
func (t *selftest) send(questions []image.Query, most int) error {
	for i := 0; i < len(questions); i += 1 + len(questions)/most {
		if err := t.packets(questions[i]); err != nil {
			return err
		}
	}
	return nil
}

func zonesOf(img *image.Image) map[image.ID]uint16 {
	zones := make(map[image.ID]uint16, len(img.Workloads))
	for i := range img.Workloads {
		zones[img.Workloads[i].ID] = img.Workloads[i].Zone
	}
	return zones
}

// nowhere is an address that few networks contain (RFC 6666, discard only).
var nowhere = netip.MustParseAddr("100::1")

// sites are places of each class of an image.
type sites struct {
	ports     map[uint16][]image.Span
	addresses map[uint16]netip.Addr
}

func newSites(img *image.Image, index *image.Index) sites {
	s := sites{map[uint16][]image.Span{}, map[uint16]netip.Addr{}}
	for _, r := range img.Ports {
		s.ports[r.Class] = append(s.ports[r.Class], r.Span)
	}
	for _, p := range img.Addresses {
		for _, a := range [...]netip.Addr{p.Prefix.Addr(), lastAddr(p.Prefix)} {
			if index.AddressClass(a) == p.Class {
				s.addresses[p.Class] = a
			}
		}
	}
	return s
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

// compare finds the rules that are not as they were: rules of the same key that lead to
// the same crossings, where both the class of ports and that of addresses mean the same.
func (t *selftest) compare() {
	rules := t.gen.image.Rules
	t.fresh = make([]bool, len(rules))
	if t.former.image == nil {
		return
	}
	old := t.former.image.Rules
	now, then := crossingEntries(t.gen.image, t.gen.clock), crossingEntries(t.former.image, t.gen.clock)
	sameAddresses := slices.Equal(t.gen.image.Addresses, t.former.image.Addresses)
	for i := range rules {
		r := &rules[i]
		for ; len(old) > 0 && old[0].Compare(r.RuleKey) < 0; old = old[1:] {
			t.former.gone = append(t.former.gone, &old[0])
		}
		if t.fresh[i] = len(old) == 0 || old[0].RuleKey != r.RuleKey; t.fresh[i] {
			continue
		}
		t.fresh[i] = !slices.EqualFunc(old[0].Crossings, r.Crossings, func(a, b uint32) bool { return a == b && then[a] == now[b] }) ||
			!slices.Equal(t.sites.ports[r.Class], t.former.ports[r.Class]) || r.Peer.Kind() == image.PeerAddress && !sameAddresses
		old = old[1:]
	}
	for i := range old {
		t.former.gone = append(t.former.gone, &old[i])
	}
}

// askRules puts to each rule the question that it answers, and one beside it: from
// the other side, of another port, or of a peer who proved something else.
func (t *selftest) askRules(out []image.Query, before bool) []image.Query {
	rules := t.gen.image.Rules
	for i := range rules {
		urgent := t.fresh[i] || i%t.stride == t.offset
		if urgent != before || !urgent && i%(1+len(rules)/(maxQuestions/4)) != 0 {
			continue
		}
		q := t.about(&rules[i], t.sites)
		other, next, stranger := q, q, q
		other.Direction = abi.Egress + abi.Ingress - q.Direction
		if q.Proof == abi.ProofUnknown { // it cannot arise there
			other.Proof = abi.ProofNone
		}
		beside := t.gen.image.Ports[i%len(t.gen.image.Ports)]
		next.Port = image.Port{Proto: beside.Proto, Number: beside.Low}
		stranger.Proof, stranger.Peer = abi.ProofIdentity, rules[(i+1)%len(rules)].Subject
		if beside := [...]image.Query{other, next, stranger}; len(rules) <= maxSample {
			out = append(append(out, q), beside[:]...)
		} else {
			out = append(out, q, beside[i%len(beside)])
		}
	}
	return out
}

// askEdges asks about the first port of each range, the last and the middle one, who may
// do something there, and who may in the ranges beside it.
func (t *selftest) askEdges(out []image.Query) []image.Query {
	ranges := t.gen.image.Ports
	of := map[uint16]*image.Rule{} // one of each class
	for i := range t.gen.image.Rules {
		of[t.gen.image.Rules[i].Class] = &t.gen.image.Rules[i]
	}
	for i, r := range ranges {
		for _, near := range ranges[max(i-1, 0):min(i+2, len(ranges))] {
			for _, port := range [...]uint16{r.Low, r.Low + (r.High-r.Low)/2, r.High} {
				if of[near.Class] != nil && len(out) < maxQuestions {
					q := t.about(of[near.Class], t.sites)
					q.Port = image.Port{Proto: r.Proto, Number: port}
					out = append(out, q)
				}
			}
		}
	}
	return out
}

// askWindows asks a rule of each crossing that has a window at both ends of it, and just
// before them.
func (t *selftest) askWindows(out []image.Query) []image.Query {
	done := make([]bool, len(t.gen.image.Crossings))
	for i := range t.gen.image.Rules {
		for _, n := range t.gen.image.Rules[i].Crossings {
			c := &t.gen.image.Crossings[n]
			for _, end := range [...]int64{c.Since, c.Until} {
				if end == 0 || done[n] || len(out) >= maxQuestions {
					continue
				}
				for _, at := range [...]int64{end - 1, end} {
					if t.gen.clock.at(at) > 1 { // before the boot all moments are one
						q := t.about(&t.gen.image.Rules[i], t.sites)
						q.Now = time.Unix(at, 0)
						out = append(out, q)
					}
				}
			}
			done[n] = true
		}
	}
	return out
}

// readBack compares what no question of this moment shows: limits, flags and windows of
// crossings, and the class of each port.
func (t *selftest) readBack() error {
	err := sameTable(t.gen.tables["crossings"], crossingEntries(t.gen.image, t.gen.clock))
	if err == nil {
		err = sameTable(t.gen.tables["ports"], portEntries(t.gen.image))
	}
	if err != nil {
		return proto.Refuse("report this: the kernel's tables do not mean what the image says", "self-test: %w", err)
	}
	return nil
}

// sameTable says what is not in an array as it was written.
func sameTable[V comparable](m *ebpf.Map, want []V) error {
	var from ebpf.MapBatchCursor
	got := make([]V, len(want))
	n, err := m.BatchLookup(&from, make([]uint32, len(want)), got, nil)
	if n != len(want) {
		return fmt.Errorf("read %d of %d entries of %v: %w", n, len(want), m, err)
	}
	for i := range want {
		if got[i] != want[i] {
			return fmt.Errorf("entry %d of %v is not what was written", i, m)
		}
	}
	return nil
}

// about is the question that a rule answers.
func (t *selftest) about(r *image.Rule, s sites) image.Query {
	port := s.ports[r.Class][0]
	q := image.Query{Subject: r.Subject, Direction: abi.Direction(r.Direction), Port: image.Port{Proto: port.Proto, Number: port.Low}, Address: nowhere, Now: t.now}
	switch r.Peer.Kind() {
	case image.PeerIdentity:
		q.Proof, q.Peer = abi.ProofIdentity, image.ID(r.Peer.Value())
	case image.PeerZone:
		q.Proof, q.Peer = abi.ProofIdentity, t.resident(r.Peer.Value())
	case image.PeerAddress:
		if a, found := s.addresses[uint16(r.Peer.Value())]; found {
			q.Address = a
		}
	case image.PeerProven:
		if q.Direction == abi.Egress { // who accepts knows what the caller proved
			q.Proof = abi.ProofUnknown
		}
	}
	return q
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
func (t *selftest) askSubjects(out []image.Query, before bool) []image.Query {
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
		zone, known := t.zones[subjects[i]]
		was, knew := t.former.zones[subjects[i]]
		if urgent := !known || t.former.image != nil && (!knew || zone != was) || i%t.stride == t.offset; urgent != before {
			continue
		}
		for j, q := range proofs {
			// Unknown is asked only of who opens a flow; elsewhere it cannot arise.
			for d := abi.Egress; d <= abi.Ingress && (d == abi.Egress || q.Proof != abi.ProofUnknown); d++ {
				n := len(out)
				if q.Proof == abi.ProofIdentity && j == len(proofs)-1 {
					q.Peer = subjects[(i+1)%len(subjects)]
				}
				q.Subject, q.Direction, q.Now = subjects[i], d, t.now
				q.Address = addresses[n%len(addresses)]
				r := t.gen.image.Ports[n%len(t.gen.image.Ports)]
				q.Port = image.Port{Proto: r.Proto, Number: r.High}
				out = append(out, q)
			}
		}
	}
	return out
}

// judge puts questions to the decision itself.
func (t *selftest) judge(questions []image.Query) error {
	for batch := range slices.Chunk(questions, abi.Questions) {
		if err := t.judgeSome(batch); err != nil {
			return err
		}
	}
	return nil
}

func (t *selftest) judgeSome(batch []image.Query) error {
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
	if q.Port.Proto != image.TCP && q.Port.Proto != image.UDP || !q.Now.Equal(t.now) { // packets are judged now
		return nil
	}
	pass := t.index.Decide(q).Verdict != abi.Deny
	if _, known := t.zones[q.Peer]; q.Port.Proto != image.TCP || q.Proof != abi.ProofIdentity || !known {
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
