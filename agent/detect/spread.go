package detect

// spread is what all workloads of the node failed at together, each below every
// threshold: a worm makes one attempt from each place it gets to.
type spread struct {
	failed recent[spreadContact]
	epoch  uint32 // of the policy that the newest flow was judged under
}

type spreadContact struct {
	by who
	to target
}

func spreading(g *Engine, m *moment) []Finding {
	if m.contact != denied || m.key.identity == 0 || m.actor.Workload == "" {
		return nil
	}
	// After a change of the policy many may fail at once that have done nothing new.
	if f := m.event.Flow; f != nil && f.Epoch != g.spread.epoch {
		g.spread = spread{epoch: f.Epoch}
	}
	c := g.config.Spread
	// Nobody takes more than a share of the room, so that one cannot hide the others.
	room := 2 * c.Contacts
	now := spreadContact{m.key, m.target()}
	mine := g.spread.failed.count(func(i item[spreadContact]) bool { return i.value.by == now.by && i.value != now })
	if mine >= c.Contacts/2 {
		return nil
	}
	g.spread.failed.see(now, m.at, c.Within, room*c.Identities, 0)
	parties := map[who]bool{}
	for _, i := range g.spread.failed.items {
		parties[i.value.by] = true
	}
	if len(parties) < c.Identities || len(g.spread.failed.items) < c.Contacts {
		return nil
	}
	f := m.finding("spread", exploitation, Medium, 70, "", "is one of %d workloads that failed at %d different places within %s", len(parties), len(g.spread.failed.items), c.Within)
	f.Key, f.Subject = "spread|node", m.actor
	f.Advice = "Look for what the workloads have in common: a policy that lacks a crossing, or one program that moves from each to the next."
	return []Finding{f}
}
