package image

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
	format     = 1
	headerSize = 8 + 4 + 4 + 8
	entrySize  = 4 + 4
	sumSize    = 32
)

// Sections, in the order they are written.
const (
	sectionPolicy       = iota // one record
	sectionZones               // name u32, trust u16
	sectionWorkloads           // name u32, id u32, zone u16, roles u16
	sectionRoles               // name u32, until i64
	sectionNetworks            // name u32, zone u16, cidrs u32
	sectionCIDRs               // address 16, length u8 (IPv4: v4-mapped, 96 + length)
	sectionCrossings           // see Encode
	sectionTerms               // kind u8, index u32
	sectionSpans               // proto u8, low u16, high u16
	sectionSelectors           // workload u32, kind u8, path, namespace, service account, name, image u32, labels u16
	sectionLabels              // key u32, value u32
	sectionPorts               // proto u8, low u16, high u16, class u16
	sectionAddresses           // address 16, length u8, class u16
	sectionRules               // subject u32, peer u32, class u16, direction u8, crossings u8
	sectionAlternatives        // crossing u32
	sectionStrings             // length u16
	sectionText                // the strings, one after the other
	sections
)

// recordSize is the size of one record of each section, in bytes.
var recordSize = [sections]int{
	sectionPolicy:       4 + 8 + 4 + 32 + 8 + 1 + 2 + 1,
	sectionZones:        4 + 2,
	sectionWorkloads:    4 + 4 + 2 + 2,
	sectionRoles:        4 + 8,
	sectionNetworks:     4 + 2 + 4,
	sectionCIDRs:        16 + 1,
	sectionCrossings:    6*4 + 5 + 4*8 + 4,
	sectionTerms:        1 + 4,
	sectionSpans:        1 + 2 + 2,
	sectionSelectors:    4 + 1 + 5*4 + 2,
	sectionLabels:       4 + 4,
	sectionPorts:        1 + 2 + 2 + 2,
	sectionAddresses:    16 + 1 + 2,
	sectionRules:        4 + 4 + 2 + 1 + 1,
	sectionAlternatives: 4,
	sectionStrings:      2,
	sectionText:         1,
}

// Bits of the flags in the policy record.
const (
	flagOutbound = 1
	flagInbound  = 2
)

// Bits of the flags in a crossing's record; from flagsSide on they are its side.
const (
	flagDecoy    = 1
	flagForensic = 2
	flagsSide    = 2
)
