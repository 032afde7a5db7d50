package core

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
)

// objects are the programs and maps in the kernel. Close leaves pinned ones
// there.
type objects struct {
	*ebpf.Collection
	spec  *ebpf.CollectionSpec
	state atomic.Pointer[abi.State] // what was last written; nil = nothing yet
}

// readSpec reads the compiled programs and makes them those of one tree.
func readSpec(t *tree) (*ebpf.CollectionSpec, error) {
	spec, err := loadDemarc()
	if err != nil {
		return nil, fmt.Errorf("read programs: %w", err)
	}
	// The depth of the root is not asked for: paths are enough.
	for name, value := range map[string]any{
		"managed_root":     t.id,
		"root_path_length": uint32(len(t.path)),
		"loads_in_order":   runtime.GOARCH == "amd64",
	} {
		v, found := spec.Variables[name]
		if !found {
			return nil, fmt.Errorf("read programs: no variable %s", name)
		}
		if err := v.Set(value); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
	}
	return spec, nil
}

// loadObjects gives the programs to the kernel. They use the pinned maps where
// there are any, else new ones.
func loadObjects(spec *ebpf.CollectionSpec, pinned map[string]*ebpf.Map, types *btf.Cache) (*objects, error) {
	// Before Linux 5.11 maps count as locked memory. Such a kernel lacks more, and the
	// limit must not hide what.
	_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
	c, errs := load(spec, pinned, types)
	var err error
	for _, name := range sortedKeys(errs) {
		if err == nil {
			err = errs[name]
		}
	}
	if err == nil {
		return &objects{Collection: c, spec: spec}, nil
	}
	c.Close()
	if errors.Is(err, ebpf.ErrNotSupported) {
		return nil, proto.Refuse("use a kernel that has it (6.1 or later)", "this kernel lacks a feature: load %w", err)
	}
	if what := lacking(spec); what != "" {
		return nil, proto.Refuse("use a kernel that has it (6.1 or later)", "this kernel lacks a feature: %s", what)
	}
	return nil, fmt.Errorf("load %s%w", kindOf(spec, err), err)
}

// load makes the maps that are not there yet, and then gives the programs to the
// kernel, one to each processor: most of a start is the kernel's verifier. Programs are
// made for the types of the kernel itself. Those of its modules are looked at only where
// a program's target is not there, and by one after the other: the library guards the
// kernel's types against being read at once, but not as part of a module's. It returns
// what was loaded, and why the other programs were not, by name; by "" what kept all
// from it.
func load(spec *ebpf.CollectionSpec, there map[string]*ebpf.Map, types *btf.Cache) (*ebpf.Collection, map[string]error) {
	part := *spec
	part.Programs = nil
	all, err := ebpf.NewCollectionWithOptions(&part, ebpf.CollectionOptions{MapReplacements: there, Cache: types})
	if err != nil {
		return &ebpf.Collection{}, map[string]error{"": err}
	}
	kernel, err := types.Kernel()
	if err != nil {
		all.Close()
		return &ebpf.Collection{}, map[string]error{"": err}
	}
	all.Programs = map[string]*ebpf.Program{}
	part.Variables = nil
	errs := map[string]error{}
	var mu sync.Mutex // guards the two maps of results
	loadOne := func(name string) {
		one := part
		one.Programs = map[string]*ebpf.ProgramSpec{name: spec.Programs[name]}
		c, err := ebpf.NewCollectionWithOptions(&one, ebpf.CollectionOptions{
			MapReplacements: all.Maps, Cache: types, Programs: ebpf.ProgramOptions{KernelTypes: kernel},
		})
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			errs[name] = err
			return
		}
		all.Programs[name] = c.DetachProgram(name)
		c.Close()
	}
	names := make(chan string)
	var workers sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(spec.Programs)) {
		workers.Go(func() {
			for name := range names {
				loadOne(name)
			}
		})
	}
	var elsewhere []string
	// Those that are fitted to the kernel's types first, as that takes one processor's time,
	// and then the longest, so that none ends up waiting for the other.
	order := sortedKeys(spec.Programs)
	slices.SortStableFunc(order, func(a, b string) int {
		p, q := spec.Programs[a], spec.Programs[b]
		if fitted := target(p) != ""; fitted != (target(q) != "") {
			return map[bool]int{true: -1, false: 1}[fitted]
		}
		return len(q.Instructions) - len(p.Instructions)
	})
	for _, name := range order {
		if at := target(spec.Programs[name]); at != "" {
			if _, err := kernel.AnyTypesByName(at); err != nil {
				elsewhere = append(elsewhere, name)
				continue
			}
		}
		names <- name
	}
	close(names)
	workers.Wait()
	for _, name := range elsewhere {
		loadOne(name)
	}
	return all, errs
}

// target is the type of the kernel's that a program is attached by; "" = none.
func target(p *ebpf.ProgramSpec) string {
	switch {
	case p.AttachTo == "":
		return ""
	case p.Type == ebpf.LSM:
		return "bpf_lsm_" + p.AttachTo
	case p.AttachType == ebpf.AttachTraceRawTp:
		return "btf_trace_" + p.AttachTo
	case p.AttachType == ebpf.AttachTraceIter:
		return "bpf_iter_" + p.AttachTo
	}
	return p.AttachTo
}

// lacking names the first kind of program or helper function of these programs that
// this kernel does not have, or nothing: what old kernels say about programs that they
// cannot run names something else.
func lacking(spec *ebpf.CollectionSpec) string {
	for _, name := range sortedKeys(spec.Programs) {
		p := spec.Programs[name]
		if errors.Is(features.HaveProgramType(p.Type), ebpf.ErrNotSupported) {
			return fmt.Sprintf("%v programs (%s)", p.Type, name)
		}
		for _, i := range p.Instructions {
			if i.IsBuiltinCall() && errors.Is(features.HaveProgramHelper(p.Type, asm.BuiltinFunc(i.Constant)), ebpf.ErrNotSupported) {
				return fmt.Sprintf("%v for %v programs (%s)", asm.BuiltinFunc(i.Constant), p.Type, name)
			}
		}
	}
	return ""
}

// kindOf says what kind of program or map an error is about: which the kernel
// lacks when it only says that an argument is invalid.
func kindOf(spec *ebpf.CollectionSpec, err error) string {
	what, rest, _ := strings.Cut(err.Error(), " ")
	name, _, _ := strings.Cut(rest, ":")
	m, p := spec.Maps[name], spec.Programs[name]
	switch {
	case what == "map" && m != nil:
		for m.InnerMap != nil {
			m = m.InnerMap
		}
		return m.Type.String() + " "
	case what == "program" && p != nil:
		return p.Type.String() + " "
	}
	return ""
}

// kept says whether a map is pinned and outlives the core. Compiler-made maps
// belong to one load of the programs.
func kept(name string) bool { return !strings.HasPrefix(name, ".") }

// keptMaps names the maps to pin, in a fixed order.
func keptMaps(spec *ebpf.CollectionSpec) []string {
	return slices.DeleteFunc(sortedKeys(spec.Maps), func(name string) bool { return !kept(name) })
}

// identityCard is what the `abi` pin says of the pins beside it. All in host
// byte order.
type identityCard struct {
	Version     uint64 // abi.Version
	ManagedRoot uint64 // cgroup id
	Layout      uint64 // of all maps
}

var cardSpec = ebpf.MapSpec{Name: "abi", Type: ebpf.Array, KeySize: 4, ValueSize: 24, MaxEntries: 1}

// card describes what these programs would pin for the tree.
func card(spec *ebpf.CollectionSpec, t *tree) identityCard {
	h := sha256.New()
	for _, name := range keptMaps(spec) {
		for m := spec.Maps[name]; m != nil; m = m.InnerMap {
			fmt.Fprintln(h, name, m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Flags)
		}
	}
	return identityCard{Version: abi.Version, ManagedRoot: t.id, Layout: binary.LittleEndian.Uint64(h.Sum(nil))}
}
