package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
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
	unknown := bad + ":2:3: unknown key \"bpfs\": use cgroup_root, bpffs, run_dir, state_dir, trust_dir, keyring, devices, agent_user, quarantine_automatic, guard, observe_packets, log_level, log_format\n"
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

// The watchdog hears of a core only as long as it works.
func TestFeed(t *testing.T) {
	address := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	environment := func(usec string) func(string) string {
		return func(name string) string {
			return map[string]string{"NOTIFY_SOCKET": address, "WATCHDOG_USEC": usec}[name]
		}
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var looks, asked atomic.Uint64
	go feed(ctx, environment("40000"), func() uint64 {
		asked.Add(1)
		return looks.Load()
	})
	for asked.Load() < 4 {
		time.Sleep(time.Millisecond)
	}
	b := make([]byte, 100)
	if err := l.SetReadDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if n, err := l.Read(b); err == nil {
		t.Errorf("a core that does nothing says %q", b[:n])
	}
	looks.Add(1)
	if err := l.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := l.Read(b); err != nil || string(b[:n]) != "WATCHDOG=1" {
		t.Errorf("a core that works says %q, %v", b[:n], err)
	}
	for _, usec := range []string{"", "0", "soon"} {
		feed(ctx, environment(usec), func() uint64 { // which returns at once
			t.Errorf("%q was taken for a watchdog", usec)
			return 0
		})
	}
}
