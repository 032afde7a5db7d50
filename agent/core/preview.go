package core

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

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
// socket that a process holds by it, as it would at the socket's next packet. What is the
// caller's own is named before the others are bounded.
func (c *Core) Preview(b []byte, own proto.Own) (*proto.Preview, error) {
	g, err := c.offered(b, "")
	if err != nil {
		return nil, err
	}
	var cuts []abi.Cut
	err = c.prepare(g, change{preview: func(slot uint32) (err error) {
		cuts, err = findCuts(c.objects, slot, 0)
		return err
	}})
	if err != nil {
		return nil, err
	}
	p := &proto.Preview{Total: len(cuts)}
	for _, first := range [...]bool{true, false} {
		for _, cut := range cuts {
			t := cut.Tuple
			ends := proto.Ends{
				Local:  netip.AddrPortFrom(netip.AddrFrom16(t.Source).Unmap(), t.SourcePort),
				Remote: netip.AddrPortFrom(netip.AddrFrom16(t.Destination).Unmap(), t.DestinationPort),
			}
			if len(p.Cuts) == maxCuts || own.Holds(ends) != first {
				continue
			}
			p.Cuts = append(p.Cuts, proto.Cut{
				Ends: ends, Process: string(bytes.TrimRight(cut.Comm[:], "\x00")), PID: cut.PID,
				Subject: cut.Subject, Peer: cut.Peer, Inbound: cut.Direction == abi.Ingress, Reason: cut.Reason.String(),
			})
		}
	}
	return p, nil
}

// Prepare verifies an image that is likely to be applied next. Then makes it ready for that,
// and changes nothing. The agent compares the image with what it declares meanwhile, and
// applies no other; what Then finds, the application finds again.
func (c *Core) Prepare(b []byte) (then func(), err error) {
	g, err := c.offered(b, "")
	if err != nil {
		return nil, err
	}
	return func() {
		if err := c.prepare(g, change{ahead: true}); err != nil {
			c.log.Info("an image is not made ready", "why", err)
		}
	}, nil
}

// prepare makes an image ready to be applied, up to where it would take over.
func (c *Core) prepare(g *generation, how change) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settle()
	if err := c.mayChange(g); err != nil {
		return err
	}
	if how.ahead && c.stands(g) {
		return nil
	}
	c.keepClaims(g)
	if err := c.install(g, how); !errors.Is(err, errPreview) {
		return err
	}
	return nil
}

// preparedFor is how long what was previewed lies ready. Whoever means it applies it
// at once; until then it takes memory.
const preparedFor = time.Minute

// offered opens what somebody wants to be in force. What was just previewed, to the
// byte, need not be verified again, nor be here again: its digest is enough.
func (c *Core) offered(b []byte, digest string) (*generation, error) {
	c.mu.Lock()
	p := c.prepared
	c.mu.Unlock()
	switch {
	case p != nil && (bytes.Equal(p.came, b) || digest == hex.EncodeToString(p.digest[:])):
		return p, nil
	case digest != "":
		return nil, proto.Refuse("apply the image itself", "no image with digest %.64q was just previewed", digest)
	}
	return openImage(b, c.trusted)
}

// keepPrepared ends a preparation. The questions that come before a flip have been
// answered by now, those that are left are put behind it, and it is staged, so that
// nothing else is left to do when it is applied. A preview leaves no questions.
func (c *Core) keepPrepared(g *generation, left *selftest) error {
	c.prepared, g.since, g.staged, g.left = g, time.Now(), true, left
	return errPreview
}

// inPlace says whether a generation lies ready as it was previewed. Its tables are
// frozen, so it is enough that they are the same.
func (c *Core) inPlace(g *generation) bool {
	return g == c.prepared && time.Since(g.since) < preparedFor && len(g.misplaced(c.objects)) == 0
}

// unprepare frees what was previewed, if anything was.
func (c *Core) unprepare() {
	if p := c.prepared; p != nil {
		if c.prepared = nil; p.staged {
			c.store.unstage()
		}
		if err := emptySlot(c.objects, p.slot); err != nil {
			c.log.Warn("previewed generation is not freed", "problem", err)
		}
		p.close()
	}
}

// findCuts walks over the files of all processes. A connection of which both ends
// are here is named once. Spare is 1 if they are to be spared, too, as the state says.
func findCuts(o *objects, slot, spare uint32) ([]abi.Cut, error) {
	if err := o.Maps["selftest"].Put(uint32(0), [4]uint32{1: slot, 3: spare}); err != nil {
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
