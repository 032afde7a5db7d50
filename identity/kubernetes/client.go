package kubernetes

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

// Bounds of what an API server may say.
const (
	maxPod    = 4 << 20   // bytes of one pod; etcd takes 1.5 MiB
	maxList   = 256 << 20 // bytes of a list, read pod by pod
	maxSecret = 64 << 10  // bytes of a token
	maxCA     = 1 << 20
	pageSize  = 250
	patience  = 30 * time.Second // of a list's page, and for an answer to begin
	watchFor  = 5 * time.Minute  // and up to as much again
)

// Where a pod has its service account.
const (
	DefaultToken = "/var/run/secrets/kubernetes.io/serviceaccount/token"
	DefaultCA    = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
)

// Options say which API server is asked, and for what.
type Options struct {
	Server    string // https://ADDRESS:PORT
	TokenFile string // read for each question: tokens are renewed
	CAFile    string // read for each connection
	Node      string // whose pods are followed
	Pod       string // UID of the pod that the agent is in; "" = it is in none
}

// Address finds where the server is. Names are not possible: asking for them would
// need another way out of the agent's confinement.
func (o Options) Address() (netip.AddrPort, error) {
	u, err := url.Parse(o.Server)
	if err != nil || u.Scheme != "https" || u.User != nil || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
		return netip.AddrPort{}, fmt.Errorf("server %q: want https://ADDRESS:PORT", o.Server)
	}
	host, err := netip.ParseAddr(u.Hostname())
	if err != nil || host.Zone() != "" {
		return netip.AddrPort{}, fmt.Errorf("server %q: %q is no address", o.Server, u.Hostname())
	}
	port := uint64(443)
	if u.Port() != "" {
		if port, err = strconv.ParseUint(u.Port(), 10, 16); err != nil || port == 0 {
			return netip.AddrPort{}, fmt.Errorf("server %q: %q is no port", o.Server, u.Port())
		}
	}
	return netip.AddrPortFrom(host, uint16(port)), nil
}

// Check says what is wrong with the options.
func (o Options) Check() error {
	if !word.MatchString(o.Node) { // a comma would ask for something else
		return fmt.Errorf("node name %q is no name of a Kubernetes node", o.Node)
	}
	_, err := o.Address()
	return err
}

var (
	errExpired = errors.New("the API server has forgotten what came after the last answer")
	errTooMany = fmt.Errorf("more than %d pods are on this node", maxPods)
	errTooLong = errors.New("the answer is too long")
	errOdd     = errors.New("the answer makes no sense")
)

// anew says whether a watch that ended so cannot go on where it was: the next question
// is for a list.
func anew(err error) bool {
	for _, e := range []error{errExpired, errTooMany, errTooLong, errOdd} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// client asks one API server.
type client struct {
	options Options
	http    *http.Client
	dialer  net.Dialer
}

func newClient(o Options) *client {
	// A connection that is cut silently is found out within half a minute.
	c := &client{options: o, dialer: net.Dialer{Timeout: patience,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}}}
	c.http = &http.Client{
		// The token goes to this server only: no proxy, and no redirection.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialTLSContext:         c.dial,
			DisableCompression:     true, // what is short on the wire may be long
			MaxIdleConns:           1,
			IdleConnTimeout:        time.Minute,
			ResponseHeaderTimeout:  patience,
			MaxResponseHeaderBytes: 64 << 10,
		},
	}
	return c
}

func (c *client) close() { c.http.CloseIdleConnections() }

// dial connects to the server whatever the request says, and believes nobody but the
// CA of the cluster.
func (c *client) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	at, err := c.options.Address()
	if err != nil {
		return nil, err
	}
	pem, err := readShort(c.options.CAFile, maxCA)
	if err != nil {
		return nil, fmt.Errorf("read CA: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("read CA: %s has no certificate", c.options.CAFile)
	}
	plain, err := c.dialer.DialContext(ctx, network, at.String())
	if err != nil {
		return nil, err
	}
	conn := tls.Client(plain, &tls.Config{RootCAs: roots, ServerName: at.Addr().String(), MinVersion: tls.VersionTLS12})
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		plain.Close()
		return nil, err
	}
	return conn, nil
}

// get asks for the pods of this node. The caller closes the answer.
func (c *client) get(ctx context.Context, query url.Values) (*http.Response, error) {
	token, err := readShort(c.options.TokenFile, maxSecret)
	if err != nil {
		return nil, fmt.Errorf("read token: %w", err)
	}
	query.Set("fieldSelector", "spec.nodeName="+c.options.Node)
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(c.options.Server, "/")+"/api/v1/pods?"+query.Encode(), nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	r.Header.Set("Accept", "application/json")
	r.Header.Set("User-Agent", "demarc-agent")
	answer, err := c.http.Do(r)
	if err != nil {
		var wrapped *url.Error
		if errors.As(err, &wrapped) { // which would repeat the whole address
			err = wrapped.Err
		}
		return nil, err
	}
	switch answer.StatusCode {
	case http.StatusOK:
		return answer, nil
	case http.StatusGone:
		err = errExpired
	case http.StatusUnauthorized:
		err = errors.New("it does not know the token (401)")
	case http.StatusForbidden:
		err = errors.New("the service account may not list and watch pods (403)")
	default:
		err = fmt.Errorf("it answers %d", answer.StatusCode)
	}
	answer.Body.Close()
	return nil, err
}

// list returns this node's pods and the version that a watch goes on from. The first
// list may come from the server's cache, as the kubelet's does: a server that starts
// all agents anew must not be asked to read everything for each. A later one may not
// be older than what is known.
func (c *client) list(ctx context.Context, cached bool) (pods map[string]pod, version string, err error) {
	pods = make(map[string]pod)
	next := ""
	for {
		query := url.Values{"limit": {strconv.Itoa(pageSize)}}
		switch {
		case next != "":
			query.Set("continue", next)
		case cached:
			query.Set("resourceVersion", "0")
		}
		if version, next, err = c.page(ctx, query, pods); err != nil {
			return nil, "", fmt.Errorf("list pods: %w", err)
		}
		if next == "" {
			return pods, version, nil
		}
	}
}

func (c *client) page(ctx context.Context, query url.Values, pods map[string]pod) (version, next string, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	answer, err := c.get(ctx, query)
	if err != nil {
		return "", "", err
	}
	defer answer.Body.Close()
	before := len(pods)
	if version, next, err = readList(answer.Body, func(k pod) error {
		if k.here(c.options.Node) {
			pods[k.Metadata.UID] = k
		}
		if len(pods) > maxPods {
			return errTooMany
		}
		return nil
	}); err != nil {
		return "", "", err
	}
	if next != "" && len(pods) == before {
		return "", "", errors.New("a page brings nothing new") // and the next one would not either
	}
	return version, next, nil
}

// watch tells of what happens after a version until the server ends it, and before
// that its beginning.
func (c *client) watch(ctx context.Context, version string, begun func(), tell func(event) error) error {
	within := watchFor + rand.N(watchFor)
	ctx, cancel := context.WithTimeout(ctx, within+patience)
	defer cancel()
	answer, err := c.get(ctx, url.Values{"watch": {"1"}, "allowWatchBookmarks": {"true"}, "resourceVersion": {version},
		"timeoutSeconds": {strconv.Itoa(int(within / time.Second))}})
	if err != nil {
		return fmt.Errorf("watch pods: %w", err)
	}
	defer answer.Body.Close()
	begun()
	if err := readEvents(answer.Body, tell); err != nil {
		return fmt.Errorf("watch pods: %w", err)
	}
	return nil
}

// meter is a reader that ends with an error where a value, or all of them, are too
// long, so that a decoder keeps no more than that.
type meter struct {
	from        io.Reader
	value, rest int64
}

func (m *meter) Read(b []byte) (int, error) {
	left := min(m.value, m.rest)
	if left <= 0 {
		return 0, errTooLong
	}
	n, err := m.from.Read(b[:min(int64(len(b)), left)])
	m.value -= int64(n)
	m.rest -= int64(n)
	return n, err
}

// readList decodes a PodList pod by pod.
func readList(from io.Reader, tell func(pod) error) (version, next string, err error) {
	m := &meter{from: from, value: maxPod, rest: maxList}
	d := json.NewDecoder(m)
	defer func() {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF // an answer that is cut says nothing
		}
	}()
	if err := expect(d, '{'); err != nil {
		return "", "", err
	}
	items := false
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return "", "", err
		}
		m.value = maxPod
		switch key {
		case "metadata":
			var about struct {
				ResourceVersion string `json:"resourceVersion"`
				Continue        string `json:"continue"`
			}
			if err := d.Decode(&about); err != nil {
				return "", "", err
			}
			version, next = about.ResourceVersion, about.Continue
		case "items":
			items = true
			t, err := d.Token()
			if err != nil {
				return "", "", err
			}
			if t == nil {
				continue // no pods
			}
			if t != json.Delim('[') {
				return "", "", errors.New("items are no list")
			}
			for d.More() {
				m.value = maxPod
				var k pod
				if err := d.Decode(&k); err != nil {
					return "", "", err
				}
				if err := tell(k); err != nil {
					return "", "", err
				}
			}
			m.value = maxPod
			if err := expect(d, ']'); err != nil {
				return "", "", err
			}
		default:
			var other json.RawMessage
			if err := d.Decode(&other); err != nil {
				return "", "", err
			}
		}
	}
	if err := expect(d, '}'); err != nil {
		return "", "", err
	}
	if !items || version == "" {
		return "", "", errors.New("the answer is no list")
	}
	return version, next, nil
}

func expect(d *json.Decoder, want json.Delim) error {
	switch t, err := d.Token(); {
	case err != nil:
		return err
	case t != want:
		return fmt.Errorf("the answer has %v where %v should be", t, want)
	}
	return nil
}

// Types of events.
const (
	deleted  = "DELETED"
	bookmark = "BOOKMARK"
)

// event is something that happened to a pod.
type event struct {
	Type   string
	Object pod
}

// readEvents decodes a watch until it ends as it should.
func readEvents(from io.Reader, tell func(event) error) error {
	m := &meter{from: from, rest: math.MaxInt64} // a watch is long, and its events are short
	d := json.NewDecoder(m)
	for {
		m.value = maxPod
		var raw struct {
			Type   string          `json:"type"`
			Object json.RawMessage `json:"object"`
		}
		switch err := d.Decode(&raw); {
		case err == io.EOF:
			return nil
		case err != nil:
			return odd(err)
		}
		e := event{Type: raw.Type}
		switch e.Type {
		case "ADDED", "MODIFIED", deleted, bookmark:
			if err := json.Unmarshal(raw.Object, &e.Object); err != nil {
				return odd(err)
			}
			if err := tell(e); err != nil {
				return err
			}
		case "ERROR":
			var status struct {
				Code int `json:"code"`
			}
			if err := json.Unmarshal(raw.Object, &status); err == nil && status.Code == http.StatusGone {
				return errExpired
			}
			return fmt.Errorf("%w: it reports error %d", errOdd, status.Code)
		default:
			return fmt.Errorf("%w: it reports %.32q", errOdd, e.Type)
		}
	}
}

// odd marks what is no JSON of the expected kind, and not what is cut.
func odd(err error) error {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	if errors.As(err, &syntax) || errors.As(err, &kind) {
		return fmt.Errorf("%w: %w", errOdd, err)
	}
	return err
}

// readShort reads a file of at most so many bytes.
func readShort(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%s has more than %d bytes", path, most)
	}
	return b, err
}
