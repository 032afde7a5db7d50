package redact

import (
	"strings"
	"testing"
)

func TestText(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"bad tag key", `{"epoch": 1, "key": "000102030405060708090a0b0c0d0e0f"}`, `{"epoch": 1, "key": "[redacted]"}`},
		{"bad signing key", "a\n-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIAAB\n-----END PRIVATE KEY-----\nb", "a\n[redacted]\nb"},
		{"bad signing key, cut", "-----BEGIN EC PRIVATE KEY-----\nMC4CAQAw", "[redacted]"},
		{"bad signing key without frame", "x MC4CAQAwBQYDK2VwBCIEIAABAgMEBQYH y", "x [redacted] y"},
		{"bad password hash", "prometheus: $2y$10$abcdefghijklmnopqrstuv", "prometheus: [redacted]"},
		{"bad password in an address", "get https://user:hunter2@host/x", "get https://[redacted]@host/x"},
		{"bad header", "Authorization: Bearer abc.def-ghi_jkl", "Authorization: [redacted] [redacted]"},
		{"bad web token", "saw eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln here", "saw [redacted] here"},
		{"bad service token", "ghp_0123456789abcdef0123", "[redacted]"},
		{"bad setting", `db_password = "hunter 2", n=1`, `db_password = [redacted], n=1`},
		{"bad argument", "--api-key=abc --x=y token: t0ken", "--api-key=[redacted] --x=y token: [redacted]"},
		{"OK digest", "sha256 9ee45e207aa192a3147472e1270aeb0bfa190a3a706fc76a194f93b5c427bc0a", "sha256 9ee45e207aa192a3147472e1270aeb0bfa190a3a706fc76a194f93b5c427bc0a"},
		{"OK path", "keyring: /var/lib/demarc/keyring", "keyring: /var/lib/demarc/keyring"},
		{"OK prose", "the token bucket of a crossing", "the token bucket of a crossing"},
	} {
		if got := string(Text([]byte(c.in))); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestConfig(t *testing.T) {
	in := `# hunter2 is the password
metrics: {listen: "127.0.0.1:9477", web_config: /etc/demarc/web.yaml}
keyring: /var/lib/demarc/keyring
basic_auth_users: {prometheus: plain}
alert: {webhook_url: "https://hooks.example/T000/B000"}
list: ["a:hunter2@b", "https://u:hunter2@h", {api_key: hunter2}]
`
	got := string(Config([]byte(in)))
	for _, secret := range []string{"hunter2@h", "plain", "T000", "password", "api_key: hunter2"} {
		if strings.Contains(got, secret) {
			t.Errorf("%q is still there:\n%s", secret, got)
		}
	}
	for _, kept := range []string{"listen: 127.0.0.1:9477", "web_config: /etc/demarc/web.yaml", "keyring: /var/lib/demarc/keyring"} {
		if !strings.Contains(got, kept) {
			t.Errorf("%q is gone:\n%s", kept, got)
		}
	}
	if got := string(Config([]byte("{ secret: x"))); strings.Contains(got, "x\n") && !strings.Contains(got, "left out") {
		t.Errorf("broken: %q", got)
	}
}
