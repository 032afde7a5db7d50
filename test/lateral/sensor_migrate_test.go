package lateral_test

import (
	"time"

	"github.com/demarc/demarc/agent/detect"
)

// A process takes itself into another workload's cgroup, and out of every workload's.
func cgroupMoves(s *sensing) []scenario {
	move := func(to string) func(*run) {
		return func(r *run) { r.shell("echo $$ >%s/cgroup.procs && exec sleep 5", r.node.Cgroup(to).Dir()) }
	}
	return []scenario{
		{"into the cgroup of another workload", move("/lab/vault"), "T1611", "cgroup-move", detect.High, "sh", 20 * time.Second, false},
		{"into a cgroup of no workload", move("/elsewhere"), "T1611", "cgroup-move", detect.High, "sh", 20 * time.Second, false},
	}
}
