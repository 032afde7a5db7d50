package bench

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/demarc/demarc/test/netlab"
)

// Every policy declares the same: so many peers that may reach the server on its
// four ports, and that the client may reach on theirs. The pair itself comes last.
// Peer i has the address and the name that follow.
func peerAddress(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 200, byte(i >> 8), byte(i)})
}

func peerName(i int) string { return fmt.Sprintf("peer-%05d", i) }

// peers is how many there are beside the pair.
func (b *bench) peers() int { return b.tuples/(lastPort-firstPort+1) - 1 }

// addNone joins a pair that nothing is done to.
func (b *bench) addNone(name string) {
	b.t.Helper()
	b.pair(name, false, b.lab.Cgroup(name+"/client"), b.lab.Cgroup(name+"/server"))
}

// What is attached where nothing is decided: to the packets of sockets, and to every
// hook of demarc that this traffic meets.
var (
	packetHooks = map[string]ebpf.AttachType{
		"empty_egress": ebpf.AttachCGroupInetEgress, "empty_ingress": ebpf.AttachCGroupInetIngress,
	}
	everyHook = map[string]ebpf.AttachType{
		"empty_egress": ebpf.AttachCGroupInetEgress, "empty_ingress": ebpf.AttachCGroupInetIngress,
		"empty_create": ebpf.AttachCGroupInetSockCreate, "empty_release": ebpf.AttachCgroupInetSockRelease,
		"empty_connect": ebpf.AttachCGroupInet4Connect, "empty_sendmsg": ebpf.AttachCGroupUDP4Sendmsg,
		"empty_setsockopt": ebpf.AttachCGroupSetsockopt, "empty_handshake": ebpf.AttachCGroupSockOps,
	}
)

// addEmpty attaches programs that let everything pass, and returns them.
func (b *bench) addEmpty(name string, hooks map[string]ebpf.AttachType) map[string]*ebpf.Program {
	b.t.Helper()
	p := b.pair(name, false, b.lab.Cgroup(name+"/client"), b.lab.Cgroup(name+"/server"))
	programs := b.programs(b.compile("peers"), slices.Collect(maps.Keys(hooks))...)
	for program, attach := range hooks {
		l, err := link.AttachCgroup(link.CgroupOptions{
			Path: filepath.Dir(p.client.cgroup.Dir()), Attach: attach, Program: programs.Programs[program],
		})
		check(b.t, err)
		b.t.Cleanup(func() { l.Close() })
	}
	return programs.Programs
}

// programs loads some programs, and the maps they use.
func (b *bench) programs(spec *ebpf.CollectionSpec, names ...string) *ebpf.Collection {
	b.t.Helper()
	keep := map[string]*ebpf.ProgramSpec{}
	for _, name := range names {
		keep[name] = spec.Programs[name]
	}
	spec = spec.Copy()
	spec.Programs = keep
	c, err := ebpf.NewCollection(spec)
	check(b.t, err)
	b.t.Cleanup(c.Close)
	return c
}

// addTC attaches the connection table to the devices of both ends, each with its own
// maps as on two hosts.
func (b *bench) addTC() {
	b.t.Helper()
	p := b.pair(tc, true, b.lab.Cgroup("tc/client"), b.lab.Cgroup("tc/server"))
	spec := b.compile("peers")
	for _, e := range []*end{&p.client, &p.server} {
		c := b.programs(spec, "conntrack_egress", "conntrack_ingress")
		b.declare(c.Maps["policy"])
		for name, attach := range map[string]ebpf.AttachType{
			"conntrack_egress": ebpf.AttachTCXEgress, "conntrack_ingress": ebpf.AttachTCXIngress,
		} {
			check(b.t, e.ns.Do(func() error {
				l, err := link.AttachTCX(link.TCXOptions{Interface: e.device, Program: c.Programs[name], Attach: attach})
				if err == nil {
					b.t.Cleanup(func() { l.Close() })
				}
				return err
			}))
		}
	}
}

// declared is a key of tc's policy map, address and port in network order.
type declared struct {
	Address  [4]byte
	Port     [2]byte
	Proto    uint8
	Outgoing uint8
}

func (b *bench) declare(m *ebpf.Map) {
	b.t.Helper()
	var keys []declared
	var values []uint32
	add := func(a netip.Addr, proto uint8, port uint16) {
		k := declared{Address: a.As4(), Proto: proto}
		binary.BigEndian.PutUint16(k.Port[:], port)
		for k.Outgoing = range uint8(2) {
			keys, values = append(keys, k), append(values, 1)
		}
	}
	all := make([]netip.Addr, 0, b.peers()+2)
	for i := range b.peers() {
		all = append(all, peerAddress(i))
	}
	all = append(all, netip.MustParseAddr(clientAddress), netip.MustParseAddr(serverAddress))
	for _, a := range all {
		for port := firstPort; port <= lastPort; port++ {
			add(a, 6, uint16(port))
		}
	}
	for _, a := range all[b.peers():] {
		add(a, 17, udpPort)
	}
	n, err := m.BatchUpdate(keys, values, nil)
	if err != nil || n != len(keys) {
		b.t.Fatalf("fill policy: %d of %d: %v", n, len(keys), err)
	}
}

// addNFT gives both ends a stateful filter with verdict maps.
func (b *bench) addNFT() {
	b.t.Helper()
	p := b.pair(nft, true, b.lab.Cgroup("nft/client"), b.lab.Cgroup("nft/server"))
	for _, e := range []struct {
		*end
		peer string
	}{{&p.client, serverAddress}, {&p.server, clientAddress}} {
		var list strings.Builder
		add := func(address string, proto string, port int) {
			fmt.Fprintf(&list, "\t\t%s . %s . %d : accept,\n", address, proto, port)
		}
		for i := range b.peers() {
			for port := firstPort; port <= lastPort; port++ {
				add(peerAddress(i).String(), "tcp", port)
			}
		}
		for port := firstPort; port <= lastPort; port++ {
			add(e.peer, "tcp", port)
		}
		add(e.peer, "udp", udpPort)
		file := filepath.Join(b.lab.Dir(), "rules.nft")
		check(b.t, os.WriteFile(file, fmt.Appendf(nil, rules, list.String()), 0o600))
		loads := e.ns.Start(e.cgroup, netlab.Command{Path: "/usr/sbin/nft", Args: []string{"-f", file}})
		if status := loads.Wait(time.Minute); status != 0 {
			b.t.Fatalf("nft: %d: %s", status, loads.Output())
		}
		e.ns.Sysctl("netfilter/nf_conntrack_tcp_timeout_time_wait", "5")
	}
}

const rules = `table ip bench {
	map declared {
		type ipv4_addr . inet_proto . inet_service : verdict
		elements = {
%s		}
	}
	chain input {
		type filter hook input priority 0; policy drop;
		ct state established,related accept
		ip saddr . meta l4proto . th dport vmap @declared
	}
	chain output {
		type filter hook output priority 0; policy drop;
		ct state established,related accept
		ip daddr . meta l4proto . th dport vmap @declared
	}
}
`

// addDemarc starts a node, with its agent, that enforces on both ends.
func (b *bench) addDemarc() {
	b.t.Helper()
	b.node = b.lab.Node(b.policy(), netlab.NodeOptions{})
	b.pair(demarc, true, b.node.Cgroup("/bench/client"), b.node.Cgroup("/bench/server"))
}

func (b *bench) policy() string {
	var p strings.Builder
	p.WriteString("apiVersion: demarc.dev/v1alpha1\nkind: BoundaryPolicy\nmetadata: {name: bench, version: 1}\n" +
		"trustDomain: bench.example\nzones:\n  app: {trust: 10}\nworkloads:\n")
	for i := range b.peers() {
		fmt.Fprintf(&p, "  %s: {zone: app, match: [{cgroup: /%[1]s}]}\n", peerName(i))
	}
	p.WriteString("  client: {zone: app, match: [{cgroup: /bench/client}]}\n  server: {zone: app, match: [{cgroup: /bench/server}]}\ncrossings:\n")
	crossing := func(name, from, to, ports string) {
		fmt.Fprintf(&p, "  - {name: %s, from: [workload/%s], to: [workload/%s], ports: [%s], log: all, purpose: bench}\n", name, from, to, ports)
	}
	tcp := fmt.Sprintf("tcp/%d-%d", firstPort, lastPort)
	for i := range b.peers() {
		crossing("in-"+peerName(i), peerName(i), "server", tcp)
		crossing("out-"+peerName(i), "client", peerName(i), tcp)
	}
	crossing("pair-tcp", "client", "server", tcp)
	crossing("pair-udp", "client", "server", fmt.Sprintf("udp/%d", udpPort))
	return p.String()
}
