package detect

import "time"

// transfer finds a file on an edge that is there for administration: many bytes,
// nearly all of them one way, and many more than that edge usually carries.
func transfer(g *Engine, m *moment) []Finding {
	if m.kind() != Transfer || !m.admin {
		return nil
	}
	s, c := m.event.Signal, g.config.Transfer
	usual := m.actors.volumes.see(edgeTo(&m.peer, m.proto), m.at, s.Bytes+s.Back)
	most := max(s.Bytes, s.Back)
	if most < c.Bytes || float64(most) < c.OneWay*float64(s.Bytes+s.Back) || float64(most) < c.Factor*usual {
		return nil
	}
	way := "to"
	if s.Back > s.Bytes {
		way = "from"
	}
	f := m.finding("transfer", toolTransfer, Medium, 60, "", "moved %d bytes %s %s", most, way, m.target())
	f.Advice = "Backups and deploys belong into a workload with the role management. Look for the file at either end."
	return []Finding{f}
}

// volumes is what edges usually carry: a moving average, for a few edges each. An
// edge that is not remembered has no usual volume.
type volumes struct {
	edges recent[edge]
	usual map[edge]float64
}

const volumesKept = 64

// see takes in what an edge carried, and returns what was usual before.
func (v *volumes) see(to edge, at time.Time, bytes uint64) float64 {
	const weight = 0.2 // of the newest
	if v.usual == nil {
		v.usual = map[edge]float64{}
	}
	v.edges.see(to, at, forgetAfter*30, volumesKept, 0)
	before, known := v.usual[to]
	if !known {
		v.usual[to] = float64(bytes)
	} else {
		v.usual[to] = before + weight*(float64(bytes)-before)
	}
	for k := range v.usual {
		if len(v.usual) > volumesKept && v.edges.count(func(i item[edge]) bool { return i.value == k }) == 0 {
			delete(v.usual, k)
		}
	}
	return before
}
