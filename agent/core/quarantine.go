package core

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// Bounds of a quarantine. It can only take away, so that whoever may talk to the
// core may ask for it; what ends it is its time, or somebody who may talk to the core.
const (
	minQuarantine     = time.Second
	maxQuarantine     = 30 * 24 * time.Hour
	maxReason         = 200 // bytes
	defaultBlast      = 2   // identities that nobody but a machine wanted quarantined
	quarantineRecord  = "quarantines"
	managementRole    = "management"
	quarantineTrouble = "quarantine"
)

// quarantined is one identity with its forensic crossings only.
type quarantined struct {
	proto.Quarantine
	Boot uint64 `json:"boot"` // Until on CLOCK_BOOTTIME, ns: what the kernel goes by
}

// quarantine begins one, or gives one another end. A machine's neither ends a
// person's earlier nor takes its place.
func (c *Core) quarantine(id uint32, lasting time.Duration, reason string, automatic bool, by string) (_ *proto.Status, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settle()
	if err := c.mayQuarantine(id, lasting, reason, automatic); err != nil {
		c.peerRecord(by, auditRefused, c.active, "quarantine %s: %v", c.called(id), err)
		return nil, err
	}
	now := time.Now()
	q := quarantined{Boot: theClock().now() + uint64(lasting), Quarantine: proto.Quarantine{
		Identity: id, Since: now.UTC(), Until: now.Add(lasting).UTC().Truncate(time.Millisecond), Reason: reason, By: by, Automatic: automatic}}
	former, had := c.quarantines[id]
	if had && automatic && (!former.Automatic || former.Boot >= q.Boot) {
		return c.status(), nil
	}
	how := ""
	if automatic {
		how = ", without anybody's order"
	}
	return c.requarantine(by, auditQuarantine, id, fmt.Sprintf(" for %v%s: %s", lasting, how, reason), func() { c.quarantines[id] = q })
}

// release ends a quarantine.
func (c *Core) release(id uint32, by string) (*proto.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settle()
	c.endQuarantines()
	former, had := c.quarantines[id]
	if !had {
		return nil, proto.Refuse("see `demarc status` for those that are", "identity %d is not quarantined", id)
	}
	return c.requarantine(by, auditRelease, id, ": "+former.Reason, func() { delete(c.quarantines, id) })
}

// requarantine changes which identities are, and notes it before. What fails leaves all
// as they were.
func (c *Core) requarantine(by, what string, id uint32, why string, change func()) (*proto.Status, error) {
	if err := c.record(by, what, c.active, "%s%s", c.called(id), why); err != nil {
		return nil, err
	}
	former := maps.Clone(c.quarantines)
	change()
	if err := c.enforceQuarantines(); err != nil {
		c.quarantines = former
		_ = c.record(by, auditFailed, c.active, "%s %s: %v", what, c.called(id), err)
		return nil, errors.Join(err, c.enforceQuarantines())
	}
	c.keepQuarantines()
	return c.status(), nil
}

// mayQuarantine says whether an identity may be.
func (c *Core) mayQuarantine(id uint32, lasting time.Duration, reason string, automatic bool) error {
	if c.active == nil {
		return proto.Refuse("apply a policy", "no policy is in force")
	}
	if err := checkTime("quarantine for", lasting, minQuarantine, maxQuarantine); err != nil {
		return err
	}
	if strings.TrimSpace(reason) == "" || len(reason) > maxReason || strings.ContainsFunc(reason, func(r rune) bool { return r < ' ' || r > '~' }) {
		return proto.Refuse(fmt.Sprintf("say why in at most %d printable ASCII characters", maxReason), "quarantine needs a reason")
	}
	w := c.workload(id)
	if w == nil {
		return proto.Refuse("see `demarc identities` for those that are", "identity %d is no workload of the policy in force", id)
	}
	for _, r := range w.Roles {
		if r.Name == managementRole && (r.Until == 0 || time.Now().Unix() < r.Until) {
			return proto.Refuse("whoever manages the host through it would be locked out; change the policy if that is meant",
				"workload %s has the role management", w.Name)
		}
	}
	c.endQuarantines()
	_, had := c.quarantines[id]
	machines := 0
	for other, q := range c.quarantines {
		if q.Automatic && other != id {
			machines++
		}
	}
	switch {
	case had:
	case automatic && machines >= c.config.Blast:
		return proto.Refuse("look at them, and quarantine it yourself; quarantine_automatic in core.json is the bound",
			"%d workloads are quarantined without anybody's order already", machines)
	case len(c.quarantines) >= abi.Quarantines:
		return proto.Refuse("release some", "%d workloads are quarantined already", len(c.quarantines))
	}
	return nil
}

func (c *Core) workload(id uint32) *image.Workload {
	if c.active == nil || id < uint32(image.FirstID) {
		return nil
	}
	all := c.active.image.Workloads
	if i := slices.IndexFunc(all, func(w image.Workload) bool { return uint32(w.ID) == id }); i >= 0 {
		return &all[i]
	}
	return nil
}

// called says which identity is meant.
func (c *Core) called(id uint32) string {
	if w := c.workload(id); w != nil {
		return fmt.Sprintf("workload %s (%d)", w.Name, id)
	}
	return fmt.Sprintf("identity %d", id)
}

// enforceQuarantines makes the kernel's table the same as this core's. What was
// admitted before is judged again: the epoch grows.
func (c *Core) enforceQuarantines() error {
	table := c.objects.Maps["quarantines"]
	found, err := c.kernelQuarantines()
	if err != nil {
		return err
	}
	for id, q := range c.quarantines {
		if found[id] == q.Boot {
			continue
		}
		if err := table.Put(id, q.Boot); err != nil {
			return fmt.Errorf("quarantine identity %d: %w", id, err)
		}
	}
	for id := range found {
		if _, wanted := c.quarantines[id]; wanted {
			continue
		}
		if err := table.Delete(id); err != nil {
			return fmt.Errorf("release identity %d: %w", id, err)
		}
	}
	return changeState(c.objects, func(s *abi.State) {
		s.Quarantines = uint64(len(c.quarantines))
		if c.active != nil {
			c.active.epoch = s.NextEpoch()
			c.renew(s)
		}
	})
}

func (c *Core) kernelQuarantines() (map[uint32]uint64, error) {
	found := map[uint32]uint64{}
	var id uint32
	var until uint64
	entries := c.objects.Maps["quarantines"].Iterate()
	for entries.Next(&id, &until) {
		found[id] = until
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("read quarantines: %w", err)
	}
	return found, nil
}

// endQuarantines forgets those whose time is over. The kernel ended them by itself, so
// only the records follow.
func (c *Core) endQuarantines() {
	clock := theClock()
	ended := false
	for id, q := range c.quarantines {
		if clock.now() < q.Boot {
			continue
		}
		ended = true
		delete(c.quarantines, id)
		_ = c.record("kernel", auditRelease, c.active, "%s: its time was over: %s", c.called(id), q.Reason)
	}
	if ended {
		c.attend(quarantineTrouble, c.enforceQuarantines())
		c.keepQuarantines()
	}
}

// watchQuarantines puts the kernel's table right.
func (c *Core) watchQuarantines() []incident {
	found, err := c.kernelQuarantines()
	if err != nil {
		return []incident{{"quarantines cannot be read", err}}
	}
	if maps.EqualFunc(found, c.quarantines, func(until uint64, q quarantined) bool { return until == q.Boot }) {
		return nil
	}
	return []incident{{"somebody else wrote the table of quarantines", c.enforceQuarantines()}}
}

// keepQuarantines writes them to the disk, for the next start.
func (c *Core) keepQuarantines() {
	content, err := json.Marshal(slices.Collect(maps.Values(c.quarantines)))
	if err == nil {
		err = c.store.put(quarantineRecord, uint64(time.Now().UnixNano()), content)
	}
	if err != nil {
		err = fmt.Errorf("quarantines hold now, and would be forgotten at the next boot: %w", err)
	}
	c.attend(quarantineTrouble, err)
}

// resumeQuarantines takes over what a former core left: in the kernel, which goes on
// with it, and on the disk, which outlives a boot and knows the reasons.
func (c *Core) resumeQuarantines() error {
	found, err := c.kernelQuarantines()
	if err != nil {
		return err
	}
	clock := theClock()
	var kept []quarantined
	b, bad := c.store.load(quarantineRecord)
	if bad == nil && b != nil {
		bad = proto.Unmarshal(b, &kept)
	}
	if bad != nil {
		c.stand("quarantines on the disk cannot be read: %v; those in the kernel go on", bad)
	}
	for _, q := range kept {
		if boot, there := found[q.Identity]; there {
			q.Boot = boot
		} else {
			q.Boot = uint64(max(q.Until.UnixNano()-clock.offset, 1))
		}
		c.quarantines[q.Identity] = q
	}
	for id, boot := range found {
		if _, known := c.quarantines[id]; !known {
			c.quarantines[id] = quarantined{Boot: boot, Quarantine: proto.Quarantine{Identity: id,
				Until: time.Unix(0, int64(boot)+clock.offset).UTC(), Reason: "not known: its record was lost", By: "unknown"}}
		}
	}
	if len(c.quarantines) > abi.Quarantines { // of a disk that somebody wrote
		c.quarantines = map[uint32]quarantined{}
		c.stand("quarantines on the disk are more than there can be")
	}
	c.endQuarantines()
	if len(c.quarantines) == 0 && len(found) == 0 {
		return nil
	}
	return c.enforceQuarantines()
}

// listQuarantines is what the status says of them.
func (c *Core) listQuarantines() []proto.Quarantine {
	var all []proto.Quarantine
	for _, id := range slices.Sorted(maps.Keys(c.quarantines)) {
		q := c.quarantines[id].Quarantine
		if w := c.workload(id); w != nil {
			q.Workload = w.Name
		}
		all = append(all, q)
	}
	return all
}
