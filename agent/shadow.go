package agent

import (
	"cmp"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// maxDifferences bounds the kinds that are told apart of what a policy in shadow would
// decide otherwise.
const maxDifferences = 4096

// differences are what the policy in shadow would have decided otherwise, by kind.
type differences struct {
	mu     sync.Mutex
	digest string // of the image
	since  time.Time
	kinds  map[difference]*tally
	total  map[abi.Verdict]uint64
}

type difference struct {
	verdict   abi.Verdict
	reason    abi.Reason
	direction abi.Direction
	subject   uint32
	peer      uint32 // only a proven one
	crossing  uint32
	proto     uint8
	port      uint16
}

type tally struct {
	sample record.Event // the first one
	count  uint64
	last   uint64 // ns of CLOCK_BOOTTIME
}

// restart forgets what another shadow found. Events of this one may have come before
// the core said that it is there; they are of its epoch, or later ones.
func (d *differences) restart(s *proto.Shadow) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s == nil || d.digest == s.Digest && d.since.Equal(s.Since) {
		return
	}
	d.digest, d.since, d.total = s.Digest, s.Since, map[abi.Verdict]uint64{}
	for key, t := range d.kinds {
		if t.sample.Epoch < s.Epoch {
			delete(d.kinds, key)
		} else {
			d.total[key.verdict] += t.count
		}
	}
}

// clear forgets everything.
func (d *differences) clear() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.digest, d.kinds, d.total = "", nil, nil
}

// add takes in an event, if it is of a shadow.
func (d *differences) add(e *record.Event) {
	if !e.Verdict.OfShadow() {
		return
	}
	key := difference{e.Verdict, e.Reason, e.Direction, e.Subject, 0, e.Crossing, e.Tuple.Proto, e.Tuple.DestinationPort}
	if e.Proof == abi.ProofIdentity {
		key.peer = e.Peer
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.kinds == nil { // told of before the core's answer
		d.kinds, d.total = map[difference]*tally{}, map[abi.Verdict]uint64{}
	}
	d.total[e.Verdict]++
	t := d.kinds[key]
	if t == nil {
		if len(d.kinds) >= maxDifferences {
			return
		}
		t = &tally{sample: *e}
		d.kinds[key] = t
	}
	t.count++
	t.last = e.Time
}

// describe says what is in shadow and what it found, in words.
func (d *differences) describe(s *proto.Shadow, r *flow.Resolver) *api.Shadow {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := &api.Shadow{Name: s.Name, Version: s.Version, Digest: s.Digest, Since: s.Since, Until: s.Until,
		WouldDeny: d.total[abi.WouldDeny], WouldAllow: d.total[abi.WouldAllow]}
	if r == nil {
		return out
	}
	listed := uint64(0)
	for key, t := range d.kinds {
		f := r.Flow(&t.sample)
		port := f.Protocol
		if key.port != 0 {
			port += "/" + strconv.Itoa(int(key.port))
		}
		out.Differences = append(out.Differences, api.Difference{
			Verdict: key.verdict, Reason: key.reason, Direction: key.direction, From: label(f.Source), To: label(f.Destination), Port: port,
			Crossing: f.Crossing, Flows: t.count, First: f.Time, Last: r.Wall(t.last),
		})
		listed += t.count
	}
	out.Unlisted = out.WouldDeny + out.WouldAllow - listed
	slices.SortFunc(out.Differences, func(a, b api.Difference) int {
		return cmp.Or(cmp.Compare(a.Verdict, b.Verdict), cmp.Compare(b.Flows, a.Flows), cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To),
			cmp.Compare(a.Port, b.Port), cmp.Compare(a.Direction, b.Direction), a.First.Compare(b.First))
	})
	return out
}

// label is an endpoint in a word, its address if nothing else is known.
func label(e flow.Endpoint) string {
	if l := e.Label(); l != "unknown" || !e.Address.IsValid() {
		return l
	}
	return e.Address.String()
}

// shadow has the core judge live traffic by an image beside the one in force.
func (s *service) shadow(w http.ResponseWriter, r *http.Request) (any, error) {
	text := r.URL.Query().Get("for")
	lasting, err := time.ParseDuration(text)
	if err != nil || lasting <= 0 {
		return nil, &api.Error{Code: http.StatusBadRequest, Message: fmt.Sprintf("for: %.40q is not a time", text), Hint: "give one like 1h"}
	}
	t, f, err := s.offered(w, r, notAsked)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s.log.Info("shadow", zap.String("name", t.name), zap.Uint64("version", t.version), zap.Duration("for", lasting), zap.Uint32("uid", uid(r)))
	return s.shadowChanged(func(c core) (*proto.Status, error) {
		s.link.differences.clear() // of one that ends now
		return c.Shadow(f, lasting)
	})
}

func (s *service) unshadow(_ http.ResponseWriter, r *http.Request) (any, error) {
	s.log.Info("end shadow", zap.Uint32("uid", uid(r)))
	return s.shadowChanged(core.Unshadow)
}

func (s *service) shadowChanged(request func(core) (*proto.Status, error)) (any, error) {
	if err := s.link.change(request); err != nil {
		s.log.Warn("shadow refused", zap.Error(err))
		return nil, err
	}
	return s.status(), nil
}

// differences answers what the policy in shadow found.
func (s *service) differences() (any, error) {
	s.fresh()
	st := s.link.view().Status
	if st == nil {
		return nil, errAway
	}
	if st.Shadow == nil {
		return nil, &api.Error{Code: http.StatusConflict, Message: "no policy is in shadow", Hint: "put one there with: demarc apply FILE --shadow"}
	}
	return s.link.differences.describe(st.Shadow, s.resolver()), nil
}

// takeShadow learns the names of an image that came into shadow.
func (l *link) takeShadow(c core, s *proto.Shadow) error {
	if s != nil && l.differences.digestNow() != s.Digest {
		names, err := fetchNames(c.Shadowed, s.Digest)
		if err != nil {
			return fmt.Errorf("fetch the image in shadow: %w", err)
		}
		if names == nil {
			return nil // replaced since the status was made; the next one tells
		}
		l.book.Shadow(names)
	}
	l.differences.restart(s)
	return nil
}

func (d *differences) digestNow() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.digest
}
