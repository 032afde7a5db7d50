package core

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/demarc/demarc/bpf/abi"
)

// floor is the highest version that was ever in force here, and which image that
// was: nothing older comes into force but by rollback. There is one for the node,
// whatever a policy is called. It is on disk and in a pinned map, so that losing one
// of the two lets nobody replay an image.
type floor struct {
	abi.Floor
	onDisk abi.Floor // as it was last read or written
}

// readFloor takes the higher of what disk and kernel know.
func (c *Core) readFloor() {
	var kernel abi.Floor
	err := c.objects.Maps["version_floor"].Lookup(uint32(0), &kernel)
	b, bad := c.store.load(floorRecord)
	if bad == nil && b != nil {
		_, bad = binary.Decode(b, binary.LittleEndian, &c.floor.onDisk)
	}
	if err = errors.Join(err, bad); err != nil {
		c.stand("the floor under versions: %v; the one of the stored images holds", err)
	}
	c.raiseFloor(c.floor.onDisk)
	c.raiseFloor(kernel)
}

func (c *Core) raiseFloor(f abi.Floor) {
	if f.Version > c.floor.Version {
		c.floor.Floor = f
	}
}

// keepFloor writes the floor where it is not.
func (c *Core) keepFloor() error {
	err := c.objects.Maps["version_floor"].Put(uint32(0), c.floor.Floor)
	if c.floor.onDisk != c.floor.Floor {
		content, _ := binary.Append(nil, binary.LittleEndian, c.floor.Floor) // never fails: it is flat
		bad := c.store.put(floorRecord, c.floor.Version, content)
		if err = errors.Join(err, bad); bad == nil {
			c.floor.onDisk = c.floor.Floor
		}
	}
	if err != nil {
		return fmt.Errorf("version %d is not kept everywhere as the highest: %w", c.floor.Version, err)
	}
	return nil
}
