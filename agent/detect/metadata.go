package detect

import (
	"net/netip"
	"slices"
)

// metadataPlaces are where clouds hand out credentials to whoever asks from inside
// a machine: Amazon, Google, Azure and others; Amazon's tasks; Alibaba; Oracle.
var metadataPlaces = []netip.Addr{
	netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("169.254.170.2"),
	netip.MustParseAddr("fd00:ec2::23"), netip.MustParseAddr("169.254.170.23"), netip.MustParseAddr("100.100.100.200"),
	netip.MustParseAddr("192.0.0.192"), netip.MustParseAddr("fd20:ce::254"),
}

// metadataService finds who asks a cloud for credentials, unless a crossing is
// declared for exactly that.
func metadataService(g *Engine, m *moment) []Finding {
	if m.kind() != Metadata && m.contact != reached && m.contact != denied || !slices.Contains(metadataPlaces, m.peer.Address) {
		return nil
	}
	severity, did := High, "was refused at"
	crossing := ""
	if f := m.event.Flow; f != nil {
		crossing = f.Crossing
	} else {
		crossing = m.event.Signal.Crossing
	}
	switch {
	case m.kind() == Metadata:
		if slices.Contains(g.config.Metadata.Declared, crossing) || g.policy.leadsToOneAddress(crossing) {
			return nil
		}
		did = "asked"
	case m.contact == reached:
		if slices.Contains(g.config.Metadata.Declared, crossing) || g.policy.leadsToOneAddress(crossing) {
			return nil
		}
		severity, did = Medium, "reached"
	}
	f := m.finding("metadata", metadataAPI, severity, 90, "", "%s the cloud's metadata service %s", did, m.peer.Address)
	f.Certain = true
	f.Advice = "Declare a crossing to a network of that one address if the workload needs it. If not, somebody makes it ask: look at what it was sent."
	return []Finding{f}
}
