package core

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
)

// Config is everything that a node of its own needs, so that two can live on one
// kernel. ParseConfig makes it.
type Config struct {
	CgroupRoot string     // directory the managed tree starts at; "" = the cgroup2 mount; relative = below it
	BPFFS      string     // pins; made below a mounted BPF file system
	RunDir     string     // the socket
	StateDir   string     // images and keyring; survives a reboot
	TrustDir   string     // keys that sign images; "" = none
	Keyring    string     // tag keys
	Devices    Devices    // where datagrams prove themselves, and frames of workloads stop
	AgentUID   uint32     // may connect, beside root
	Blast      int        // workloads that may be quarantined at once without anybody's order
	LogLevel   slog.Level // least severe line that is written
	LogJSON    bool       // one JSON object a line instead of text
	Unguarded  bool       // others are not kept from what enforces, though the kernel could
}

// Socket is where the agent finds the core.
func (c *Config) Socket() string { return filepath.Join(c.RunDir, "core.sock") }

// LoadConfig reads the configuration from a file.
func LoadConfig(file string) (Config, error) {
	src, err := os.ReadFile(file)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	return ParseConfig(file, src)
}

// ParseConfig reads one JSON object with nothing unknown, nothing twice and
// nothing behind it. Errors start with file:line:col.
func ParseConfig(file string, src []byte) (Config, error) {
	p := configParser{file: file, src: src, decoder: json.NewDecoder(bytes.NewReader(src))}
	c := Config{BPFFS: "/sys/fs/bpf/demarc", RunDir: "/run/demarc", StateDir: "/var/lib/demarc", Devices: Devices{Auto: true}, Blast: defaultBlast}
	if err := p.object(&c); err != nil {
		return Config{}, err
	}
	if c.Keyring == "" {
		c.Keyring = filepath.Join(c.StateDir, "keyring")
		// Or the service manager hands it over (LoadCredential= of systemd).
		if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" {
			if _, err := os.Lstat(filepath.Join(dir, "demarc.keyring")); err == nil {
				c.Keyring = filepath.Join(dir, "demarc.keyring")
			}
		}
	}
	return c, nil
}

type configParser struct {
	file    string
	src     []byte
	decoder *json.Decoder
	at      int64 // where the current key or value starts
}

func (p *configParser) object(c *Config) error {
	if token, err := p.token(); err != nil {
		return err
	} else if token != json.Delim('{') {
		return p.fail("a JSON object is needed")
	}
	seen := map[string]bool{}
	for p.decoder.More() {
		token, err := p.token()
		if err != nil {
			return err
		}
		key, _ := token.(string)
		if seen[key] {
			return p.fail("%q is given twice", key)
		}
		seen[key] = true
		if err := p.set(c, key); err != nil {
			return err
		}
	}
	if _, err := p.token(); err != nil { // the closing brace
		return err
	}
	p.advance()
	if _, err := p.decoder.Token(); !errors.Is(err, io.EOF) {
		return p.fail("something follows the object")
	}
	return nil
}

// set reads the value of one key.
func (p *configParser) set(c *Config, key string) error {
	switch key {
	case "cgroup_root":
		return p.value(&c.CgroupRoot)
	case "bpffs":
		return p.directory(&c.BPFFS)
	case "run_dir":
		return p.directory(&c.RunDir)
	case "state_dir":
		return p.directory(&c.StateDir)
	case "trust_dir":
		return p.directory(&c.TrustDir)
	case "keyring":
		return p.directory(&c.Keyring)
	case "devices":
		return p.devices(&c.Devices)
	case "agent_user":
		return p.user(&c.AgentUID)
	case "quarantine_automatic":
		if err := p.value(&c.Blast); err != nil {
			return err
		}
		if c.Blast < 0 || c.Blast > abi.Quarantines {
			return p.fail("quarantine_automatic is a number from 0 to %d", abi.Quarantines)
		}
		return nil
	case "log_level":
		if err := p.value(&c.LogLevel); err != nil {
			return p.fail("log_level is one of debug, info, warn, error")
		}
		return nil
	case "guard":
		on := true
		err := p.value(&on)
		c.Unguarded = !on
		return err
	case "log_format":
		return p.format(&c.LogJSON)
	}
	return p.fail("unknown key %q", key)
}

func (p *configParser) directory(out *string) error {
	if err := p.value(out); err != nil {
		return err
	}
	if !filepath.IsAbs(*out) || filepath.Clean(*out) != *out || *out == "/" {
		return p.fail("%q is not a clean absolute path", *out)
	}
	return nil
}

// devices takes "auto" or a list of names, which may be empty.
func (p *configParser) devices(out *Devices) error {
	var raw json.RawMessage
	if err := p.value(&raw); err != nil {
		return err
	}
	*out = Devices{Auto: string(raw) == `"auto"`}
	if out.Auto {
		return nil
	}
	if err := json.Unmarshal(raw, &out.Names); err != nil || out.Names == nil {
		return p.fail(`devices is "auto" or a list of names`)
	}
	for i, name := range out.Names {
		if !deviceName(name) {
			return p.fail("%q cannot be the name of a device", name)
		}
		if slices.Contains(out.Names[:i], name) {
			return p.fail("device %q is given twice", name)
		}
	}
	return nil
}

// deviceName says whether the kernel would accept a name (dev_valid_name in
// net/core/dev.c).
func deviceName(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) < unix.IFNAMSIZ &&
		!strings.ContainsFunc(name, func(r rune) bool { return r == '/' || r == ':' || unicode.IsSpace(r) || r == 0 })
}

// user takes a name or a number.
func (p *configParser) user(out *uint32) error {
	var raw json.RawMessage
	if err := p.value(&raw); err != nil {
		return err
	}
	text := string(raw)
	if name := ""; json.Unmarshal(raw, &name) == nil {
		text = name
		if found, err := user.Lookup(name); err == nil {
			text = found.Uid
		}
	}
	uid, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return p.fail("agent_user %s is no user of this machine", raw)
	}
	*out = uint32(uid)
	return nil
}

func (p *configParser) format(out *bool) error {
	var v string
	if err := p.value(&v); err != nil {
		return err
	}
	if v != "text" && v != "json" {
		return p.fail("log_format is text or json")
	}
	*out = v == "json"
	return nil
}

func (p *configParser) token() (json.Token, error) {
	p.advance()
	token, err := p.decoder.Token()
	if err != nil {
		return nil, p.wrap(err)
	}
	return token, nil
}

func (p *configParser) value(out any) error {
	p.advance()
	if err := p.decoder.Decode(out); err != nil {
		return p.wrap(err)
	}
	return nil
}

// advance moves to the first byte of the next token.
func (p *configParser) advance() {
	p.at = p.decoder.InputOffset()
	for p.at < int64(len(p.src)) && bytes.IndexByte([]byte(" \t\r\n:,"), p.src[p.at]) >= 0 {
		p.at++
	}
}

func (p *configParser) wrap(err error) error {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		p.at = max(p.at, syntax.Offset-1)
	case errors.As(err, &kind):
		return p.fail("a %s is not expected here", kind.Value)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return p.fail("the file ends too early")
	}
	return fmt.Errorf("%s: %w", p.position(), err)
}

func (p *configParser) fail(format string, args ...any) error {
	return fmt.Errorf("%s: %s", p.position(), fmt.Sprintf(format, args...))
}

func (p *configParser) position() string {
	before := p.src[:min(p.at, int64(len(p.src)))]
	line := 1 + bytes.Count(before, []byte("\n"))
	column := len(before) - bytes.LastIndexByte(before, '\n')
	return fmt.Sprintf("%s:%d:%d", p.file, line, column)
}
