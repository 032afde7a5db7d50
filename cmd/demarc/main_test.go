package main

import (
	"os"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"demarc": func() { os.Exit(run(os.Args[1:])) },
	})
}

// TestScripts runs what reads like sessions in testdata. In a script, "exits CODE
// ARGS..." runs demarc and wants that exit code; stdout and stderr work as usual.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			env.Setenv("DEMARC_SERVER", "unix://"+env.WorkDir+"/agent.sock")
			env.Setenv("NO_COLOR", "1")
			env.Setenv("TZ", "UTC")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
	})
}

// exits runs demarc with the rest of its arguments and compares the exit code.
// testscript itself tells only good from bad, so a shell writes the code down.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: exits CODE ARGS...")
	}
	code := ts.MkAbs(".exit-code")
	script := `out=$1; shift; demarc "$@"; echo $? >"$out"`
	ts.Check(ts.Exec("sh", append([]string{"-c", script, "sh", code}, args[1:]...)...))
	if got := strings.TrimSpace(ts.ReadFile(code)); got != args[0] {
		ts.Fatalf("exit code %s, want %s; stderr: %s", got, args[0], ts.ReadFile("stderr"))
	}
}
