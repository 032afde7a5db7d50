package identity

import (
	"path"
	"regexp"
	"strings"
)

// Container is what a cgroup path alone tells of a container.
type Container struct {
	ID  string // of the runtime: 64 hexadecimal digits
	Pod string // UID of its pod, with dashes; "" = it is in none
}

var (
	containerID = regexp.MustCompile(`^(?:cri-containerd-|crio-|docker-|libpod-)?([0-9a-f]{64})(?:\.scope)?$`)
	podUID      = regexp.MustCompile(`pod([0-9a-f]{8}[-_]?[0-9a-f]{4}[-_]?[0-9a-f]{4}[-_]?[0-9a-f]{4}[-_]?[0-9a-f]{12}|[0-9a-f]{32})(?:\.slice)?$`)
)

// ContainerOf finds the container that a cgroup belongs to, by the layouts of the
// systemd and cgroupfs drivers of containerd, CRI-O, Docker, Podman and k3s, also
// inside another container, as kind has them: the innermost counts, and cgroups below
// it are its own. The path of the container itself comes with it.
func ContainerOf(cgroup string) (c Container, at string, found bool) {
	if !strings.HasPrefix(cgroup, "/") || path.Clean(cgroup) != cgroup {
		return Container{}, "", false
	}
	for dir := cgroup; dir != "/"; dir = path.Dir(dir) {
		m := containerID.FindStringSubmatch(path.Base(dir))
		if m == nil {
			continue
		}
		c.ID = m[1]
		for above := path.Dir(dir); above != "/"; above = path.Dir(above) {
			if containerID.MatchString(path.Base(above)) {
				break // the pod, if any, is outside of the host of this container
			}
			if m := podUID.FindStringSubmatch(path.Base(above)); m != nil {
				c.Pod = dashed(m[1])
				break
			}
		}
		return c, dir, true
	}
	return Container{}, "", false
}

// dashed writes a UID as Kubernetes does: the systemd driver has underscores, for a
// dash would be a slice within a slice. Static pods have 32 digits and no dash.
func dashed(uid string) string {
	return strings.ReplaceAll(uid, "_", "-")
}
