package e2e_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/test/netlab"
)

// What a report holds by name, without its directory.
func unpack(t *testing.T, file string) map[string]string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		found[filepath.Base(h.Name)] = string(b)
	}
}

// J17: a report of a whole node, by root, who may read every file, holds none of its
// secrets: tag keys, signing keys, passwords and tokens, wherever they were put.
func TestJ17ReportHoldsNoSecret(t *testing.T) {
	e := newEnds(t, cliBody, netlab.NodeOptions{})
	e.server.serve(7000)
	file := func(name string) string { return filepath.Join(e.node.Dir(), name) }
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(file(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if !e.client.reaches(e.at4(7000)) || e.client.reaches(e.at4(7001)) {
		t.Fatal("verdicts are not those of the policy")
	}
	core, err := os.ReadFile(e.node.CoreConfig())
	if err != nil {
		t.Fatal(err)
	}
	var c struct{ Keyring string }
	if err := json.Unmarshal(core, &c); err != nil {
		t.Fatal(err)
	}
	keyring, err := os.ReadFile(c.Keyring)
	if err != nil {
		t.Fatal(err)
	}
	tagKeys := regexp.MustCompile(`\b[0-9a-f]{32}\b`).FindAllString(string(keyring), -1)
	if len(tagKeys) == 0 {
		t.Fatalf("no key in the keyring: %q", keyring)
	}
	if out, problems, status := e.node.Demarc("keys", "generate", "signing", "-o", file("trust/ops.key")); status != 0 {
		t.Fatalf("keys generate: %s%s", out, problems)
	}
	signing, err := os.ReadFile(file("trust/ops.key"))
	if err != nil {
		t.Fatal(err)
	}
	const password, hash, token = "correct-horse-battery", "$2y$10$Ro0CUfOqk6cXEKf3dyaM7O", "ghp_plantedplantedplanted0123456789"
	write("web.yaml", "basic_auth_users: {prometheus: '"+hash+"'}\n")
	agent, err := os.ReadFile(e.node.AgentConfig())
	if err != nil {
		t.Fatal(err)
	}
	write("planted.yaml", string(agent)+"# "+password+"\nmetrics: {listen: ':9477', web_config: "+file("web.yaml")+"}\n"+
		"upstream: https://demarc:"+password+"@example\ntag: "+tagKeys[0]+"\nbearer: "+token+"\nsigning: |\n  "+
		strings.ReplaceAll(strings.TrimSpace(string(signing)), "\n", "\n  ")+"\n")
	// A refused policy's file name, and so what is said of it, is somebody's choice.
	if _, _, status := e.node.Demarc("apply", file("web.yaml")); status == 0 {
		t.Fatal("that is no policy")
	}

	report := file("report.tar.gz")
	if out, problems, status := e.node.Demarc("bugreport", "--core-config", e.node.CoreConfig(), "--agent-config", file("planted.yaml"), "--flows", "50", "-o", report); status != 0 {
		t.Fatalf("bugreport: %d\n%s%s", status, out, problems)
	}
	found := unpack(t, report)
	var names []string
	for name := range found {
		names = append(names, name)
	}
	slices.Sort(names)
	want := []string{"agent.yaml", "audit.jsonl", "core.json", "devices.txt", "flows.jsonl", "identities.json", "kernel.txt", "metrics.txt", "mounts.txt",
		"pins.txt", "policy.json", "status.json", "version.json", "zones.json"}
	if d := cmp.Diff(want, names); d != "" {
		t.Errorf("files (-want +got):\n%s\n%s", d, found["problems.txt"])
	}
	for name, holds := range map[string]string{
		"status.json": `"state": "enforcing"`, "metrics.txt": "demarc_enforcing 1", "flows.jsonl": "no-crossing", "policy.json": `"web-db"`,
		"core.json": "keyring: " + c.Keyring, "agent.yaml": "web_config: " + file("web.yaml"), "identities.json": "spiffe://lab.example/app/web",
		"audit.jsonl": `"apply`,
	} {
		if !strings.Contains(found[name], holds) {
			t.Errorf("%s does not hold %q:\n%.600s", name, holds, found[name])
		}
	}
	secrets := append(tagKeys, password, hash, token)
	for line := range strings.Lines(string(signing)) {
		if !strings.HasPrefix(line, "-") {
			secrets = append(secrets, strings.TrimSpace(line))
		}
	}
	packed, err := os.ReadFile(report)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range secrets {
		for name, text := range found {
			if strings.Contains(text, secret) {
				t.Errorf("%s holds a secret: %.8s...", name, secret)
			}
		}
		if bytes.Contains(packed, []byte(secret)) {
			t.Errorf("the archive holds a secret: %.8s...", secret)
		}
	}
}
