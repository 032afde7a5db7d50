package calls

import (
	"testing"

	"golang.org/x/sys/unix"
)

// run is what the kernel does with a filter.
func run(t *testing.T, filter []unix.SockFilter, arch, call uint32, arguments [6]uint64) uint32 {
	t.Helper()
	data := map[uint32]uint32{offsetCall: call, offsetArch: arch}
	for i, a := range arguments {
		data[offsetArguments+8*uint32(i)] = uint32(a)
	}
	var a uint32
	for at := 0; at < len(filter); at++ {
		switch f := filter[at]; f.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			value, known := data[f.K]
			if !known {
				t.Fatalf("load of %d", f.K)
			}
			a = value
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			a &= f.K
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			if a == f.K {
				at += int(f.Jt)
			} else {
				at += int(f.Jf)
			}
		case unix.BPF_RET | unix.BPF_K:
			return f.K
		default:
			t.Fatalf("instruction %+v", f)
		}
	}
	t.Fatal("the filter has no end")
	return 0
}

func TestFilter(t *testing.T) {
	const own, limited, unknown = 1000, 1001, 1002
	rules := []Rule{{Call: limited, Argument: 1, Mask: 0xf0, Values: []uint32{0x10, 0x20}, Else: unix.SECCOMP_RET_ERRNO}}
	const allow, kill = unix.SECCOMP_RET_ALLOW, unix.SECCOMP_RET_KILL_PROCESS
	for name, p := range processors {
		all := filter(p, []uint32{own}, rules)
		if len(all) > 4096 { // BPF_MAXINSNS
			t.Errorf("%s: %d instructions", name, len(all))
		}
		for _, tt := range []struct {
			name      string
			arch      uint32
			call      uint32
			arguments [6]uint64
			want      uint32
		}{
			{"OK of the runtime", p.arch, unix.SYS_FUTEX, [6]uint64{}, allow},
			{"OK of this processor", p.arch, p.fstatat, [6]uint64{}, allow},
			{"OK own", p.arch, own, [6]uint64{}, allow},
			{"OK first value", p.arch, limited, [6]uint64{0, 0x11}, allow},
			{"OK last value", p.arch, limited, [6]uint64{0, 0x2f}, allow},
			{"OK thread", p.arch, unix.SYS_CLONE, [6]uint64{unix.CLONE_THREAD | unix.CLONE_VM}, allow},
			{"bad value", p.arch, limited, [6]uint64{0, 0x31}, unix.SECCOMP_RET_ERRNO},
			// A refused argument must not be taken for the number of a call.
			{"bad value that is a call", p.arch, limited, [6]uint64{0, own}, unix.SECCOMP_RET_ERRNO},
			{"bad process", p.arch, unix.SYS_CLONE, [6]uint64{uint64(unix.SIGCHLD)}, kill},
			{"bad process that is a call", p.arch, unix.SYS_CLONE, [6]uint64{unix.SYS_FUTEX}, kill},
			{"bad unknown", p.arch, unknown, [6]uint64{}, kill},
			{"bad architecture", p.arch + 1, unix.SYS_FUTEX, [6]uint64{}, kill},
			{"bad ABI of 32 bits", p.arch, 1<<30 | unix.SYS_FUTEX, [6]uint64{}, kill},
		} {
			if got := run(t, all, tt.arch, tt.call, tt.arguments); got != tt.want {
				t.Errorf("%s, %s: %#x, want %#x", name, tt.name, got, tt.want)
			}
		}
	}
}
