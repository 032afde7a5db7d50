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

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/internal/strict"
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
	r := reader{strict.New(file, src)}
	c := Config{BPFFS: "/sys/fs/bpf/demarc", RunDir: "/run/demarc", StateDir: "/var/lib/demarc", Devices: Devices{Auto: true}, Blast: defaultBlast}
	err := r.Object(map[string]func() error{
		"cgroup_root": func() error { return r.Value(&c.CgroupRoot) },
		"bpffs":       func() error { return r.directory(&c.BPFFS) },
		"run_dir":     func() error { return r.directory(&c.RunDir) },
		"state_dir":   func() error { return r.directory(&c.StateDir) },
		"trust_dir":   func() error { return r.directory(&c.TrustDir) },
		"keyring":     func() error { return r.directory(&c.Keyring) },
		"devices":     func() error { return r.devices(&c.Devices) },
		"agent_user":  func() error { return r.user(&c.AgentUID) },
		"quarantine_automatic": func() error {
			err := r.Value(&c.Blast)
			if err == nil && (c.Blast < 0 || c.Blast > abi.Quarantines) {
				err = r.Fail("quarantine_automatic is a number from 0 to %d", abi.Quarantines)
			}
			return err
		},
		"guard":           func() error { return r.unless(&c.Unguarded) },
		"observe_packets": func() error { return r.unless(&c.Sealed) },
		"log_level": func() error {
			if r.Value(&c.LogLevel) != nil {
				return r.Fail("log_level is one of debug, info, warn, error")
			}
			return nil
		},
		"log_format": func() error {
			var format string
			err := r.Value(&format)
			if c.LogJSON = format == "json"; err == nil && !c.LogJSON && format != "text" {
				err = r.Fail("log_format is text or json")
			}
			return err
		},
	})
	if err == nil {
		err = r.End()
	}
	if err != nil {
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

type reader struct{ *strict.Reader }

func (r reader) directory(out *string) error {
	if err := r.Value(out); err != nil {
		return err
	}
	if !filepath.IsAbs(*out) || filepath.Clean(*out) != *out || *out == "/" {
		return r.Fail("%q is not a clean absolute path", *out)
	}
	return nil
}

// unless reads a switch, and notes whether it is off.
func (r reader) unless(off *bool) error {
	on := true
	err := r.Value(&on)
	*off = !on
	return err
}

// devices takes "auto" or a list of names, which may be empty.
func (r reader) devices(out *Devices) error {
	if r.Next() != '[' {
		if word, err := r.Raw(); err != nil || string(word) != `"auto"` {
			return r.Fail(`devices is "auto" or a list of names`)
		}
		*out = Devices{Auto: true}
		return nil
	}
	*out = Devices{Names: []string{}}
	return r.List(func() error {
		var name string
		switch err := r.Value(&name); {
		case err != nil:
			return err
		case !deviceName(name):
			return r.Fail("%q cannot be the name of a device", name)
		case slices.Contains(out.Names, name):
			return r.Fail("device %q is given twice", name)
		}
		out.Names = append(out.Names, name)
		return nil
	})
}

// deviceName says whether the kernel would accept a name (dev_valid_name in
// net/core/dev.c).
func deviceName(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) < unix.IFNAMSIZ &&
		!strings.ContainsFunc(name, func(r rune) bool { return r == '/' || r == ':' || unicode.IsSpace(r) || r == 0 })
}

// user takes a name or a number.
func (r reader) user(out *uint32) error {
	raw, err := r.Raw()
	if err != nil {
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
	*out = uint32(uid)
	return nil
}
