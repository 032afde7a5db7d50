package e2e_test

import (
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

func enter(c *netlab.Cgroup) probe.Call { return probe.Call{Op: "cgroup", Path: c.Dir()} }

// A socket of one identity in the hands of another may do nothing.
func TestC01MoveThenSend(t *testing.T) {
	w := enforced(t)
	w.control()
	for _, c := range []struct{ name, from, to string }{
		{"away from the rights", "/lab/web", "/lab/other"},
		{"towards the rights", "/lab/other", "/lab/web"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := w.web.Probe(w.node.Cgroup(c.from))
			p.Socket("u", "udp4")
			p.Socket("t", "tcp4")
			p.Socket("t6", "tcp6")
			p.Must(enter(w.node.Cgroup(c.to)))
			w.wire.Forget()
			p.Refused(send("u", w.decoy.At4(7000)), "EPERM")
			p.Refused(connect("u", w.decoy.At4(7000)), "EPERM")
			w.node.AwaitDenied(abi.TaskMismatch, udp, w.decoy.At4(7000))
			p.Refused(connect("t", w.decoy.At4(7000)), "EPERM")
			w.node.AwaitDenied(abi.TaskMismatch, tcp, w.decoy.At4(7000))
			p.Refused(connect("t6", w.decoy.At6(7000)), "EPERM")
			w.node.AwaitDenied(abi.TaskMismatch, tcp, w.decoy.At6(7000))
			w.nothing(netlab.ToAddress(w.decoy.IP4))
			w.nothing(netlab.ToAddress(w.decoy.IP6))
			w.node.Forget()
		})
	}
	w.silent()
}

// A listener, and what it accepts, stay what they were made as.
func TestC02MoveThenAccept(t *testing.T) {
	w := enforced(t)
	w.control()
	// Towards the rights: still nobody's server.
	p := w.decoy.Probe(w.node.Cgroup("/lab/other"))
	decoy := w.node.Cgroup("/lab/decoy")
	const port = 7100
	w.node.Apply(policyText(2, strings.ReplaceAll(webDecoy, "tcp/7002", "tcp/7002, tcp/7100, tcp/7101")))
	p.Socket("l", "tcp4")
	p.Must(probe.Call{Op: "bind", Socket: "l", Address: w.decoy.At4(port).String()})
	p.Must(probe.Call{Op: "listen", Socket: "l"})
	p.Must(enter(decoy))
	w.p.Socket("s", "tcp4")
	w.p.Refused(connect("s", w.decoy.At4(port)), probe.Timeout)
	w.node.AwaitDenied(abi.NoCrossingFor, tcp, w.decoy.At4(port))
	p.Refused(probe.Call{Op: "accept", Socket: "l", New: "a", Timeout: 1}, probe.Timeout)

	// Away from them: the listener's connections are decoy's, and end with decoy's rights.
	p = w.decoy.Probe(decoy)
	p.Socket("l", "tcp4")
	p.Must(probe.Call{Op: "bind", Socket: "l", Address: w.decoy.At4(port + 1).String()})
	p.Must(probe.Call{Op: "listen", Socket: "l"})
	w.p.Socket("s", "tcp4")
	w.p.Connect("s", w.decoy.At4(port+1).String())
	p.Must(enter(w.node.Cgroup("/lab/other")))
	p.Must(probe.Call{Op: "accept", Socket: "l", New: "a"})
	w.p.Must(probe.Call{Op: "send", Socket: "s", Data: []byte("to decoy")})
	if r := p.Must(probe.Call{Op: "recv", Socket: "a"}); string(r.Data) != "to decoy" {
		t.Errorf("received %q", r.Data)
	}
	f := w.node.AwaitFlow("the accepted connection", func(f netlab.Flow) bool {
		return f.Verdict == abi.Allow && f.Direction == abi.Ingress && f.Destination.Port == port+1
	})
	if f.Destination.Workload != "decoy" {
		t.Errorf("accepted %s", netlab.Describe(f))
	}
	// Nor does what is accepted lend its holder rights.
	p.Socket("u", "udp4")
	p.Refused(send("u", w.peer.At4(7001)), "EPERM")
	w.silent()
}

// A socket that an ally made does not become its receiver's.
func TestC03PassedSocket(t *testing.T) {
	for _, way := range []string{"SCM_RIGHTS", "pidfd_getfd"} {
		t.Run(way, func(t *testing.T) {
			w := enforced(t)
			w.control()
			ally := w.web.Probe(w.node.Cgroup("/lab/ally")) // of no workload: may send anywhere
			for _, kind := range []string{"udp4", "udp6", "tcp4", "tcp6"} {
				to := w.peer.At4(7001)
				if strings.HasSuffix(kind, "6") {
					to = w.peer.At6(7001)
				}
				ally.Socket("s", kind)
				if way == "SCM_RIGHTS" {
					box := filepath.Join(w.lab.Dir(), kind)
					w.p.Must(probe.Call{Op: "mailbox", New: "box", Path: box})
					ally.Must(probe.Call{Op: "give", Socket: "s", Path: box})
					w.p.Must(probe.Call{Op: "take", Socket: "box", New: "s"})
				} else {
					fd := ally.Must(probe.Call{Op: "dup", Socket: "s", New: "d"}).N
					w.p.Must(probe.Call{Op: "steal", New: "s", PID: ally.PID(), FD: fd})
				}
				if strings.HasPrefix(kind, "udp") {
					w.p.Refused(send("s", to), "EPERM")
				}
				w.p.Refused(connect("s", to), "EPERM")
				f := w.node.AwaitDenied(abi.TaskMismatch, protocolOf(kind), to)
				if f.Source.Workload != "web" {
					t.Errorf("denied %s", netlab.Describe(f))
				}
			}
			w.silent()
			w.echo.Received.Store(0)
			ally.Socket("s", "udp4")
			ally.Must(send("s", w.peer.At4(7001))) // control: the ally itself may
			ally.Must(probe.Call{Op: "recv", Socket: "s"})
		})
	}
}

// Another program and another user in the same process change nothing.
func TestC04Exec(t *testing.T) {
	w := enforced(t)
	w.control()
	w.p.Socket("u", "udp4")
	w.p.Socket("t", "tcp4")
	w.p.Connect("t", w.decoy.At4(7000).String())
	w.p.Echoed("t", "before")
	w.p.Must(probe.Call{Op: "exec", Value: 65534})
	w.p.Echoed("t", "after")
	w.p.Refused(send("u", w.peer.At4(7001)), "EPERM")
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	w.p.Socket("s", "tcp4")
	w.p.Refused(connect("s", w.peer.At4(7001)), "EPERM")
	w.denied(abi.NoCrossingFor, tcp, w.peer.At4(7001))
	w.p.Must(send("u", w.decoy.At4(7000)))
	w.p.Must(probe.Call{Op: "recv", Socket: "u"})
	w.silent()
}

// However deep, a cgroup belongs to its workload.
func TestC07Nested(t *testing.T) {
	w := enforced(t)
	w.control()
	p := w.web.Probe(w.node.Cgroup("/lab/web"))
	deep := w.node.Cgroup("/lab/web" + strings.Repeat("/deeper", 32))
	p.Must(enter(deep))
	p.Socket("u", "udp4")
	p.Refused(send("u", w.peer.At4(7001)), "EPERM")
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	p.Socket("t", "tcp4")
	p.Connect("t", w.decoy.At4(7000).String())
	p.Echoed("t", "from the deep")
	// Beside is not below.
	beside := w.web.Probe(w.node.Cgroup("/lab/web-evil"))
	beside.Socket("t", "tcp4")
	beside.Refused(connect("t", w.decoy.At4(7000)), probe.Timeout)
	w.silent()
}

// Cgroups that come and go faster than any agent looks have their identity all the
// same.
func TestC08Churn(t *testing.T) {
	w := enforced(t)
	w.control()
	const times = 1000
	before := w.node.Denied(abi.NoCrossingFor)
	churn := probe.Call{Op: "churn", Path: w.node.Cgroup("/lab/web").Dir(), Address: w.peer.At4(7001).String(), Data: []byte("x"), Size: times}
	p := w.web.Probe(w.node.Cgroup("/lab/ally"))
	if r := p.Must(churn); r.N != 0 {
		t.Errorf("%d of %d datagrams were taken", r.N, times)
	}
	if got := w.node.Denied(abi.NoCrossingFor) - before; got != times {
		t.Errorf("%d denials counted of %d", got, times)
	}
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	w.silent()
	churn.Address, churn.Size = w.decoy.At4(7000).String(), 50
	if r := p.Must(churn); r.N != churn.Size { // control
		t.Errorf("%d of %d declared datagrams were taken", r.N, churn.Size)
	}
}

// A socket that outlives its cgroup stays what it was.
func TestC09DeadCgroup(t *testing.T) {
	w := enforced(t)
	w.control()
	short := w.node.Cgroup("/lab/web/short")
	p := w.web.Probe(short)
	for _, kind := range []string{"udp4", "tcp4"} {
		p.Socket(kind, kind)
		p.Socket(kind+" declared", kind)
	}
	p.Connect("tcp4 declared", w.decoy.At4(7000).String())
	p.Echoed("tcp4 declared", "while it lives")
	p.Must(enter(w.node.Cgroup("/lab/web")))
	short.Remove()
	for range 100 { // whoever is born now does not take its place
		w.node.Cgroup("/lab/ally/x").Remove()
	}
	p.Refused(send("udp4", w.peer.At4(7001)), "EPERM")
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	p.Refused(connect("tcp4", w.peer.At4(7001)), "EPERM")
	w.denied(abi.NoCrossingFor, tcp, w.peer.At4(7001))
	p.Echoed("tcp4 declared", "when it is dead")
	p.Connect("udp4 declared", w.decoy.At4(7000).String())
	p.Echoed("udp4 declared", "when it is dead")
	w.silent()
}

// A process acts in the moment in which its cgroup is born; birth_test.go does so
// ten thousand times. Here it is a process that is started into it.
func TestC13FirstBreath(t *testing.T) {
	w := enforced(t)
	w.control()
	for range 20 {
		c := w.node.Cgroup("/lab/web/unit")
		p := w.web.Probe(c)
		p.Send(probe.Call{Op: "socket", New: "t", Domain: unix.AF_INET, Type: unix.SOCK_STREAM})
		p.Send(connect("t", w.peer.At4(7001)))
		p.Send(probe.Call{Op: "socket", New: "u", Domain: unix.AF_INET, Type: unix.SOCK_DGRAM})
		p.Send(send("u", w.peer.At4(7001)))
		p.Send(send("u", w.decoy.At4(7000)))
		for i, want := range []string{"", "EPERM", "", "EPERM", ""} {
			if r := p.Result(); r.Error != want {
				t.Errorf("call %d: %q, want %q", i, r.Error, want)
			}
		}
		p.Must(probe.Call{Op: "recv", Socket: "u"})
		p.Kill()
		c.Remove()
	}
	w.denied(abi.NoCrossingFor, tcp, w.peer.At4(7001))
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	w.silent()
}
