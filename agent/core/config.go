package core

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/strict"
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
	Sealed     bool       // observers look into no packet
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
	r := strict.New(file, src)
	c := Config{BPFFS: "/sys/fs/bpf/demarc", RunDir: "/run/demarc", StateDir: "/var/lib/demarc", Devices: Devices{Auto: true}, Blast: defaultBlast}
	if err := r.Object(func(key string) error { return c.set(r, key) }, "cgroup_root", "bpffs", "run_dir", "state_dir", "trust_dir", "keyring",
		"devices", "agent_user", "quarantine_automatic", "guard", "observe_packets", "log_level", "log_format"); err != nil {
		return Config{}, err
	}
	if err := r.End(); err != nil {
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

// set reads the value of one key.
func (c *Config) set(r *strict.Reader, key string) (err error) {
	directories := map[string]*string{"bpffs": &c.BPFFS, "run_dir": &c.RunDir, "state_dir": &c.StateDir, "trust_dir": &c.TrustDir, "keyring": &c.Keyring}
	if out, found := directories[key]; found {
		if err := r.Value(out); err != nil {
			return err
		}
		if !filepath.IsAbs(*out) || filepath.Clean(*out) != *out || *out == "/" {
			return r.Fail("%q is not a clean absolute path", *out)
		}
		return nil
	}
	switch key {
	case "cgroup_root":
		err = r.Value(&c.CgroupRoot)
	case "devices":
		err = c.setDevices(r)
	case "agent_user":
		err = c.setUser(r)
	case "quarantine_automatic":
		if err = r.Value(&c.Blast); err == nil && (c.Blast < 0 || c.Blast > abi.Quarantines) {
			err = r.Fail("quarantine_automatic is a number from 0 to %d", abi.Quarantines)
		}
	case "log_level":
		if r.Value(&c.LogLevel) != nil {
			err = r.Fail("log_level is one of debug, info, warn, error")
		}
	case "guard":
		on := true
		err = r.Value(&on)
		c.Unguarded = !on
	case "observe_packets":
		on := true
		err = r.Value(&on)
		c.Sealed = !on
	case "log_format":
		var format string
		if err = r.Value(&format); err == nil && format != "text" && format != "json" {
			err = r.Fail("log_format is text or json")
		}
		c.LogJSON = format == "json"
	}
	return err
}

// setDevices takes "auto" or a list of names, which may be empty.
func (c *Config) setDevices(r *strict.Reader) error {
	var raw json.RawMessage
	if err := r.Value(&raw); err != nil {
		return err
	}
	c.Devices = Devices{Auto: string(raw) == `"auto"`}
	if c.Devices.Auto {
		return nil
	}
	if err := json.Unmarshal(raw, &c.Devices.Names); err != nil || c.Devices.Names == nil {
		return r.Fail(`devices is "auto" or a list of names`)
	}
	for i, name := range c.Devices.Names {
		if !deviceName(name) {
			return r.Fail("%q cannot be the name of a device", name)
		}
		if slices.Contains(c.Devices.Names[:i], name) {
			return r.Fail("device %q is given twice", name)
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

// setUser takes a name or a number.
func (c *Config) setUser(r *strict.Reader) error {
	var raw json.RawMessage
	if err := r.Value(&raw); err != nil {
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
		return r.Fail("agent_user %s is no user of this machine", raw)
	}
	c.AgentUID = uint32(uid)
	return nil
}
