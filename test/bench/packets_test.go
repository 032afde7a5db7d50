package bench

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/dchest/siphash"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/test/netlab"
)

// repeatVariable says how often each packet runs in a row. Without it the runs are
// short, and only what they decide is checked.
const repeatVariable = "REPEAT"

// TestPackets runs single packets through demarc's paths, on the tables that a real
// core made of the policy of TestTraffic, and looks at the attached programs under
// traffic.
func TestPackets(t *testing.T) {
	outcome := Packets{Machine: describeMachine(), Repeat: 500, Best: 2}
	seconds, tuples := 0.1, 400
	full := os.Getenv(repeatVariable) != ""
	if full {
		var err error
		if outcome.Repeat, err = strconv.Atoi(os.Getenv(repeatVariable)); err != nil || outcome.Repeat < 1 {
			t.Fatalf("%s=%q is no number of repeats", repeatVariable, os.Getenv(repeatVariable))
		}
		outcome.Best, seconds, tuples = 25, 1, 10_000
	}
	b := build(t, tuples)
	b.empty = b.addEmpty(empty, packetHooks)
	b.addDemarc()
	b.packets(&outcome)
	for _, mode := range []Mode{Requests, Connections, Datagrams} {
		for _, p := range b.pairs {
			outcome.Live = append(outcome.Live, b.live(p, mode, seconds)...)
		}
	}
	outcome.Machine.After = loadAverage()
	net := func(program string) float64 {
		i := slices.IndexFunc(outcome.Packets, func(p Packet) bool { return p.Program == program })
		return outcome.Packets[i].Net
	}
	outcome.Goals = []Goal{goalPacket.judge(net("packet_established"), full), goalSYN.judge(net("packet_syn"), full)}
	fmt.Println(&outcome)
	for _, g := range outcome.Goals {
		if g.Outcome == Missed {
			t.Errorf("goal missed: %s", g)
		}
	}
	writeJSON(t, &outcome)
}

// packets measures every kind of packet.
func (b *bench) packets(outcome *Packets) {
	b.t.Helper()
	c := b.private()
	signed := b.signed(c)
	wrong := slices.Clone(signed)
	wrong[len(wrong)-1] ^= 1
	unsigned := frame(&layers.TCP{SrcPort: 40000, DstPort: firstPort, SYN: true, Seq: 7, Options: usualOptions()}, nil)
	data := frame(&layers.TCP{SrcPort: 40000, DstPort: firstPort, ACK: true, PSH: true, Seq: 8, Ack: 9}, []byte{1})
	datagram := frame(&layers.UDP{SrcPort: 40000, DstPort: udpPort}, make([]byte, 64))

	drain(b.t, c.Maps["denied_events"])
	drain(b.t, c.Maps["allowed_events"])
	outcome.Empty = b.best(outcome, c, "empty", data, 1)
	renewed := b.best(outcome, c, "packet_renewed", signed, 1)
	// Both ends have seen the flow of datagrams: it is not held up for want of proof.
	once := &Packets{Repeat: 1, Best: 1}
	b.inside(b.node.Cgroup("/bench/client"), func() { b.best(once, c, "packet_datagram_out", datagram, 1) })
	b.inside(b.node.Cgroup("/bench/server"), func() { b.best(once, c, "packet_datagram_in", datagram, 1) })
	for _, k := range []struct {
		what, cgroup, program string
		frame                 []byte
		verdict               uint32
	}{
		{"packet of an established connection", "server", "packet_established", data, 1},
		{"SYN at a listener: verified and admitted", "server", "packet_syn", signed, 1},
		{"SYN at a listener: wrong MAC, counted and told", "server", "packet_syn", wrong, 0},
		{"SYN at a listener: no tag, counted and told", "server", "packet_syn", unsigned, 0},
		{"datagram of a known flow, on its way out", "client", "packet_datagram_out", datagram, 1},
		{"datagram of a known flow, on its way in", "server", "packet_datagram_in", datagram, 1},
		{"no packet: a socket's verdict, made and deleted", "server", "packet_storage", data, 1},
	} {
		before := rings(b.t, c)
		var ns float64
		b.inside(b.node.Cgroup("/bench/"+k.cgroup), func() { ns = b.best(outcome, c, k.program, k.frame, k.verdict) })
		after := rings(b.t, c)
		p := Packet{What: k.what, Program: k.program, NS: ns, Net: ns - outcome.Empty}
		if k.program == "packet_syn" { // it was made a new one first
			p.Net = ns - renewed
		}
		if made := after.Seq - before.Seq; made > 0 {
			p.Lost = float64(after.Lost-before.Lost) / float64(made)
		}
		outcome.Packets = append(outcome.Packets, p)
	}
}

// signed is the client's SYN, with the tag of the key that is in use.
func (b *bench) signed(c *ebpf.Collection) []byte {
	b.t.Helper()
	var state abi.State
	check(b.t, c.Maps["state"].Lookup(uint32(0), &state))
	var key abi.Key
	check(b.t, c.Maps["keys"].Lookup(uint32(state.TagEpoch), &key))
	return synFrame(b.identities()["client"], uint32(state.TagEpoch), key)
}

// best runs a program often and returns the least mean of a run, in ns.
func (b *bench) best(outcome *Packets, c *ebpf.Collection, program string, frame []byte, verdict uint32) float64 {
	b.t.Helper()
	least := 0.0
	for i := range outcome.Best {
		got, d, err := c.Programs[program].Benchmark(frame, outcome.Repeat, nil)
		check(b.t, err)
		if got != verdict {
			b.t.Fatalf("%s: verdict %d, want %d", program, got, verdict)
		}
		if ns := float64(d.Nanoseconds()); i == 0 || ns < least {
			least = ns
		}
	}
	return least
}

// private loads the packet programs. They read the policy, the keys and the bindings
// of the node; what they write is their own, apart from the maps that are named.
func (b *bench) private(also ...string) *ebpf.Collection {
	b.t.Helper()
	spec := b.compile("packets")
	for name := range spec.Programs {
		if name != "empty" && !strings.HasPrefix(name, "packet_") {
			delete(spec.Programs, name)
		}
	}
	shared := map[string]*ebpf.Map{}
	open := func(name string) *ebpf.Map {
		m, err := ebpf.LoadPinnedMap(filepath.Join(b.node.Dir(), "bpf/demarc/maps", name), nil)
		check(b.t, err)
		return m
	}
	for _, name := range append(also, "bindings", "keys", "rules", "subjects", "crossings", "buckets", "prefixes", "ports") {
		shared[name] = open(name)
		defer shared[name].Close()
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
	check(b.t, err)
	b.t.Cleanup(c.Close)
	var state abi.State
	theirs := open("state")
	defer theirs.Close()
	check(b.t, theirs.Lookup(uint32(0), &state))
	check(b.t, c.Maps["state"].Put(uint32(0), state))
	return c
}

// identities are the numbers of the pair's workloads.
func (b *bench) identities() map[string]image.ID {
	b.t.Helper()
	p, err := policy.Parse("policy.yaml", []byte(b.policy()))
	check(b.t, err)
	img, err := policy.Compile(p)
	check(b.t, err)
	ids := map[string]image.ID{}
	for _, w := range img.Workloads {
		ids[w.Name] = w.ID
	}
	return ids
}

// inside calls f with this process in a cgroup: the socket of a test run is in the
// cgroup of whoever asks for it.
func (b *bench) inside(c *netlab.Cgroup, f func()) {
	b.t.Helper()
	move := func(dir string) { check(b.t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0)) }
	home := b.home(c)
	move(c.Dir())
	defer move(home) // before the lab kills what is left in its cgroups
	f()
}

// home is the directory of the cgroup that this process is in. The lab's cgroups lie
// below the root of the same hierarchy.
func (b *bench) home(c *netlab.Cgroup) string {
	b.t.Helper()
	text, err := os.ReadFile("/proc/self/cgroup")
	check(b.t, err)
	mount, _, found := strings.Cut(c.Dir(), "/demarc-lab-")
	for line := range strings.Lines(string(text)) {
		if path, v2 := strings.CutPrefix(line, "0::"); v2 && found {
			return filepath.Join(mount, strings.TrimSpace(path))
		}
	}
	b.t.Fatalf("find own cgroup below %s in %q", mount, text)
	return ""
}

func rings(t testing.TB, c *ebpf.Collection) (total record.RingState) {
	t.Helper()
	for i := range uint32(record.Rings) {
		var cpus []record.RingState
		check(t, c.Maps["ring_state"].Lookup(i, &cpus))
		for _, s := range cpus {
			total.Seq += s.Seq
			total.Lost += s.Lost
		}
	}
	return total
}

// drain reads a ring until the test ends, so that events find room. It rests between,
// because an event wakes a reader that has read all before it, and that is the
// reader's cost, not the packet's.
func drain(t testing.TB, m *ebpf.Map) {
	t.Helper()
	r, err := ringbuf.NewReader(m)
	check(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		var record ringbuf.Record
		for r.ReadInto(&record) == nil {
			if r.AvailableBytes() == 0 {
				time.Sleep(5 * time.Millisecond)
			}
		}
	}()
	t.Cleanup(func() {
		r.Close()
		<-done
	})
}

// usualOptions are those of Linux's own SYN: 20 bytes.
func usualOptions() []layers.TCPOption {
	return []layers.TCPOption{
		{OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{5, 180}},
		{OptionType: layers.TCPOptionKindSACKPermitted, OptionLength: 2},
		{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: make([]byte, 8)},
		{OptionType: layers.TCPOptionKindNop, OptionLength: 1},
		{OptionType: layers.TCPOptionKindWindowScale, OptionLength: 3, OptionData: []byte{7}},
	}
}

// synFrame is the client's SYN with its tag, as docs/identity.md specifies it.
func synFrame(id image.ID, epoch uint32, key abi.Key) []byte {
	const seq, sport = 7, 40000
	claim := uint32(id)<<8 | epoch<<4
	var covered []byte
	covered = binary.BigEndian.AppendUint32(covered, claim)
	covered = binary.BigEndian.AppendUint32(covered, seq)
	covered = binary.BigEndian.AppendUint32(covered, uint32(time.Now().UnixNano()>>abi.TagSlotShift))
	covered = binary.BigEndian.AppendUint16(covered, sport)
	covered = binary.BigEndian.AppendUint16(covered, firstPort)
	covered = append(covered, net.ParseIP(clientAddress).To16()...)
	covered = append(covered, net.ParseIP(serverAddress).To16()...)
	tag := binary.BigEndian.AppendUint16(nil, 0xd3ac)
	tag = binary.BigEndian.AppendUint32(tag, claim)
	tag = binary.LittleEndian.AppendUint64(tag, siphash.Hash(key.Key[0], key.Key[1], covered))
	return frame(&layers.TCP{SrcPort: sport, DstPort: firstPort, SYN: true, Seq: seq, Options: append(usualOptions(),
		layers.TCPOption{OptionType: 253, OptionLength: 16, OptionData: tag})}, nil)
}

// frame puts a segment or datagram of the client into a frame for the server.
func frame(transport gopacket.SerializableLayer, payload []byte) []byte {
	ip := &layers.IPv4{Version: 4, TTL: 64, SrcIP: net.ParseIP(clientAddress).To4(), DstIP: net.ParseIP(serverAddress).To4(), Protocol: layers.IPProtocolTCP}
	if _, datagram := transport.(*layers.UDP); datagram {
		ip.Protocol = layers.IPProtocolUDP
	}
	eth := &layers.Ethernet{SrcMAC: make(net.HardwareAddr, 6), DstMAC: make(net.HardwareAddr, 6), EthernetType: layers.EthernetTypeIPv4}
	out := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(out, gopacket.SerializeOptions{FixLengths: true}, eth, ip, transport, gopacket.Payload(payload)); err != nil {
		panic(err)
	}
	return out.Bytes()
}

// live counts runs and time of the programs that work on a pair while it is loaded.
func (b *bench) live(p *pair, mode Mode, seconds float64) (all []Live) {
	b.t.Helper()
	programs := map[string]*ebpf.Program{}
	if p.name == demarc {
		for _, name := range []string{"sock_create", "sock_release", "post_bind4", "connect4", "sendmsg4", "setsockopt", "sock_ops", "egress", "ingress"} {
			programs[name] = b.attached(name)
		}
	} else {
		programs = b.empty
	}
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	check(b.t, err)
	defer stats.Close()
	before := map[string]*ebpf.ProgramStats{}
	for name, program := range programs {
		before[name], err = program.Stats()
		check(b.t, err)
	}
	r := b.run(p, mode, seconds)
	for name, program := range programs {
		after, err := program.Stats()
		check(b.t, err)
		runs := float64(after.RunCount - before[name].RunCount)
		if perOperation := runs / float64(r.Operations); perOperation >= 0.01 {
			all = append(all, Live{
				Mode: mode, Configuration: p.name, Program: name, Runs: perOperation,
				NS: float64(after.Runtime-before[name].Runtime) / runs,
			})
		}
	}
	slices.SortFunc(all, func(a, b Live) int { return strings.Compare(a.Program, b.Program) })
	return all
}

// attached is a program that the node attached.
func (b *bench) attached(name string) *ebpf.Program {
	b.t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(b.node.Dir(), "bpf/demarc/links", name), nil)
	check(b.t, err)
	defer l.Close()
	info, err := l.Info()
	check(b.t, err)
	p, err := ebpf.NewProgramFromID(info.Program)
	check(b.t, err)
	b.t.Cleanup(func() { p.Close() })
	return p
}
