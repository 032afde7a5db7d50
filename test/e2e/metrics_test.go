package e2e_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/demarc/demarc/test/netlab"
)

// certify writes a certificate for the agent, with its key, that the agent's user may
// read.
func certify(t *testing.T, dir string, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{"web.crt": {Type: "CERTIFICATE", Bytes: der}, "web.key": {Type: "PRIVATE KEY", Bytes: private}} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file+".new", pem.EncodeToMemory(block), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
}

// The confined agent serves its metrics over TLS to those who know the password, and
// to nobody else; a certificate that is renewed is used without a restart.
func TestMetricsOverTLS(t *testing.T) {
	e := newEnds(t, cliBody, netlab.NodeOptions{Metrics: metricsAt})
	dir := filepath.Join(e.node.Dir(), "web")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	certify(t, dir, 1)
	hash, err := bcrypt.GenerateFromPassword([]byte("right"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "web.yaml")
	text := fmt.Sprintf("tls_server_config: {cert_file: web.crt, key_file: web.key}\nbasic_auth_users: {prometheus: '%s'}\n", hash)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	agent, err := os.ReadFile(e.node.AgentConfig())
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(string(agent), "metrics: {", "metrics: {web_config: "+config+", ", 1)
	if err := os.WriteFile(e.node.AgentConfig(), []byte(changed), 0o644); err != nil || changed == string(agent) {
		t.Fatalf("%v in\n%s", err, changed)
	}
	e.node.RestartAgent()

	get := func(scheme, password string) (code int, serial int64, body string) {
		t.Helper()
		transport := &http.Transport{
			DisableKeepAlives: true,
			TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, // which certificate it is, is looked at below
			DialContext: func(context.Context, string, string) (c net.Conn, err error) {
				err = e.node.Home().Do(func() error {
					c, err = net.Dial("tcp", metricsAt)
					return err
				})
				return c, err
			},
		}
		r, err := http.NewRequest("GET", scheme+"://"+metricsAt+"/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.SetBasicAuth("prometheus", password)
		res, err := (&http.Client{Transport: transport, Timeout: 30 * time.Second}).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		if res.TLS != nil {
			serial = res.TLS.PeerCertificates[0].SerialNumber.Int64()
		}
		return res.StatusCode, serial, string(b)
	}
	if code, serial, body := get("https", "right"); code != http.StatusOK || serial != 1 || !strings.Contains(body, "demarc_enforcing 1") {
		t.Errorf("with the password: %d, certificate %d\n%.300s", code, serial, body)
	}
	for scheme, password := range map[string]string{"https": "wrong", "http": "right"} {
		if code, _, body := get(scheme, password); code == http.StatusOK || strings.Contains(body, "demarc_") {
			t.Errorf("%s with password %q: %d\n%.300s", scheme, password, code, body)
		}
	}
	certify(t, dir, 2)
	if _, serial, _ := get("https", "right"); serial != 2 {
		t.Errorf("certificate %d, want the renewed one", serial)
	}
}
