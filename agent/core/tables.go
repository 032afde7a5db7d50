package core

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// bootClock converts wall-clock seconds, as an image states its windows, to the
// kernel's CLOCK_BOOTTIME, which no clock step moves.
type bootClock struct {
	offset int64 // wall clock minus boot clock, in ns
}

// readBootClock reads the wall clock between two looks at the other, and again where
// too much time was between these: another process may have had the processor.
func readBootClock() (bootClock, error) {
	var c bootClock
	closest := time.Hour
	for tries := 0; tries < 20 && closest > wallTolerance/10; tries++ {
		var before, after unix.Timespec
		err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &before)
		wall := time.Now().UnixNano()
		if err := errors.Join(err, unix.ClockGettime(unix.CLOCK_BOOTTIME, &after)); err != nil {
			return bootClock{}, fmt.Errorf("read boot clock: %w", err)
		}
		if gap := time.Duration(after.Nano() - before.Nano()); gap < closest {
			closest, c.offset = gap, wall-before.Nano()-int64(gap/2)
		}
	}
	return c, nil
}

// now is the boot clock's time in ns.
func (c bootClock) now() uint64 { return uint64(max(time.Now().UnixNano()-c.offset, 0)) }

// at converts Unix seconds; 0 means no bound and stays 0. A bound before the boot
// must not become "no bound", so it is the first nanosecond instead.
func (c bootClock) at(seconds int64) uint64 {
	const most = 1 << 33 // seconds; some 270 years, where ns still fit
	if seconds == 0 {
		return 0
	}
	if seconds > most {
		seconds = most
	}
	return uint64(max(seconds*int64(time.Second)-c.offset, 1))
}

// crossingEntries are the crossings as the kernel needs them, by index.
func crossingEntries(img *image.Image, clock bootClock) []abi.Crossing {
	out := make([]abi.Crossing, len(img.Crossings))
	for i := range img.Crossings {
		c := &img.Crossings[i]
		out[i] = abi.Crossing{
			Number: c.Number, Need: uint8(c.Need), NAT: uint8(c.NAT), Log: uint8(c.Log),
			Since: clock.at(c.Since), Until: clock.at(c.Until),
		}
		if c.Decoy {
			out[i].Flags |= abi.CrossingDecoy
		}
		if c.Forensic {
			out[i].Flags |= abi.CrossingForensic
		}
		if c.Refuse == image.RefuseDrop {
			out[i].Flags |= abi.CrossingDrop
		}
		if c.Rate > 0 {
			out[i].Interval, out[i].Slack = pace(c.Rate, c.Burst)
		}
	}
	return out
}

// pace turns flows per hour and a burst into ns between flows, and ns that a
// burst may run ahead. It rounds towards fewer flows.
func pace(rate, burst uint64) (interval, slack uint64) {
	const hour = uint64(time.Hour)
	interval = (hour + rate - 1) / rate
	ahead := max(burst, 1) - 1
	if most := ^uint64(0) >> 1; ahead > most/interval {
		return interval, most
	}
	return interval, ahead * interval
}

// subjectEntries are all identities of the image.
func subjectEntries(img *image.Image) (keys []uint32, values []abi.Subject) {
	var flags uint16
	if img.UnmanagedOutbound {
		flags |= abi.SubjectOutbound
	}
	if img.UnmanagedInbound {
		flags |= abi.SubjectInbound
	}
	keys, values = []uint32{uint32(image.Unmanaged)}, []abi.Subject{{Zone: img.UnmanagedZone, Flags: flags}}
	for i := range img.Workloads {
		keys = append(keys, uint32(img.Workloads[i].ID))
		values = append(values, abi.Subject{Zone: img.Workloads[i].Zone})
	}
	place := make(map[uint32]int, len(keys))
	for i, id := range keys {
		place[id] = i
	}
	at, known, last := 0, false, image.None
	for i := range img.Rules { // those of one subject are together
		r := &img.Rules[i]
		if r.Subject != last {
			last = r.Subject
			at, known = place[uint32(last)]
		}
		if known {
			values[at].Flags |= abi.SubjectMeets(abi.Direction(r.Direction), uint8(r.Peer>>24))
		}
	}
	return keys, values
}

func ruleEntries(img *image.Image) (keys []abi.RuleKey, values []abi.Rule) {
	keys, values = make([]abi.RuleKey, len(img.Rules)), make([]abi.Rule, len(img.Rules))
	for i := range img.Rules {
		r := &img.Rules[i]
		keys[i] = abi.RuleKey{Subject: uint32(r.Subject), Peer: uint32(r.Peer), Class: r.Class, Direction: abi.Direction(r.Direction)}
		for j := range values[i].Crossing {
			values[i].Crossing[j] = abi.NoCrossing
		}
		copy(values[i].Crossing[:], r.Crossings)
	}
	return keys, values
}

// portEntries are the port classes by row. Numbers that a protocol does not have
// are looked up by no program.
func portEntries(img *image.Image) []abi.PortClasses {
	rows := make([]abi.PortClasses, abi.Rows)
	for _, r := range img.Ports {
		row, base := portRow(r.Proto)
		for port := int(r.Low); port <= int(r.High); port++ {
			rows[row].Class[base+port] = r.Class
		}
	}
	return rows
}

func portRow(p image.Proto) (row, base int) {
	switch p {
	case image.TCP:
		return abi.RowTCP, 0
	case image.UDP:
		return abi.RowUDP, 0
	case image.SCTP:
		return abi.RowSCTP, 0
	case image.ICMP:
		return abi.RowOther, 0
	case image.ICMP6:
		return abi.RowOther, 256
	}
	return abi.RowOther, 512
}

func prefixEntries(img *image.Image) (keys []abi.PrefixKey, values []uint32) {
	for _, p := range img.Addresses {
		key := abi.PrefixKey{Length: 8 + uint32(p.Prefix.Bits()), Family: 6, Address: p.Prefix.Addr().As16()}
		if p.Prefix.Addr().Is4() {
			key.Family, key.Length = 4, key.Length+96
		}
		keys = append(keys, key)
		values = append(values, uint32(p.Class))
	}
	return keys, values
}

// activeFlags say what mode the image asks for.
func activeFlags(img *image.Image) uint32 {
	flags := uint32(abi.ActiveOn)
	if img.Mode == image.Observe {
		flags |= abi.ActiveObserve
	}
	for i := range img.Crossings {
		if img.Crossings[i].Decoy {
			flags |= abi.ActiveDecoy
		}
	}
	for i := range img.Crossings {
		for _, terms := range [][]image.Term{img.Crossings[i].From, img.Crossings[i].To} {
			for _, t := range terms {
				if t.Kind == image.TermUnmanaged {
					return flags | abi.ActiveUnmanaged
				}
			}
		}
	}
	return flags
}
