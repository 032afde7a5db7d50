package core

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
)

// maxCuts bounds the connections that a preview names. The others are counted.
const maxCuts = 1000

// errPreview ends an installation before anything is judged by it.
var errPreview = errors.New("only a preview")

// Preview says which live TCP connections an image would cut, and changes nothing.
// The image is filled and tested as if it were applied; the kernel then judges each
// socket that a process holds by it, as it would at the socket's next packet.
func (c *Core) Preview(b []byte) (*proto.Preview, error) {
	g, err := openImage(b, c.trusted)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settle()
	if err := c.mayChange(g); err != nil {
		return nil, err
	}
	var cuts []abi.Cut
	c.keepClaims(g)
	err = c.install(g, change{preview: func() (err error) {
		if cuts, err = findCuts(c.objects, g.slot); err == nil {
			err = errPreview
		}
		return err
	}})
	if !errors.Is(err, errPreview) {
		return nil, err
	}
	p := &proto.Preview{Total: len(cuts)}
	for _, cut := range cuts[:min(len(cuts), maxCuts)] {
		t := cut.Tuple
		p.Cuts = append(p.Cuts, proto.Cut{
			Local:   netip.AddrPortFrom(netip.AddrFrom16(t.Source).Unmap(), t.SourcePort),
			Remote:  netip.AddrPortFrom(netip.AddrFrom16(t.Destination).Unmap(), t.DestinationPort),
			Process: string(bytes.TrimRight(cut.Comm[:], "\x00")), PID: cut.PID, Subject: cut.Subject, Peer: cut.Peer, Inbound: cut.Direction == abi.Ingress, Reason: cut.Reason.String(),
		})
	}
	return p, nil
}

// findCuts walks over the files of all processes. A connection of which both ends
// are here is named once.
func findCuts(o *objects, slot uint32) ([]abi.Cut, error) {
	if err := o.Maps["selftest"].Put(uint32(0), [4]uint32{1: slot}); err != nil {
		return nil, fmt.Errorf("look for connections: %w", err)
	}
	seen := map[abi.Tuple]bool{}
	var all []abi.Cut
	found, err := readIterator(o.Programs["cuts"])
	if err != nil {
		return nil, fmt.Errorf("look for connections: %w", err)
	}
	cuts := make([]abi.Cut, len(found)/binary.Size(abi.Cut{}))
	if err := binary.Read(bytes.NewReader(found), binary.NativeEndian, cuts); err != nil {
		return nil, fmt.Errorf("look for connections: %w", err)
	}
	for _, cut := range cuts {
		there := cut.Tuple
		there.Source, there.Destination = there.Destination, there.Source
		there.SourcePort, there.DestinationPort = there.DestinationPort, there.SourcePort
		if !seen[cut.Tuple] && !seen[there] {
			seen[cut.Tuple], all = true, append(all, cut)
		}
	}
	slices.SortFunc(all, func(a, b abi.Cut) int { return int(a.Cookie - b.Cookie) })
	return all, nil
}

// readIterator runs a program over all that it walks over, and returns what it wrote.
func readIterator(p *ebpf.Program) ([]byte, error) {
	iter, err := link.AttachIter(link.IterOptions{Program: p})
	if err != nil {
		return nil, err
	}
	defer iter.Close()
	return walk(iter)
}

func walk(iter *link.Iter) ([]byte, error) {
	all, err := iter.Open()
	if err != nil {
		return nil, err
	}
	defer all.Close()
	return io.ReadAll(all)
}
