// Package journal keeps flows on disk: bounded, in blocks with checksums, so that what
// a crash, a full disk or a bad sector takes is known to the number.
//
// A journal is a directory of segments. A segment is a sequence of blocks, named after
// the number of its first flow. A block is a header, the places up to which the kernel's
// rings were read, and flows as compressed JSON lines. Numbers are little-endian.
package journal

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi/record"
)

// Bounds of a block, in bytes and places. A writer stays far below them.
const (
	maxBody   = 2 << 20
	maxText   = 4 << 20
	maxPlaces = 8192 // CPUs of all rings
	maxCount  = 1 << 20
)

// header is the fixed part of a block.
type header struct {
	Magic  [4]byte
	Sum    uint32 // CRC-32C of everything behind it, the block's end included
	Body   uint32 // bytes of compressed text
	Text   uint32 // bytes of it uncompressed
	Count  uint32 // flows
	Places uint32
	Index  uint64 // number of the first flow, of all that were ever written
	Lost   uint64 // flows that are missing before these
	Ever   uint64 // flows that are missing before these and before all others: a damaged block takes no count with it
	First  int64  // earliest and latest time of a flow, ns since 1970
	Last   int64
	Rings  [record.Rings]uint64 // which rings the places are of; 0 = not known
}

// place is how far a CPU's events of a ring were read.
type place struct {
	Ring uint32
	CPU  uint32
	Seq  uint64
}

var (
	magic      = [4]byte{'d', 'm', 'j', '2'}
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	headerSize = binary.Size(header{})
	placeSize  = binary.Size(place{})
)

// sumEnd is where the checksum's own field ends.
const sumEnd = 8

// block is one that was read.
type block struct {
	header
	places []place
	body   []byte
}

// size of the whole block, in bytes.
func (h *header) size() int { return headerSize + int(h.Places)*placeSize + int(h.Body) }

// times of the first and the last flow.
func (h *header) times() (first, last time.Time) { return time.Unix(0, h.First), time.Unix(0, h.Last) }

// encode makes a block's bytes of its parts and fills in the sizes and the checksum.
func encode(h header, places []place, body []byte) []byte {
	h.Magic, h.Body, h.Places = magic, uint32(len(body)), uint32(len(places))
	b := make([]byte, 0, h.size())
	b, _ = binary.Append(b, binary.LittleEndian, &h) // of fixed size: it cannot fail
	b, _ = binary.Append(b, binary.LittleEndian, places)
	b = append(b, body...)
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[sumEnd:], castagnoli))
	return b
}

// errDamaged means that what is there is no block; more may follow.
var errDamaged = errors.New("damaged block")

// decode reads the block that b begins with. It takes no memory for what the block
// claims but does not hold.
func decode(b []byte) (*block, error) {
	if len(b) < headerSize {
		return nil, errDamaged
	}
	out := &block{}
	if _, err := binary.Decode(b, binary.LittleEndian, &out.header); err != nil || out.Magic != magic {
		return nil, errDamaged
	}
	if out.Body > maxBody || out.Text > maxText || out.Places > maxPlaces || out.Count > maxCount || out.size() > len(b) {
		return nil, errDamaged
	}
	b = b[:out.size()]
	if crc32.Checksum(b[sumEnd:], castagnoli) != out.Sum {
		return nil, errDamaged
	}
	rest := b[headerSize:]
	out.places = make([]place, out.Places)
	if _, err := binary.Decode(rest, binary.LittleEndian, out.places); err != nil {
		return nil, errDamaged
	}
	out.body = rest[int(out.Places)*placeSize:]
	return out, nil
}

// flows hands on the flows of a block, each of which holds until the next one. Whoever
// can write to the journal can write checksums too, so strings are escaped again.
func (b *block) flows(take func(*flow.Flow) error) error {
	if b.Count == 0 && b.Body == 0 {
		return nil // it is there for its places
	}
	text := make([]byte, 0, b.Text)
	buffer := bytes.NewBuffer(text)
	r := flate.NewReader(bytes.NewReader(b.body))
	n, err := io.Copy(buffer, io.LimitReader(r, int64(b.Text)+1))
	if err != nil || n != int64(b.Text) {
		return errDamaged
	}
	count := uint32(0)
	for line := range bytes.Lines(buffer.Bytes()) {
		var f flow.Flow
		if err := json.Unmarshal(line, &f); err != nil {
			return fmt.Errorf("%w: %w", errDamaged, err)
		}
		f.Inert()
		if count++; count > b.Count {
			return errDamaged
		}
		if err := take(&f); err != nil {
			return err
		}
	}
	if count != b.Count {
		return errDamaged
	}
	return nil
}
