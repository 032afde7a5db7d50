package e2e_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// others are hooks of ours where somebody else's program stands, and how a declared
// connection ends that it refuses.
var others = []struct {
	hook   string
	kind   ebpf.ProgramType
	attach ebpf.AttachType
	want   string
}{
	{"egress", ebpf.CGroupSKB, ebpf.AttachCGroupInetEgress, "TIMEOUT"},
	{"ingress", ebpf.CGroupSKB, ebpf.AttachCGroupInetIngress, "TIMEOUT"},
	{"sock_create", ebpf.CGroupSock, ebpf.AttachCGroupInetSockCreate, "EPERM"},
	{"sock_ops", ebpf.SockOps, ebpf.AttachCGroupSockOps, "TIMEOUT"},
}

// saying is a program that says the same of everything.
func saying(t *testing.T, kind ebpf.ProgramType, attach ebpf.AttachType, verdict int32) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "foreign", Type: kind, AttachType: attach, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// Programs of somebody else's stand before ours and behind. Where they let everything
// pass, what is undeclared does not; what they refuse is refused, and not told as if we
// had; and with them gone all is as before. (X20)
func TestX20ForeignBeforeAndBehind(t *testing.T) {
	for _, place := range []string{"before ours", "behind ours", "at the workload"} {
		t.Run(place, func(t *testing.T) {
			w := newWorld(t)
			links := map[string]link.Link{}
			allow, deny := map[string]*ebpf.Program{}, map[string]*ebpf.Program{}
			attach := func(dir string) {
				t.Helper()
				for _, o := range others {
					allow[o.hook], deny[o.hook] = saying(t, o.kind, o.attach, 1), saying(t, o.kind, o.attach, 0)
					l, err := link.AttachCgroup(link.CgroupOptions{Path: dir, Attach: o.attach, Program: allow[o.hook]})
					if err != nil {
						t.Fatalf("attach at %s: %v", o.hook, err)
					}
					t.Cleanup(func() { l.Close() })
					links[o.hook] = l
				}
			}
			w.p.Must(raw("old", unix.AF_INET, udp)) // from before there was a policy
			switch place {
			case "before ours":
				w.node.Detach()
				attach(w.node.Root().Dir())
				w.node.StartCore()
				w.enforce()
			case "behind ours":
				w.enforce()
				attach(w.node.Root().Dir())
			case "at the workload":
				w.enforce()
				attach(w.node.Cgroup("/lab/web").Dir())
			}
			refused := func(when string) {
				t.Helper()
				w.control()
				w.node.Forget()
				w.wire.Forget()
				p := w.web.Probe(w.node.Cgroup("/lab/web"))
				p.Socket("tcp", "tcp4")
				p.Socket("udp", "udp4")
				p.Refused(connect("tcp", w.peer.At4(7001)), "EPERM")
				w.denied(abi.NoCrossingFor, tcp, w.peer.At4(7001))
				p.Refused(send("udp", w.peer.At4(7001)), "EPERM")
				w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
				w.p.Refused(rawSend("old", w.peer.IP4, datagram(5000, 7001)), "EPERM")
				p.Refused(raw("new", unix.AF_INET, udp), "EPERM")
				w.denied(abi.RawSocket, udp, anywhere)
				w.silent()
				// A stranger has no proof.
				stranger := w.peer.Probe(w.lab.Cgroup("peer"))
				stranger.Socket("s", "tcp4")
				if r := stranger.Do(connect("s", w.decoy.At4(7000))); r.Error == "" {
					t.Errorf("%s: a stranger is answered: %+v", when, r)
				}
				w.node.AwaitDenied(abi.TagMissing, tcp, w.decoy.At4(7000))
			}
			refused("they let everything pass")
			for _, o := range others {
				p := w.web.Probe(w.node.Cgroup("/lab/web"))
				p.Socket("undeclared", "tcp4")
				if err := links[o.hook].Update(deny[o.hook]); err != nil {
					t.Fatal(err)
				}
				w.node.Forget()
				w.wire.Forget()
				r := p.Do(probe.Call{Op: "socket", New: "declared", Domain: unix.AF_INET, Type: unix.SOCK_STREAM})
				if r.Error == "" {
					r = p.Do(connect("declared", w.decoy.At4(7000)))
					p.Must(probe.Call{Op: "close", Socket: "declared"})
				}
				if r.Error != o.want {
					t.Errorf("refused at %s: %q, want %q", o.hook, r.Error, o.want)
				}
				syn := func(p netlab.Packet) bool {
					return p.Sent && p.Flags&2 != 0 && p.Dst == netip.AddrPortFrom(w.decoy.IP4, 7000)
				}
				if n := w.wire.Count(syn); (n > 0) != (o.hook == "ingress") {
					t.Errorf("refused at %s: %d SYNs on the wire", o.hook, n)
				}
				if o.hook == "sock_ops" { // it has no room for our tag: then it is ours that refuses, and says why
					w.denied(abi.TagNoRoom, tcp, w.decoy.At4(7000))
				}
				for _, f := range w.node.Flows() {
					if f.Verdict == abi.Deny && f.Source.Workload == "web" && (o.hook != "sock_ops" || f.Reason != abi.TagNoRoom) {
						t.Errorf("refused at %s, and told as ours: %s", o.hook, netlab.Describe(f))
					}
				}
				p.Refused(connect("undeclared", w.peer.At4(7001)), "EPERM")
				w.denied(abi.NoCrossingFor, tcp, w.peer.At4(7001))
				w.silent()
				if err := links[o.hook].Update(allow[o.hook]); err != nil {
					t.Fatal(err)
				}
			}
			refused("they let everything pass again")
			if place != "at the workload" {
				eventually(t, 30*time.Second, "the programs are named", func() bool {
					limits := strings.Join(w.node.Status().Limits, "; ")
					for _, o := range others {
						if !strings.Contains(limits, " at "+o.hook+" is not ours") {
							return false
						}
					}
					return true
				})
			}
			if s := w.node.Status(); s.State != "enforcing" {
				t.Errorf("%v, %v", s.State, s.Problems)
			}
		})
	}
}
