// Package layout is where the parts of an encoded image are: what its encoder and its
// decoder share.
package layout

// An encoded image is little-endian and has no padding:
//
//	magic     8 bytes "DEMARCIM"
//	format    u32     1
//	sections  u32     number of sections
//	length    u64     bytes of the whole image
//	table             for each section: offset u32, records u32
//	sections          fixed-size records, one section after the other
//	checksum  32      SHA-256 of everything before it
//
// Lists inside a record (a crossing's terms, a network's blocks) are a count;
// the elements follow each other in a section of their own, in the order of
// their owners. A string is its index in the string table, which is sorted, has
// no duplicate and no string that nothing refers to. So one Image has exactly
// one encoding, and a byte that means nothing has no place to be.
const (
	Magic      = "DEMARCIM" // what every encoded image starts with
	Format     = 1
	HeaderSize = 8 + 4 + 4 + 8
	EntrySize  = 4 + 4
	SumSize    = 32
)

// Sections, in the order they are written.
const (
	Policy       = iota // one record
	Zones               // name u32, trust u16
	Workloads           // name u32, id u32, zone u16, roles u16
	Roles               // name u32, until i64
	Networks            // name u32, zone u16, cidrs u32
	CIDRs               // address 16, length u8 (IPv4: v4-mapped, 96 + length)
	Crossings           // see encode
	Terms               // kind u8, index u32
	Spans               // proto u8, low u16, high u16
	Selectors           // workload u32, kind u8, path, namespace, service account, name, image u32, labels u16
	Labels              // key u32, value u32
	Ports               // proto u8, low u16, high u16, class u16
	Addresses           // address 16, length u8, class u16
	Rules               // subject u32, peer u32, class u16, direction u8, crossings u8
	Alternatives        // crossing u32
	Strings             // length u16
	Text                // the strings, one after the other
	Sections
)

// RecordSize is the size of one record of each section, in bytes.
var RecordSize = [Sections]int{
	Policy:       4 + 8 + 4 + 32 + 8 + 1 + 2 + 1,
	Zones:        4 + 2,
	Workloads:    4 + 4 + 2 + 2,
	Roles:        4 + 8,
	Networks:     4 + 2 + 4,
	CIDRs:        16 + 1,
	Crossings:    6*4 + 5 + 4*8 + 4,
	Terms:        1 + 4,
	Spans:        1 + 2 + 2,
	Selectors:    4 + 1 + 5*4 + 2,
	Labels:       4 + 4,
	Ports:        1 + 2 + 2 + 2,
	Addresses:    16 + 1 + 2,
	Rules:        4 + 4 + 2 + 1 + 1,
	Alternatives: 4,
	Strings:      2,
	Text:         1,
}

// Bits of the flags in the policy record.
const (
	FlagOutbound = 1
	FlagInbound  = 2
)

// Bits of the flags in a crossing's record; from FlagsSide on they are its side.
const (
	FlagDecoy    = 1
	FlagForensic = 2
	FlagsSide    = 2
)
