package core

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/core/proto"
)

func TestApply(t *testing.T) {
	m := newMachine(t)
	m.mkdir("/lab/postgres/inner")
	m.mkdir("/system.slice/nginx.service/worker")
	m.mkdir("/system.slice/api@1.service")
	m.mkdir("/lab/nginx.service") // not below slices only: no unit
	c := m.start()
	if got := c.Status(); got.State != proto.StateIdle || len(got.Links) != 0 {
		t.Fatalf("before any policy: %+v", got)
	}

	b := shop(t, nil)
	status, err := c.Apply(b)
	if err != nil {
		t.Fatal(err)
	}
	if status.State != proto.StateEnforcing || len(status.Links) != len(attachOrder) || status.Active.Bindings != 5 {
		t.Errorf("after apply: %+v", status)
	}
	m.mkdir("/lab/postgres/late") // named by the program, not by the scan
	m.mkdir("/system.slice/nginx.service/late")
	m.mkdir("/user.slice/api@2.service")
	m.mkdir("/lab/postgresql")
	want := map[string]uint32{
		"/": 1, "/lab": 1, "/lab/postgresql": 1, "/lab/nginx.service": 1, "/system.slice": 1,
		"/lab/postgres": id(t, b, "postgres"), "/lab/postgres/inner": id(t, b, "postgres"), "/lab/postgres/late": id(t, b, "postgres"),
		"/system.slice/nginx.service": id(t, b, "web"), "/system.slice/nginx.service/worker": id(t, b, "web"),
		"/system.slice/nginx.service/late": id(t, b, "web"),
		"/system.slice/api@1.service":      id(t, b, "api"), "/user.slice/api@2.service": id(t, b, "api"),
	}
	got := map[string]uint32{}
	for path := range want {
		got[path] = identity(t, c, path)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("identities (-want +got):\n%s", diff)
	}
}
