package detect

import (
	"net/netip"
	"slices"
	"time"
)

// recent remembers different values for a time, the newest last. It holds no more
// than its user allows; what has to go is the oldest of the same recent, never
// somebody else's. The zero value is empty.
type recent[K comparable] struct{ items []item[K] }

type item[K comparable] struct {
	value K
	at    time.Time // when it was last seen
	mark  uint8     // what its user makes of it
}

// see takes in a value, and reports whether it was not there. Values not seen
// within span before at are forgotten first.
func (r *recent[K]) see(value K, at time.Time, span time.Duration, room int, mark uint8) bool {
	r.forget(at.Add(-span))
	i := len(r.items) - 1 // what comes again was mostly there a moment ago
	for i >= 0 && r.items[i].value != value {
		i--
	}
	fresh := i < 0
	if !fresh {
		mark = max(mark, r.items[i].mark)
		if last := len(r.items) - 1; i == last {
			r.items[i].at, r.items[i].mark = latest(at, r.items[i].at), mark
			return false
		}
		r.items = slices.Delete(r.items, i, i+1)
	}
	if len(r.items) >= room {
		r.items = slices.Delete(r.items, 0, len(r.items)-room+1)
	}
	// Events of two rings may come a little out of order.
	at = latest(at, r.newest())
	r.items = append(r.items, item[K]{value, at, mark})
	return fresh
}

func (r *recent[K]) newest() time.Time {
	if len(r.items) == 0 {
		return time.Time{}
	}
	return r.items[len(r.items)-1].at
}

// forget drops what was last seen before a moment.
func (r *recent[K]) forget(before time.Time) {
	n := 0
	for n < len(r.items) && r.items[n].at.Before(before) {
		n++
	}
	if n > 0 {
		r.items = slices.Delete(r.items, 0, n)
	}
}

// count says for how many values f holds.
func (r *recent[K]) count(f func(item[K]) bool) (n int) {
	for _, i := range r.items {
		if f(i) {
			n++
		}
	}
	return n
}

// burst counts events within a time, up to a number. The zero value is empty.
type burst struct{ times []time.Time }

// see counts some more, at least one, and returns how many there were within span,
// at most room.
func (b *burst) see(at time.Time, span time.Duration, room int, more uint64) int {
	old := 0
	for old < len(b.times) && b.times[old].Before(at.Add(-span)) {
		old++
	}
	b.times = slices.Delete(b.times, 0, old)
	for range min(max(more, 1), uint64(room)) {
		b.times = append(b.times, at)
	}
	b.times = slices.Delete(b.times, 0, max(0, len(b.times)-room))
	return len(b.times)
}

func latest(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// who keys the memory of a party: its identity, and only where nothing was proved
// its address. Reserved identities are many parties; their cgroups tell them apart.
type who struct {
	identity uint32
	cgroup   string
	address  netip.Addr
	bits     uint8 // of the address; less than all of them where parties share a place
}

// Bounds of a roster. Workloads are bounded by the policy; the others by these.
const (
	addressesKept = 4096
	prefixesKept  = 1024
)

// roster keeps something for each party. A workload always has a place of its own:
// nobody can push it out. Addresses and cgroups, of which an attacker has many, have
// bounded places; those that find none share one with their neighbours, so that
// what they do together is still seen.
type roster[T any] struct {
	workloads map[uint32]*T // by identity
	others    map[who]*entry[T]
	shared    map[who]*T
	swept     time.Time // when others was last looked through
}

type entry[T any] struct {
	value T
	at    time.Time
}

// get returns what is kept of a party, and under which key. What was not asked for
// within idle may be forgotten.
func (r *roster[T]) get(w who, at time.Time, idle time.Duration) (*T, who) {
	if r.workloads == nil {
		r.workloads, r.others, r.shared = map[uint32]*T{}, map[who]*entry[T]{}, map[who]*T{}
	}
	if w.identity != 0 && w.cgroup == "" {
		v := r.workloads[w.identity]
		if v == nil {
			v = new(T)
			r.workloads[w.identity] = v
		}
		return v, w
	}
	if e := r.others[w]; e != nil {
		e.at = latest(e.at, at)
		return &e.value, w
	}
	// Looking through them all is dear, and whoever has many addresses could ask for
	// it with each packet.
	if len(r.others) >= addressesKept && at.Sub(r.swept) > idle/64 {
		r.swept = at
		for k, e := range r.others {
			if at.Sub(e.at) > idle {
				delete(r.others, k)
			}
		}
	}
	if len(r.others) < addressesKept {
		e := &entry[T]{at: at}
		r.others[w] = e
		return &e.value, w
	}
	w = w.neighbours()
	v := r.shared[w]
	if v == nil {
		if len(r.shared) >= prefixesKept {
			w = who{identity: w.identity}
			v = r.shared[w]
		}
		if v == nil {
			v = new(T)
			r.shared[w] = v
		}
	}
	return v, w
}

// neighbours is the place that a party shares: its /24 or /64, or its identity.
func (w who) neighbours() who {
	w.cgroup = ""
	if !w.address.IsValid() {
		return w
	}
	w.bits = 24
	if w.address.Is6() {
		w.bits = 64
	}
	if p, err := w.address.Prefix(int(w.bits)); err == nil {
		w.address = p.Addr()
	}
	return w
}
