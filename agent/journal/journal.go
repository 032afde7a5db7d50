package journal

import (
	"bytes"
	"cmp"
	"compress/flate"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi/record"
)

// Sizes and times of a journal.
const (
	MinSize     = 1 << 20 // bytes that a journal may be bounded to, at least
	segments    = 8       // that its size is cut into: what goes at a time, when it is full
	blockText   = 256 << 10
	commitEvery = time.Second // what a crash may take
	suffix      = ".flows"
)

// Options say what a journal is of.
type Options struct {
	Dir      string
	MaxSize  int64 // bytes of all segments
	Store    *flow.Store
	Resolver *flow.Resolver
	Log      *zap.Logger
}

// Birth is a ring of the kernel's that is about to be read for the first time.
type Birth struct {
	Ring   int
	Number uint64   // tells it from all others; 0 = not known
	Last   []uint64 // numbers of the last event of each CPU
	Read   bool     // all of them were read by somebody, none is left in the ring
}

type births struct {
	rings []Birth
	done  chan struct{}
}

// Place is how far one CPU's events of a ring are on disk.
type Place struct {
	CPU uint32
	Seq uint64
}

// Journal writes what comes into a store, and reads it back. It is a task; Read may be
// called at the same time.
type Journal struct {
	Options
	dir    *os.File // locked while the journal is open
	ready  chan struct{}
	flush  chan chan struct{} // asks for a commit of what there is
	births chan births
	resume [record.Rings]ringPlaces

	// Of the writer.
	cursor *flow.Cursor
	text   []byte
	json   flow.JSON // of that text
	head   header
	zip    *flate.Writer
	at     [record.Rings]map[uint32]uint64 // events taken, by CPU
	rings  [record.Rings]uint64

	mu      sync.Mutex
	file    *os.File
	name    string
	size    int64        // of the segment, committed
	next    uint64       // number of the next flow
	ever    uint64       // flows that are missing before it, as blocks on disk say
	done    *flow.Cursor // behind the last event that is on disk
	dropped uint64       // flows that found no room on disk, ever
	problem string
}

type ringPlaces struct {
	ring   uint64
	places []Place
}

// Open makes or opens a journal, which nobody else may write to, and looks where it
// ends. Old segments are left as they are.
func Open(o Options) (*Journal, error) {
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	dir, err := os.Open(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		return nil, fmt.Errorf("open journal: %s is in use by another agent", o.Dir)
	}
	zip, err := flate.NewWriter(nil, flate.BestSpeed)
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("open journal: %w", err)
	}
	j := &Journal{Options: o, dir: dir, zip: zip, ready: make(chan struct{}), flush: make(chan chan struct{}), births: make(chan births), cursor: o.Store.Oldest()}
	for i := range j.at {
		j.at[i] = map[uint32]uint64{}
	}
	done := *j.cursor
	j.done = &done
	names, err := j.segments()
	if err != nil {
		dir.Close()
		return nil, err
	}
	// The newest block may be in an older segment, if the last one has none.
	for _, name := range slices.Backward(names) {
		var last *block
		err := j.blocks(name, -1, func(b *block) error { last = b; return nil })
		if err != nil {
			dir.Close()
			return nil, err
		}
		if last == nil {
			continue
		}
		j.next, j.ever = last.Index+uint64(last.Count), last.Ever
		for i := range j.resume {
			j.resume[i].ring, j.rings[i] = last.Rings[i], last.Rings[i]
		}
		for _, p := range last.places {
			if p.Ring < record.Rings {
				r := &j.resume[p.Ring]
				r.places = append(r.places, Place{p.CPU, p.Seq})
				j.at[p.Ring][p.CPU] = p.Seq
			}
		}
		break
	}
	return j, nil
}

// Resume tells up to which events a ring was on disk when the journal was opened.
func (j *Journal) Resume(ring int) (id uint64, places []Place) {
	return j.resume[ring].ring, j.resume[ring].places
}

func (j *Journal) Ready() <-chan struct{} { return j.ready }
func (j *Journal) String() string         { return "journal" }

// Run writes until ctx ends; it then puts what there is on disk. A disk that takes
// nothing ends nothing: what finds no room is counted.
func (j *Journal) Run(ctx context.Context) error {
	defer j.dir.Close()
	close(j.ready)
	tick := time.NewTicker(commitEvery)
	defer tick.Stop()
	for {
		j.take()
		select {
		case <-ctx.Done():
			j.take()
			j.commit()
			return j.closeSegment()
		case <-tick.C:
			j.commit()
		case asked := <-j.flush:
			j.take()
			j.commit()
			close(asked)
		case b := <-j.births:
			j.take()
			j.commit()
			j.born(b.rings)
			close(b.done)
		case <-j.cursor.Changed():
		}
	}
}

// take puts what is in the store into the block, and a full block on disk.
func (j *Journal) take() {
	var events [256]record.Event
	var f flow.Flow
	for {
		n, lost := j.cursor.Read(events[:])
		j.head.Lost += lost.Total()
		if n == 0 {
			return
		}
		for i := range events[:n] {
			e := &events[i]
			j.Resolver.Resolve(e, &f)
			at := f.Time.UnixNano()
			if j.head.Count == 0 || at < j.head.First {
				j.head.First = at
			}
			if j.head.Count == 0 || at > j.head.Last {
				j.head.Last = at
			}
			j.text = append(j.json.Append(j.text, &f), '\n')
			j.head.Count++
			cpus := j.at[flow.Ring(e.Verdict)]
			cpus[e.CPU] = max(cpus[e.CPU], e.Seq)
		}
		if len(j.text) >= blockText {
			j.commit()
		}
	}
}

// commit puts the block on disk, or counts it as lost.
func (j *Journal) commit() {
	if j.head.Count == 0 {
		return
	}
	var body bytes.Buffer
	j.zip.Reset(&body)
	_, err := j.zip.Write(j.text)
	if err == nil {
		err = j.zip.Close()
	}
	h := j.head
	h.Text, h.Rings = uint32(len(j.text)), j.rings
	places := j.places()
	j.mu.Lock()
	defer j.mu.Unlock()
	h.Index, h.Ever = j.next, j.ever+h.Lost
	if err == nil {
		err = j.write(encode(h, places, body.Bytes()))
	}
	j.text = j.text[:0]
	if err != nil {
		if j.problem == "" {
			j.Log.Warn("journal", zap.Error(err))
		}
		j.problem = "journal: " + err.Error()
		j.dropped += uint64(h.Count)
		j.head = header{Lost: h.Lost + uint64(h.Count)}
		return
	}
	if j.problem != "" {
		j.Log.Info("journal is written again", zap.Uint64("missing", h.Lost))
	}
	j.problem, j.head = "", header{}
	j.next, j.ever = j.next+uint64(h.Count), h.Ever
	done := *j.cursor
	j.done = &done
}

// Born notes where rings begin that are new, so that what a crash takes of them is known
// from their first event on. It returns when that is on disk, or cannot be.
func (j *Journal) Born(ctx context.Context, rings []Birth) {
	if len(rings) == 0 {
		return
	}
	b := births{rings, make(chan struct{})}
	select {
	case j.births <- b:
		<-b.done
	case <-ctx.Done():
	}
}

func (j *Journal) born(rings []Birth) {
	for _, b := range rings {
		j.rings[b.Ring] = b.Number
		clear(j.at[b.Ring])
		for cpu, last := range b.Last {
			if last == 0 || b.Read { // what waits in the ring is neither lost nor on disk
				j.at[b.Ring][uint32(cpu)] = last
			}
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.write(encode(header{Index: j.next, Ever: j.ever, Rings: j.rings}, j.places(), nil)); err != nil {
		j.problem = "journal: " + err.Error()
		j.Log.Warn("journal", zap.Error(err))
	}
}

// places are those of all rings, in order.
func (j *Journal) places() (places []place) {
	for ring, cpus := range j.at {
		for cpu, seq := range cpus {
			places = append(places, place{uint32(ring), cpu, seq})
		}
	}
	slices.SortFunc(places, func(a, b place) int { return cmp.Or(cmp.Compare(a.Ring, b.Ring), cmp.Compare(a.CPU, b.CPU)) })
	return places
}

// write adds a block to the segment, or to a new one; on an error nothing of it stays.
// It is called with the journal locked.
func (j *Journal) write(b []byte) error {
	if j.file != nil && j.size+int64(len(b)) > j.MaxSize/segments {
		if err := j.closeSegment(); err != nil {
			return err
		}
	}
	if j.file == nil {
		if err := j.makeRoom(int64(len(b))); err != nil {
			return err
		}
		name := fmt.Sprintf("%020d%s", j.next, suffix)
		f, err := os.OpenFile(filepath.Join(j.Dir, name), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		j.file, j.name, j.size = f, name, 0
	}
	n, err := j.file.WriteAt(b, j.size)
	if err == nil {
		err = unix.Fdatasync(int(j.file.Fd()))
	}
	if err != nil {
		if n > 0 {
			err = errors.Join(err, j.file.Truncate(j.size))
		}
		return err
	}
	j.size += int64(len(b))
	return nil
}

// makeRoom removes the oldest segments until another one finds room.
func (j *Journal) makeRoom(first int64) error {
	names, err := j.segments()
	if err != nil {
		return err
	}
	var total int64
	sizes := make([]int64, len(names))
	for i, name := range names {
		info, err := os.Stat(filepath.Join(j.Dir, name))
		if err != nil {
			return err
		}
		sizes[i] = info.Size()
		total += sizes[i]
	}
	for i, name := range names {
		if total+max(first, j.MaxSize/segments) <= j.MaxSize {
			break
		}
		if err := os.Remove(filepath.Join(j.Dir, name)); err != nil {
			return err
		}
		total -= sizes[i]
	}
	return nil
}

func (j *Journal) closeSegment() error {
	if j.file == nil {
		return nil
	}
	err := j.file.Close()
	j.file, j.name, j.size = nil, "", 0
	return err
}

// segments lists the files of the journal, oldest first. Other files are left alone.
func (j *Journal) segments() ([]string, error) {
	entries, err := os.ReadDir(j.Dir)
	if err != nil {
		return nil, fmt.Errorf("list journal: %w", err)
	}
	var names []string
	for _, e := range entries {
		number, ok := strings.CutSuffix(e.Name(), suffix)
		if _, err := strconv.ParseUint(number, 10, 64); ok && err == nil && len(number) == 20 && e.Type().IsRegular() {
			names = append(names, e.Name())
		}
	}
	return names, nil // ReadDir sorts, and the numbers have leading zeros
}

// number of a segment's first flow.
func number(name string) uint64 {
	n, _ := strconv.ParseUint(strings.TrimSuffix(name, suffix), 10, 64) // segments looked
	return n
}

// State is what a journal has to say of itself.
type State struct {
	Bytes   int64
	Flows   uint64 // written, ever
	Dropped uint64 // since the start: found no room on disk
	Problem string // why the last block was not written; "" = it was
}

// State looks at the journal.
func (j *Journal) State() State {
	j.mu.Lock()
	defer j.mu.Unlock()
	s := State{Flows: j.next, Dropped: j.dropped, Problem: j.problem}
	names, err := j.segments()
	if err != nil {
		s.Problem = cmp.Or(s.Problem, err.Error())
	}
	for _, name := range names {
		if info, err := os.Stat(filepath.Join(j.Dir, name)); err == nil {
			s.Bytes += info.Size()
		}
	}
	return s
}

// blocks hands on the blocks of a segment's first limit bytes; -1 = all of it. What is
// damaged is passed over, up to the next block.
func (j *Journal) blocks(name string, limit int64, take func(*block) error) error {
	f, err := os.Open(filepath.Join(j.Dir, name))
	if err != nil {
		return fmt.Errorf("read journal: %w", err)
	}
	defer f.Close()
	if limit < 0 {
		limit = 1 << 62
	}
	return scan(io.LimitReader(f, limit), take)
}

// scan hands on the blocks of a stream in memory that is bounded by the largest block.
func scan(r io.Reader, take func(*block) error) error {
	var b []byte
	end := false
	for {
		for !end && len(b) < headerSize+maxPlaces*placeSize+maxBody {
			// Enough for the next block is enough.
			if h, err := peek(b); err == nil && h.size() <= len(b) {
				break
			}
			n := len(b)
			b = slices.Grow(b, 64<<10)
			m, err := r.Read(b[n : n+64<<10])
			b = b[:n+m]
			switch {
			case errors.Is(err, io.EOF):
				end = true
			case err != nil:
				return fmt.Errorf("read journal: %w", err)
			}
		}
		if len(b) == 0 {
			return nil
		}
		block, err := decode(b)
		if err != nil {
			next := bytes.Index(b[1:], magic[:])
			switch {
			case next >= 0:
				b = b[1+next:]
			case end:
				return nil
			default: // the magic's beginning may be at the end
				b = b[len(b)-len(magic)+1:]
			}
			continue
		}
		if err := take(block); err != nil {
			return err
		}
		b = slices.Clone(b[block.size():])
	}
}

// peek reads a header whose sizes are within the bounds.
func peek(b []byte) (*header, error) {
	if len(b) < headerSize {
		return nil, errDamaged
	}
	var h header
	if h.Magic = [4]byte(b); h.Magic != magic {
		return &h, nil // no block: decode says so at once
	}
	h.Body = le32(b[8:])
	h.Places = le32(b[20:])
	if h.Body > maxBody || h.Places > maxPlaces {
		h.Body, h.Places = 0, 0
	}
	return &h, nil
}

func le32(b []byte) uint32 {
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}
