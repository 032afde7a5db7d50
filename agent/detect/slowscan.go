package detect

import "time"

// slowScan is a threshold random walk over first contacts (Jung et al. 2004): each
// failure is a step up, each success a step down. A denial is never made good by
// successes, or interleaving them would hide any scan (Mell and Harang 2013).
func slowScan(g *Engine, m *moment) []Finding {
	if m.contact != reached && !m.hasFailed() {
		return nil
	}
	c := g.config.SlowScan
	if m.contact == reached {
		m.actors.good.see(m.target(), m.at, c.Within, c.room(), 0)
		return nil
	}
	if !m.actors.first.see(m.target(), m.at, c.Within, c.room(), uint8(m.contact)) {
		return nil
	}
	certain := m.actors.first.count(func(i item[target]) bool { return i.mark == uint8(denied) })
	score := certain + max(0, len(m.actors.first.items)-certain-len(m.actors.good.items))
	if score < c.Failures {
		return nil
	}
	severity, confidence := Low, uint8(60)
	if score >= c.Certain {
		severity, confidence = Medium, 85
	}
	first := m.actors.first.items[0].at
	f := m.finding("slow-scan", serviceDiscovery, severity, confidence, "", "failed at %d different places within %s", score, max(m.at.Sub(first), time.Second).Round(time.Second))
	f.Advice = "Compare the places with what the workload needs: declare them, or look for who asked for them."
	f.led(m.actors.failures)
	return []Finding{f}
}

// room holds more failures than are needed. Successes have a list of their own, so
// that they push no failure out.
func (c SlowScan) room() int { return 4 * max(c.Failures, c.Certain) }
