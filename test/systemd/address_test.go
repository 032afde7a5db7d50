package systemd_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/test/netlab"
)

// systemd has programs of its own in a unit's cgroup where the unit says IPAddressDeny=.
// What one of both refuses is refused, and each answers for its own. (X20)
func TestX20SystemdAddresses(t *testing.T) {
	lab := netlab.New(t)
	h := newHost(t, lab)
	peer := h.peer.IP4.String()
	for unit, more := range map[string]string{
		"worker-open": "", "worker-none": "IPAddressDeny=any\n", "worker-one": "IPAddressDeny=any\nIPAddressAllow=" + peer + "\n",
		"worker-other": "IPAddressDeny=" + peer + "\n",
	} {
		h.unit(unit+".service", "[Service]\nType=oneshot\nExecStart=/usr/local/bin/dial "+peer+" 7001 7002\n"+more)
	}
	h.Boot()
	h.apply(fmt.Sprintf(workerPolicy, peer))
	wire := h.Wire()
	for _, tt := range []struct {
		unit    string
		want    []uint16
		answers string
	}{
		{"worker-open", []uint16{7001}, "7001 open 7002 refused"},
		{"worker-none", nil, "7001 refused 7002 refused"},
		{"worker-one", []uint16{7001}, "7001 open 7002 refused"},
		{"worker-other", nil, "7001 refused 7002 refused"},
	} {
		wire.Forget()
		h.Run("systemctl", "start", tt.unit)
		if diff := cmp.Diff(tt.want, reached(wire, h.peer)); diff != "" {
			t.Errorf("%s: ports on the wire (-want +got):\n%s", tt.unit, diff)
		}
		var answers []string
		for line := range strings.Lines(h.Journal(tt.unit)) {
			if _, answer, found := strings.Cut(strings.TrimSpace(line), peer+" "); found {
				answers = append(answers, answer)
			}
		}
		if got := strings.Join(answers, " "); got != tt.answers {
			t.Errorf("%s: %q, want %q", tt.unit, got, tt.answers)
		}
	}
	if out := h.Run("demarc", "flows", "--all", "--verdict", "deny", "--port", "7001", "-o", "json"); strings.TrimSpace(out) != "" {
		t.Errorf("what systemd refused is told as ours:\n%s", out)
	}
	out := h.Run("demarc", "flows", "--all", "--verdict", "deny", "--port", "7002", "-o", "json")
	if n := strings.Count(out, `"verdict":"deny"`); n < 4 {
		t.Errorf("%d of the four that we refused are told:\n%s", n, out)
	}
	h.awaitState("enforcing")
}
