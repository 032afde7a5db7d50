package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"time"

	authentication "k8s.io/api/authentication/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Types of what is sent.
const (
	JSON  = "application/json"
	Merge = "application/merge-patch+json"
	// Strategic merges lists by their keys.
	Strategic = "application/strategic-merge-patch+json"
	// Apply is server-side apply, of JSON or YAML.
	Apply = "application/apply-patch+yaml"
)

// Client asks the API server as one user.
type Client struct {
	server *Server
	token  string
	http   *http.Client

	Warnings []string // that came with the last answer
}

func newClient(s *Server, pair *tls.Certificate, token string) *Client {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.ca.pem)
	config := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}
	if pair != nil {
		config.Certificates = []tls.Certificate{*pair}
	}
	return &Client{server: s, token: token, http: &http.Client{
		Timeout:   time.Minute,
		Transport: &http.Transport{DialContext: s.dial, TLSClientConfig: config, DisableKeepAlives: true},
	}}
}

func (c *Client) try(method, path, kind string, body []byte) (status int, answer []byte, err error) {
	r, err := http.NewRequestWithContext(context.Background(), method, c.server.URL()+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	if kind != "" {
		r.Header.Set("Content-Type", kind)
	}
	if c.token != "" {
		r.Header.Set("Authorization", "Bearer "+c.token)
	}
	r.Header.Set("User-Agent", "test")
	a, err := c.http.Do(r)
	if err != nil {
		return 0, nil, err
	}
	defer a.Body.Close()
	c.Warnings = a.Header.Values("Warning")
	answer, err = io.ReadAll(a.Body)
	return a.StatusCode, answer, err
}

// Ask asks, and returns what is answered. Objects are sent as JSON, texts as they are.
func (c *Client) Ask(method, path, kind string, body any) (status int, answer []byte) {
	c.server.t.Helper()
	var sent []byte
	switch b := body.(type) {
	case nil:
	case []byte:
		sent = b
	case string:
		sent = []byte(b)
	default:
		var err error
		sent, err = json.Marshal(body)
		c.server.check(err, "encode")
	}
	status, answer, err := c.try(method, path, kind, sent)
	c.server.check(err, method+" "+path)
	return status, answer
}

// Must asks for what has to work, and decodes the answer into out, unless it is nil.
func (c *Client) Must(method, path, kind string, body, out any) {
	c.server.t.Helper()
	status, answer := c.Ask(method, path, kind, body)
	if status < 200 || status > 299 {
		c.server.t.Fatalf("%s %s: %d\n%s", method, path, status, answer)
	}
	if out != nil {
		c.server.check(json.Unmarshal(answer, out), "decode answer of "+path)
	}
}

// Create creates an object, and decodes what became of it into the same.
func (c *Client) Create(path string, object any) {
	c.server.t.Helper()
	c.Must(http.MethodPost, path, JSON, object, object)
}

// Token makes a token of a service account that is good as long as a Secret is there.
func (c *Client) Token(namespace, account, secret, uid string) string {
	c.server.t.Helper()
	seconds := int64(3600)
	r := &authentication.TokenRequest{Spec: authentication.TokenRequestSpec{ExpirationSeconds: &seconds}}
	if secret != "" {
		r.Spec.BoundObjectRef = &authentication.BoundObjectReference{Kind: "Secret", APIVersion: "v1", Name: secret, UID: types.UID(uid)}
	}
	c.Create("/api/v1/namespaces/"+namespace+"/serviceaccounts/"+account+"/token", r)
	return r.Status.Token
}

// Reason is why a request was refused.
func Reason(answer []byte) string {
	var s meta.Status
	if json.Unmarshal(answer, &s) != nil {
		return strings.TrimSpace(string(answer))
	}
	return s.Message
}
