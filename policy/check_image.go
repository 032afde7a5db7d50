package policy

import (
	"cmp"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// everySubject is up to how many workloads each identity is asked about by itself. Of
// more, one is asked about of each class of those that neither judge can tell apart.
const everySubject = 2000

// Coverage says what Check compared: every subject, direction, port, address, proof, peer
// and second. Nothing bounds it but what an image can hold.
type Coverage struct {
	Identities  int // of the policy, and unmanaged
	Asked       int // of these: was asked about
	Alike       int // its answers depend on what those of another one do that was asked about, see dependence
	Remembered  int // they depend on what was compared before, with another image
	PortClasses int
	Addresses   int // classes of addresses, and no address at all
	Questions   int // asked, each for all that cannot be told apart from it
}

func (c Coverage) String() string {
	text := fmt.Sprintf("%d identities, %d classes of ports and %d of addresses, exhaustive by %d questions",
		c.Identities, c.PortClasses, c.Addresses, c.Questions)
	if c.Remembered > 0 {
		text += fmt.Sprintf(", %d identities as they were before", c.Remembered)
	}
	if c.Alike > 0 {
		text += fmt.Sprintf(", %d like another", c.Alike)
	}
	return text
}

// Check compares an image with the policy that it was made from, and returns an error
// with the first difference: first what both declare, field by field, then what
// Evaluate and the tables answer to every question that there is. The image is one
// that Verify accepts, or at least one whose tables stay inside each other.
//
// There are too many questions to ask, so one is asked for all of a kind: for all that
// neither judge can tell apart. What they can tell apart is read off Evaluate and
// image.Index.Decide; TestCheckIsBruteForce asks every question there is of small
// policies and mutated images, and must come to the same end.
//
//   - Subject and direction. Each is asked about; of many workloads, one of all subjects
//     whose answers depend on the same, see dependence. Evaluate looks only at crossings that
//     have the subject on its side, those that face it; Decide only at the subject's
//     rules of the direction.
//   - Port. Evaluate depends on which facing crossings cover it, Decide on its class,
//     and of the class only on whether the subject has rules of it. So each pair of a
//     set of facing crossings and a class with rules (or none) is asked about with one
//     port: see pieces. Protocols without a name are Other to both. What no protocol
//     has, such as ICMP type 256, is covered by nothing and has no class.
//   - Address. Evaluate depends on which networks of the covering crossings contain it,
//     Decide on its class where there is a rule for that. Both are constant between two
//     edges of blocks: see cells.
//   - Peer. Evaluate depends on whether the covering crossings name it, its zone, anyone
//     or unmanaged; Decide on the rules for it and its zone. So every peer is asked about
//     that a covering crossing or a rule names, one more of each zone that they name,
//     and one that is nobody's. All other peers, the reserved ones too, are like that.
//   - Peer and address together. A proven peer is admitted by the first open crossing
//     among those for its identity and those for its address, on both sides: Evaluate
//     takes the first of one list, Decide the lesser of the first of each, and each
//     notes a closed window if none is open. So the judges agree on the two together if
//     they agree on the peer without an address and on the address with a stranger.
//   - Time. Only windows of crossings that the question reaches matter, and those of
//     crossings in rules that it looks up. Each edge is asked about, and a time before all:
//     from one edge to the next nothing changes.
//   - Quarantine. It depends on nothing but which crossing decides and whether that one is
//     forensic. The first is asked about, the second is declared and compared.
//   - Proof. All kinds are asked about. Without a proof nothing depends on the peer. A
//     bad proof, and a subject that no policy knows, are refused before anything else is
//     looked at.
func Check(p *Policy, img *image.Image) (Coverage, error) {
	return check(p, img, len(p.Workloads) > everySubject)
}

// check is Check, where each identity is asked about, or one of each class.
func check(p *Policy, img *image.Image, classes bool) (Coverage, error) {
	if err := sameDeclarations(p, img); err != nil {
		return Coverage{}, err
	}
	c, err := newChecker(p, img)
	if err != nil {
		return Coverage{}, err
	}
	if !classes {
		return c.all(nil, false, nil)
	}
	return c.all(newDependence(c, maphash.MakeSeed()), true, nil)
}

// A whom is somebody to ask about. A crossing can name him in the ways that sides lists.
type whom struct {
	id    image.ID
	sides []Term
}

// all asks about every subject; of classes, about one. With a dependence it leaves out
// those whose number is known. Both may be nil, for one needs the other.
func (c *checker) all(d *dependence, classes bool, known func(image.ID, uint64) bool) (Coverage, error) {
	if err := c.strangers(); err != nil {
		return c.cover, err
	}
	subjects := []whom{{image.Unmanaged, []Term{{Kind: image.TermUnmanaged}, {Kind: image.TermAny}}}}
	for i := range c.policy.Workloads {
		w := &c.policy.Workloads[i]
		subjects = append(subjects, whom{c.ids[w.Name], []Term{{Kind: image.TermWorkload, Name: w.Name}, {Kind: image.TermZone, Name: w.Zone}, {Kind: image.TermAny}}})
	}
	met := map[uint64]bool{} // classes
	var asked []whom
	for _, s := range subjects {
		number, certain := uint64(0), false
		if d != nil {
			number, certain = d.subject(s.id, s.sides)
		}
		switch {
		case certain && known != nil && known(s.id, number):
			c.cover.Remembered++
		case certain && classes && met[number]:
			c.cover.Alike++
		default:
			asked = append(asked, s)
		}
		if certain {
			met[number] = true
		}
	}
	if err := c.askAll(asked); err != nil {
		return c.cover, err
	}
	if left := c.cover.Identities - c.cover.Asked - c.cover.Alike - c.cover.Remembered; left != 0 {
		return c.cover, fmt.Errorf("compare image and policy: %d of %d identities were not asked about", left, c.cover.Identities)
	}
	return c.cover, nil
}

// apiece is how many subjects are worth a processor.
const apiece = 64

// askAll asks about subjects, on all processors, and returns the first difference in
// their order. Whoever finds one lets those end who have begun, and nobody else begin.
func (c *checker) askAll(subjects []whom) error {
	var next atomic.Int64
	differs := make([]error, len(subjects))
	workers := make([]*checker, min(runtime.GOMAXPROCS(0), 1+len(subjects)/apiece))
	var all sync.WaitGroup
	for n := range workers {
		w := c.twin()
		workers[n] = w
		all.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(subjects)); i = next.Add(1) - 1 {
				if differs[i] = w.subject(subjects[i].id, subjects[i].sides); differs[i] != nil {
					next.Store(int64(len(subjects)))
				}
				w.cover.Asked++
			}
		})
	}
	all.Wait()
	for _, w := range workers {
		c.cover.Asked += w.cover.Asked
		c.cover.Questions += w.cover.Questions
	}
	for _, err := range differs {
		if err != nil {
			return err
		}
	}
	return nil
}

// twin asks the same about other subjects at the same time.
func (c *checker) twin() *checker {
	t, e := *c, *c.evaluator
	t.evaluator, t.cover, t.scratch = &e, Coverage{}, scratch{}
	return &t
}

type checker struct {
	policy    *Policy
	img       *image.Image
	evaluator *Evaluator
	index     *image.Index
	ids       map[string]image.ID
	cover     Coverage

	facing   [2]map[Term][]int32        // crossings by who stands on the subject's side
	rules    map[image.ID][]*image.Rule // by subject
	ranges   map[uint16][]image.Span    // of a port class
	members  map[string][]image.ID      // of a zone
	zones    map[image.ID]uint16        // of a workload, as the image numbers them
	stranger image.ID                   // that neither the policy nor the image knows
	cells    []cell
	inClass  map[uint16][]int // cells by class of addresses
	inside   map[string][]int // cells by network

	scratch
}

// scratch is of one question, piece or subject.
type scratch struct {
	sides    []side
	reached  []int32
	named    []image.ID
	instants []time.Time
	places   []int
}

func newChecker(p *Policy, img *image.Image) (*checker, error) {
	c := &checker{
		policy: p, img: img, evaluator: p.Evaluator(), index: img.Index(), ids: p.IDs(),
		rules: map[image.ID][]*image.Rule{}, ranges: map[uint16][]image.Span{},
		members: map[string][]image.ID{}, zones: map[image.ID]uint16{},
	}
	if err := c.parted(); err != nil {
		return nil, err
	}
	for d := range c.facing {
		c.facing[d] = map[Term][]int32{}
		q := Query{Direction: abi.Direction(d)}
		for i := range p.Crossings {
			if !p.Crossings[i].Side.HoldsAt(image.Direction(d)) {
				continue
			}
			for _, t := range subjectSide(&p.Crossings[i], q) {
				t.Pos = Pos{}
				c.facing[d][t] = append(c.facing[d][t], int32(i))
			}
		}
	}
	known := map[image.ID]bool{}
	for i := range p.Workloads {
		w := &p.Workloads[i]
		c.members[w.Zone] = append(c.members[w.Zone], c.ids[w.Name])
		known[c.ids[w.Name]] = true
	}
	for i := range img.Workloads {
		c.zones[img.Workloads[i].ID] = img.Workloads[i].Zone
	}
	for i := range img.Rules {
		r := &img.Rules[i]
		for _, x := range r.Crossings {
			if int64(x) >= int64(len(p.Crossings)) {
				return nil, fmt.Errorf("image and policy differ: the rule for %s lists crossing %d of %d", r.RuleKey, x, len(p.Crossings))
			}
		}
		c.rules[r.Subject] = append(c.rules[r.Subject], r)
		if r.Peer.Kind() == image.PeerIdentity {
			known[image.ID(r.Peer.Value())] = true
		}
	}
	for c.stranger = image.FirstID; known[c.stranger]; c.stranger++ {
	}
	c.addresses()
	c.cover = Coverage{Identities: len(p.Workloads) + 1, PortClasses: len(c.ranges), Addresses: len(c.cells)}
	return c, nil
}

// strangers asks about subjects that no policy knows, who are refused before their
// peer, port or address is looked at.
func (c *checker) strangers() error {
	for _, id := range [...]image.ID{image.None, image.Kernel, image.Pending, c.stranger} {
		for _, d := range [...]abi.Direction{abi.Egress, abi.Ingress} {
			q := Query{Subject: id, Direction: d, Port: image.Port{Proto: image.TCP, Number: 80}, Now: always}
			if err := c.ask(q); err != nil {
				return err
			}
		}
	}
	return nil
}

// always is a time before every window.
var always = time.Unix(1, 0)

// subject asks everything about one subject. A crossing can name it in the ways that
// sides lists.
func (c *checker) subject(id image.ID, sides []Term) error {
	rules := c.rules[id]
	slices.SortFunc(rules, func(a, b *image.Rule) int {
		return cmp.Or(cmp.Compare(a.Direction, b.Direction), cmp.Compare(a.Class, b.Class), cmp.Compare(a.Peer, b.Peer))
	})
	for _, d := range [...]abi.Direction{abi.Egress, abi.Ingress} {
		base := Query{Subject: id, Direction: d}
		var facing []int32
		for _, t := range sides {
			facing = append(facing, c.facing[d][t]...)
		}
		slices.Sort(facing)
		ruled := map[uint16][]*image.Rule{}
		for start, i := 0, 0; i <= len(rules); i++ {
			if i == len(rules) || rules[i].Direction != rules[start].Direction || rules[i].Class != rules[start].Class {
				if start < i && rules[start].Direction == image.Direction(d) {
					ruled[rules[start].Class] = rules[start:i]
				}
				start = i
			}
		}
		q := base
		q.Proof, q.Bad, q.Now = abi.ProofBad, abi.TagBadMAC, always
		if err := c.ask(q); err != nil {
			return err
		}
		for _, piece := range c.pieces(slices.Compact(facing), ruled) {
			if err := c.piece(base, piece); err != nil {
				return err
			}
		}
	}
	return nil
}

// A piece is a port that stands for all that the same facing crossings cover and that
// have the same rules.
type piece struct {
	port      image.Port
	crossings []int32       // that cover it, ascending
	rules     []*image.Rule // by peer
}

// piece asks about one subject, direction and port.
func (c *checker) piece(base Query, p piece) error {
	base.Port = p.port
	c.takeSides(base, p.crossings)

	// With each address: a caller without a proof, one whose proof is yet unknown, and
	// one who proved to be nobody in particular.
	for _, place := range c.placesOf(p) {
		cell := &c.cells[place]
		c.evaluator.inside = cell.inside
		q := base
		q.Address = cell.address
		for _, proof := range [...]abi.Proof{abi.ProofNone, abi.ProofUnknown, abi.ProofIdentity} {
			if q.Proof, q.Peer = proof, image.None; proof == abi.ProofIdentity {
				q.Peer = c.stranger
			}
			if err := c.askAt(q, p, cell); err != nil {
				return err
			}
		}
	}
	// Every peer that matters, without an address.
	nowhere := &c.cells[0]
	c.evaluator.inside = nowhere.inside
	q := base
	q.Proof = abi.ProofIdentity
	for _, q.Peer = range c.peersOf(p) {
		if q.Peer == c.stranger { // asked about above
			continue
		}
		if err := c.askAt(q, p, nowhere); err != nil {
			return err
		}
	}
	return nil
}

// A side is a crossing of a piece, under one way in which it can be met by a peer.
type side struct {
	kind     meet
	name     string // of the workload, zone or network
	crossing int32
}

// meet is a way to be admitted: as a term names it, or as somebody provable.
type meet uint8

const provably meet = 255

// takeSides lists the crossings of a piece by who stands on the peer's side.
func (c *checker) takeSides(q Query, crossings []int32) {
	c.sides = c.sides[:0]
	for _, i := range crossings {
		terms := peerSide(&c.policy.Crossings[i], q)
		for _, t := range terms {
			c.sides = append(c.sides, side{meet(t.Kind), t.Name, i})
		}
		if provable(terms) {
			c.sides = append(c.sides, side{provably, "", i})
		}
	}
	slices.SortFunc(c.sides, func(a, b side) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.name, b.name), cmp.Compare(a.crossing, b.crossing))
	})
}

// reach adds the crossings that can be met in one way. Behind the first that is always
// open none can be the first open one, nor be passed over: whoever meets one of them
// meets that one before it.
func (c *checker) reach(kind meet, name string) {
	i, _ := slices.BinarySearchFunc(c.sides, side{kind, name, -1}, func(a, b side) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.name, b.name), cmp.Compare(a.crossing, b.crossing))
	})
	for ; i < len(c.sides) && c.sides[i].kind == kind && c.sides[i].name == name; i++ {
		c.reached = append(c.reached, c.sides[i].crossing)
		if x := &c.policy.Crossings[c.sides[i].crossing]; x.Since.IsZero() && x.Until.IsZero() {
			return
		}
	}
}

// askAt asks at every instant that matters. The evaluator is given the crossings that
// the question can reach; to all others it would say that they do not name the peer.
func (c *checker) askAt(q Query, p piece, cell *cell) error {
	c.reached = c.reached[:0]
	c.reach(meet(image.TermAny), "")
	for _, n := range cell.networks {
		c.reach(meet(image.TermNetwork), n)
	}
	switch {
	case q.Proof != abi.ProofIdentity:
		c.reach(provably, "")
		c.reach(meet(image.TermUnmanaged), "")
	case q.Peer == image.Unmanaged:
		c.reach(meet(image.TermUnmanaged), "")
	default:
		if w := c.evaluator.workloads[q.Peer]; w != nil {
			c.reach(meet(image.TermWorkload), w.Name)
			c.reach(meet(image.TermZone), w.Zone)
		}
	}
	slices.Sort(c.reached)
	c.reached = slices.Compact(c.reached)
	c.evaluator.crossings = c.reached

	c.instants = append(c.instants[:0], always)
	for _, i := range c.reached {
		x := &c.policy.Crossings[i]
		c.edge(x.Since)
		c.edge(x.Until)
	}
	c.windows(p, image.PeerAny, 0)
	c.windows(p, image.PeerAddress, uint32(cell.class))
	if q.Proof == abi.ProofIdentity {
		c.windows(p, image.PeerIdentity, uint32(q.Peer))
		if zone, known := c.zones[q.Peer]; known {
			c.windows(p, image.PeerZone, uint32(zone))
		}
	} else {
		c.windows(p, image.PeerProven, 0)
		c.windows(p, image.PeerIdentity, uint32(image.Unmanaged))
	}
	if len(c.instants) > 1 {
		slices.SortFunc(c.instants, time.Time.Compare)
		c.instants = slices.CompactFunc(c.instants, time.Time.Equal)
	}
	for _, q.Now = range c.instants {
		if err := c.ask(q); err != nil {
			return err
		}
	}
	return nil
}

// windows adds the edges of the windows of one rule's crossings. What both declare is
// the same, so they are the policy's.
func (c *checker) windows(p piece, kind image.PeerKind, value uint32) {
	peer := image.MakePeer(kind, value)
	i, _ := slices.BinarySearchFunc(p.rules, peer, func(r *image.Rule, peer image.Peer) int { return cmp.Compare(r.Peer, peer) })
	for ; i < len(p.rules) && p.rules[i].Peer == peer; i++ {
		for _, x := range p.rules[i].Crossings {
			c.edge(c.policy.Crossings[x].Since)
			c.edge(c.policy.Crossings[x].Until)
		}
	}
}

// edge adds an instant at which a window opens or closes.
func (c *checker) edge(t time.Time) {
	if !t.IsZero() {
		c.instants = append(c.instants, t)
	}
}

func (c *checker) ask(q Query) error {
	c.cover.Questions++
	want, got := c.evaluator.Evaluate(q), c.index.Decide(q)
	if want == got {
		return nil
	}
	return fmt.Errorf("image and policy differ: subject %s, %s, port %d/%d, address %s, proof %s %s, at %s: "+
		"the policy says %s, the image %s", c.who(q.Subject), q.Direction, q.Port.Proto, q.Port.Number, q.Address, q.Proof,
		c.who(q.Peer), q.Now.UTC().Format(time.RFC3339), c.policy.decision(want), c.policy.decision(got))
}

// who names an identity.
func (c *checker) who(id image.ID) string {
	if w := c.evaluator.workloads[id]; w != nil {
		return w.Name
	}
	return fmt.Sprint(id)
}

func (p *Policy) decision(d Decision) string {
	if d.Crossing < 0 || d.Crossing >= len(p.Crossings) {
		return fmt.Sprintf("%s (%s)", d.Verdict, d.Reason)
	}
	return fmt.Sprintf("%s (%s %s)", d.Verdict, d.Reason, p.Crossings[d.Crossing].Name)
}

// peersOf are the peers that the crossings or rules of a piece name, one more of each
// zone that they name, unmanaged, and a stranger.
func (c *checker) peersOf(p piece) []image.ID {
	c.named = append(c.named[:0], image.Unmanaged, c.stranger)
	var zones []string
	for i, s := range c.sides {
		switch {
		case i > 0 && c.sides[i-1].kind == s.kind && c.sides[i-1].name == s.name:
		case s.kind == meet(image.TermWorkload):
			c.named = append(c.named, c.ids[s.name])
		case s.kind == meet(image.TermZone):
			zones = append(zones, s.name)
		}
	}
	for _, r := range p.rules {
		switch value := r.Peer.Value(); r.Peer.Kind() {
		case image.PeerIdentity:
			c.named = append(c.named, image.ID(value))
		case image.PeerZone:
			if int64(value) < int64(len(c.policy.Zones)) {
				zones = append(zones, c.policy.Zones[value].Name)
			}
		}
	}
	slices.Sort(c.named)
	c.named = slices.Compact(c.named)
	slices.Sort(zones)
	out := c.named
	for _, zone := range slices.Compact(zones) {
		for _, id := range c.members[zone] {
			if _, named := slices.BinarySearch(c.named, id); !named {
				out = append(out, id)
				break
			}
		}
	}
	return out
}

// shuffled is a copy in an order that depends only on the length: any beginning
// of it is a fair sample, the same each time.
func shuffled[T any](all []T) []T {
	out := slices.Clone(all)
	r := rand.New(rand.NewPCG(uint64(len(all)), 0))
	r.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}
