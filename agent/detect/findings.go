package detect

import (
	"cmp"
	"context"
	"math/bits"
	"slices"
	"sync"
	"time"
)

// Bounds of what is kept.
const (
	findingsKept  = 4096
	findingsEach  = 64             // of one party
	sameWithin    = 24 * time.Hour // a sighting later than this after the last one is another finding
	seriesKept    = 8192           // label sets of the metric
	notDeclared   = "unknown"      // label of what no policy names
	otherFindings = "other"        // label of what found no room
)

// Findings keeps what was found, in bounded memory. What has to go is the mildest
// and oldest of whoever has most: one party's findings push out no other's. Readers
// are cursors, for which nobody waits: one that is slow sees the newest state of
// what it missed. Safe for concurrent use.
type Findings struct {
	mu       sync.Mutex
	kept     map[string]*keptFinding // by key
	parties  map[string]int          // findings of each
	revision uint64                  // of the newest change that is worth telling
	changed  chan struct{}           // closed at the next one; nil while nobody waits
	counts   map[Series]uint64
}

type keptFinding struct {
	Finding
	party    string
	revision uint64
}

// Series is a set of labels of the metric: words of the policy and of the catalogue.
type Series struct {
	Technique, Severity, Zone, Workload, SuppressedBy string
}

// NewFindings makes an empty store.
func NewFindings() *Findings {
	return &Findings{kept: map[string]*keptFinding{}, parties: map[string]int{}, counts: map[Series]uint64{}}
}

// Change says what a sighting did to its finding.
type Change uint8

const (
	Nothing Change = iota // worth telling
	Grown                 // it was seen twice as often as when it was last told
	Worse                 // its severity rose, or what suppressed it ended
	New
)

// Add takes in a sighting and returns the finding that it belongs to.
func (s *Findings) Add(seen Finding) (Finding, Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.kept[seen.Key]
	if r != nil && seen.LastSeen.Sub(r.LastSeen) <= sameWithin {
		severity, suppressed, count := r.Severity, r.SuppressedBy, r.Count
		knew := r.Process != nil
		r.add(&seen)
		change := Nothing
		switch {
		case r.Severity > severity || suppressed != "" && r.SuppressedBy == "":
			change = Worse
			s.count(&r.Finding)
		case bits.Len64(r.Count) > bits.Len64(count) || !knew && r.Process != nil:
			change = Grown
		}
		if change != Nothing {
			s.tell(r)
		}
		return r.clone(), change
	}
	if r != nil {
		s.remove(r)
	}
	seen.Count = max(seen.Count, 1) // it may only say more of a finding that has gone
	seen.identify()
	r = &keptFinding{Finding: seen.clone(), party: seen.Subject.Label()}
	s.insert(r)
	s.count(&r.Finding)
	s.tell(r)
	return r.clone(), New
}

// Restore puts back a finding of an earlier run; it is not counted again.
func (s *Findings) Restore(f Finding) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.kept[f.Key]; r != nil {
		s.remove(r)
	}
	s.insert(&keptFinding{Finding: f, party: f.Subject.Label()})
}

// Act notes what was done about a finding.
func (s *Findings) Act(key, action string) (Finding, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.kept[key]
	if r == nil || r.Action == action {
		return Finding{}, false
	}
	r.Action = action
	s.tell(r)
	return r.clone(), true
}

func (s *Findings) insert(r *keptFinding) {
	if s.parties[r.party] >= findingsEach {
		s.evict(func(o *keptFinding) bool { return o.party == r.party })
	} else if len(s.kept) >= findingsKept {
		most := ""
		for p, n := range s.parties {
			if n > s.parties[most] || n == s.parties[most] && p < most {
				most = p
			}
		}
		s.evict(func(o *keptFinding) bool { return o.party == most })
	}
	s.kept[r.Key] = r
	s.parties[r.party]++
}

// evict removes the mildest, and of those the oldest, of some.
func (s *Findings) evict(of func(*keptFinding) bool) {
	var worst *keptFinding
	for _, r := range s.kept {
		if of(r) && (worst == nil || mildestFirst(&r.Finding, &worst.Finding) < 0) {
			worst = r
		}
	}
	if worst != nil {
		s.remove(worst)
	}
}

func mildestFirst(a, b *Finding) int {
	return cmp.Or(cmp.Compare(a.Severity, b.Severity), a.LastSeen.Compare(b.LastSeen), cmp.Compare(a.ID, b.ID))
}

func (s *Findings) remove(r *keptFinding) {
	delete(s.kept, r.Key)
	if s.parties[r.party]--; s.parties[r.party] == 0 {
		delete(s.parties, r.party)
	}
}

func (s *Findings) tell(r *keptFinding) {
	s.revision++
	r.revision = s.revision
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

func (s *Findings) count(f *Finding) {
	series := Series{f.Technique.ID, f.Severity.String(), f.Subject.Zone, f.Subject.Workload, f.SuppressedBy}
	if series.Workload == "" {
		series.Workload = cmp.Or(f.Subject.Reserved, notDeclared)
	}
	if _, ok := s.counts[series]; !ok && len(s.counts) >= seriesKept {
		series.Zone, series.Workload = otherFindings, otherFindings
	}
	s.counts[series]++
}

// Counts says how many findings reached each severity, each finding once for each
// of them, since the store was made.
func (s *Findings) Counts() map[Series]uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[Series]uint64, len(s.counts))
	for k, n := range s.counts {
		out[k] = n
	}
	return out
}

// After returns what was told after a revision, in that order, and the newest
// revision. Revision 0 comes before everything.
func (s *Findings) After(revision uint64) ([]Finding, uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []*keptFinding
	for _, r := range s.kept {
		if r.revision > revision || revision == 0 {
			found = append(found, r)
		}
	}
	slices.SortFunc(found, func(a, b *keptFinding) int {
		return cmp.Or(cmp.Compare(a.revision, b.revision), a.FirstSeen.Compare(b.FirstSeen), cmp.Compare(a.ID, b.ID))
	})
	out := make([]Finding, 0, len(found))
	for _, r := range found {
		out = append(out, r.clone())
	}
	return out, s.revision
}

// Wait returns when there is something after a revision, with false when ctx ended.
func (s *Findings) Wait(ctx context.Context, revision uint64) bool {
	for {
		s.mu.Lock()
		if s.revision > revision {
			s.mu.Unlock()
			return true
		}
		if s.changed == nil {
			s.changed = make(chan struct{})
		}
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-ctx.Done():
			return false
		case <-changed:
		}
	}
}
