package journal

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open is a journal over a store of its own.
func open(t *testing.T, dir string, size int64) (*Journal, *flow.Store) {
	t.Helper()
	store := flow.NewStore(4096)
	j, err := Open(Options{Dir: dir, MaxSize: size, Store: store, Log: zap.NewNop(),
		Resolver: &flow.Resolver{Node: "n1", Book: &flow.Book{}, Wall: func(boot uint64) time.Time { return time.Unix(1000, int64(boot)).UTC() }}})
	if err != nil {
		t.Fatal(err)
	}
	return j, store
}

// denied is an event of a CPU; its time is its number.
func denied(cpu uint32, seq uint64) *record.Event {
	return &record.Event{Kind: record.EventVerdict, Time: seq, Seq: seq, CPU: cpu, Hook: record.HookConnect, Reason: abi.NoCrossingFor, Tuple: abi.Tuple{Proto: 6, DestinationPort: 22}}
}

// run has a journal write until the returned function is called. Its rings are 7 and 8,
// of two CPUs each.
func run(t *testing.T, j *Journal) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- j.Run(ctx) }()
	for ring, number := range []uint64{7, 8} {
		if id, _ := j.Resume(ring); id != number {
			j.Born(ctx, []Birth{{Ring: ring, Number: number, Last: []uint64{0, 0}, Read: true}})
		}
	}
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// content is what a reader gets, in short: "1-3 lost 2 6" are three flows, a loss of
// two, and one flow.
func content(t *testing.T, j *Journal, since, until time.Time) string {
	t.Helper()
	var out []string
	var from, to uint64
	end := func() {
		switch {
		case from == 0:
		case from == to:
			out = append(out, fmt.Sprint(from))
		default:
			out = append(out, fmt.Sprintf("%d-%d", from, to))
		}
		from = 0
	}
	_, err := j.Read(t.Context(), since, until, func(f *flow.Flow) error {
		if from == 0 || f.Seq != to+1 {
			end()
			from = f.Seq
		}
		to = f.Seq
		return nil
	}, func(l flow.Loss) error {
		end()
		out = append(out, fmt.Sprintf("lost %d", l.Journal))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	end()
	return strings.Join(out, " ")
}

var always time.Time

func TestJournalKeepsWhatComes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	j, store := open(t, dir, MinSize)
	stop := run(t, j)
	for seq := range uint64(3) {
		store.Add(record.RingDenied, denied(0, seq+1))
	}
	if got := content(t, j, always, always); got != "1-3" {
		t.Errorf("first: %q", got)
	}
	store.Missed(record.RingDenied, 2)
	store.Add(record.RingDenied, denied(0, 6))
	if got := content(t, j, always, always); got != "1-3 lost 2 6" {
		t.Errorf("with a loss: %q", got)
	}
	for _, c := range []struct {
		name         string
		since, until time.Time
		want         string
	}{
		{"OK since", time.Unix(1000, 5), always, "lost 2 6"},
		{"OK until", always, time.Unix(1000, 4), "1-3"},
		{"OK later", time.Unix(1001, 0), always, ""},
	} {
		if got := content(t, j, c.since, c.until); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	if _, err := Open(j.Options); err == nil || err.Error() != "open journal: "+dir+" is in use by another agent" {
		t.Errorf("opened twice: %v", err)
	}
	stop()
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}

	// Another agent goes on where this one ended.
	j, store = open(t, dir, MinSize)
	for ring, want := range []uint64{7, 8} {
		id, places := j.Resume(ring)
		if d := cmp.Diff([][]Place{{{0, 6}, {1, 0}}, {{0, 0}, {1, 0}}}[ring], places); id != want || d != "" {
			t.Errorf("resume ring %d: id %d (-want +got):\n%s", ring, id, d)
		}
	}
	stop = run(t, j)
	store.Add(record.RingDenied, denied(1, 1))
	if got := content(t, j, always, always); got != "1-3 lost 2 6 1" {
		t.Errorf("after a start: %q", got)
	}
	stop()
	// What was read before is not forgotten, though this agent saw another CPU only.
	j, _ = open(t, dir, MinSize)
	if _, places := j.Resume(record.RingDenied); !cmp.Equal(places, []Place{{0, 6}, {1, 1}}) {
		t.Errorf("resume: %v", places)
	}
	run(t, j)()
}

// TestReaderMeetsTheStore has a query span the journal and what is not in it yet.
func TestReaderMeetsTheStore(t *testing.T) {
	j, store := open(t, t.TempDir(), MinSize)
	defer run(t, j)()
	for seq := range uint64(5000) { // more than the store holds
		store.Add(record.RingDenied, denied(0, seq+1))
		if seq%1000 == 0 {
			content(t, j, always, always)
		}
	}
	q := flow.Query{Last: -1, Since: time.Unix(1, 0)}
	s := &sink{}
	if err := q.Run(t.Context(), store, j, j.Resolver, s); err != nil {
		t.Fatal(err)
	}
	if s.flows != 5000 || s.lost != 0 || s.disorder {
		t.Errorf("%+v", s)
	}
}

type sink struct {
	flows, lost, last uint64
	disorder          bool
}

func (s *sink) Flow(f *flow.Flow) error {
	s.flows++
	s.disorder = s.disorder || f.Seq != s.last+1
	s.last = f.Seq
	return nil
}
func (s *sink) Lost(l flow.Loss) error { s.lost += l.Total(); return nil }
func (s *sink) Flush() error           { return nil }

func TestJournalIsBounded(t *testing.T) {
	dir := t.TempDir()
	j, store := open(t, dir, MinSize)
	stop := run(t, j)
	if err := os.WriteFile(filepath.Join(dir, "other"), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	last := uint64(0)
	for j.State().Flows < 60_000 {
		for range 2000 {
			last++
			e := denied(0, last)
			for i := range e.Tuple.Source { // so that it does not shrink much
				e.Tuple.Source[i] = byte(last * uint64(i+7) >> (i % 5))
			}
			e.Tuple.SourcePort, e.PID = uint16(last*7919), uint32(last*104729)
			store.Add(record.RingDenied, e)
		}
		content(t, j, time.Unix(2000, 0), always) // commits
	}
	if s := j.State(); s.Bytes > MinSize || s.Bytes < MinSize/2 || s.Dropped != 0 || s.Problem != "" {
		t.Errorf("%+v", s)
	}
	got := content(t, j, always, always)
	if from, to, ok := strings.Cut(got, "-"); !ok || to != fmt.Sprint(last) || from == "1" {
		t.Errorf("content %q, want the newest up to %d", got, last)
	}
	stop()
	if b, err := os.ReadFile(filepath.Join(dir, "other")); err != nil || string(b) != "mine" {
		t.Errorf("another file: %q, %v", b, err)
	}
}

// TestDamage has every byte of a journal of three blocks be another one, and every
// length be its end: what is missing is always told exactly, and nothing else is wrong.
func TestDamage(t *testing.T) {
	dir := t.TempDir()
	j, store := open(t, dir, MinSize)
	stop := run(t, j)
	seq := uint64(0)
	for round := range 3 {
		if round == 1 { // of the block that may be damaged
			store.Missed(record.RingDenied, 3)
		}
		for range 5 {
			seq++
			store.Add(record.RingDenied, denied(0, seq))
		}
		content(t, j, always, always)
	}
	names, err := j.segments()
	if err != nil || len(names) != 1 {
		t.Fatalf("segments %v, %v", names, err)
	}
	path := filepath.Join(dir, names[0])
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	possible := map[string]int{}
	for i := range whole {
		b := bytes.Clone(whole)
		b[i] ^= 0x55
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		possible[content(t, j, always, always)]++
	}
	for got := range possible {
		switch got {
		case "1-5 lost 3 6-15": // in a block that tells of places only
		case "lost 8 6-15", "1-5 lost 8 11-15", "1-5 lost 3 6-10 lost 5":
		default:
			t.Errorf("one byte changed: %q", got)
		}
	}
	if len(possible) != 4 {
		t.Errorf("one byte changed: %v", possible)
	}
	stop()

	for n := range whole {
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		var flows uint64
		err := scan(bytes.NewReader(whole[:n]), func(b *block) error {
			flows += uint64(b.Count)
			return b.flows(func(*flow.Flow) error { return nil })
		})
		if err != nil || flows%5 != 0 || flows >= 15 {
			t.Fatalf("cut at %d: %d flows, %v", n, flows, err)
		}
	}
	// The next agent goes on from the last whole block.
	j, _ = open(t, dir, MinSize)
	if _, places := j.Resume(record.RingDenied); j.next != 10 || !cmp.Equal(places, []Place{{0, 10}, {1, 0}}) {
		t.Errorf("after a torn block: %d, %v", j.next, places)
	}
	run(t, j)()
}

// TestFullDisk has a disk that fills up and gets room again. It needs root, to mount one.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root, to mount a small disk")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=128k"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	j, store := open(t, filepath.Join(dir, "journal"), MinSize)
	stop := run(t, j)
	seq := uint64(0)
	add := func(n int) {
		for range n {
			seq++
			store.Add(record.RingDenied, denied(0, seq))
		}
		content(t, j, time.Unix(2000, 0), always) // commits
	}
	add(10)
	ballast := filepath.Join(dir, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	f.Close()
	for j.State().Dropped == 0 { // what is left of the last page
		add(200)
	}
	lost := j.State().Dropped
	if s := j.State(); !strings.Contains(s.Problem, "no space left on device") {
		t.Errorf("problem %q", s.Problem)
	}
	written := j.State().Flows
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	add(5)
	want := fmt.Sprintf("1-%d lost %d %d-%d", written, lost, seq-4, seq)
	if got := content(t, j, always, always); got != want || j.State().Problem != "" {
		t.Errorf("content %q, want %q; %+v", got, want, j.State())
	}
	stop()
}

// FuzzScan gives any bytes to the reader.
func FuzzScan(f *testing.F) {
	f.Add([]byte("dmj2"))
	f.Add(encode(header{Count: 1, Text: 3}, []place{{0, 1, 2}}, []byte("abc")))
	f.Fuzz(func(t *testing.T, b []byte) {
		err := scan(bytes.NewReader(b), func(b *block) error {
			_ = b.flows(func(f *flow.Flow) error {
				if strings.ContainsFunc(f.Comm+f.Node+f.Source.Workload, func(r rune) bool { return r < 0x20 || r > 0x7e }) {
					t.Errorf("%q", f.Comm)
				}
				return nil
			})
			return nil
		})
		if err != nil {
			t.Errorf("scan: %v", err)
		}
	})
}
