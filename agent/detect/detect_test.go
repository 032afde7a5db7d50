package detect

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// Each detector, on the trace that it is for and on the one that comes closest
// without being it.
func TestDetectors(t *testing.T) {
	for _, c := range []struct {
		name  string
		trace func(*trace)
		want  []string
	}{
		{"port scan", func(r *trace) {
			for p := range 15 {
				r.denied("web", fmt.Sprintf("10.9.0.1:%d", 1000+p)).wait(time.Second)
			}
		}, []string{"T1046 slow-scan medium edge/web tool[4242]", "T1046 port-scan medium edge/web tool[4242]"}},
		{"OK fourteen ports, again and again", func(r *trace) {
			for range 10 {
				for p := range 3 {
					r.denied("web", fmt.Sprintf("10.9.0.1:%d", 1000+p)).wait(time.Second)
				}
			}
		}, []string{}},
		{"port scan of somebody unknown", func(r *trace) {
			for p := range 15 {
				r.arrives("10.9.0.7", "api", uint16(1000+p), abi.NoCrossingFor)
			}
		}, []string{"T1046 slow-scan medium 10.9.0.7", "T1046 port-scan medium 10.9.0.7"}},
		{"segments without a connection", func(r *trace) {
			for p := range 15 {
				r.arrives("10.9.0.7", "api", uint16(1000+p), abi.NoState)
			}
		}, []string{"T1046 slow-scan medium 10.9.0.7", "T1046 port-scan medium 10.9.0.7"}},
		{"OK late answers", func(r *trace) {
			for p := range 40 {
				r.arrives("10.9.0.7", "api", uint16(40000+p), abi.NoState)
			}
		}, []string{}},
		{"OK over its limit", func(r *trace) {
			for p := range 40 {
				r.opens("web", "tcp", fmt.Sprintf("10.9.0.1:%d", 1000+p), abi.Deny, abi.OverLimit, "web-api")
			}
		}, []string{}},
		{"host sweep", func(r *trace) {
			for h := range 25 {
				r.denied("web", fmt.Sprintf("10.9.0.%d:8081", h+1)).wait(time.Second)
			}
		}, []string{"T1046 slow-scan medium edge/web tool[4242]", "T1018 host-sweep medium edge/web tool[4242]"}},
		{"some ports of some hosts", func(r *trace) {
			for p := range 7 {
				for h := range 6 {
					r.denied("web", fmt.Sprintf("10.9.0.%d:%d", h+1, 1000+p)).wait(time.Second)
				}
			}
		}, []string{"T1046 slow-scan medium edge/web tool[4242]", "T1046 port-scan medium edge/web tool[4242]"}},
		{"slow scan, one in ten minutes", func(r *trace) {
			for p := range 6 {
				r.denied("web", fmt.Sprintf("10.9.0.%d:%d", p, 2000+p)).wait(10 * time.Minute)
			}
		}, []string{"T1046 slow-scan low edge/web tool[4242]"}},
		{"slow scan between successes", func(r *trace) {
			for p := range 6 {
				r.denied("web", fmt.Sprintf("10.9.0.%d:%d", p, 2000+p)).wait(10 * time.Minute)
				for h := range 30 {
					r.allowed("web", fmt.Sprintf("10.8.%d.%d:443", p, h), "updates")
				}
			}
		}, []string{"T1046 slow-scan low edge/web tool[4242]"}},
		{"OK three places in a day, all day", func(r *trace) {
			for i := range 300 {
				r.denied("web", fmt.Sprintf("10.9.0.%d:5432", i%3)).wait(5 * time.Minute)
			}
		}, []string{}},
		{"spread over workloads", func(r *trace) {
			for i, w := range []string{"web", "api", "batch", "mail", "web", "api", "batch", "mail"} {
				r.denied(w, fmt.Sprintf("10.9.0.%d:8081", i+1)).wait(time.Minute)
			}
		}, []string{"T1210 spread medium app/mail tool[4242]"}},
		{"OK many fail after a change of the policy", func(r *trace) {
			for i, w := range []string{"web", "api", "batch", "mail", "web", "api", "batch", "mail"} {
				if i == 4 {
					r.epoch++
				}
				r.denied(w, fmt.Sprintf("10.9.0.%d:8081", i+1)).wait(time.Minute)
			}
		}, []string{}},
		{"ssh fan-out", func(r *trace) {
			for h := range 10 {
				r.allowed("batch", fmt.Sprintf("10.1.0.%d:22", h), "ssh").wait(time.Minute)
			}
		}, []string{"T1021.004 fan-out medium app/batch tool[4242]"}},
		{"ssh fan-out of a bastion", func(r *trace) {
			for h := range 10 {
				r.allowed("jump", fmt.Sprintf("10.1.0.%d:22", h), "ssh").wait(time.Minute)
			}
		}, []string{"T1021.004 fan-out medium app/jump tool[4242] role bastion"}},
		{"OK ssh to nine", func(r *trace) {
			for h := range 9 {
				r.allowed("batch", fmt.Sprintf("10.1.0.%d:22", h), "ssh").wait(time.Minute)
			}
		}, []string{}},
		{"new edge", func(r *trace) {
			r.allowed("web", "10.8.0.1:443", "updates").wait(25*time.Hour).allowed("web", "10.8.0.1:443", "updates").allowed("web", "10.8.0.2:443", "updates")
		}, []string{"T1210 new-edge info edge/web tool[4242]"}},
		{"OK new edge behind a new policy", func(r *trace) {
			r.allowed("web", "10.8.0.1:443", "updates").wait(25 * time.Hour)
			r.epoch++
			r.allowed("web", "10.8.0.2:443", "updates")
		}, []string{}},
		{"baseline that drifts", func(r *trace) {
			r.allowed("web", "10.8.0.1:443", "updates").wait(25 * time.Hour)
			for h := range 33 {
				r.allowed("web", fmt.Sprintf("10.8.1.%d:443", h), "updates").wait(time.Minute)
			}
		}, []string{"T1210 new-edge low edge/web tool[4242]"}},
		{"upward probe", func(r *trace) {
			f := r.denied("web", "10.3.0.1:5432").events[0].Flow
			f.Destination.Networks = []string{"databases"}
		}, []string{"T1021 upward-probe info edge/web tool[4242]"}},
		{"upward probes", func(r *trace) {
			for p := range 3 {
				r.denied("web", fmt.Sprintf("10.3.0.1:%d", 5432+p))
			}
			for _, e := range r.events {
				e.Flow.Destination.Networks = []string{"databases"}
			}
		}, []string{"T1021 upward-probe medium edge/web tool[4242]"}},
		{"OK denied downward", func(r *trace) {
			for p := range 3 {
				r.denied("api", fmt.Sprintf("10.9.0.1:%d", 5432+p))
			}
			for _, e := range r.events {
				e.Flow.Destination.Networks = []string{"anywhere"}
			}
		}, []string{}},
		{"brute force", func(r *trace) {
			for range 10 {
				r.allowed("batch", "10.1.0.1:22", "ssh").wait(time.Second)
			}
		}, []string{"T1110 brute-force medium app/batch tool[4242]"}},
		{"password spraying", func(r *trace) {
			for i := range 30 {
				r.allowed("batch", fmt.Sprintf("10.1.0.%d:22", i%6), "ssh").wait(400 * time.Millisecond)
			}
		}, []string{"T1110 brute-force medium app/batch tool[4242]"}},
		{"OK ten logins in a minute", func(r *trace) {
			for range 30 {
				r.allowed("batch", "10.1.0.1:22", "ssh").wait(6 * time.Second)
			}
		}, []string{}},
		{"forged proof", func(r *trace) {
			r.arrives("10.9.0.7", "api", 8080, abi.TagBadMAC)
			r.events[0].Flow.Source.Claimed, r.events[0].Flow.Source.Identity, r.events[0].Flow.Source.Workload = true, identity("web"), "web"
		}, []string{"T1036 forgery high 10.9.0.7"}},
		{"OK a clock that is off, twice", func(r *trace) {
			r.arrives("10.9.0.7", "api", 8080, abi.TagStale).arrives("10.9.0.7", "api", 8080, abi.TagStale)
		}, []string{}},
		{"clock that is off", func(r *trace) {
			for range 3 {
				r.arrives("10.9.0.7", "api", 8080, abi.TagStale)
			}
		}, []string{"T1036 forgery low 10.9.0.7"}},
		{"metadata, refused", func(r *trace) { r.denied("web", "169.254.169.254:80") }, []string{"T1552.005 metadata high edge/web tool[4242]"}},
		{"metadata, through a wide crossing", func(r *trace) { r.allowed("web", "169.254.169.254:443", "updates") },
			[]string{"T1552.005 metadata medium edge/web tool[4242]"}},
		{"OK metadata, declared", func(r *trace) { r.allowed("batch", "169.254.169.254:80", "credentials") }, []string{}},
		{"decoy", func(r *trace) { r.allowed("api", "10.0.0.5:3306", "trap") }, []string{"T1046 decoy high app/api tool[4242]"}},
		{"decoy, and then the signal that names the process", func(r *trace) {
			r.reaches("api", "10.0.0.5:3306", "trap").signal("api", Signal{Kind: Contact, Protocol: "tcp", Peer: peer("10.0.0.5:3306"), Comm: "nc", PID: 77})
		}, []string{"T1046 decoy high app/api nc[77]"}},
		{"decoy, and before it the signal that names the process", func(r *trace) {
			r.signal("api", Signal{Kind: Contact, Protocol: "tcp", Peer: peer("10.0.0.5:3306"), Comm: "nc", PID: 77}).reaches("api", "10.0.0.5:3306", "trap")
		}, []string{"T1046 decoy high app/api nc[77]"}},
		{"decoy, and a signal of another place", func(r *trace) {
			r.reaches("api", "10.0.0.5:3306", "trap").signal("api", Signal{Kind: Contact, Protocol: "tcp", Peer: peer("10.0.0.5:3307"), Comm: "nc", PID: 77})
		}, []string{"T1046 decoy high app/api"}},
		{"decoy, and a signal long after", func(r *trace) {
			r.reaches("api", "10.0.0.5:3306", "trap").wait(time.Minute).signal("api", Signal{Kind: Contact, Protocol: "tcp", Peer: peer("10.0.0.5:3306"), Comm: "nc", PID: 77})
		}, []string{"T1046 decoy high app/api"}},
		{"decoy of a scanner, and then the signal", func(r *trace) {
			r.reaches("nessus", "10.0.0.5:3306", "trap").signal("nessus", Signal{Kind: Contact, Protocol: "tcp", Peer: peer("10.0.0.5:3306"), Comm: "nc", PID: 77})
		}, []string{"T1046 decoy high app/nessus nc[77] role scanner"}},
		{"decoy and scanner", func(r *trace) { r.allowed("nessus", "10.0.0.5:3306", "trap") },
			[]string{"T1046 decoy high app/nessus tool[4242] role scanner"}},
		{"decoy and scanner whose time is over", func(r *trace) {
			r.wait(60*24*time.Hour).allowed("nessus", "10.0.0.5:3306", "trap")
		}, []string{"T1046 decoy high app/nessus tool[4242]"}},
		{"raw socket", func(r *trace) {
			r.denied("web", "10.9.0.1:0")
			f := r.events[0].Flow
			f.Reason, f.Hook, f.Destination = abi.RawSocket, record.HookSockCreate, flow.Endpoint{}
		}, []string{"T1040 raw-socket medium edge/web tool[4242]"}},
		{"packet socket", func(r *trace) { r.signal("web", Signal{Kind: Raw}) }, []string{"T1040 raw-socket medium edge/web tool[4242]"}},
		{"socket of another", func(r *trace) { r.opens("web", "tcp", "10.9.0.1:80", abi.Deny, abi.TaskMismatch, "") },
			[]string{"T1559 handover high edge/web tool[4242]"}},
		{"chain of two", func(r *trace) {
			r.signal("mail", Signal{Kind: Chain, Hops: 1, Protocol: "tcp", Peer: peer("10.1.0.1:22")})
		},
			[]string{"T1021.004 chain low app/mail tool[4242]"}},
		{"chain of three", func(r *trace) {
			r.signal("web", Signal{Kind: Chain, Hops: 2, Protocol: "tcp", Peer: peer("10.1.0.1:22")})
		},
			[]string{"T1021.004 chain high edge/web tool[4242]"}},
		{"chain in flows", func(r *trace) {
			r.accepts("batch", "web").wait(time.Minute).allowed("batch", "10.1.0.1:22", "ssh")
		}, []string{"T1021.004 chain low app/batch tool[4242]"}},
		{"longer chain in flows", func(r *trace) {
			r.accepts("batch", "web").accepts("mail", "batch").wait(time.Minute).allowed("mail", "10.1.0.1:22", "ssh")
		}, []string{"T1021.004 chain low app/batch", "T1021.004 chain high app/mail tool[4242]"}},
		{"OK session of yesterday", func(r *trace) {
			r.accepts("batch", "web").wait(2*time.Hour).allowed("batch", "10.1.0.1:22", "ssh")
		}, []string{}},
		{"OK ssh only", func(r *trace) { r.allowed("batch", "10.1.0.1:22", "ssh").allowed("batch", "10.1.0.1:22", "ssh") }, []string{}},
		{"chain of a bastion", func(r *trace) {
			r.signal("jump", Signal{Kind: Chain, Hops: 2, Protocol: "tcp", Peer: peer("10.1.0.1:22")})
		},
			[]string{"T1021.004 chain high app/jump tool[4242] role bastion"}},
		{"OK a server asks its database", func(r *trace) {
			r.signal("web", Signal{Kind: Chain, Hops: 3, Protocol: "tcp", Peer: peer("10.1.0.1:5432")})
		}, []string{}},
		{"relay", func(r *trace) {
			r.signal("web", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:5432"), Comm: "socat", PID: 7,
				Values: Values{Received: 10001, Bytes: 10001, Answered: 80000, Back: 80000}})
		}, []string{"T1090.001 relay medium edge/web socat[7]"}},
		{"relay by ssh, whose side is a little longer", func(r *trace) {
			for range 3 {
				r.signal("web", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:5432"), Comm: "sshd", PID: 7,
					Values: Values{Received: 10300, Bytes: 10000, Answered: 20500, Back: 20000}}).wait(5 * time.Second)
			}
		}, []string{"T1572 relay medium edge/web sshd[7]"}},
		{"relay of little at a time", func(r *trace) {
			for range 20 {
				r.signal("web", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:5432"), Comm: "socat", PID: 7,
					Values: Values{Received: 101, Bytes: 100, Answered: 200, Back: 200}}).wait(20 * time.Second)
			}
		}, []string{"T1090.001 relay medium edge/web socat[7]"}},
		{"OK a server that answers what its database says, with more around it", func(r *trace) {
			for range 50 {
				r.signal("web", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:5432"), Comm: "api", PID: 7,
					Values: Values{Received: 1000, Bytes: 900, Answered: 12000, Back: 10000}}).wait(5 * time.Second)
			}
		}, []string{}},
		{"OK twice about the same", func(r *trace) {
			for range 2 {
				r.signal("web", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:5432"), Comm: "api", PID: 7,
					Values: Values{Received: 1000, Bytes: 1000, Answered: 10300, Back: 10000}}).wait(5 * time.Second)
			}
		}, []string{}},
		{"relay by ssh -R, both of whose connections it opened", func(r *trace) {
			for range 3 {
				r.signal("web", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:5432"), Comm: "x", PID: 7, Between: "opened", SSH: true,
					Values: Values{Received: 20500, Bytes: 20000, Answered: 20500, Back: 20000}}).wait(5 * time.Second)
			}
		}, []string{"T1572 relay medium edge/web x[7]"}},
		{"relay between two that it opened", func(r *trace) {
			for range 3 {
				r.signal("web", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:5432"), Comm: "socat", PID: 7, Between: "opened",
					Values: Values{Received: 500, Bytes: 500, Answered: 20000, Back: 20000}}).wait(5 * time.Second)
			}
		}, []string{"T1090.001 relay medium edge/web socat[7]"}},
		{"OK copied from one place to another", func(r *trace) {
			for range 50 {
				r.signal("web", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:5432"), Comm: "sync", PID: 7, Between: "opened",
					Values: Values{Received: 1000000, Bytes: 1000000, Answered: 300, Back: 200}}).wait(5 * time.Second)
			}
		}, []string{}},
		{"OK two peers are asked how they are", func(r *trace) {
			for i := range 50 {
				n := uint64(200 + 10*i)
				r.signal("web", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:2380"), Comm: "etcd", PID: 7, Between: "opened",
					Values: Values{Received: n, Bytes: n, Answered: n, Back: n, Parts: [4]uint32{uint32(10 + i), uint32(10 + i), uint32(10 + i), uint32(10 + i)}}}).wait(5 * time.Second)
			}
		}, []string{}},
		{"relay of what is typed, through ssh", func(r *trace) {
			for i := range 5 {
				n := uint32(10 + 3*i)
				r.signal("web", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:23"), Comm: "sshd", PID: 7, SSH: true,
					Values: Values{Received: uint64(n) * 36, Bytes: uint64(n), Answered: uint64(n) * 40, Back: uint64(n) * 4, Parts: [4]uint32{n, n, n, n}}}).wait(5 * time.Second)
			}
		}, []string{"T1572 relay medium edge/web sshd[7]"}},
		{"relay of what is typed", func(r *trace) {
			for i := range 5 {
				n := uint32(10 + 3*i)
				r.signal("web", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:23"), Comm: "socat", PID: 7,
					Values: Values{Received: uint64(n), Bytes: uint64(n), Answered: uint64(n), Back: uint64(n), Parts: [4]uint32{n, n, n, n}}}).wait(5 * time.Second)
			}
		}, []string{"T1090.001 relay medium edge/web socat[7]"}},
		{"OK a question for each question, of other lengths", func(r *trace) {
			for i := range 100 {
				n := uint32(10 + i)
				r.signal("api", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:6379"), Comm: "api", PID: 7,
					Values: Values{Received: uint64(n) * 120, Bytes: uint64(n) * 30, Answered: uint64(n) * 110, Back: uint64(n) * 8, Parts: [4]uint32{n, n, n, n}}}).wait(5 * time.Second)
			}
		}, []string{}},
		{"OK as often as the clock ticks", func(r *trace) {
			for range 100 {
				r.signal("api", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:6379"), Comm: "api", PID: 7,
					Values: Values{Received: 400, Bytes: 10, Answered: 400, Back: 10, Parts: [4]uint32{10, 10, 10, 10}}}).wait(5 * time.Second)
			}
		}, []string{}},
		{"relay of a proxy", func(r *trace) {
			r.signal("jump", Signal{Kind: Relay, Protocol: "tcp", Peer: peer("10.1.0.1:5432"), Comm: "ssh", PID: 7,
				Values: Values{Received: 10000, Bytes: 10000, Answered: 20000, Back: 20000}})
		}, []string{"T1572 relay medium app/jump ssh[7] role bastion"}},
		{"reverse shell", func(r *trace) {
			r.signal("web", Signal{Kind: Shell, Exe: "/usr/bin/dash", Comm: "sh", PID: 8, Peer: peer("10.9.0.1:443")})
		}, []string{"T1059.004 shell critical edge/web sh[8]"}},
		{"inetd", func(r *trace) {
			r.signal("web", Signal{Kind: Shell, Exe: "/usr/sbin/in.ftpd", Comm: "in.ftpd", PID: 8})
		},
			[]string{"T1059.004 shell low edge/web in.ftpd[8]"}},
		{"OK inetd behind a crossing", func(r *trace) {
			r.signal("api", Signal{Kind: Shell, Exe: "/usr/sbin/sshd", Comm: "sshd", PID: 8, Local: flow.Endpoint{Port: 8080}})
		}, []string{}},
		{"inetd beside a crossing", func(r *trace) {
			r.signal("api", Signal{Kind: Shell, Exe: "/usr/sbin/sshd", Comm: "sshd", PID: 8, Local: flow.Endpoint{Port: 8081}})
		}, []string{"T1059.004 shell low app/api sshd[8]"}},
		{"shell behind a crossing", func(r *trace) {
			r.signal("api", Signal{Kind: Shell, Exe: "/bin/sh", Comm: "sh", PID: 8, Local: flow.Endpoint{Port: 8080}})
		}, []string{"T1059.004 shell critical app/api sh[8]"}},
		{"cgroup of another", func(r *trace) {
			r.signal("web", Signal{Kind: Migrate, Peer: flow.Endpoint{Identity: 5, Workload: "api", Zone: "app"}})
		}, []string{"T1611 cgroup-move high edge/web tool[4242]"}},
		{"cgroup of another, by the manager", func(r *trace) {
			r.signal("web", Signal{Kind: Migrate, Cause: "manager", Peer: flow.Endpoint{Identity: 5, Workload: "api", Zone: "app"}})
		}, []string{"T1611 cgroup-move low edge/web tool[4242]"}},
		{"out of every workload", func(r *trace) {
			r.signal("web", Signal{Kind: Migrate, Peer: flow.Endpoint{Identity: 1, Reserved: "unmanaged"}})
		}, []string{"T1611 cgroup-move high edge/web tool[4242]"}},
		{"OK a session that the manager gives a scope", func(r *trace) {
			r.signal("web", Signal{Kind: Migrate, Cause: "manager", Peer: flow.Endpoint{Identity: 1, Reserved: "unmanaged"}})
		}, []string{}},
		{"network namespace", func(r *trace) { r.signal("web", Signal{Kind: Setns}) }, []string{"T1611 namespace high edge/web tool[4242]"}},
		{"tun", func(r *trace) { r.signal("web", Signal{Kind: Tun}) }, []string{"T1572 tun medium edge/web tool[4242]"}},
		{"listener", func(r *trace) {
			r.signal("web", Signal{Kind: Listen, Protocol: "tcp", Local: flow.Endpoint{Port: 4444}})
		}, []string{"T1571 listener info edge/web tool[4242]"}},
		{"file by ssh", func(r *trace) {
			r.signal("batch", Signal{Kind: Transfer, Protocol: "tcp", Peer: peer("10.1.0.1:22"), Values: Values{Bytes: 20 << 20, Back: 10000}})
		}, []string{"T1570 transfer medium app/batch tool[4242]"}},
		{"OK files by ssh every night, after the first", func(r *trace) {
			r.signal("jump", Signal{Kind: Transfer, Protocol: "tcp", Peer: peer("10.1.0.1:22"), Values: Values{Bytes: 20 << 20}})
			for range 5 {
				r.wait(24*time.Hour).signal("jump", Signal{Kind: Transfer, Protocol: "tcp", Peer: peer("10.1.0.1:22"), Values: Values{Bytes: 21 << 20}})
			}
		}, []string{"T1570 transfer medium app/jump tool[4242] role bastion"}},
		{"dns tunnel", func(r *trace) {
			for range 100 {
				r.signal("web", Signal{Kind: DNS, Protocol: "udp", Peer: peer("10.1.0.1:53"), Values: Values{Length: 120, Labels: 4, Count: 1}}).wait(time.Second)
			}
		}, []string{"T1071.004 dns-tunnel medium edge/web tool[4242]"}},
		{"OK dns", func(r *trace) {
			for range 500 {
				r.signal("web", Signal{Kind: DNS, Protocol: "udp", Peer: peer("10.1.0.1:53"), Values: Values{Length: 30, Labels: 3, Count: 1}}).wait(time.Second)
			}
		}, []string{}},
		{"icmp tunnel", func(r *trace) {
			for range 10 {
				r.signal("web", Signal{Kind: ICMP, Protocol: "icmp", Peer: peer("10.1.0.1:0"), Values: Values{Bytes: 900}}).wait(time.Second)
			}
		}, []string{"T1095 icmp-tunnel medium edge/web tool[4242]"}},
		{"OK ping", func(r *trace) {
			for range 100 {
				r.signal("web", Signal{Kind: ICMP, Protocol: "icmp", Peer: peer("10.1.0.1:0"), Values: Values{Bytes: 56}}).wait(time.Second)
			}
		}, []string{}},
		{"ssh on the port of something else", func(r *trace) {
			r.signal("web", Signal{Kind: Banner, Protocol: "tcp", Peer: peer("10.1.0.1:443")})
		}, []string{"T1571 banner medium edge/web tool[4242]"}},
		{"OK ssh", func(r *trace) { r.signal("web", Signal{Kind: Banner, Protocol: "tcp", Peer: peer("10.1.0.1:22")}) }, []string{}},
		{"lost signals", func(r *trace) { r.signal("web", Signal{Kind: Lost, Cause: "quota", Values: Values{Count: 9}}) },
			[]string{"T1562.006 lost low edge/web tool[4242]"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newTrace()
			c.trace(r)
			if d := cmp.Diff(c.want, r.found(t, nil)); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}
