package core

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Whoever takes a running core over can do nothing with it that the core does not
// do itself: calls that it has no use for end it, on every thread.
func TestConfined(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "confined")
	build := exec.Command("go", "build", "-o", binary, "./testdata/confined")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	const killed = "killed"
	for attempt, want := range map[string]string{
		"OK nothing":                 "<nil>",
		"bad execve":                 killed,
		"bad fork":                   killed,
		"bad clone3":                 "function not implemented",
		"bad ptrace":                 killed,
		"bad memory of others":       killed,
		"bad kernel module":          killed,
		"bad kernel module in bytes": killed,
		"bad kexec":                  killed,
		"bad mount":                  killed,
		"bad new mount":              killed,
		"bad unshare":                killed,
		"bad setns":                  killed,
		"bad setuid":                 killed,
		"bad capset":                 killed,
		"bad prctl":                  killed,
		"bad another filter":         killed,
		"bad keys of the kernel":     killed,
		"bad file by handle":         killed,
		"bad perf":                   killed,
		"bad io_uring":               killed,
		"bad signal to others":       killed,
		"bad clock":                  killed,
		"bad reboot":                 killed,
		"bad call of another ABI":    killed,
		"bad packet socket":          killed,
		"bad vsock":                  killed,
		"bad executable memory":      killed,
		"bad executable later":       killed,
		// What the filter leaves to capabilities.
		"bad program":        "operation not permitted",
		"bad raw socket":     "operation not permitted",
		"bad file of others": "permission denied",
	} {
		t.Run(attempt, func(t *testing.T) {
			_, name, _ := strings.Cut(attempt, " ")
			out, err := exec.Command(binary, name).Output()
			got := strings.TrimSpace(string(out))
			var exit *exec.ExitError
			if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == unix.SIGSYS {
				got += killed
			} else if err != nil {
				t.Fatal(err)
			}
			if got != want {
				t.Errorf("%s, want %s", got, want)
			}
		})
	}
}
