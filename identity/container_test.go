package identity

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	id1 = "1f2e3d4c5b6a79881f2e3d4c5b6a79881f2e3d4c5b6a79881f2e3d4c5b6a7988"
	id2 = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
	uid = "0f3b2c1d-1111-2222-3333-444455556666"
	sys = "0f3b2c1d_1111_2222_3333_444455556666"
)

func TestContainerOf(t *testing.T) {
	tests := []struct {
		name, path string
		want       Container
		at         string // "" = the path itself
	}{
		{name: "OK containerd, systemd", path: "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + sys + ".slice/cri-containerd-" + id1 + ".scope", want: Container{id1, uid}},
		{name: "OK containerd, cgroupfs", path: "/kubepods/burstable/pod" + uid + "/" + id1, want: Container{id1, uid}},
		{name: "OK containerd, guaranteed", path: "/kubepods.slice/kubepods-pod" + sys + ".slice/cri-containerd-" + id1 + ".scope", want: Container{id1, uid}},
		{name: "OK CRI-O, systemd", path: "/kubepods.slice/kubepods-pod" + sys + ".slice/crio-" + id1 + ".scope", want: Container{id1, uid}},
		{name: "OK CRI-O, its child", path: "/kubepods.slice/kubepods-pod" + sys + ".slice/crio-" + id1 + ".scope/container", want: Container{id1, uid},
			at: "/kubepods.slice/kubepods-pod" + sys + ".slice/crio-" + id1 + ".scope"},
		{name: "OK CRI-O, cgroupfs", path: "/kubepods/burstable/pod" + uid + "/crio-" + id1, want: Container{id1, uid}},
		{name: "OK Docker, systemd", path: "/system.slice/docker-" + id1 + ".scope", want: Container{ID: id1}},
		{name: "OK Docker, cgroupfs", path: "/docker/" + id1, want: Container{ID: id1}},
		{name: "OK Podman, system", path: "/machine.slice/libpod-" + id1 + ".scope", want: Container{ID: id1}},
		{name: "OK Podman, cgroupfs", path: "/libpod_parent/libpod-" + id1, want: Container{ID: id1}},
		{name: "OK Podman, a user's, its payload", path: "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id1 + ".scope/container", want: Container{ID: id1},
			at: "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id1 + ".scope"},
		{name: "OK k3s", path: "/kubepods/besteffort/pod" + uid + "/" + id1, want: Container{id1, uid}},
		{name: "OK kind, in Docker", path: "/system.slice/docker-" + id2 + ".scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + sys + ".slice/cri-containerd-" + id1 + ".scope", want: Container{id1, uid}},
		{name: "OK Docker in a pod", path: "/kubepods/burstable/pod" + uid + "/" + id2 + "/docker/" + id1, want: Container{ID: id1}},
		{name: "OK static pod", path: "/kubepods/burstable/pod" + strings.Repeat("ab", 16) + "/" + id1, want: Container{id1, strings.Repeat("ab", 16)}},
		{name: "bad pod's own cgroup", path: "/kubepods/burstable/pod" + uid},
		{name: "bad service", path: "/system.slice/nginx.service"},
		{name: "bad too short", path: "/docker/" + id1[:63]},
		{name: "bad too long", path: "/docker/" + id1 + "0"},
		{name: "bad upper case", path: "/docker/" + strings.ToUpper(id1)},
		{name: "bad monitor", path: "/machine.slice/libpod-conmon-" + id1 + ".scope"},
		{name: "bad relative", path: "docker/" + id1},
		{name: "bad dots", path: "/docker/../docker/" + id1},
		{name: "bad root", path: "/"},
		{name: "bad empty", path: ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, at, found := ContainerOf(tt.path)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			want := tt.at
			if want == "" && tt.want.ID != "" {
				want = tt.path
			}
			if at != want || found != (tt.want.ID != "") {
				t.Errorf("at %q, %v, want %q", at, found, want)
			}
		})
	}
}

func FuzzContainerOf(f *testing.F) {
	f.Add("/kubepods/burstable/pod" + uid + "/" + id1)
	f.Fuzz(func(t *testing.T, p string) {
		c, at, found := ContainerOf(p)
		if found != (c.ID != "") || found && (!strings.Contains(at, c.ID) || !strings.HasPrefix(p, at)) {
			t.Errorf("%q: %+v at %q, %v", p, c, at, found)
		}
	})
}
