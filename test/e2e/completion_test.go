package e2e_test

import (
	"strings"
	"testing"

	"github.com/demarc/demarc/test/netlab"
)

// The shell is offered the words of the policy in force.
func TestCompletionKnowsThePolicy(t *testing.T) {
	e := newEnds(t, cliBody, netlab.NodeOptions{})
	for _, c := range []struct {
		line string
		want string
	}{
		{"flows --crossing ", "web-db"},
		{"flows --from-zone ", "app"},
		{"flows --to ", "app/web"},
		{"quarantine ", "db"},
		{"release ", "web"},
		{"probe --as ", "app/web"},
	} {
		args := append([]string{"__complete"}, strings.Split(c.line, " ")...)
		out, problems, status := e.node.Demarc(args...)
		if status != 0 || !strings.Contains("\n"+out, "\n"+c.want+"\n") {
			t.Errorf("demarc %s<TAB>: %d, want %q among\n%s%s", c.line, status, c.want, out, problems)
		}
	}
}
