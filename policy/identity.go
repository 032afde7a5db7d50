package policy

import (
	"crypto/sha256"
	"encoding/binary"

	"github.com/demarc/demarc/policy/image"
)

// SPIFFEID is the workload's name in the world.
func (p *Policy) SPIFFEID(w *Workload) string {
	return "spiffe://" + p.TrustDomain + "/" + w.Zone + "/" + w.Name
}

// IDs numbers the workloads by name: the first 24 bits of the SHA-256 of the
// SPIFFE ID, or the next 24 if those are reserved or already taken by a workload
// earlier in name order. Every node comes to the same numbers without asking.
//
// A workload for which all ten numbers of its hash are taken is left out, and has
// no identity; Compile refuses such a policy.
func (p *Policy) IDs() map[string]image.ID {
	ids := make(map[string]image.ID, len(p.Workloads))
	taken := make(map[image.ID]bool, len(p.Workloads))
	for i := range p.Workloads {
		w := &p.Workloads[i]
		sum := sha256.Sum256([]byte(p.SPIFFEID(w)))
		for b := sum[:]; len(b) >= 3; b = b[3:] {
			id := image.ID(b[0])<<16 | image.ID(b[1])<<8 | image.ID(b[2])
			if id < image.FirstID || taken[id] {
				continue
			}
			ids[w.Name], taken[id] = id, true
			break
		}
	}
	return ids
}

// numbers gives each crossing its stable number, in the order of the policy: the
// first 32 bits, big endian, of the SHA-256 of "crossing/" and its name, or the
// next 32 if those are zero or taken. A crossing without a free number keeps 0.
func numbers(crossings []Crossing) []uint32 {
	out := make([]uint32, len(crossings))
	taken := make(map[uint32]bool, len(crossings))
	for i := range crossings {
		sum := sha256.Sum256([]byte("crossing/" + crossings[i].Name))
		for b := sum[:]; len(b) > 0; b = b[4:] {
			n := binary.BigEndian.Uint32(b)
			if n == 0 || taken[n] {
				continue
			}
			out[i], taken[n] = n, true
			break
		}
	}
	return out
}
