package agent

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/agent/journal"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/exporter"
	"github.com/demarc/demarc/internal/version"
	"github.com/demarc/demarc/policy/envelope"
	"github.com/demarc/demarc/policy/image"
)

// freshFor is how old a status may be before a reader has the core asked again, and
// freshWithin how long the reader waits for that.
const (
	freshFor    = 100 * time.Millisecond
	freshWithin = 2 * time.Second
)

// service answers the API.
type service struct {
	journal   *journal.Journal // nil without one
	node      string
	server    string    // path of the API's socket
	since     time.Time // of the agent's start
	link      *link
	binder    *binder // nil without an inventory
	cgroups   *cgroups
	detection *detection
	limits    []string // what the agent's own confinement lacks
	log       *zap.Logger
	checked   checkedImage
	metrics   *metrics
}

// routes is the API as a handler.
func (s *service) routes() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET "+api.PathStatus, answer(func(*http.Request) (any, error) { return s.status(), nil }))
	mux.Handle("GET "+api.PathIdentities, answer(func(*http.Request) (any, error) { return s.identities() }))
	mux.Handle("GET "+api.PathZones, answer(func(*http.Request) (any, error) { return s.zones() }))
	mux.HandleFunc("GET "+api.PathFlows, s.flows)
	mux.HandleFunc("GET "+api.PathFindings, s.findings)
	mux.HandleFunc("GET "+api.PathPolicy, s.image)
	mux.HandleFunc("GET "+api.PathAudit, s.audit)
	mux.Handle("GET "+api.PathMetrics, http.StripPrefix(strings.TrimSuffix(api.PathMetrics, "/metrics"), exporter.Handler(s.metrics)))
	mux.Handle("POST "+api.PathPolicy, changing(s.apply))
	mux.Handle("POST "+api.PathPreview, changing(s.preview))
	mux.Handle("GET "+api.PathShadow, answer(func(*http.Request) (any, error) { return s.differences() }))
	mux.Handle("POST "+api.PathShadow, changing(s.shadow))
	mux.Handle("POST "+api.PathUnshadow, changing(s.unshadow))
	mux.Handle("POST "+api.PathConfirm, changing(s.confirm))
	mux.Handle("POST "+api.PathRollback, changing(s.rollback))
	mux.Handle("POST "+api.PathQuarantine, changing(s.quarantine))
	mux.Handle("POST "+api.PathRelease, changing(s.release))
	mux.Handle("/", answer(func(r *http.Request) (any, error) {
		return nil, &api.Error{Code: http.StatusNotFound, Message: fmt.Sprintf("there is no %s %.100q here", r.Method, r.URL.Path), Hint: "use the demarc command of the same version"}
	}))
	return mux
}

// changing checks the caller before anything of the request's body is read.
func changing(f func(http.ResponseWriter, *http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := mayChange(r); err != nil {
			refuse(w, err)
			return
		}
		v, err := f(w, r)
		if err != nil {
			refuse(w, err)
			return
		}
		write(w, http.StatusOK, v)
	}
}

// fresh has the core asked unless it answered just now, and waits a little for it.
func (s *service) fresh() {
	if s.link.age() < freshFor {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.link.refreshIfIdle()
	}()
	select {
	case <-done:
	case <-time.After(freshWithin):
	}
}

func (s *service) status() *api.Status {
	s.fresh()
	out := &api.Status{Node: s.node, Version: version.String(), State: api.StateUnknown, Limits: slices.Clone(s.limits)}
	received := s.link.store.Counts()
	s.link.look(func(v view, k kernel) {
		out.Core = api.Core{Connected: v.Connected, Since: v.Since, Problem: v.Problem, Root: v.Root, Status: v.Status}
		var states [record.AllRings]record.RingState
		if k != nil {
			var err error
			if states, err = k.Rings(); err != nil {
				out.Problems = append(out.Problems, err.Error())
			}
		}
		for i, name := range ringNames {
			if i == record.RingSignals {
				n, missed := s.link.signals.counts()
				out.Rings = append(out.Rings, api.Ring{Name: name, Made: states[i].Seq, Lost: states[i].Lost, Received: n, Missed: missed})
				continue
			}
			out.Rings = append(out.Rings, api.Ring{Name: name, Made: states[i].Seq, Lost: states[i].Lost, Received: received[i].Received, Missed: received[i].Missed})
		}
		if v.Status == nil {
			return
		}
		out.State = v.Status.State
		out.Problems = append(out.Problems, v.Status.Problems...)
		out.Limits, out.Unconfirmed, out.Blind = append(out.Limits, v.Status.Limits...), v.Status.Unconfirmed, blindness(v.Status.Blind)
		if v.Status.Shadow != nil {
			out.Shadow = s.link.differences.describe(v.Status.Shadow, nil)
		}
		if g := v.Status.Active; g != nil {
			out.Policy = &api.Policy{Name: g.Name, Version: g.Version, Digest: g.Digest, Mode: g.Mode, Since: g.Since}
			if v.Names != nil {
				out.Policy.Workloads, out.Policy.Crossings = len(v.Names.Image.Workloads), len(v.Names.Image.Crossings)
			}
		}
	})
	if s.journal != nil {
		j := s.journal.State()
		out.Journal = &api.Journal{Dir: s.journal.Dir, Bytes: j.Bytes, MaxBytes: s.journal.MaxSize, Flows: j.Flows, Dropped: j.Dropped}
		if j.Problem != "" {
			out.Problems = append(out.Problems, j.Problem)
		}
	}
	if out.Core.Problem != "" {
		out.Problems = append(out.Problems, "core: "+out.Core.Problem)
	}
	if problem, _ := s.detection.status(); problem != "" {
		out.Problems = append(out.Problems, problem)
	}
	if s.binder != nil {
		out.Inventory = s.binder.status()
		out.Problems = append(out.Problems, out.Inventory.Problems...)
		if st := out.Core.Status; st != nil && st.Claims > out.Inventory.Bound {
			out.Problems = append(out.Problems, fmt.Sprintf("the core holds %d claims, this agent made %d: somebody else makes claims", st.Claims, out.Inventory.Bound))
		}
	}
	return out
}

// errNoPolicy answers questions about a policy while there is none.
var errNoPolicy = &api.Error{Code: http.StatusConflict, Message: "no policy is in force", Hint: "apply one with: demarc apply FILE"}

// inForce runs f on the names in force and the bindings.
func (s *service) inForce(f func(*flow.Names, map[uint64]uint32, string)) error {
	s.fresh()
	var err error
	s.link.look(func(v view, k kernel) {
		switch {
		case k == nil:
			err = errAway
		case v.Names == nil:
			err = errNoPolicy
		default:
			var bound map[uint64]uint32
			if bound, err = k.Bindings(); err == nil {
				f(v.Names, bound, v.Root)
			}
		}
	})
	return err
}

// cgroupsShown bounds the paths that are listed for one identity.
const cgroupsShown = 16

func (s *service) identities() ([]api.Identity, error) {
	var out []api.Identity
	quarantined := map[uint32]*time.Time{}
	if st := s.link.view().Status; st != nil {
		for _, q := range st.Quarantines {
			quarantined[q.Identity] = &q.Until
		}
	}
	err := s.inForce(func(names *flow.Names, bound map[uint64]uint32, root string) {
		at := make(map[uint32]int)
		for _, w := range names.Image.Workloads {
			at[uint32(w.ID)] = len(out)
			id := api.Identity{Identity: uint32(w.ID), Workload: w.Name, Zone: names.Image.Zones[w.Zone].Name, SPIFFE: names.SPIFFE(w)}
			for _, r := range w.Roles {
				id.Roles = append(id.Roles, r.Name)
			}
			id.Quarantined = quarantined[uint32(w.ID)]
			out = append(out, id)
		}
		for _, sel := range names.Image.Selectors {
			id := &out[at[uint32(names.Image.Workloads[sel.Workload].ID)]]
			id.Selectors = append(id.Selectors, describe(sel))
		}
		for _, reserved := range []image.ID{image.Unmanaged, image.Pending} {
			at[uint32(reserved)] = len(out)
			out = append(out, api.Identity{Identity: uint32(reserved), Reserved: flow.ReservedName(uint32(reserved))})
		}
		out[at[uint32(image.Unmanaged)]].Zone = names.Image.Zones[names.Image.UnmanagedZone].Name
		for cgroup, id := range bound {
			i, ok := at[id]
			if !ok {
				continue
			}
			out[i].Bindings++
			if path := s.cgroups.Path(root, cgroup); path != "" && out[i].Reserved == "" {
				out[i].Cgroups = append(out[i].Cgroups, flow.Escape(path))
			}
		}
		for i := range out {
			out[i].Cgroups = topmost(out[i].Cgroups)
		}
	})
	return out, err
}

// topmost sorts paths and leaves out those below another one.
func topmost(paths []string) []string {
	slices.Sort(paths)
	var top []string
	for _, p := range paths {
		below := slices.ContainsFunc(top, func(t string) bool { return strings.HasPrefix(p, t+"/") })
		if !below && len(top) < cgroupsShown {
			top = append(top, p)
		}
	}
	return top
}

// describe says a selector in the words of the policy.
func describe(s image.Selector) string {
	var parts []string
	add := func(key, value string) {
		if value != "" {
			parts = append(parts, key+"="+value)
		}
	}
	add("namespace", s.Namespace)
	add("serviceAccount", s.ServiceAccount)
	add("name", s.Name)
	add("image", s.Image)
	for _, l := range s.Labels {
		parts = append(parts, "label "+l.Key+"="+l.Value)
	}
	switch s.Kind {
	case image.SelectCgroup:
		return "cgroup " + s.Path
	case image.SelectUnit:
		return "systemdUnit " + s.Path
	case image.SelectKubernetes:
		return "kubernetes " + strings.Join(parts, ", ")
	}
	return "container " + strings.Join(parts, ", ")
}

func (s *service) zones() ([]api.Zone, error) {
	var out []api.Zone
	err := s.inForce(func(names *flow.Names, bound map[uint64]uint32, _ string) {
		img := names.Image
		zoneOf := map[uint32]uint16{uint32(image.Unmanaged): img.UnmanagedZone}
		for i, z := range img.Zones {
			out = append(out, api.Zone{Name: z.Name, Trust: z.Trust, Unmanaged: i == int(img.UnmanagedZone)})
		}
		for _, w := range img.Workloads {
			zoneOf[uint32(w.ID)] = w.Zone
			out[w.Zone].Workloads = append(out[w.Zone].Workloads, w.Name)
		}
		for _, n := range img.Networks {
			out[n.Zone].Networks = append(out[n.Zone].Networks, n.Name)
		}
		for _, id := range bound {
			if z, ok := zoneOf[id]; ok && image.ID(id) != image.Unmanaged {
				out[z].Bindings++
			}
		}
		slices.SortStableFunc(out, func(a, b api.Zone) int { return cmp.Compare(a.Trust, b.Trust) })
	})
	return out, err
}

// image sends the active image as it is.
func (s *service) image(w http.ResponseWriter, r *http.Request) {
	err := s.link.with(func(c core) error {
		f, err := c.Image()
		if err != nil {
			return err
		}
		defer f.Close()
		b, err := readImage(f)
		if err != nil {
			return err
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		_, _ = w.Write(b) // the caller has gone; that is no fault of the core
		return nil
	})
	if err != nil {
		refuse(w, err)
	}
}

// audit sends the core's audit log as it is.
func (s *service) audit(w http.ResponseWriter, r *http.Request) {
	err := s.link.with(func(c core) error {
		head, files, err := c.Audit()
		if err != nil {
			return err
		}
		defer proto.CloseFiles(files)
		w.Header().Set("Content-Type", "application/jsonl")
		w.Header().Set(api.AuditSeq, strconv.FormatUint(head.Seq, 10))
		w.Header().Set(api.AuditHash, head.Hash)
		for _, f := range files {
			if _, err := io.Copy(w, f); err != nil {
				break // the caller has gone; that is no fault of the core
			}
		}
		return nil
	})
	if err != nil {
		refuse(w, err)
	}
}

// receive reads the image in a request's body, and makes a file of it for the core.
func receive(w http.ResponseWriter, r *http.Request) ([]byte, *os.File, error) {
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(bodyTimeout))
	var body bytes.Buffer
	body.Grow(int(min(max(r.ContentLength, 0), envelope.MaxSize)) + bytes.MinRead)
	_, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, envelope.MaxSize))
	b := body.Bytes()
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, nil, &api.Error{Code: http.StatusRequestEntityTooLarge, Message: fmt.Sprintf("the image is larger than %d bytes", envelope.MaxSize)}
	case err != nil:
		return nil, nil, &api.Error{Code: http.StatusBadRequest, Message: "read image: " + err.Error()}
	}
	f, err := memfd(b)
	return b, f, err
}

// offered is the image in a request's body, if it is good, and a file with it for the
// core. Verified has somebody else verify the file; if he does not, so does the agent.
func (s *service) offered(w http.ResponseWriter, r *http.Request, verified func(*os.File) error) (title, *os.File, error) {
	b, f, err := receive(w, r)
	if err != nil {
		return title{}, nil, err
	}
	var bad error
	done := make(chan struct{})
	go func() { bad = verified(f); close(done) }()
	t, err := s.judge(b, func() error { <-done; return bad })
	<-done // the file is in use until then
	if err != nil {
		f.Close()
		return title{}, nil, &api.Error{Code: http.StatusUnprocessableEntity, Message: err.Error(), Hint: "build the image again with: demarc policy build FILE -o IMAGE"}
	}
	return t, f, nil
}

// prepare has the core verify an image that is not in force by that, and make it ready
// behind its answer.
func (s *service) prepare(f *os.File) error {
	return s.link.with(func(c core) error { return c.Prepare(f) })
}

// errNotAsked means that nobody else verifies an image.
var errNotAsked = errors.New("not asked")

func notAsked(*os.File) error { return errNotAsked }

// preview has the core look at an image, and changes nothing.
func (s *service) preview(w http.ResponseWriter, r *http.Request) (any, error) {
	own, err := ownConnections(r.URL.Query()["own"])
	if err != nil {
		return nil, err
	}
	_, f, err := s.offered(w, r, notAsked)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var p *proto.Preview
	err = s.link.with(func(c core) (err error) {
		p, err = c.Preview(f, own)
		return err
	})
	return p, err
}

// ownConnections reads what a caller says are his own connections.
func ownConnections(all []string) (own proto.Own, err error) {
	if len(all) > len(own) {
		return own, &api.Error{Code: http.StatusBadRequest, Message: fmt.Sprintf("own: %d connections, at most %d", len(all), len(own)), Hint: "name the one through which this is asked"}
	}
	for i, text := range all {
		local, remote, _ := strings.Cut(text, ",")
		own[i].Local, err = netip.ParseAddrPort(local)
		if err == nil {
			own[i].Remote, err = netip.ParseAddrPort(remote)
		}
		if err != nil {
			return own, &api.Error{Code: http.StatusBadRequest, Message: fmt.Sprintf("own: %.100q is not two ends of a connection", text), Hint: "give them like 192.0.2.1:22,192.0.2.9:50112"}
		}
	}
	return own, nil
}

// apply hands an image to the core, twice: to be verified and made ready, and, when the
// agent has found that it decides as it declares, to come into force. What the core does not
// verify, the agent does, to name what is wrong with a bad file; the core believes nothing of
// that.
func (s *service) apply(w http.ResponseWriter, r *http.Request) (any, error) {
	var within, spare time.Duration
	for name, d := range map[string]*time.Duration{"within": &within, "grandfather": &spare} {
		text := r.URL.Query().Get(name)
		if text == "" {
			continue
		}
		var err error
		if *d, err = time.ParseDuration(text); err != nil || *d < 0 {
			return nil, &api.Error{Code: http.StatusBadRequest, Message: fmt.Sprintf("%s: %.40q is not a time", name, text), Hint: "give one like 60s"}
		}
	}
	start := time.Now()
	previewed := r.URL.Query().Get("previewed")
	if previewed != "" && !s.checked.is(previewed) { // the core may have one ready that is not good
		return nil, &api.Error{Code: http.StatusUnprocessableEntity, Message: fmt.Sprintf("no image with digest %.64q was just previewed", previewed), Hint: "apply the image itself"}
	}
	t, put := title{}, func(c core) (*proto.Status, error) { return c.ApplyPreviewed(previewed, within, spare) }
	if previewed == "" {
		var f *os.File
		var err error
		if t, f, err = s.offered(w, r, s.prepare); err != nil {
			s.metrics.count(0, 0, err)
			return nil, err
		}
		defer f.Close()
		put = func(c core) (*proto.Status, error) { return c.ApplySparing(f, within, spare) }
	}
	offered := time.Now()
	s.log.Info("apply", zap.String("name", t.name), zap.Uint64("version", t.version), zap.String("previewed", previewed), zap.Duration("within", within), zap.Duration("grandfather", spare), zap.Uint32("uid", uid(r)))
	err := s.link.change(put)
	s.metrics.count(offered.Sub(start), time.Since(offered), err)
	if err != nil {
		s.log.Warn("apply refused", zap.Error(err))
		return nil, err
	}
	return s.status(), nil
}

func (s *service) confirm(_ http.ResponseWriter, r *http.Request) (any, error) {
	s.log.Info("confirm", zap.Uint32("uid", uid(r)))
	if err := s.link.change(core.Confirm); err != nil {
		s.log.Warn("confirmation refused", zap.Error(err))
		return nil, err
	}
	return s.status(), nil
}

func (s *service) rollback(_ http.ResponseWriter, r *http.Request) (any, error) {
	s.log.Info("roll back", zap.Uint32("uid", uid(r)))
	if err := s.link.change(core.Rollback); err != nil {
		s.log.Warn("rollback refused", zap.Error(err))
		return nil, err
	}
	return s.status(), nil
}

func uid(r *http.Request) uint32 {
	if cred := callerOf(r); cred != nil {
		return cred.Uid
	}
	return nobody
}

// memfd is an unnamed file with b, sealed so that it cannot change while the core
// reads it.
func memfd(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("demarc-image", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "demarc-image")
	if _, err := f.WriteAt(b, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("write memory file: %w", err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		f.Close()
		return nil, fmt.Errorf("seal memory file: %w", err)
	}
	return f, nil
}
