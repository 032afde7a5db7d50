package netlab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
)

// binariesVariable names a directory that holds the programs already.
const binariesVariable = "DEMARC_BIN"

// binary is the path of one of demarc's programs. They are built once in a test
// run, agent and command line with the race detector if the tests are; the core
// must be free of C, which that needs.
func (l *Lab) binary(name string) string {
	l.t.Helper()
	dir, err := binaries()
	l.check(err, "build programs")
	return filepath.Join(dir, name)
}

// Program is the path of one of demarc's programs, for what no node runs.
func (l *Lab) Program(name string) string { return l.binary(name) }

// release is the path of one of demarc's programs as it is released: static, and
// without race detector.
func (l *Lab) release(name string) string {
	l.t.Helper()
	if !raceDetector {
		return l.binary(name)
	}
	dir, err := releases()
	l.check(err, "build programs")
	return filepath.Join(dir, name)
}

var releases = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(process.dir, "release")
	return dir, build(dir, false, "demarc-core", "demarc-agent", "demarc")
})

var binaries = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv(binariesVariable); dir != "" {
		return dir, nil
	}
	dir := filepath.Join(process.dir, "bin")
	if err := build(dir, false, "demarc-core"); err != nil {
		return "", err
	}
	if err := build(dir, raceDetector, "demarc-agent", "demarc"); err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
})

func build(dir string, race bool, programs ...string) error {
	args := []string{"build", "-o", dir + "/"}
	c := "CGO_ENABLED=0"
	if race {
		args, c = append(args, "-race"), "CGO_ENABLED=1"
	}
	for _, p := range programs {
		args = append(args, "github.com/demarc/demarc/cmd/"+p)
	}
	command := exec.Command("go", args...)
	command.Env = append(os.Environ(), c)
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}
