package identity

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// follow starts a provider on a file with the given content.
func follow(t *testing.T, content string) (*File, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "inventory.yaml")
	write(t, path, content)
	f := NewFile(path)
	if err := f.Load(); err != nil {
		t.Fatal(err)
	}
	<-f.Changed()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	<-f.Ready()
	return f, path
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// await waits until the file is read as it should be. On a machine that is slow to
// write it, it may be read before, too.
func await(t *testing.T, f *File, what, name, problem string) {
	t.Helper()
	for end := time.After(time.Minute); ; {
		select {
		case <-f.Changed():
		case <-end:
			got, err := first(t, f)
			t.Fatalf("%s: %q, %v, want %q and %q", what, got, err, name, problem)
		}
		got, err := first(t, f)
		if got == name && (err == nil) == (problem == "") && (err == nil || strings.Contains(err.Error(), problem)) {
			return
		}
	}
}

func first(t *testing.T, f *File) (string, error) {
	t.Helper()
	inv, _, err := f.Current()
	if inv == nil || len(inv.Workloads) == 0 {
		return "", err
	}
	return inv.Workloads[0].Name, err
}

func TestFileFollowsWritesAndRenames(t *testing.T) {
	f, path := follow(t, "workloads: [{name: a}]")
	write(t, path, "workloads: [{name: b}]")
	await(t, f, "after a write", "b", "")
	write(t, path+".new", "workloads: [{name: c}]")
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	await(t, f, "after a rename", "c", "")
}

func TestFileKeepsTheLastGoodInventory(t *testing.T) {
	f, path := follow(t, "workloads: [{name: a}]")
	for _, c := range []struct {
		name, want string
		spoil      func()
	}{
		{"bad content", "unknown field", func() { write(t, path, "workload: []") }},
		{"bad empty", "is empty", func() { write(t, path, "") }},
		{"bad removed", "no such file", func() { os.Remove(path) }},
		{"bad named pipe", "not a regular file", func() { unix.Mkfifo(path, 0o644) }},
		{"bad mode", "everybody may write", func() { os.Remove(path); write(t, path, "workloads: []"); os.Chmod(path, 0o666) }},
	} {
		c.spoil()
		await(t, f, c.name, "a", c.want)
	}
	os.Chmod(path, 0o644)
	await(t, f, "mended", "", "")
}

func TestLoadRefusesABadFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "inventory.yaml")
	if err := NewFile(path).Load(); err == nil {
		t.Error("a missing file was taken")
	}
	write(t, path, "x: 1")
	if err := NewFile(path).Load(); err == nil || !strings.HasPrefix(err.Error(), path+":1:1: ") {
		t.Errorf("error %v does not say where", err)
	}
}
