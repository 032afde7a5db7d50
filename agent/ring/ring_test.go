package ring

import (
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// kernel writes into a ring buffer as the kernel does: programs run in it.
type kernel struct {
	t              *testing.T
	write, discard *ebpf.Program
}

// recordSize is of the records that kernel writes; each begins with its number, from 1.
const recordSize = 100

// open makes a ring buffer and a reader of it. It needs root, as loading programs does.
func open(t *testing.T, size uint32) (*kernel, *Reader) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root, to load BPF programs")
	}
	ring, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: size})
	check(t, err)
	t.Cleanup(func() { ring.Close() })
	last, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	check(t, err)
	t.Cleanup(func() { last.Close() })
	program := func(code ...asm.Instruction) *ebpf.Program {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SocketFilter, License: "GPL", Instructions: code})
		check(t, err)
		t.Cleanup(func() { p.Close() })
		return p
	}
	room := []asm.Instruction{
		asm.LoadMapPtr(asm.R1, ring.FD()), asm.Mov.Imm(asm.R2, recordSize), asm.Mov.Imm(asm.R3, 0),
		asm.FnRingbufReserve.Call(),
		asm.JEq.Imm(asm.R0, 0, "full"),
		asm.Mov.Reg(asm.R6, asm.R0),
	}
	end := []asm.Instruction{asm.Mov.Imm(asm.R0, 0).WithSymbol("full"), asm.Return()}
	k := &kernel{t: t}
	k.write = program(append(append(room,
		asm.LoadMapValue(asm.R7, last.FD(), 0),
		asm.LoadMem(asm.R1, asm.R7, 0, asm.DWord), asm.Add.Imm(asm.R1, 1), asm.StoreMem(asm.R7, 0, asm.R1, asm.DWord),
		asm.StoreMem(asm.R6, 0, asm.R1, asm.DWord),
		asm.StoreMem(asm.R6, recordSize-4, asm.R1, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, 0), asm.FnRingbufSubmit.Call(),
	), end...)...)
	k.discard = program(append(append(room,
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, 0), asm.FnRingbufDiscard.Call(),
	), end...)...)
	fd, err := unix.FcntlInt(uintptr(ring.FD()), unix.F_DUPFD_CLOEXEC, 0)
	check(t, err)
	r, err := Open(fd, size)
	check(t, err)
	t.Cleanup(func() { r.Close() })
	return k, r
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (k *kernel) run(p *ebpf.Program, times int) {
	k.t.Helper()
	if _, err := p.Run(&ebpf.RunOptions{Data: make([]byte, 64), Repeat: uint32(times)}); err != nil {
		k.t.Fatal(err)
	}
}

// number is what a record says it is, at its start and at its end.
func number(t *testing.T, record []byte) uint64 {
	t.Helper()
	if len(record) != recordSize {
		t.Fatalf("a record of %d bytes, want %d", len(record), recordSize)
	}
	n := binary.NativeEndian.Uint64(record)
	if end := binary.NativeEndian.Uint32(record[recordSize-4:]); end != uint32(n) {
		t.Fatalf("record %d ends as %d", n, end)
	}
	return n
}

// Records come whole and in order, wherever the buffer and the window end, and those
// that were taken back do not come.
func TestRead(t *testing.T) {
	for _, tt := range []struct {
		name string
		size uint32
	}{
		{"buffer smaller than the window", 1 << 12},
		{"buffer of several windows", 4 * windowSize},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k, r := open(t, tt.size)
			burst := int(tt.size) / 3 / (recordSize + 12)
			var buf []byte
			want := uint64(1)
			for range 10 { // three times round
				k.run(k.write, burst)
				k.run(k.discard, 1)
				k.run(k.write, 1)
				if n, want := r.Available(), (burst+2)*(recordSize+12); n != want {
					t.Fatalf("%d bytes are there, want %d", n, want)
				}
				took := 0
				for i := range burst + 1 {
					record, more, found, err := r.Take(buf)
					if found {
						took++
					} else {
						check(t, err)
						record, more, err = r.Read(buf)
					}
					check(t, err)
					if n := number(t, record); n != want {
						t.Fatalf("record %d, want %d", n, want)
					}
					if more != (i < burst) {
						t.Fatalf("record %d of %d: more is %v", i, burst+1, more)
					}
					want++
					buf = record
				}
				// Only where the window moves it cannot be taken without waiting.
				if took == burst+1 && tt.size > windowSize || took < burst-1 {
					t.Errorf("%d of %d were taken without waiting", took, burst+1)
				}
				if _, _, found, err := r.Take(buf); found || err != nil {
					t.Errorf("one more was taken: %v", err)
				}
			}
		})
	}
}

// A reader that waits is woken, each time.
func TestWait(t *testing.T) {
	k, r := open(t, 1<<12)
	got := make(chan []byte)
	go func() {
		defer close(got)
		for {
			record, _, err := r.Read(nil)
			if err != nil {
				if !errors.Is(err, os.ErrClosed) {
					t.Error(err)
				}
				return
			}
			got <- record
		}
	}()
	for want := uint64(1); want <= 2000; want++ {
		if want%2 == 0 { // the one that wakes it may be one that is not for it
			k.run(k.discard, 1)
		}
		if want%100 == 0 { // it does wait
			time.Sleep(time.Millisecond)
		}
		k.run(k.write, 1)
		select {
		case record := <-got:
			if n := number(t, record); n != want {
				t.Fatalf("record %d, want %d", n, want)
			}
		case <-time.After(time.Minute):
			t.Fatalf("record %d never came", want)
		}
	}
	check(t, r.Close())
	if _, open := <-got; open {
		t.Error("a record after the end")
	}
	if _, _, err := r.Read(nil); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, _, found, err := r.Take(nil); found || err != nil {
		t.Errorf("closed: one was taken: %v", err)
	}
	if n := r.Available(); n != 0 {
		t.Errorf("closed: %d bytes are there", n)
	}
}

// Whatever is written at once, from all processors, comes.
func TestRace(t *testing.T) {
	const writers, each = 4, 10000
	k, r := open(t, 1<<23) // room for all of it, so that none is lost
	for range writers {
		go func() {
			for range each / 100 {
				if _, err := k.write.Run(&ebpf.RunOptions{Data: make([]byte, 64), Repeat: 100}); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	// A number is given twice when two count at once: only how many came is sure.
	var buf []byte
	for range writers * each {
		record, _, err := r.Read(buf)
		check(t, err)
		buf = record
	}
	if n := r.Available(); n != 0 {
		t.Errorf("%d bytes more", n)
	}
}

// Of a large buffer little is mapped.
func TestMapped(t *testing.T) {
	const size = 1 << 24
	resident := func() uint64 {
		t.Helper()
		text, err := os.ReadFile("/proc/self/smaps")
		check(t, err)
		var sum uint64
		ours := false
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if strings.Contains(f[0], "-") {
				ours = strings.Contains(line, "bpf-map")
			}
			if ours && f[0] == "Rss:" {
				n := uint64(0)
				for _, c := range f[1] {
					n = n*10 + uint64(c-'0')
				}
				sum += n << 10
			}
		}
		return sum
	}
	k, r := open(t, size)
	var buf []byte
	for range 300 {
		k.run(k.write, 1000)
		for range 1000 {
			record, _, err := r.Read(buf)
			check(t, err)
			buf = record
		}
	}
	if n := resident(); n < windowSize || n > 2*windowSize {
		t.Errorf("%d bytes are mapped of a buffer of %d, want a window of %d and two pages", n, size, windowSize)
	}
}

func TestBadDescriptor(t *testing.T) {
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	check(t, err)
	if _, err := Open(fd, 1<<12); err == nil {
		t.Error("/dev/null was taken for a ring buffer")
	}
}
