package agent

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap/zapcore"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/identity/kubernetes"
)

func TestParseConfig(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	tuned := detect.DefaultConfig()
	tuned.Mode, tuned.Modes, tuned.PortScan.Count = detect.Off, map[string]detect.Mode{"T1046": detect.Automatic}, 20
	for _, c := range []struct {
		name, src string
		want      Config
	}{
		{"OK only comments", "# nothing\n", Config{Node: host, Server: "/run/demarc-agent/agent.sock", Core: "/run/demarc/core.sock", Detect: detect.DefaultConfig()}},
		{"OK empty", "", Config{Node: host, Server: "/run/demarc-agent/agent.sock", Core: "/run/demarc/core.sock", Detect: detect.DefaultConfig()}},
		{"OK all", `
node: n1
server: unix:///run/n1/agent.sock
core: unix:///run/n1/core.sock
metrics: {listen: "127.0.0.1:9477"}
identity: {providers: [file], inventory: inventory.yaml}
journal: {}
detect: {}
log: {level: debug, format: json}
`, Config{Node: "n1", Server: "/run/n1/agent.sock", Core: "/run/n1/core.sock", Metrics: "127.0.0.1:9477", Inventory: "/etc/demarc/inventory.yaml", LogLevel: zapcore.DebugLevel, LogJSON: true, Detect: detect.DefaultConfig()}},
		{"OK web config", "metrics: {listen: \":9477\", web_config: web.yaml}\n",
			Config{Node: host, Server: "/run/demarc-agent/agent.sock", Core: "/run/demarc/core.sock", Metrics: ":9477", WebConfig: "/etc/demarc/web.yaml", Detect: detect.DefaultConfig()}},
		{"OK plain path, absolute inventory", "server: /a.sock\nidentity: {providers: [file], inventory: /i.yaml}\n",
			Config{Node: host, Server: "/a.sock", Core: "/run/demarc/core.sock", Inventory: "/i.yaml", Detect: detect.DefaultConfig()}},
		{"OK API server", "node: n1\nidentity: {providers: [kubernetes], kubernetes: {server: \"https://10.96.0.1:443\", token_file: token, ca_file: /ca.crt, node: n2}}\n",
			Config{Node: "n1", Server: "/run/demarc-agent/agent.sock", Core: "/run/demarc/core.sock", Detect: detect.DefaultConfig(),
				Kubernetes: &kubernetes.Options{Server: "https://10.96.0.1:443", TokenFile: "/etc/demarc/token", CAFile: "/ca.crt", Node: "n2"}}},
		{"OK journal", "journal: {dir: /var/lib/demarc-agent/journal}\n",
			Config{Node: host, Server: "/run/demarc-agent/agent.sock", Core: "/run/demarc/core.sock", Journal: "/var/lib/demarc-agent/journal", JournalSize: 256 << 20, Detect: detect.DefaultConfig()}},
		{"OK journal of a size", "journal: {dir: journal, max_size: 2GiB}\n",
			Config{Node: host, Server: "/run/demarc-agent/agent.sock", Core: "/run/demarc/core.sock", Journal: "/etc/demarc/journal", JournalSize: 2 << 30, Detect: detect.DefaultConfig()}},
		{"OK detect", "state: /var/lib/demarc-agent\ndetect: {mode: off, modes: {T1046: automatic}, portScan: {count: 20}}\n",
			Config{Node: host, Server: "/run/demarc-agent/agent.sock", Core: "/run/demarc/core.sock", State: "/var/lib/demarc-agent", Detect: tuned}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseConfig("/etc/demarc/agent.yaml", []byte(c.src))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, *got); d != "" {
				t.Errorf("config (-want +got):\n%s", d)
			}
		})
	}
}

// In a pod the environment says who is asked, and for which node.
func TestParseConfigInPod(t *testing.T) {
	for k, v := range map[string]string{"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443", "NODE_NAME": "n2", "POD_UID": "u"} {
		t.Setenv(k, v)
	}
	got, err := ParseConfig("a.yaml", []byte("node: n1\nidentity: {providers: [kubernetes]}\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := &kubernetes.Options{Server: "https://[fd00::1]:6443", TokenFile: kubernetes.DefaultToken, CAFile: kubernetes.DefaultCA, Node: "n2", Pod: "u"}
	if d := cmp.Diff(want, got.Kubernetes); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestParseConfigRefuses(t *testing.T) {
	for _, c := range []struct{ name, src, want string }{
		{"bad key", "sever: x\n", "a.yaml:1:1: unknown field \"sever\"\nhint: check the spelling; unknown keys are never ignored"},
		{"bad nested key", "metrics:\n  port: 1\n", "a.yaml:2:3: unknown field \"port\"\nhint: check the spelling; unknown keys are never ignored"},
		{"bad server", "server: tcp://1.2.3.4\n", "a.yaml:1:9: server \"tcp://1.2.3.4\": want unix:///PATH\nhint: for example unix:///run/demarc-agent/agent.sock"},
		{"bad core", "core: core.sock\n", "a.yaml:1:7: server \"core.sock\": want unix:///PATH\nhint: for example unix:///run/demarc/core.sock"},
		{"bad same socket", "server: /a\ncore: /a\n", "a.yaml:1:9: server and core are the same socket\nhint: the agent and the core each need a socket of their own"},
		{"bad node", "node: \"a b\"\n", "a.yaml:1:7: node name \"a b\" is no name\nhint: use at most 253 printable ASCII characters"},
		{"bad listen", "metrics: {listen: 9477}\n", "a.yaml:1:19: \"9477\" is no HOST:PORT\nhint: for example 127.0.0.1:9477"},
		{"bad unused web config", "metrics: {web_config: x}\n", "a.yaml:1:23: web_config is not used without metrics\nhint: set metrics.listen, too"},
		{"bad provider", "identity: {providers: [docker]}\n", "a.yaml:1:24: unknown identity provider \"docker\"\nhint: this version has file, cri and kubernetes"},
		{"bad no API server", "identity: {providers: [kubernetes]}\n", "a.yaml:1:23: provider kubernetes needs an API server\nhint: set identity.kubernetes.server, as https://10.96.0.1:443, and node; in a pod the environment says them"},
		{"bad API server", "identity: {providers: [kubernetes], kubernetes: {server: \"http://127.0.0.1:8080\"}}\n", "a.yaml:1:23: server \"http://127.0.0.1:8080\": want https://ADDRESS:PORT\nhint: set identity.kubernetes.server, as https://10.96.0.1:443, and node; in a pod the environment says them"},
		{"bad unused API server", "identity: {kubernetes: {node: n1}}\n", "a.yaml:1:24: the API server is not used by any provider\nhint: add `providers: [kubernetes]`"},
		{"bad two providers", "identity: {providers: [file, cri], inventory: x}\n", "a.yaml:1:30: a second identity provider\nhint: use one: two could contradict each other"},
		{"bad unused runtime", "identity: {cri: unix:///run/x.sock}\n", "a.yaml:1:17: the runtime is not used by any provider\nhint: add `providers: [cri]`"},
		{"bad runtime", "identity: {providers: [cri], cri: x.sock}\n", "a.yaml:1:35: server \"x.sock\": want unix:///PATH\nhint: for example unix:///run/containerd/containerd.sock"},
		{"bad no inventory", "identity: {providers: [file]}\n", "a.yaml:1:23: provider file needs an inventory\nhint: set identity.inventory to its file"},
		{"bad unused inventory", "identity: {inventory: x}\n", "a.yaml:1:23: the inventory is not used by any provider\nhint: add `providers: [file]`"},
		{"bad journal", "journal: {path: /x}\n", "a.yaml:1:11: unknown field \"path\"\nhint: check the spelling; unknown keys are never ignored"},
		{"bad journal size", "journal: {dir: /x, max_size: 12parsecs}\n", "a.yaml:1:30: \"12parsecs\" is no size of a journal\nhint: use a size like 256MiB, and at least 1MiB"},
		{"bad small journal", "journal: {dir: /x, max_size: 512KiB}\n", "a.yaml:1:30: \"512KiB\" is no size of a journal\nhint: use a size like 256MiB, and at least 1MiB"},
		{"bad large journal", "journal: {dir: /x, max_size: 99999999999GiB}\n", "a.yaml:1:30: \"99999999999GiB\" is no size of a journal\nhint: use a size like 256MiB, and at least 1MiB"},
		{"bad journal without a place", "journal: {max_size: 1GiB}\n", "a.yaml:1:21: a journal needs a directory\nhint: set journal.dir, for example /var/lib/demarc-agent/journal"},
		{"bad detect", "detect: {scan: on}\n", "a.yaml:1:10: unknown field \"scan\"\nhint: check the spelling; unknown keys are never ignored"},
		{"bad technique", "detect: {modes: {T9: off}}\n", "a.yaml:1:17: no detector reports technique \"T9\"\nhint: docs/detection.md lists them"},
		{"bad mode", "detect: {modes: {T1046: perhaps}}\n", "a.yaml:1:17: unknown mode \"perhaps\" of T1046\nhint: use off, advise or automatic"},
		{"bad threshold", "detect:\n  portScan: {count: 0}\n", "a.yaml:2:21: 0 is out of bounds\nhint: use 1 to 256"},
		{"bad time", "detect: {upward: {within: -1s}}\n", "a.yaml:1:27: -1s is out of bounds\nhint: use a duration such as 5m, at most 720h"},
		{"bad log", "detect: {log: {file: here}}\n", "a.yaml:1:22: \"here\" is no absolute path\nhint: for example /var/log/demarc/findings.jsonl"},
		{"bad state", "state: here\n", "a.yaml:1:8: \"here\" is no absolute path\nhint: for example /var/lib/demarc-agent"},
		{"bad level", "log: {level: loud}\n", "a.yaml:1:14: unknown log level \"loud\"\nhint: use debug, info, warn or error"},
		{"bad fatal level", "log: {level: fatal}\n", "a.yaml:1:14: unknown log level \"fatal\"\nhint: use debug, info, warn or error"},
		{"bad format", "log: {format: xml}\n", "a.yaml:1:15: unknown log format \"xml\"\nhint: use text or json"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := ""
			if _, err := ParseConfig("a.yaml", []byte(c.src)); err != nil {
				got = err.Error()
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Errorf("error (-want +got):\n%s", d)
			}
		})
	}
}
