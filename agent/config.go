package agent

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"go.uber.org/zap/zapcore"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/agent/journal"
	"github.com/demarc/demarc/identity/kubernetes"
	"github.com/demarc/demarc/internal/yamlfile"
)

// Config is a valid configuration of the agent.
type Config struct {
	Node      string // name of this node
	Server    string // path of the agent's socket
	Core      string // path of the core's socket
	Metrics   string // HOST:PORT; "" = no metrics
	WebConfig string // file with TLS and users for the metrics; "" = neither
	Inventory string // file of the `file` provider; "" = not used
	Runtime   string // socket of the `cri` provider; "" = not used
	// Kubernetes is whom the `kubernetes` provider asks; nil = not used.
	Kubernetes *kubernetes.Options
	State      string // directory for what outlives the agent; "" = nothing does
	Detect     *detect.Config
	// Journal is the directory that flows are kept in; "" = they are not. JournalSize
	// bounds it, in bytes.
	Journal     string
	JournalSize int64
	LogLevel    zapcore.Level
	LogJSON     bool
}

// document is agent.yaml as it is written.
type document struct {
	Node    string `yaml:"node"`
	Server  string `yaml:"server"`
	Core    string `yaml:"core"`
	Metrics struct {
		Listen    string `yaml:"listen"`
		WebConfig string `yaml:"web_config"`
	} `yaml:"metrics"`
	Identity struct {
		Providers []string `yaml:"providers"`
		Inventory string   `yaml:"inventory"`
		CRI       string   `yaml:"cri"`

		Kubernetes *struct {
			Server    string `yaml:"server"`
			TokenFile string `yaml:"token_file"`
			CAFile    string `yaml:"ca_file"`
			Node      string `yaml:"node"`
		} `yaml:"kubernetes"`
	} `yaml:"identity"`
	Journal struct {
		Dir     string `yaml:"dir"`
		MaxSize string `yaml:"max_size"`
	} `yaml:"journal"`
	State  string         `yaml:"state"`
	Detect *detect.Config `yaml:"detect"`
	Log    struct {
		Level  string `yaml:"level"`
		Format string `yaml:"format"`
	} `yaml:"log"`
}

// ReadConfig reads and checks a configuration file.
func ReadConfig(file string) (*Config, error) {
	src, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return ParseConfig(file, src)
}

// ParseConfig checks a configuration. Relative paths in it are relative to the
// directory of the file.
func ParseConfig(file string, src []byte) (*Config, error) {
	d := document{Server: api.DefaultServer, Core: "unix:///run/demarc/core.sock", Detect: detect.DefaultConfig()}
	d.Log.Level, d.Log.Format = "info", "text"
	f, err := yamlfile.Decode(file, src, &d)
	if err != nil {
		return nil, err
	}
	c := &Config{Node: d.Node, Metrics: d.Metrics.Listen}
	if c.Node == "" {
		if c.Node, err = os.Hostname(); err != nil {
			return nil, f.Errorf("$.node", "set `node` to this node's name", "find out the host's name: %s", err)
		}
	}
	if !printable(c.Node) || len(c.Node) > 253 {
		return nil, f.Errorf("$.node", "use at most 253 printable ASCII characters", "node name %q is no name", c.Node)
	}
	if c.Server, err = api.SocketPath(d.Server); err != nil {
		return nil, f.Errorf("$.server", "for example "+api.DefaultServer, "%s", err)
	}
	if c.Core, err = api.SocketPath(d.Core); err != nil {
		return nil, f.Errorf("$.core", "for example unix:///run/demarc/core.sock", "%s", err)
	}
	if c.Server == c.Core {
		return nil, f.Errorf("$.server", "the agent and the core each need a socket of their own", "server and core are the same socket")
	}
	if c.Metrics != "" && !validListen(c.Metrics) {
		return nil, f.Errorf("$.metrics.listen", "for example 127.0.0.1:9477", "%q is no HOST:PORT", c.Metrics)
	}
	if c.WebConfig = d.Metrics.WebConfig; c.WebConfig != "" {
		if c.Metrics == "" {
			return nil, f.Errorf("$.metrics.web_config", "set metrics.listen, too", "web_config is not used without metrics")
		}
		if !filepath.IsAbs(c.WebConfig) {
			c.WebConfig = filepath.Join(filepath.Dir(file), c.WebConfig)
		}
	}
	for i, p := range d.Identity.Providers {
		at := fmt.Sprintf("$.identity.providers[%d]", i)
		switch {
		case p != "file" && p != "cri" && p != "kubernetes":
			return nil, f.Errorf(at, "this version has file, cri and kubernetes", "unknown identity provider %q", p)
		case i > 0:
			return nil, f.Errorf(at, "use one: two could contradict each other", "a second identity provider")
		}
	}
	named := func(p string) bool { return slices.Contains(d.Identity.Providers, p) }
	switch {
	case named("file") && d.Identity.Inventory == "":
		return nil, f.Errorf("$.identity.providers", "set identity.inventory to its file", "provider file needs an inventory")
	case !named("file") && d.Identity.Inventory != "":
		return nil, f.Errorf("$.identity.inventory", "add `providers: [file]`", "the inventory is not used by any provider")
	case !named("cri") && d.Identity.CRI != "":
		return nil, f.Errorf("$.identity.cri", "add `providers: [cri]`", "the runtime is not used by any provider")
	case !named("kubernetes") && d.Identity.Kubernetes != nil:
		return nil, f.Errorf("$.identity.kubernetes", "add `providers: [kubernetes]`", "the API server is not used by any provider")
	case named("kubernetes"):
		if c.Kubernetes, err = d.apiServer(c.Node, filepath.Dir(file)); err != nil {
			return nil, f.Errorf("$.identity.providers", "set identity.kubernetes.server, as https://10.96.0.1:443, and node; in a pod the environment says them", "%s", err)
		}
	case named("cri"):
		if c.Runtime, err = api.SocketPath(cmp.Or(d.Identity.CRI, "unix:///run/containerd/containerd.sock")); err != nil {
			return nil, f.Errorf("$.identity.cri", "for example unix:///run/containerd/containerd.sock", "%s", err)
		}
	}
	if c.Inventory = d.Identity.Inventory; c.Inventory != "" && !filepath.IsAbs(c.Inventory) {
		c.Inventory = filepath.Join(filepath.Dir(file), c.Inventory)
	}
	if c.Journal = d.Journal.Dir; c.Journal != "" && !filepath.IsAbs(c.Journal) {
		c.Journal = filepath.Join(filepath.Dir(file), c.Journal)
	}
	switch size, err := parseSize(cmp.Or(d.Journal.MaxSize, defaultJournalSize)); {
	case d.Journal.Dir == "" && d.Journal.MaxSize != "":
		return nil, f.Errorf("$.journal.max_size", "set journal.dir, for example /var/lib/demarc-agent/journal", "a journal needs a directory")
	case err != nil || size < journal.MinSize:
		return nil, f.Errorf("$.journal.max_size", "use a size like 256MiB, and at least 1MiB", "%q is no size of a journal", d.Journal.MaxSize)
	case c.Journal != "":
		c.JournalSize = size
	}
	if c.Detect = d.Detect; c.Detect == nil {
		c.Detect = detect.DefaultConfig() // the section is there, and empty
	}
	if problem := c.Detect.Check(); problem != nil {
		return nil, f.Errorf("$.detect."+problem.Path, problem.Hint, "%s", problem.Message)
	}
	if log := c.Detect.Log.File; log != "" && !filepath.IsAbs(log) {
		return nil, f.Errorf("$.detect.log.file", "for example /var/log/demarc/findings.jsonl", "%q is no absolute path", log)
	}
	if file := c.Detect.Record; file != "" && !filepath.IsAbs(file) {
		return nil, f.Errorf("$.detect.record", "for example /var/lib/demarc-agent/recording.jsonl", "%q is no absolute path", file)
	}
	if c.State = d.State; c.State != "" && !filepath.IsAbs(c.State) {
		return nil, f.Errorf("$.state", "for example /var/lib/demarc-agent", "%q is no absolute path", c.State)
	}
	if err := c.LogLevel.UnmarshalText([]byte(d.Log.Level)); err != nil || c.LogLevel > zapcore.ErrorLevel {
		return nil, f.Errorf("$.log.level", "use debug, info, warn or error", "unknown log level %q", d.Log.Level)
	}
	switch d.Log.Format {
	case "text":
	case "json":
		c.LogJSON = true
	default:
		return nil, f.Errorf("$.log.format", "use text or json", "unknown log format %q", d.Log.Format)
	}
	return c, nil
}

// apiServer says whom the `kubernetes` provider asks. What is not written is as it is
// for every process in a pod.
func (d *document) apiServer(node, dir string) (*kubernetes.Options, error) {
	o := &kubernetes.Options{Node: cmp.Or(os.Getenv("NODE_NAME"), node), Pod: os.Getenv("POD_UID"), TokenFile: kubernetes.DefaultToken, CAFile: kubernetes.DefaultCA}
	if host := os.Getenv("KUBERNETES_SERVICE_HOST"); host != "" {
		o.Server = "https://" + net.JoinHostPort(host, cmp.Or(os.Getenv("KUBERNETES_SERVICE_PORT"), "443"))
	}
	if k := d.Identity.Kubernetes; k != nil {
		o.Server, o.Node = cmp.Or(k.Server, o.Server), cmp.Or(k.Node, o.Node)
		o.TokenFile, o.CAFile = cmp.Or(k.TokenFile, o.TokenFile), cmp.Or(k.CAFile, o.CAFile)
	}
	for _, f := range []*string{&o.TokenFile, &o.CAFile} {
		if !filepath.IsAbs(*f) {
			*f = filepath.Join(dir, *f)
		}
	}
	if o.Server == "" {
		return nil, errors.New("provider kubernetes needs an API server")
	}
	return o, o.Check()
}

// defaultJournalSize holds some million flows.
const defaultJournalSize = "256MiB"

// parseSize takes bytes, and powers of 1024 of them.
func parseSize(s string) (int64, error) {
	number, shift := s, 0
	for unit, bits := range map[string]int{"KiB": 10, "MiB": 20, "GiB": 30} {
		if n, ok := strings.CutSuffix(s, unit); ok {
			number, shift = n, bits
		}
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%q is no size", s)
	}
	return n << shift, nil
}

func validListen(s string) bool {
	_, port, err := net.SplitHostPort(s)
	if err != nil {
		return false
	}
	_, err = strconv.ParseUint(port, 10, 16)
	return err == nil
}

func printable(s string) bool {
	for _, b := range []byte(s) {
		if b <= 0x20 || b > 0x7e {
			return false
		}
	}
	return true
}
