package core

import (
	"errors"
	"maps"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// Bind makes a cgroup path and all below it a workload's, on the agent's word.
// The word counts only where the image leaves it to metadata: for workloads that
// it finds by them, and for cgroups that it does not find itself. Where a container
// waits for its name, it may also turn out to be nobody's.
func (c *Core) Bind(path string, id uint32) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.active == nil {
		return proto.Refuse("apply a policy", "bind %s: no policy is in force", path)
	}
	claims, key := c.active.selectors.claims, pathKey(path)
	if err := c.active.checkClaim(path, id); err != nil {
		return err
	}
	if claims[key] == id {
		return nil
	}
	if len(claims) >= maxClaims {
		return proto.Refuse("unbind paths that are gone", "bind %s: %d paths are bound already", path, maxClaims)
	}
	// What an unconfirmed change would return to, and what is in shadow, know the path
	// too, if their image leaves it to the agent.
	for _, g := range c.decisive() {
		if g.checkClaim(path, id) != nil {
			continue
		}
		if err := g.bind(key, id); err != nil {
			return proto.Refuse("", "bind %s: %w", path, err)
		}
	}
	return c.rebind(path)
}

// bind writes a claim. The trie comes first: a cgroup made from now on is bound at
// its birth.
func (g *generation) bind(key string, id uint32) error {
	err := g.tables["paths"].Put(selectorKey(key), id)
	if err == nil {
		g.selectors.claims[key] = id
	}
	return err
}

// unbind takes a claim back. One that is not there is fine.
func (g *generation) unbind(key string) error {
	if g.selectors.claims[key] == 0 {
		return nil
	}
	err := g.tables["paths"].Delete(selectorKey(key))
	if err == nil {
		delete(g.selectors.claims, key)
	}
	return err
}

// Unbind withdraws a claim. A path that is not bound is fine.
func (c *Core) Unbind(path string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := pathKey(path)
	if c.active == nil || c.active.selectors.claims[key] == 0 {
		return nil
	}
	for _, g := range c.decisive() {
		if err := g.unbind(key); err != nil {
			return proto.Refuse("", "unbind %s: %w", path, err)
		}
	}
	return c.rebind(path)
}

// forget withdraws all claims but the given ones.
func (c *Core) forget(but map[string]bool) error {
	c.mu.Lock()
	var gone []string
	if c.active != nil {
		for _, key := range sortedKeys(c.active.selectors.claims) {
			if path := strings.TrimSuffix(key, "/"); !but[path] {
				gone = append(gone, path)
			}
		}
	}
	c.mu.Unlock()
	for _, path := range gone {
		if err := c.Unbind(path); err != nil {
			return err
		}
	}
	return nil
}

// rebind names the cgroups below a path again. If that changed anything, cached
// verdicts are of no use any more: the epoch grows.
func (c *Core) rebind(path string) error {
	var errs []error
	anything := false
	for _, g := range c.decisive() {
		s := scanner{objects: c.objects, tree: c.tree, slot: g.slot, selectors: g.selectors}
		_, changed, err := s.scan(path)
		anything, errs = anything || changed, append(errs, err)
	}
	if anything {
		errs = append(errs, changeState(c.objects, func(s *abi.State) {
			c.active.epoch = s.NextEpoch()
			c.renew(s)
		}))
	}
	return errors.Join(errs...)
}

// renew puts the present epoch of what is in force into a state, and a later one of
// what may come back.
func (c *Core) renew(s *abi.State) {
	s.Active = c.active.word()
	if s.Deadline != 0 {
		s.Fallback = abi.MakeActive(abi.ActiveSlot(s.Fallback), abi.ActiveFlags(s.Fallback), c.active.epoch+1)
	}
}

// decisive are the generations that packets are judged by, or will be when nobody
// confirms the one in force, or that are asked beside it. The first is in force.
func (c *Core) decisive() []*generation {
	all := []*generation{c.active}
	if c.fallback != nil && c.fallback != c.active {
		all = append(all, c.fallback)
	}
	if c.shadow != nil {
		all = append(all, c.shadow)
	}
	return all
}

// checkClaim says whether the agent may say so.
func (g *generation) checkClaim(path string, id uint32) error {
	refuse := func(hint, format string, args ...any) error {
		return proto.Refuse(hint, "bind %s: "+format, append([]any{path}, args...)...)
	}
	if !canonical(path) {
		return refuse("give a path below the managed root, like /lab/api-1", "not a canonical path")
	}
	if !g.metadataFinds(id) && id != uint32(image.Unmanaged) {
		return refuse("give the workload a kubernetes or container selector", "no workload %d is found by metadata", id)
	}
	key := pathKey(path)
	for selected, owner := range g.selectors.paths {
		if strings.HasPrefix(selected, key) || strings.HasPrefix(key, selected) && owner != uint32(image.Pending) {
			return refuse("", "the policy selects %s itself", selected)
		}
	}
	for claimed, other := range g.selectors.claims {
		if claimed != key && other != id && (strings.HasPrefix(claimed, key) || strings.HasPrefix(key, claimed)) {
			return refuse("unbind it first", "%s is bound to another workload", claimed)
		}
	}
	// Down the path as the kernel goes, without claims: units are found by name.
	image0 := &selectors{paths: g.selectors.paths, units: g.selectors.units}
	identity, flags := uint32(image.Unmanaged), uint32(abi.BindingSlices)
	for end := 1; end <= len(path); end++ {
		if end < len(path) && path[end] != '/' {
			continue
		}
		here := cgroup{path: path[:end]}
		identity = image0.identity(here, identity, flags)
		if !here.isSlice() {
			flags = 0
		}
	}
	waits := identity == uint32(image.Pending)
	if !waits && identity != uint32(image.Unmanaged) {
		return refuse("", "a systemd unit of the policy is there")
	}
	if !waits && id == uint32(image.Unmanaged) {
		return refuse("", "no container waits for its name there")
	}
	if flags != 0 && g.selectors.own > 0 {
		return refuse("bind a scope or service inside it", "a slice may hold systemd units of the policy")
	}
	return nil
}

// metadataFinds says whether the image leaves it to metadata to find a workload.
func (g *generation) metadataFinds(id uint32) bool {
	for i := range g.image.Selectors {
		s := &g.image.Selectors[i]
		if byMetadata(*s) && uint32(g.image.Workloads[s.Workload].ID) == id {
			return true
		}
	}
	return false
}

// canonical paths are absolute and say each place in one way only. The root
// itself cannot be claimed.
func canonical(path string) bool {
	if len(path) < 2 || len(path) > image.MaxPath || path[0] != '/' {
		return false
	}
	for part := range strings.SplitSeq(path[1:], "/") {
		if part == "" || part == "." || part == ".." {
			return false
		}
	}
	return !strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r > '~' })
}

// keepClaims carries the claims of the active generation over to the next one,
// as far as its image leaves them to the agent. One that lies ready under other claims
// is filled anew.
func (c *Core) keepClaims(next *generation) {
	filled := next.selectors.claims
	next.selectors.claims = map[string]uint32{}
	if c.active != nil {
		c.carry(c.active.selectors.claims, next)
	}
	if next == c.prepared && !maps.Equal(filled, next.selectors.claims) {
		c.unprepare()
	}
}

// recoverClaims reads what a former core was told from the tables in force, so
// that its workloads keep their identity until the agent speaks again. It needs
// the privileges of the start.
func (c *Core) recoverClaims(next *generation) {
	state, err := readState(c.objects)
	var table *ebpf.Map
	if err == nil {
		err = c.objects.Maps["paths"].Lookup(abi.ActiveSlot(state.Active), &table)
	}
	if err != nil {
		c.log.Warn("bound paths are not recovered", "problem", err)
		return
	}
	defer table.Close()
	found := map[string]uint32{}
	var key abi.PathKey
	var id uint32
	entries := table.Iterate()
	for entries.Next(&key, &id) {
		path := string(key.Path[:min(key.Length/8, abi.PathMax)])
		if next.selectors.paths[path] == 0 && id != uint32(image.Pending) {
			found[path] = id
		}
	}
	if err := entries.Err(); err != nil {
		c.log.Warn("bound paths are not recovered", "problem", err)
	}
	c.carry(found, next)
}

func (c *Core) carry(claims map[string]uint32, next *generation) {
	for _, key := range sortedKeys(claims) {
		if err := next.checkClaim(strings.TrimSuffix(key, "/"), claims[key]); err != nil {
			c.log.Warn("bound path is dropped", "problem", err)
			continue
		}
		next.selectors.claims[key] = claims[key]
	}
}
