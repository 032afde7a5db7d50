package core

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

// A claim names cgroups that exist, is there before those that do not yet, and
// goes when it is withdrawn.
func TestBind(t *testing.T) {
	m := newMachine(t)
	m.mkdir("/lab/pod-1/c1")
	c := m.start()
	b := shop(t, nil)
	if _, err := c.Apply(b, 0); err != nil {
		t.Fatal(err)
	}
	pod := id(t, b, "pod")
	must(t, c.Bind("/lab/pod-1", pod))
	must(t, c.Bind("/lab/pod-2", pod))
	m.mkdir("/lab/pod-1/c2")
	m.mkdir("/lab/pod-2/c1")
	paths := []string{"/lab", "/lab/pod-1", "/lab/pod-1/c1", "/lab/pod-1/c2", "/lab/pod-2", "/lab/pod-2/c1"}
	look := func() (ids []uint32) {
		for _, p := range paths {
			ids = append(ids, identity(t, c, p))
		}
		return ids
	}
	if diff := cmp.Diff([]uint32{1, pod, pod, pod, pod, pod}, look()); diff != "" {
		t.Errorf("bound (-want +got):\n%s", diff)
	}
	if s := c.Status(); s.Claims != 2 || s.Active.Epoch != 2 || len(s.Problems) > 0 {
		t.Errorf("status %+v", s)
	}
	must(t, c.Bind("/lab/pod-1", pod))
	if s := c.Status(); s.Active.Epoch != 2 {
		t.Errorf("saying it again began epoch %d", s.Active.Epoch)
	}

	// A core that starts knows what the last one was told, and so does a new image.
	c.Close()
	c = m.start()
	if diff := cmp.Diff([]uint32{1, pod, pod, pod, pod, pod}, look()); diff != "" {
		t.Errorf("after restart (-want +got):\n%s", diff)
	}
	if _, err := c.Apply(shop(t, version(8)), 0); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]uint32{1, pod, pod, pod, pod, pod}, look()); diff != "" {
		t.Errorf("after apply (-want +got):\n%s", diff)
	}
	must(t, c.Unbind("/lab/pod-1"))
	must(t, c.Unbind("/lab/never"))
	if diff := cmp.Diff([]uint32{1, 1, 1, 1, pod, pod}, look()); diff != "" {
		t.Errorf("unbound (-want +got):\n%s", diff)
	}
	// An image that selects the place itself does not heed the claim any more.
	if _, err := c.Apply(shop(t, func(p *policy.Policy) {
		p.Version = 9
		p.Workloads[1].Match = []policy.Selector{{Kind: image.SelectCgroup, Path: "/lab/pod-2"}}
	}), 0); err != nil {
		t.Fatal(err)
	}
	bastion := id(t, b, "bastion")
	if diff := cmp.Diff([]uint32{1, 1, 1, 1, bastion, bastion}, look()); diff != "" {
		t.Errorf("selected (-want +got):\n%s", diff)
	}
	if s := c.Status(); s.Claims != 0 {
		t.Errorf("%d claims", s.Claims)
	}
}

// The agent may be in an attacker's hands: it labels what the policy leaves to
// it, and nothing else.
// Where runtimes put containers, nobody is anybody before he is named; who turns out to
// be nobody's is let go. Where no selector asks for metadata, nobody waits. (C13)
func TestC13PendingUntilNamed(t *testing.T) {
	m := newMachine(t)
	const pod1, box = "/kubepods.slice/kubepods-pod1.slice/cri-containerd-1.scope", "/system.slice/docker-2.scope"
	m.mkdir(pod1)
	c := m.start()
	b := shop(t, nil)
	_, err := c.Apply(b, 0)
	must(t, err)
	pod := id(t, b, "pod")
	m.mkdir(box)
	m.mkdir("/system.slice/docker.service")
	m.mkdir("/kubepods/besteffort/pod3/4")
	m.mkdir("/libpod_parent/libpod-5")
	m.mkdir("/kubepodsx")
	const pending, nobody = uint32(image.Pending), uint32(image.Unmanaged)
	look := func() map[string]uint32 {
		ids := map[string]uint32{}
		for _, p := range []string{pod1, box, "/system.slice/docker.service", "/kubepods/besteffort/pod3/4", "/libpod_parent/libpod-5", "/kubepodsx"} {
			ids[p] = identity(t, c, p)
		}
		return ids
	}
	want := map[string]uint32{pod1: pending, box: pending, "/system.slice/docker.service": nobody, "/kubepods/besteffort/pod3/4": pending, "/libpod_parent/libpod-5": pending, "/kubepodsx": nobody}
	if diff := cmp.Diff(want, look()); diff != "" {
		t.Errorf("born (-want +got):\n%s", diff)
	}
	must(t, c.Bind(pod1, pod))
	must(t, c.Bind(box, nobody))
	want[pod1], want[box] = pod, nobody
	if diff := cmp.Diff(want, look()); diff != "" {
		t.Errorf("named (-want +got):\n%s", diff)
	}
	if err := c.Bind("/lab/other", nobody); err == nil || err.Error() != "bind /lab/other: no container waits for its name there" {
		t.Errorf("nobody elsewhere: %v", err)
	}
	if err := c.Bind("/kubepods.slice", nobody); err == nil {
		t.Error("all pods were let go at once")
	}
	c.Close()
	c = m.start()
	if diff := cmp.Diff(want, look()); diff != "" {
		t.Errorf("after restart (-want +got):\n%s", diff)
	}
	must(t, c.Unbind(pod1))
	if got := identity(t, c, pod1); got != pending {
		t.Errorf("unbound is %d, not pending", got)
	}
	_, err = c.Apply(shop(t, func(p *policy.Policy) {
		p.Version = 9
		for i := range p.Workloads {
			if p.Workloads[i].Name == "pod" {
				p.Workloads[i].Match = []policy.Selector{{Kind: image.SelectCgroup, Path: "/lab/pod"}}
			}
		}
	}), 0)
	must(t, err)
	for p, got := range look() {
		if got != nobody {
			t.Errorf("without metadata, %s is %d", p, got)
		}
	}
}

func TestBindRefuses(t *testing.T) {
	m := newMachine(t)
	m.mkdir("/system.slice/nginx.service")
	c := m.start()
	if err := c.Bind("/lab/pod", 77); err == nil || err.Error() != "bind /lab/pod: no policy is in force" {
		t.Errorf("before any policy: %v", err)
	}
	b := shop(t, func(p *policy.Policy) {
		p.Workloads = append(p.Workloads, policy.Workload{Name: "zbox", Zone: "app",
			Match: []policy.Selector{{Kind: image.SelectContainer, Name: "box"}}})
	})
	if _, err := c.Apply(b, 0); err != nil {
		t.Fatal(err)
	}
	pod, box := id(t, b, "pod"), id(t, b, "zbox")
	must(t, c.Bind("/lab/pod", pod))
	tests := []struct {
		name, path string
		id         uint32
		want       string // "" = accepted
	}{
		{"OK beside", "/lab/pod-2", pod, ""},
		{"OK below, same workload", "/lab/pod/c", pod, ""},
		{"OK scope in a slice", "/kubepods.slice/cri-1.scope", pod, ""},
		{"OK like a unit, not below slices only", "/lab/nginx.service", box, ""},
		{"bad root", "/", pod, "not a canonical path"},
		{"bad empty", "", pod, "not a canonical path"},
		{"bad relative", "lab", pod, "not a canonical path"},
		{"bad dots", "/lab/../x", pod, "not a canonical path"},
		{"bad slashes", "/lab//x", pod, "not a canonical path"},
		{"bad slash at the end", "/lab/x/", pod, "not a canonical path"},
		{"bad control byte", "/lab/x\x00", pod, "not a canonical path"},
		{"bad long", "/" + strings.Repeat("x", image.MaxPath), pod, "not a canonical path"},
		{"bad reserved identity", "/lab/x", 2, "no workload 2 is found by metadata"},
		{"bad workload of selectors", "/lab/x", id(t, b, "web"), "is found by metadata"},
		{"bad selected cgroup", "/lab/postgres", pod, "the policy selects /lab/postgres/ itself"},
		{"bad inside a selected cgroup", "/lab/postgres/x", pod, "the policy selects /lab/postgres/ itself"},
		{"bad above a selected cgroup", "/lab", pod, "itself"},
		{"bad unit", "/system.slice/nginx.service", pod, "a systemd unit of the policy is there"},
		{"bad inside a unit", "/system.slice/api@7.service/x", pod, "a systemd unit of the policy is there"},
		{"bad slice", "/system.slice", pod, "a slice may hold systemd units of the policy"},
		{"bad inside another's", "/lab/pod/x", box, "/lab/pod/ is bound to another workload"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := c.Bind(tt.path, tt.id)
			if (err == nil) != (tt.want == "") || err != nil && !strings.HasSuffix(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}
