package core

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// room compares what the tables may grow to with what is available. What they need
// from the start is there once they are loaded.
func (t *trial) room() error {
	need := growth(t.spec)
	if free, err := available(); err != nil {
		t.limits = append(t.limits, fmt.Sprintf("whether there is room for tables to grow is not known: %v", err))
	} else if free < need {
		t.limits = append(t.limits, fmt.Sprintf("tables may grow by %d MiB, and %d MiB are available: what finds no room is refused", need>>20, free>>20))
	}
	return nil
}

// growth is the size of the entries that are made as they are needed.
func growth(spec *ebpf.CollectionSpec) (total uint64) {
	const overhead = 64 // of an entry: links, lock, allocator
	for _, m := range spec.Maps {
		entry := uint64(m.KeySize) + uint64(m.ValueSize) + overhead
		if m.Type == ebpf.PerCPUHash {
			entry += uint64(m.ValueSize) * uint64(runtime.NumCPU())
		}
		if m.Flags&unix.BPF_F_NO_PREALLOC != 0 {
			total += entry * uint64(m.MaxEntries)
		}
	}
	return total
}

// available is what the machine, and the core's own cgroup, still give.
func available() (uint64, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	var free uint64 // KiB
	_, rest, _ := strings.Cut(string(text), "\nMemAvailable:")
	if _, err := fmt.Sscan(rest, &free); err != nil {
		return 0, fmt.Errorf("read MemAvailable: %w", err)
	}
	free <<= 10
	mounts, err := cgroup2Mounts("/proc/self/mountinfo")
	if err != nil || len(mounts) == 0 {
		return free, err
	}
	if text, err = os.ReadFile("/proc/self/cgroup"); err != nil {
		return 0, err
	}
	_, own, _ := strings.Cut("\n"+string(text), "\n0::")
	own, _, _ = strings.Cut(own, "\n")
	most, unlimited := readNumber(filepath.Join(mounts[0].point, own, "memory.max"))
	used, unknown := readNumber(filepath.Join(mounts[0].point, own, "memory.current"))
	if unlimited == nil && unknown == nil {
		free = min(free, most-min(used, most))
	}
	return free, nil
}

func readNumber(file string) (uint64, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
}
