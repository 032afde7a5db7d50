package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestRun(t *testing.T) {
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "good.json"), filepath.Join(dir, "bad.json")
	for file, text := range map[string]string{good: "{}", bad: "{\n  \"bpfs\": \"/x\"\n}"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	type result struct {
		Status         int
		Stdout, Stderr string
	}
	unknown := bad + ":2:3: unknown key \"bpfs\": use agent_user, bpffs, cgroup_root, devices, guard, keyring, log_format, log_level, observe_packets, quarantine_automatic, run_dir, state_dir, trust_dir\n"
	tests := []struct {
		name string
		args []string
		want result
	}{
		{"OK version", []string{"version"}, result{0, "demarc-core dev\n", ""}},
		{"OK help", []string{"help"}, result{0, usage, ""}},
		{"bad command", []string{"enforce"}, result{2, "", "demarc-core: unknown command \"enforce\"\n" + usage}},
		{"bad flag", []string{"run", "--conf", good}, result{2, "", "flag provided but not defined: -conf\n" + usage}},
		{"bad argument", []string{"run", "--config", good, "now"}, result{2, "", "demarc-core: unexpected argument \"now\"\n" + usage}},
		{"bad configuration", []string{"run", "--config", bad}, result{1, "", "demarc-core: " + unknown}},
		{"bad configuration without command", []string{"--config", bad}, result{1, "", "demarc-core: " + unknown}},
		{"bad configuration for preflight", []string{"preflight", "--config", bad}, result{1, "", "demarc-core: " + unknown}},
		{"bad configuration for detach", []string{"detach", "--config", bad, "--yes"}, result{1, "", "demarc-core: " + unknown}},
		{"bad configuration missing", []string{"--config", dir + "/none"}, result{1, "",
			"demarc-core: read configuration: open " + dir + "/none: no such file or directory\n"}},
		{"bad detach without yes", []string{"detach", "--config", good}, result{1, "",
			"demarc-core: detach would end enforcement\nhint: say --yes if that is wanted\n"}},
		{"bad flag of preflight", []string{"preflight", "--config", good, "-o", "json"}, result{2, "", "flag provided but not defined: -o\n" + usage}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			status := run(context.Background(), tt.args, &stdout, &stderr, func(string) string { return "" })
			if diff := cmp.Diff(tt.want, result{status, stdout.String(), stderr.String()}); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestNotify(t *testing.T) {
	if err := notify("", "READY=1"); err != nil {
		t.Errorf("without a service manager: %v", err)
	}
	if err := notify(filepath.Join(t.TempDir(), "none"), "READY=1"); err == nil {
		t.Error("a socket that is not there was told")
	}
	for _, address := range []string{filepath.Join(t.TempDir(), "notify"), "@demarc-core-test-" + filepath.Base(t.TempDir())} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := notify(address, "READY=1"); err != nil {
			t.Fatal(err)
		}
		if err := l.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		if n, err := l.Read(b); err != nil || string(b[:n]) != "READY=1" {
			t.Errorf("%s: got %q, %v", address, b[:n], err)
		}
	}
}

// A service manager that does not read keeps nobody waiting for long.
func TestNotifyWaitsNotForever(t *testing.T) {
	address := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	start := time.Now()
	for err == nil { // until its queue is full
		err = notify(address, "WATCHDOG=1")
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) > 20*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
}
