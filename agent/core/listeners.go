package core

import (
	"bytes"
	"fmt"
)

// convertListeners makes the workloads' listeners that are older than the programs
// prove themselves, where the kernel can (Linux 6.12), in the network namespace
// that the core runs in. It returns how many cannot: proven callers refuse them
// until they are restarted. Listeners in other namespaces are not seen.
func convertListeners(o *objects) (converted, left int, err error) {
	answers, err := readIterator(o.Programs["old_listeners"])
	if err != nil {
		return 0, 0, fmt.Errorf("walk over listeners: %w", err)
	}
	return bytes.Count(answers, []byte("y")), bytes.Count(answers, []byte("n")), nil
}

// adoptListeners converts what it can, once, when the first policy is in force.
// What it cannot is said, and no reason to refuse: such a listener is refused by
// its callers, not reached by anybody else.
func (c *Core) adoptListeners() {
	converted, left, err := convertListeners(c.objects)
	switch {
	case err != nil:
		c.limits = append(c.limits, fmt.Sprintf("listeners of workloads that are older than demarc cannot prove themselves, restart them: %v", err))
	case left > 0:
		c.limits = append(c.limits, fmt.Sprintf("%d listeners of workloads are older than demarc and cannot prove themselves: restart them", left))
	}
	c.log.Info("old listeners", "converted", converted, "left", left)
}
