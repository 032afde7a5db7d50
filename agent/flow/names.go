package flow

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/gaissmai/bart"

	"github.com/demarc/demarc/policy/image"
)

// Names tells the words of one image for its numbers. It does not change.
type Names struct {
	Image     *image.Image
	workloads map[uint32]int        // identity -> index into Image.Workloads
	crossings map[uint32]int        // number -> index into Image.Crossings
	networks  *bart.Table[[]string] // all that contain a prefix, sorted
}

// NewNames prepares the names of a verified image, which it keeps.
func NewNames(img *image.Image) *Names {
	n := &Names{
		Image:     img,
		workloads: make(map[uint32]int, len(img.Workloads)),
		crossings: make(map[uint32]int, len(img.Crossings)),
		networks:  new(bart.Table[[]string]),
	}
	for i, w := range img.Workloads {
		n.workloads[uint32(w.ID)] = i
	}
	for i, c := range img.Crossings {
		n.crossings[c.Number] = i
	}
	own := new(bart.Table[[]string])
	for _, network := range img.Networks {
		for _, cidr := range network.CIDRs {
			had, _ := own.Get(cidr)
			own.Insert(cidr, append(slices.Clip(had), network.Name))
		}
	}
	// What contains an address is found by one look, not put together anew for each.
	for cidr := range own.All() {
		var all []string
		for _, names := range own.Supernets(cidr) {
			all = append(all, names...)
		}
		slices.Sort(all)
		n.networks.Insert(cidr, slices.Clip(slices.Compact(all)))
	}
	return n
}

// Workload returns the workload of an identity, and its zone's name.
func (n *Names) Workload(id uint32) (w image.Workload, zone string, ok bool) {
	i, ok := n.workloads[id]
	if !ok {
		return w, "", false
	}
	w = n.Image.Workloads[i]
	return w, n.Image.Zones[w.Zone].Name, true
}

// Crossing returns the crossing with a number, which nobody may change, or nil.
func (n *Names) Crossing(number uint32) *image.Crossing {
	i, ok := n.crossings[number]
	if !ok {
		return nil
	}
	return &n.Image.Crossings[i]
}

// words are a workload's and its zone's name.
func (n *Names) words(id uint32) (workload, zone string, ok bool) {
	i, ok := n.workloads[id]
	if !ok {
		return "", "", false
	}
	w := &n.Image.Workloads[i]
	return w.Name, n.Image.Zones[w.Zone].Name, true
}

// Networks returns the names of all networks that contain an address, sorted. They are
// shared: nobody may change them.
func (n *Names) Networks(a netip.Addr) []string {
	if !a.IsValid() {
		return nil
	}
	found, _ := n.networks.Lookup(a)
	return found
}

// SPIFFE returns the SPIFFE ID of a workload of the image.
func (n *Names) SPIFFE(w image.Workload) string {
	return fmt.Sprintf("spiffe://%s/%s/%s", n.Image.TrustDomain, n.Image.Zones[w.Zone].Name, w.Name)
}

// imagesKept bounds how many images' names a Book keeps for late events.
const imagesKept = 8

// Book holds the names of the active image and of the last few before it, so that
// an event judged under one of those still finds its words. The zero value is an
// empty book. It is safe for concurrent use; who reads waits for nobody.
type Book struct {
	mu  sync.Mutex            // of who writes
	now atomic.Pointer[pages] // nil while it is empty; what it points to does not change
}

// pages are what a book holds at one moment.
type pages struct {
	of     []page // oldest first
	shadow *Names // of the image that was in shadow last; nil = none was
}

// ofShadow stands for an epoch: the image in shadow comes first.
const ofShadow = ^uint32(0) - 1

type page struct {
	epoch  uint32 // from which on these names hold
	digest string
	names  *Names
}

func (b *Book) open() *pages {
	if p := b.now.Load(); p != nil {
		return p
	}
	return &pages{}
}

// Add makes names the current ones from an epoch on. The digest is the image's.
func (b *Book) Add(epoch uint32, digest string, names *Names) {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := *b.open()
	next.of = append(slices.Clone(next.of), page{epoch, digest, names})
	if over := len(next.of) - imagesKept; over > 0 {
		next.of = slices.Delete(next.of, 0, over)
	}
	b.now.Store(&next)
}

// Shadow makes names those that verdicts of a shadow are told with.
func (b *Book) Shadow(names *Names) {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := *b.open()
	next.shadow = names
	b.now.Store(&next)
}

// Current returns the names of the active image and its digest, or nil.
func (b *Book) Current() (*Names, string) {
	p := b.now.Load()
	if p == nil || len(p.of) == 0 {
		return nil, ""
	}
	last := &p.of[len(p.of)-1]
	return last.names, last.digest
}

// first is where a word of an epoch is looked for first, or nil: in the image that was
// active then.
func (p *pages) first(epoch uint32) *Names {
	if epoch == ofShadow && p.shadow != nil {
		return p.shadow
	}
	for i := len(p.of) - 1; i >= 0; i-- {
		if p.of[i].epoch <= epoch {
			return p.of[i].names
		}
	}
	return nil
}

// find looks for a word first in the image that was active at an epoch, then in
// the others from the newest on: identities and crossing numbers are hashes of
// their names, so another image that knows the number means the same.
func find[T any](b *Book, epoch uint32, look func(*Names) (T, bool)) (v T, ok bool) {
	p := b.now.Load()
	if p == nil {
		return v, false
	}
	if names := p.first(epoch); names != nil {
		if v, ok = look(names); ok {
			return v, true
		}
	}
	for i := len(p.of) - 1; i >= 0; i-- {
		if v, ok = look(p.of[i].names); ok {
			return v, true
		}
	}
	if p.shadow != nil { // a number that only it knows
		v, ok = look(p.shadow)
	}
	return v, ok
}

// Workload names an identity as of an epoch.
func (b *Book) Workload(epoch, id uint32) (workload, zone string, ok bool) {
	if p := b.now.Load(); p != nil {
		if names := p.first(epoch); names != nil {
			if workload, zone, ok = names.words(id); ok {
				return workload, zone, true
			}
		}
	}
	type named struct{ workload, zone string }
	n, ok := find(b, epoch, func(names *Names) (n named, ok bool) {
		n.workload, n.zone, ok = names.words(id)
		return n, ok
	})
	return n.workload, n.zone, ok
}

// Crossing returns the crossing with a number as of an epoch, which nobody may change,
// or nil.
func (b *Book) Crossing(epoch, number uint32) *image.Crossing {
	if p := b.now.Load(); p != nil {
		if names := p.first(epoch); names != nil {
			if c := names.Crossing(number); c != nil {
				return c
			}
		}
	}
	c, _ := find(b, epoch, func(names *Names) (*image.Crossing, bool) {
		c := names.Crossing(number)
		return c, c != nil
	})
	return c
}

// UnmanagedZone returns the zone of unmanaged processes as of an epoch.
func (b *Book) UnmanagedZone(epoch uint32) string {
	zone, _ := find(b, epoch, func(names *Names) (string, bool) {
		return names.Image.Zones[names.Image.UnmanagedZone].Name, true
	})
	return zone
}

// Networks names the networks that contain an address as of an epoch. An image
// without such a network is an answer too, so no other image is asked.
func (b *Book) Networks(epoch uint32, a netip.Addr) []string {
	networks, _ := find(b, epoch, func(names *Names) ([]string, bool) { return names.Networks(a), true })
	return networks
}
