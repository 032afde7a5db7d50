package flow

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/gaissmai/bart"

	"github.com/demarc/demarc/policy/image"
)

// Names tells the words of one image for its numbers. It does not change.
type Names struct {
	Image     *image.Image
	workloads map[uint32]int // identity -> index into Image.Workloads
	crossings map[uint32]int // number -> index into Image.Crossings
	networks  *bart.Table[[]string]
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
	for _, network := range img.Networks {
		for _, cidr := range network.CIDRs {
			had, _ := n.networks.Get(cidr)
			n.networks.Insert(cidr, append(slices.Clip(had), network.Name))
		}
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

// Crossing returns the crossing with a number.
func (n *Names) Crossing(number uint32) (image.Crossing, bool) {
	i, ok := n.crossings[number]
	if !ok {
		return image.Crossing{}, false
	}
	return n.Image.Crossings[i], true
}

// Networks returns the names of all networks that contain an address, sorted.
func (n *Names) Networks(a netip.Addr) []string {
	if !a.IsValid() {
		return nil
	}
	var found []string
	for _, names := range n.networks.Supernets(netip.PrefixFrom(a, a.BitLen())) {
		found = append(found, names...)
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// SPIFFE returns the SPIFFE ID of a workload of the image.
func (n *Names) SPIFFE(w image.Workload) string {
	return fmt.Sprintf("spiffe://%s/%s/%s", n.Image.TrustDomain, n.Image.Zones[w.Zone].Name, w.Name)
}

// imagesKept bounds how many images' names a Book keeps for late events.
const imagesKept = 8

// Book holds the names of the active image and of the last few before it, so that
// an event judged under one of those still finds its words. The zero value is an
// empty book. It is safe for concurrent use.
type Book struct {
	mu     sync.RWMutex
	pages  []page // oldest first
	shadow *Names // of the image that was in shadow last; nil = none was
}

// ofShadow stands for an epoch: the image in shadow comes first.
const ofShadow = ^uint32(0) - 1

type page struct {
	epoch  uint32 // from which on these names hold
	digest string
	names  *Names
}

// Add makes names the current ones from an epoch on. The digest is the image's.
func (b *Book) Add(epoch uint32, digest string, names *Names) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pages = append(b.pages, page{epoch, digest, names})
	if over := len(b.pages) - imagesKept; over > 0 {
		b.pages = slices.Delete(b.pages, 0, over)
	}
}

// Shadow makes names those that verdicts of a shadow are told with.
func (b *Book) Shadow(names *Names) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.shadow = names
}

// Current returns the names of the active image and its digest, or nil.
func (b *Book) Current() (*Names, string) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if len(b.pages) == 0 {
		return nil, ""
	}
	last := b.pages[len(b.pages)-1]
	return last.names, last.digest
}

// find looks for a word first in the image that was active at an epoch, then in
// the others from the newest on: identities and crossing numbers are hashes of
// their names, so another image that knows the number means the same.
func find[T any](b *Book, epoch uint32, look func(*Names) (T, bool)) (T, *Names, bool) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if epoch == ofShadow && b.shadow != nil {
		if v, ok := look(b.shadow); ok {
			return v, b.shadow, true
		}
	}
	for _, p := range slices.Backward(b.pages) {
		if p.epoch <= epoch {
			if v, ok := look(p.names); ok {
				return v, p.names, true
			}
			break
		}
	}
	for _, p := range slices.Backward(b.pages) {
		if v, ok := look(p.names); ok {
			return v, p.names, true
		}
	}
	if b.shadow != nil { // a number that only it knows
		if v, ok := look(b.shadow); ok {
			return v, b.shadow, true
		}
	}
	var none T
	return none, nil, false
}

// Workload names an identity as of an epoch.
func (b *Book) Workload(epoch, id uint32) (workload, zone string, ok bool) {
	type named struct{ workload, zone string }
	n, _, ok := find(b, epoch, func(names *Names) (named, bool) {
		w, zone, ok := names.Workload(id)
		return named{w.Name, zone}, ok
	})
	return n.workload, n.zone, ok
}

// Crossing returns the crossing with a number as of an epoch.
func (b *Book) Crossing(epoch, number uint32) (image.Crossing, bool) {
	c, _, ok := find(b, epoch, func(names *Names) (image.Crossing, bool) { return names.Crossing(number) })
	return c, ok
}

// UnmanagedZone returns the zone of unmanaged processes as of an epoch.
func (b *Book) UnmanagedZone(epoch uint32) string {
	zone, _, _ := find(b, epoch, func(names *Names) (string, bool) {
		return names.Image.Zones[names.Image.UnmanagedZone].Name, true
	})
	return zone
}

// Networks names the networks that contain an address as of an epoch. An image
// without such a network is an answer too, so no other image is asked.
func (b *Book) Networks(epoch uint32, a netip.Addr) []string {
	networks, _, _ := find(b, epoch, func(names *Names) ([]string, bool) { return names.Networks(a), true })
	return networks
}
