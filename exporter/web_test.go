package exporter

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/bcrypt"
)

// certificate writes cert.pem and key.pem, for 127.0.0.1.
func certificate(t *testing.T, dir string) *x509.CertPool {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, "cert.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	put(t, filepath.Join(dir, "key.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: secret})))
	pool := x509.NewCertPool()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool.AddCert(cert)
	return pool
}

func put(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Who does not know the password, or does not speak TLS, gets no number.
func TestWebConfig(t *testing.T) {
	dir := t.TempDir()
	trusted := certificate(t, dir)
	hash, err := bcrypt.GenerateFromPassword([]byte("right"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "web.yaml")
	put(t, config, "tls_server_config: {cert_file: cert.pem, key_file: key.pem}\nbasic_auth_users: {prometheus: '"+string(hash)+"'}\n")
	s := server(t, config)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	<-s.Ready()
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: trusted}}
	client := &http.Client{Transport: transport}
	for _, c := range []struct {
		name, url, user, password string
		code                      int
	}{
		{"OK", "https://", "prometheus", "right", http.StatusOK},
		{"bad password", "https://", "prometheus", "wrong", http.StatusUnauthorized},
		{"bad user", "https://", "other", "right", http.StatusUnauthorized},
		{"bad nobody", "https://", "", "", http.StatusUnauthorized},
		{"bad plain text", "http://", "prometheus", "right", http.StatusBadRequest},
	} {
		r, err := http.NewRequest("GET", c.url+s.Addr().String()+"/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		if c.user != "" {
			r.SetBasicAuth(c.user, c.password)
		}
		res, err := client.Do(r)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if got := strings.Contains(string(body), "demarc_enforcing"); res.StatusCode != c.code || got != (c.code == http.StatusOK) {
			t.Errorf("%s: %d, metrics %t", c.name, res.StatusCode, got)
		}
	}
	transport.CloseIdleConnections()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestBadWebConfig(t *testing.T) {
	dir := t.TempDir()
	certificate(t, dir)
	for _, c := range []struct{ name, text, says string }{
		{"bad key", "tls_server_confg: {}\n", "field tls_server_confg not found"},
		{"bad certificate", "tls_server_config: {cert_file: none.pem, key_file: key.pem}\n", "none.pem"},
		{"bad password", "basic_auth_users: {prometheus: plain}\n", "hashedSecret too short"},
	} {
		file := filepath.Join(dir, "web.yaml")
		put(t, file, c.text)
		_, err := NewServer("127.0.0.1:0", file, full)
		if err == nil || !strings.Contains(err.Error(), "read web configuration "+file+": ") || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %q, want %q in one line", c.name, err, c.says)
		}
	}
	if _, err := NewServer("127.0.0.1:0", filepath.Join(dir, "nothing"), full); err == nil {
		t.Error("a file that is not there is taken")
	}
}

func TestWebDirectories(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "web.yaml")
	put(t, file, "tls_server_config: {cert_file: a/cert.pem, key_file: /etc/ssl/private/key.pem, client_ca_file: ca.pem}\n")
	got, err := WebDirectories(file)
	want := []string{"/etc/ssl/private", dir, dir + "/a"}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}
