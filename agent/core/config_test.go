package core

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseConfig(t *testing.T) {
	defaults := Config{BPFFS: "/sys/fs/bpf/demarc", RunDir: "/run/demarc", StateDir: "/var/lib/demarc", Keyring: "/var/lib/demarc/keyring",
		Devices: Devices{Auto: true}, Blast: 2}
	tests := []struct {
		name, src string
		want      Config
		err       string
	}{
		{name: "OK empty", src: "{}", want: defaults},
		{name: "OK everything",
			src: `{"cgroup_root": "lab", "bpffs": "/b/d", "run_dir": "/r", "state_dir": "/s", "trust_dir": "/t", "keyring": "/k",
				"devices": ["eth0", "bond0.100"], "agent_user": "root", "quarantine_automatic": 0, "log_level": "debug", "log_format": "json"}`,
			want: Config{CgroupRoot: "lab", BPFFS: "/b/d", RunDir: "/r", StateDir: "/s", TrustDir: "/t", Keyring: "/k",
				Devices: Devices{Names: []string{"eth0", "bond0.100"}}, LogLevel: slog.LevelDebug, LogJSON: true}},
		{name: "OK user by number", src: `{"agent_user": 1234}`, want: func() Config { c := defaults; c.AgentUID = 1234; return c }()},
		{name: "OK keyring follows state_dir", src: `{"state_dir": "/s"}`,
			want: func() Config { c := defaults; c.StateDir, c.Keyring = "/s", "/s/keyring"; return c }()},
		{name: "bad empty file", src: "", err: "f:1:1: the file ends too early"},
		{name: "bad array", src: "[]", err: "f:1:1: a JSON object is needed"},
		{name: "bad unknown key", src: "{\n  \"bpffs\": \"/b\",\n  \"bpfs\": \"/b\"\n}", err: "f:3:3: unknown key \"bpfs\": use agent_user, bpffs, cgroup_root, devices, guard, keyring, log_format, log_level, observe_packets, quarantine_automatic, run_dir, state_dir, trust_dir"},
		{name: "bad key twice", src: "{\"run_dir\": \"/a\", \"run_dir\": \"/b\"}", err: `f:1:19: "run_dir" is given twice`},
		{name: "bad type", src: "{\"run_dir\": 7}", err: "f:1:13: a number is not expected here"},
		{name: "bad relative directory", src: `{"run_dir": "run"}`, err: `f:1:13: "run" is not a clean absolute path`},
		{name: "bad directory with dots", src: `{"run_dir": "/run/../etc"}`, err: `f:1:13: "/run/../etc" is not a clean absolute path`},
		{name: "bad root directory", src: `{"state_dir": "/"}`, err: `f:1:15: "/" is not a clean absolute path`},
		{name: "OK devices by themselves", src: `{"devices": "auto"}`, want: defaults},
		{name: "OK no devices", src: `{"devices": []}`, want: func() Config { c := defaults; c.Devices = Devices{Names: []string{}}; return c }()},
		{name: "bad devices word", src: `{"devices": "none"}`, err: `f:1:13: devices is "auto" or a list of names`},
		{name: "bad devices null", src: `{"devices": null}`, err: `f:1:13: devices is "auto" or a list of names`},
		{name: "bad devices number", src: `{"devices": [1]}`, err: `f:1:14: a number is not expected here`},
		{name: "bad device name", src: `{"devices": ["eth0", "eth 0"]}`, err: `f:1:22: "eth 0" cannot be the name of a device`},
		{name: "bad long device name", src: `{"devices": ["a234567890123456"]}`, err: `f:1:14: "a234567890123456" cannot be the name of a device`},
		{name: "bad empty device name", src: `{"devices": [""]}`, err: `f:1:14: "" cannot be the name of a device`},
		{name: "bad device twice", src: `{"devices": ["eth0", "eth0"]}`, err: `f:1:22: device "eth0" is given twice`},
		{name: "bad blast", src: `{"quarantine_automatic": 257}`, err: `f:1:26: quarantine_automatic is a number from 0 to 256`},
		{name: "bad user", src: `{"agent_user": "no such user"}`, err: `f:1:16: agent_user "no such user" is no user of this machine`},
		{name: "bad negative user", src: `{"agent_user": -1}`, err: `f:1:16: agent_user -1 is no user of this machine`},
		{name: "bad level", src: `{"log_level": "loud"}`, err: `f:1:15: log_level is one of debug, info, warn, error`},
		{name: "bad guard", src: `{"guard": "off"}`, err: `f:1:11: a string is not expected here`},
		{name: "bad observe_packets", src: `{"observe_packets": 1}`, err: `f:1:21: a number is not expected here`},
		{name: "bad format", src: `{"log_format": "xml"}`, err: `f:1:16: log_format is text or json`},
		{name: "bad trailing object", src: "{}\n{}", err: "f:2:1: something follows the object"},
		{name: "bad trailing garbage", src: "{} x", err: "f:1:4: something follows the object"},
		{name: "bad comma", src: "{\"run_dir\": \"/a\",}", err: "f:1:18: a string is needed here"},
		{name: "bad cut off", src: "{\"run_dir\": \"/a\"", err: "f:1:17: the file ends too early"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseConfig("f", []byte(tt.src))
			text := ""
			if err != nil {
				text = err.Error()
			}
			if diff := cmp.Diff(tt.err, text); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("config (-want +got):\n%s", diff)
			}
		})
	}
}

// A keyring that the service manager hands over is used where the configuration names
// none.
func TestKeyringCredential(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	keyring := func(src string) string {
		t.Helper()
		c, err := ParseConfig("f", []byte(src))
		if err != nil {
			t.Fatal(err)
		}
		return c.Keyring
	}
	if got := keyring("{}"); got != "/var/lib/demarc/keyring" {
		t.Errorf("without the credential: %s", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "demarc.keyring"), nil, 0o400); err != nil {
		t.Fatal(err)
	}
	if got := keyring("{}"); got != filepath.Join(dir, "demarc.keyring") {
		t.Errorf("with the credential: %s", got)
	}
	if got := keyring(`{"keyring": "/k"}`); got != "/k" {
		t.Errorf("with the credential and a path: %s", got)
	}
}
