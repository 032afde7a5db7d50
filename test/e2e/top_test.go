package e2e_test

import (
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

// TestTop has demarc top on a real terminal, tmux's, and somebody at its keys.
func TestTop(t *testing.T) {
	e := newEnds(t, cliBody, netlab.NodeOptions{})
	e.server.serve(7000)
	dir := t.TempDir()
	tmux := func(args ...string) (string, error) {
		c := exec.Command("tmux", append([]string{"-f", "/dev/null", "-S", dir + "/tmux"}, args...)...)
		c.Env = append([]string{"PATH=/usr/bin:/bin", "TERM=xterm-256color", "LC_ALL=C.UTF-8", "SHELL=/bin/sh"}, e.node.DemarcEnv()...)
		out, err := c.CombinedOutput()
		return string(out), err
	}
	// The shell stays when top has ended, and shows what it left.
	if out, err := tmux("new-session", "-d", "-x", "120", "-y", "30", "sh -c 'echo before; "+e.node.DemarcPath()+" top; echo ended with $?; sleep 1000'"); err != nil {
		t.Fatalf("tmux: %v %s", err, out)
	}
	defer tmux("kill-server")
	shows := func(what string, wanted ...string) {
		t.Helper()
		screen := ""
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			screen, _ = tmux("capture-pane", "-p")
			all := true
			for _, w := range wanted {
				text, not := strings.CutPrefix(w, "!")
				all = all && strings.Contains(screen, text) != not
			}
			if all {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: the screen does not show %q:\n%s", what, wanted, screen)
			}
		}
	}
	press := func(keys ...string) {
		t.Helper()
		if out, err := tmux(append([]string{"send-keys"}, keys...)...); err != nil {
			t.Fatalf("keys: %v %s", err, out)
		}
	}
	shows("start", "demarc top", "SOURCE", "!before")
	eventually(t, 20*time.Second, "flows show", func() bool {
		e.client.reaches(e.at4(7000))
		e.client.reaches(e.at4(7001))
		screen, _ := tmux("capture-pane", "-p")
		return strings.Contains(screen, "tcp/7000") && strings.Contains(screen, "tcp/7001")
	})
	shows("edges", "app/web", "app/db", "no-crossing", "crossing web-db")
	press("/", "7001", "Enter")
	shows("filter", "filter: 7001", "tcp/7001", "!tcp/7000 ")
	press("s")
	shows("sort", "sort: denied")
	press("Enter")
	shows("one row's flows", "DENIED", "egress no-crossing", "hook=connect", "!RATE/S")
	press("Escape")
	shows("back", "RATE/S", "filter: 7001")
	press("Escape")
	shows("no filter", "tcp/7000", "!filter: 7001")
	press("?")
	shows("help", "forget what was counted")
	press("?", "p")
	shows("pause", "PAUSED")
	press("p")
	shows("go on", "!PAUSED")
	if _, err := tmux("resize-window", "-x", "60", "-y", "12"); err != nil {
		t.Fatal(err)
	}
	shows("a small window", "demarc top", "q quit")
	press("q")
	shows("the end", "before", "ended with 0", "!SOURCE")
}
