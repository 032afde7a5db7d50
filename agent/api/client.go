package api

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/demarc/demarc/agent/core/audit"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/policy/envelope"
	"github.com/demarc/demarc/policy/image"
)

// ErrNotRunning means that nobody listens on the agent's socket, ErrPermission
// that this user may not do that.
var (
	ErrNotRunning = errors.New("agent is not running")
	ErrPermission = errors.New("permission denied")
)

// Client asks one agent. Its methods may be used at the same time.
type Client struct {
	path string
	http *http.Client
}

// SocketPath takes a server of the form unix:///path or /path apart.
func SocketPath(server string) (string, error) {
	path := strings.TrimPrefix(server, "unix://")
	if !strings.HasPrefix(path, "/") || strings.ContainsRune(path, 0) {
		return "", fmt.Errorf("server %q: want unix:///PATH", server)
	}
	// The kernel's sun_path holds 108 bytes with the terminating NUL.
	if len(path) > 107 {
		return "", fmt.Errorf("server %q: path of %d bytes, a socket's may have 107", server, len(path))
	}
	return path, nil
}

// NewClient makes a client. It does not connect yet.
func NewClient(server string) (*Client, error) {
	path, err := SocketPath(server)
	if err != nil {
		return nil, err
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		// The kernel holds a number of connections that wait for the agent, and says EAGAIN
		// beyond that, whoever they are of.
		for end := time.Now().Add(5 * time.Second); ; {
			c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", path)
			if !errors.Is(err, syscall.EAGAIN) || time.Now().After(end) {
				return c, err
			}
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{DialContext: dial}}}, nil
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status asks for the agent's status.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	return getJSON[*Status](ctx, c, PathStatus)
}

// Identities asks for the identities of the active image.
func (c *Client) Identities(ctx context.Context) ([]Identity, error) {
	return getJSON[[]Identity](ctx, c, PathIdentities)
}

// Zones asks for the zones of the active image.
func (c *Client) Zones(ctx context.Context) ([]Zone, error) {
	return getJSON[[]Zone](ctx, c, PathZones)
}

// Apply puts an encoded image, or an envelope around one, in force. Unless it is confirmed within a time, the
// kernel takes it back; 0 = it is for good.
func (c *Client) Apply(ctx context.Context, img []byte, within time.Duration) (*Status, error) {
	return c.ApplySparing(ctx, img, within, 0)
}

// ApplySparing is Apply that lets live connections go on for a time which the image
// cuts.
func (c *Client) ApplySparing(ctx context.Context, img []byte, within, spare time.Duration) (*Status, error) {
	return c.apply(ctx, url.Values{}, img, within, spare)
}

// ApplyPreviewed is ApplySparing of an image that was just previewed. If that does not
// lie ready any more, the image is sent again.
func (c *Client) ApplyPreviewed(ctx context.Context, img []byte, within, spare time.Duration) (*Status, error) {
	encoded, _, err := envelope.Open(img)
	if err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	digest := sha256.Sum256(encoded)
	s, err := c.apply(ctx, url.Values{"previewed": {hex.EncodeToString(digest[:])}}, nil, within, spare)
	var refused *Error
	if errors.As(err, &refused) && refused.Code == http.StatusUnprocessableEntity {
		return c.ApplySparing(ctx, img, within, spare)
	}
	return s, err
}

func (c *Client) apply(ctx context.Context, query url.Values, img []byte, within, spare time.Duration) (*Status, error) {
	for name, d := range map[string]time.Duration{"within": within, "grandfather": spare} {
		if d != 0 {
			query.Set(name, d.String())
		}
	}
	path := PathPolicy
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	return doJSON[*Status](ctx, c, http.MethodPost, path, bytes.NewReader(img))
}

// Preview asks which live connections an encoded image would cut, and to name some
// first: the caller's own, at most proto.MaxOwn.
func (c *Client) Preview(ctx context.Context, img []byte, own ...proto.Ends) (*proto.Preview, error) {
	query := url.Values{}
	for _, e := range own {
		query.Add("own", e.Local.String()+","+e.Remote.String())
	}
	path := PathPreview
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	return doJSON[*proto.Preview](ctx, c, http.MethodPost, path, bytes.NewReader(img))
}

// Shadow has live traffic judged by an encoded image beside the one in force, for a
// time.
func (c *Client) Shadow(ctx context.Context, img []byte, lasting time.Duration) (*Status, error) {
	path := PathShadow + "?" + url.Values{"for": {lasting.String()}}.Encode()
	return doJSON[*Status](ctx, c, http.MethodPost, path, bytes.NewReader(img))
}

// Unshadow ends that.
func (c *Client) Unshadow(ctx context.Context) (*Status, error) {
	return doJSON[*Status](ctx, c, http.MethodPost, PathUnshadow, nil)
}

// Differences asks what the policy in shadow would have decided otherwise.
func (c *Client) Differences(ctx context.Context) (*Shadow, error) {
	return doJSON[*Shadow](ctx, c, http.MethodGet, PathShadow, nil)
}

// Confirm keeps the change that waits for it.
func (c *Client) Confirm(ctx context.Context) (*Status, error) {
	return doJSON[*Status](ctx, c, http.MethodPost, PathConfirm, nil)
}

// Quarantine leaves a workload its forensic crossings only, for a time.
func (c *Client) Quarantine(ctx context.Context, workload string, lasting time.Duration, reason string) (*Status, error) {
	v := url.Values{"workload": {workload}, "for": {lasting.String()}, "reason": {reason}}
	return doJSON[*Status](ctx, c, http.MethodPost, PathQuarantine+"?"+v.Encode(), nil)
}

// Release ends a workload's quarantine.
func (c *Client) Release(ctx context.Context, workload string) (*Status, error) {
	return doJSON[*Status](ctx, c, http.MethodPost, PathRelease+"?"+url.Values{"workload": {workload}}.Encode(), nil)
}

// Audit returns the core's audit log, and where it ends. The caller closes it.
func (c *Client) Audit(ctx context.Context) (io.ReadCloser, *audit.Head, error) {
	res, err := c.do(ctx, http.MethodGet, PathAudit, nil)
	if err != nil {
		return nil, nil, err
	}
	var head audit.Head
	hash, err := hex.DecodeString(res.Header.Get(AuditHash))
	if err == nil && len(hash) == len(head.Hash) {
		head.Hash = [sha256.Size]byte(hash)
		head.Seq, err = strconv.ParseUint(res.Header.Get(AuditSeq), 10, 64)
	} else if err == nil {
		err = errors.New("the agent does not say where it ends")
	}
	if err != nil {
		res.Body.Close()
		return nil, nil, fmt.Errorf("read audit log: %w", err)
	}
	return res.Body, &head, nil
}

// maxMetrics bounds a page of metrics, in bytes.
const maxMetrics = 64 << 20

// Metrics returns what Prometheus would scrape.
func (c *Client) Metrics(ctx context.Context) ([]byte, error) {
	res, err := c.do(ctx, http.MethodGet, PathMetrics, nil)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxMetrics))
	if err != nil {
		return nil, fmt.Errorf("read metrics: %w", err)
	}
	return b, nil
}

// Rollback goes back to the previous image.
func (c *Client) Rollback(ctx context.Context) (*Status, error) {
	return doJSON[*Status](ctx, c, http.MethodPost, PathRollback, nil)
}

// Image returns the encoded image in force.
func (c *Client) Image(ctx context.Context) ([]byte, error) {
	res, err := c.do(ctx, http.MethodGet, PathPolicy, nil)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, image.MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read image: %w", err)
	}
	return b, nil
}

// Flows streams lines; query holds filters and options. The sequence ends at the
// stream's end or with one error.
func (c *Client) Flows(ctx context.Context, query url.Values) iter.Seq2[Line, error] {
	return func(yield func(Line, error) bool) {
		for text, err := range c.FlowLines(ctx, query) {
			var line Line
			if err == nil {
				if err = json.Unmarshal(text, &line); err != nil {
					err = fmt.Errorf("read flows: %w", err)
				}
			}
			if !yield(line, err) || err != nil {
				return
			}
		}
	}
}

// longestLine bounds a line of flows, in bytes; the longest that an agent sends has a
// few thousand.
const longestLine = 1 << 20

// FlowLines is Flows as the agent sends it: each is the JSON of a Line, without a line
// end, and holds until the next one.
func (c *Client) FlowLines(ctx context.Context, query url.Values) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		res, err := c.do(ctx, http.MethodGet, PathFlows+"?"+query.Encode(), nil)
		if err != nil {
			yield(nil, err)
			return
		}
		defer res.Body.Close()
		lines := bufio.NewScanner(res.Body)
		lines.Buffer(make([]byte, 64<<10), longestLine)
		for lines.Scan() {
			if !yield(lines.Bytes(), nil) {
				return
			}
		}
		if err := lines.Err(); err != nil {
			yield(nil, fmt.Errorf("read flows: %w", err))
		}
	}
}

// Findings streams the findings that a query asks for: detect.Filter, and follow. It
// ends as Flows does.
func (c *Client) Findings(ctx context.Context, query url.Values) iter.Seq2[detect.Finding, error] {
	return func(yield func(detect.Finding, error) bool) {
		res, err := c.do(ctx, http.MethodGet, PathFindings+"?"+query.Encode(), nil)
		if err != nil {
			yield(detect.Finding{}, err)
			return
		}
		defer res.Body.Close()
		d := json.NewDecoder(bufio.NewReader(res.Body))
		for {
			var f detect.Finding
			if err := d.Decode(&f); err != nil {
				if !errors.Is(err, io.EOF) {
					yield(f, fmt.Errorf("read findings: %w", err))
				}
				return
			}
			if !yield(f, nil) {
				return
			}
		}
	}
}

func getJSON[T any](ctx context.Context, c *Client, path string) (T, error) {
	return doJSON[T](ctx, c, http.MethodGet, path, nil)
}

func doJSON[T any](ctx context.Context, c *Client, method, path string, body io.Reader) (T, error) {
	var out T
	res, err := c.do(ctx, method, path, body)
	if err != nil {
		return out, err
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&out); err != nil {
		return out, fmt.Errorf("read answer to %s %s: %w", method, path, err)
	}
	return out, nil
}

// do sends a request and returns a good answer, whose body the caller closes.
func (c *Client) do(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://demarc"+path, body)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if res.StatusCode < 400 {
		return res, nil
	}
	defer res.Body.Close()
	refused := &Error{Code: res.StatusCode}
	b, _ := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	if json.Unmarshal(b, refused) != nil || refused.Message == "" {
		refused.Message = fmt.Sprintf("agent answered %s", res.Status)
	}
	if res.StatusCode == http.StatusForbidden {
		return nil, fmt.Errorf("%w: %w", ErrPermission, refused)
	}
	return nil, refused
}

// explain tells a missing agent and a missing right from other errors.
func (c *Client) explain(err error) error {
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err
	}
	var dial *net.OpError
	if !errors.As(err, &dial) || dial.Op != "dial" {
		return err
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("connect to %s: %w: no such socket", c.path, ErrNotRunning)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("connect to %s: %w: nobody listens", c.path, ErrNotRunning)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("connect to %s: %w", c.path, ErrPermission)
	}
	return fmt.Errorf("connect to %s: %w", c.path, dial.Err)
}
