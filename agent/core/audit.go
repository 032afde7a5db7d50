package core

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/audit"
	"github.com/demarc/demarc/agent/core/proto"
)

// What the audit log tells.
const (
	auditStart      = "start"
	auditStop       = "stop"
	auditDetach     = "detach"
	auditConnected  = "connected" // somebody said hello on the socket
	auditApply      = "apply"     // an image is about to be put in force
	auditRollback   = "rollback"  // the same, the previous one
	auditShadow     = "shadow"    // an image is about to be asked beside the one in force
	auditShadowEnd  = "unshadow"  // it is not any more
	auditConfirm    = "confirm"   // a change is about to be kept
	auditFallback   = "fallback"  // one was taken back; the policy is what decides now
	auditApplied    = "applied"   // it is in force
	auditFailed     = "failed"    // it is not, and nothing has changed
	auditRefused    = "refused"   // nothing was tried
	auditKeys       = "keys"
	auditQuarantine = "quarantine" // an identity is about to have its forensic crossings only
	auditRelease    = "release"    // it is about to have all of them again, or has
	auditDrift      = "drift"      // the kernel held something else than this core put there
	auditProblem    = "problem"
	auditHealthy    = "healthy"
	auditRotated    = "rotated"
)

const (
	auditBytes = 4 << 20 // of one file
	auditFiles = 6       // that are kept beside the one that is written
	// auditSpare is how many records of peers may come at once; one a second comes
	// back. Whoever may talk to the core could otherwise push out what came before.
	auditSpare = 60
	// auditTrouble is the part of the upkeep that the log itself is.
	auditTrouble = "audit log"
)

// journal appends to the audit log. The log ends where the kernel says, too, so that
// it cannot be cut short while nobody looks.
//
//	STATE_DIR/audit.log                the newest records
//	STATE_DIR/audit-000000000123.log   older ones, by the number of their last
type journal struct {
	dir    string
	file   *os.File // nil = it could not be opened
	kernel *ebpf.Map
	head   audit.Head
	wrote  unix.Stat_t // the file as the last record left it
	fresh  bool        // the kernel did not know where the log ends
	spare  int         // records that peers may still cause
	muted  uint64      // that they could not
	lost   uint64      // records that could not be written
}

var journalSpec = ebpf.MapSpec{Name: "audit", Type: ebpf.Array, KeySize: 4, ValueSize: 40, MaxEntries: 1}

func (p pins) audit() string { return filepath.Join(p.dir, "audit") }

func (j *journal) path() string { return filepath.Join(j.dir, "audit.log") }

// openJournal goes on where the log ends. It returns what is wrong with it, which is
// no reason not to go on: the chain breaks there for good, and everybody can see it.
func openJournal(dir string, p pins, adopted bool) (_ *journal, broken error, err error) {
	var kernel *ebpf.Map
	if adopted && !missing(p.audit()) { // a former core may have had none
		kernel, err = openPinnedMap(p.audit(), &journalSpec)
	} else {
		kernel, err = pinMap(p.audit(), &journalSpec, audit.Head{})
	}
	if err != nil {
		return nil, nil, err
	}
	j := &journal{dir: dir, kernel: kernel, spare: auditSpare}
	last, prev, broken := j.end()
	if err := kernel.Lookup(uint32(0), &j.head); err != nil {
		kernel.Close()
		return nil, nil, fmt.Errorf("read end of the audit log: %w", err)
	}
	j.fresh = j.head.Seq == 0
	switch {
	// A core that ended between writing the line and telling the kernel.
	case j.head == last, j.fresh, last.Seq == j.head.Seq+1 && prev == hex.EncodeToString(j.head.Hash[:]):
		j.head = last
	case broken == nil:
		broken = fmt.Errorf("audit log ends with record %d, but record %d was written", last.Seq, j.head.Seq)
	}
	_ = j.reopen() // the first record fails for the same reason, which is a problem then
	return j, broken, nil
}

// end finds the last line, and the hash of the one before it. A torn one was never
// acknowledged and is cut off.
func (j *journal) end() (last audit.Head, prev string, broken error) {
	files := append([]string{j.path()}, j.older()...)
	for _, name := range files {
		b, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return last, "", fmt.Errorf("read audit log: %w", err)
		}
		whole := bytes.LastIndexByte(b, '\n') + 1
		if whole < len(b) {
			if err := os.Truncate(name, int64(whole)); err != nil {
				return last, "", fmt.Errorf("cut torn record off: %w", err)
			}
		}
		if whole == 0 { // it was about to be begun
			continue
		}
		line := b[bytes.LastIndexByte(b[:whole-1], '\n')+1 : whole-1]
		r, head, err := audit.Parse(line)
		if err != nil {
			return last, "", fmt.Errorf("last line of %s: %w", name, err)
		}
		return head, r.Prev, nil
	}
	return last, "", nil
}

// older lists the files that are full, the newest first.
func (j *journal) older() []string {
	names, _ := filepath.Glob(filepath.Join(j.dir, "audit-*.log")) // the pattern is good
	slices.Sort(names)
	slices.Reverse(names)
	return names
}

func (j *journal) reopen() error {
	if j.file != nil {
		j.file.Close()
	}
	var err error
	j.file, err = os.OpenFile(j.path(), os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err == nil {
		err = errors.Join(unix.Fstat(int(j.file.Fd()), &j.wrote), (&store{dir: j.dir}).flush())
	}
	if err != nil {
		return fmt.Errorf("open audit log: %w", err)
	}
	return nil
}

// append writes one record to the disk, and then tells the kernel.
func (j *journal) append(r audit.Record) error {
	err := j.room()
	if err == nil {
		err = j.write(r)
	}
	if err != nil {
		j.lost++
		return fmt.Errorf("write audit log: %w", err)
	}
	return nil
}

func (j *journal) write(r audit.Record) error {
	r.Time = time.Now().UTC()
	if j.lost > 0 {
		r.Detail = strings.TrimPrefix(fmt.Sprintf("%s; %d records before this one could not be written", r.Detail, j.lost), "; ")
	}
	line, head, err := j.head.Line(r)
	if err != nil {
		return err
	}
	if _, err = j.file.Write(line); err == nil {
		err = j.file.Sync()
	}
	if err != nil {
		// Nothing of it may stay, or the next line would follow half a one.
		return errors.Join(err, j.file.Truncate(j.wrote.Size))
	}
	j.head, j.lost = head, 0
	return errors.Join(unix.Fstat(int(j.file.Fd()), &j.wrote), j.kernel.Put(uint32(0), j.head))
}

// room begins a new file when this one is full, and lets go of the oldest.
func (j *journal) room() error {
	if j.file == nil {
		return j.reopen()
	}
	if j.wrote.Size < auditBytes {
		return nil
	}
	if err := os.Rename(j.path(), filepath.Join(j.dir, fmt.Sprintf("audit-%012d.log", j.head.Seq))); err != nil {
		return err
	}
	if err := j.reopen(); err != nil {
		return err
	}
	r := audit.Record{What: auditRotated, Who: "core"}
	for i, name := range j.older() {
		if i < auditFiles {
			continue
		}
		if r.Removed == 0 {
			if _, err := fmt.Sscanf(filepath.Base(name), "audit-%d.log", &r.Removed); err != nil {
				continue // not one of ours
			}
		}
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	return j.write(r)
}

// drift says whether somebody else wrote to the log, and goes on in a new file where
// it is gone. The lines themselves tell what was changed: demarc audit verify.
func (j *journal) drift() error {
	if j.file == nil {
		return j.reopen()
	}
	var there unix.Stat_t
	if err := unix.Lstat(j.path(), &there); err != nil || there.Ino != j.wrote.Ino || there.Dev != j.wrote.Dev {
		return errors.Join(errors.New("the audit log is gone, or another file is in its place: a new one was begun"), j.reopen())
	}
	if there.Size != j.wrote.Size || there.Ctim != j.wrote.Ctim {
		before := j.wrote.Size
		j.wrote = there
		return fmt.Errorf("the audit log was changed by somebody else: it had %d bytes and has %d", before, there.Size)
	}
	var head audit.Head
	if err := j.kernel.Lookup(uint32(0), &head); err != nil || head != j.head {
		return errors.Join(errors.New("the audit log's end was changed in the kernel: it was put back"), err, j.kernel.Put(uint32(0), j.head))
	}
	return nil
}

// record notes what happened, by whom, to which generation; nil = to none. Where it
// fails, the log is a problem until it can be written again, and a change that is
// not begun yet is refused.
func (c *Core) record(by, what string, g *generation, format string, args ...any) error {
	if c.journal == nil {
		return nil
	}
	r := audit.Record{What: what, Who: by, Detail: fmt.Sprintf(format, args...)}
	r.Detail = r.Detail[:min(len(r.Detail), audit.MaxLine/8)] // escaped, a byte may take six
	if g != nil {
		r.Policy, r.Version, r.Digest = g.image.Name, g.image.Version, hex.EncodeToString(g.digest[:])
	}
	err := c.journal.append(r)
	if c.attend(auditTrouble, err); err != nil {
		return proto.Refuse("make room in state_dir, or mend its disk", "nothing is changed without a record of it: %w", err)
	}
	return nil
}

// peerRecord is record for what peers can cause as often as they like.
func (c *Core) peerRecord(by, what string, g *generation, format string, args ...any) {
	if c.journal == nil {
		return
	}
	if c.journal.spare == 0 {
		c.journal.muted++
		return
	}
	c.journal.spare--
	if n := c.journal.muted; n > 0 {
		format, args = format+"; %d more before this one were not recorded", append(args, n)
	}
	if c.record(by, what, g, format, args...) == nil {
		c.journal.muted = 0
	}
}

// String says what comes with a change.
func (how change) String() string {
	var parts []string
	if how.within > 0 {
		parts = append(parts, fmt.Sprintf("unless it is confirmed within %v, it is taken back", how.within))
	}
	if how.spare > 0 {
		parts = append(parts, fmt.Sprintf("live connections that it cuts go on for %v", how.spare))
	}
	return strings.Join(parts, "; ")
}

// outcome notes how a change ended that was recorded before it began.
func (c *Core) outcome(by string, g *generation, err error) {
	if err != nil {
		_ = c.record(by, auditFailed, g, "%v", err) // a problem of its own
		return
	}
	_ = c.record(by, auditApplied, g, "slot %d, epoch %d", g.slot, g.epoch)
}

// Audit opens the log for reading, the oldest file first, and says where it ends.
// The caller closes the files.
func (c *Core) Audit() (*proto.Audit, []*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var files []*os.File
	names := append([]string{c.journal.path()}, c.journal.older()...)
	slices.Reverse(names)
	for _, name := range names[max(0, len(names)-proto.MaxFiles):] {
		f, err := os.Open(name)
		if err != nil {
			proto.CloseFiles(files)
			return nil, nil, fmt.Errorf("open audit log: %w", err)
		}
		files = append(files, f)
	}
	return &proto.Audit{Seq: c.journal.head.Seq, Hash: hex.EncodeToString(c.journal.head.Hash[:])}, files, nil
}

// begun opens the log as the core starts, and notes that.
func (c *Core) begun() error {
	adopted := c.committed
	j, broken, err := openJournal(c.config.StateDir, c.pins, adopted)
	if err != nil {
		return err
	}
	c.journal = j
	if broken != nil {
		c.stand("%v: demarc audit verify", broken)
		_ = c.record("core", auditProblem, nil, "%v", broken)
	}
	detail := fmt.Sprintf("adopted %v", adopted)
	if adopted && c.journal.fresh {
		detail += "; the kernel did not know where the log ended"
	}
	_ = c.record("core", auditStart, nil, "%s", detail) // a problem of its own
	return nil
}

// greeted notes who said hello.
func (c *Core) greeted(by string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.peerRecord(by, auditConnected, nil, "")
}

// close gives up the file and the map. What is in them stays.
func (j *journal) close() {
	if j == nil {
		return
	}
	if j.file != nil {
		j.file.Close()
	}
	j.kernel.Close()
}

// detachRecord notes that enforcement ends, before it does. Nobody is kept from
// ending it by a full disk.
func detachRecord(dir string, p pins, committed bool) error {
	if !committed {
		return nil
	}
	j, broken, err := openJournal(dir, p, true)
	if err != nil {
		return err
	}
	defer j.close()
	detail := ""
	if broken != nil {
		detail = broken.Error()
	}
	return j.append(audit.Record{What: auditDetach, Who: fmt.Sprintf("user %d, process %d", os.Getuid(), os.Getpid()), Detail: detail})
}
