package main

import (
	"os"
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
		Dir:                 "testdata",
		RequireExplicitExec: false,
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
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: exits CODE ARGS...")
	}
	// A shell prints the code, because Exec tells only good from bad.
	script := `"$0" "$@"; echo "exit code $?" >&2`
	path, err := os.Executable()
	ts.Check(err)
	_ = path
	err = ts.Exec("sh", append([]string{"-c", script, "demarc"}, args[1:]...)...)
	ts.Check(err)
	if want := "exit code " + args[0] + "\n"; !hasSuffix(ts.ReadFile("stderr"), want) {
		ts.Fatalf("stderr %q does not end in %q", ts.ReadFile("stderr"), want)
	}
}

func hasSuffix(s, suffix string) bool { return len(s) >= len(suffix) && s[len(s)-len(suffix):] == suffix }
