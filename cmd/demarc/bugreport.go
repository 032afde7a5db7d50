package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/internal/redact"
	"github.com/demarc/demarc/internal/version"
	"github.com/demarc/demarc/policy/image"
)

type bugreportOptions struct {
	out         string
	flows       int
	coreConfig  string
	agentConfig string
}

func newBugreportCommand(env *environment) *cobra.Command {
	var o bugreportOptions
	c := &cobra.Command{
		Use:   "bugreport [-o FILE]",
		Short: "Collect what is needed to find a fault, without secrets",
		Long: `Collect what is needed to find a fault into a tar.gz: status, configuration, versions,
what the kernel offers, links, metrics, the policy in force, the audit log's end.

No key, password or token gets in: files that hold them are not read, and what looks
like one is taken out of the others. Addresses and process names are in the flows,
which are left out unless --flows asks for them. What cannot be collected is listed
in problems.txt; a report without an agent is one, too.`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return bugreportRun(c.Context(), env, &o, time.Now()) },
	}
	flags := c.Flags()
	flags.StringVarP(&o.out, "output", "o", "", "write to `FILE`; - is standard output; default: demarc-bugreport-TIME.tar.gz")
	flags.IntVar(&o.flows, "flows", 0, "with the newest `N` flows")
	flags.StringVar(&o.coreConfig, "core-config", "/etc/demarc/core.json", "`FILE` of the core's configuration")
	flags.StringVar(&o.agentConfig, "agent-config", "/etc/demarc/agent.yaml", "`FILE` of the agent's configuration")
	return c
}

// report is a bug report in the making.
type report struct {
	files    []reportFile
	problems []string
}

type reportFile struct {
	name string
	text []byte
}

// longestPart bounds one file of a report, in bytes.
const longestPart = 8 << 20

// add takes in a file; secrets are taken out of it here and nowhere else, so that
// nothing gets by.
func (r *report) add(name string, text []byte) {
	if len(text) > longestPart {
		text = append(text[:longestPart:longestPart], "\n[cut]\n"...)
	}
	r.files = append(r.files, reportFile{name, redact.Text(text)})
}

// json takes in a value, unless there was an error.
func (r *report) json(name string, v any, err error) {
	if err == nil {
		var b []byte
		if b, err = json.MarshalIndent(v, "", "  "); err == nil {
			r.add(name, append(b, '\n'))
		}
	}
	if err != nil {
		r.failed(name, err)
	}
}

func (r *report) failed(name string, err error) {
	r.problems = append(r.problems, fmt.Sprintf("%s: %v", name, err))
}

func bugreportRun(ctx context.Context, env *environment, o *bugreportOptions, now time.Time) error {
	if o.flows < 0 {
		return usagef("--flows counts from 0")
	}
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	r := &report{}
	r.json("version.json", version.Get(), nil)
	r.fromAgent(ctx, client, o.flows)
	r.configuration("core.json", o.coreConfig)
	r.configuration("agent.yaml", o.agentConfig)
	r.kernel()
	r.links()
	if len(r.problems) > 0 {
		r.add("problems.txt", []byte(strings.Join(r.problems, "\n")+"\n"))
	}
	packed, err := r.pack("demarc-bugreport-"+now.UTC().Format("20060102T150405Z"), now)
	if err != nil {
		return fmt.Errorf("pack report: %w", err)
	}
	if o.out == "-" {
		_, err := env.Stdout.Write(packed)
		return err
	}
	if o.out == "" {
		o.out = "demarc-bugreport-" + now.UTC().Format("20060102T150405Z") + ".tar.gz"
	}
	if err := replaceFile(o.out, packed, 0o600); err != nil {
		return err
	}
	_, err = fmt.Fprintf(env.Stdout, "wrote %s: %s, %s not collected; look through it before you send it\n", o.out, plural(len(r.files), "file"), plural(len(r.problems), "other"))
	return err
}

// agentPatience bounds what is asked of the agent: one that hangs is a reason for a
// report.
const agentPatience = 20 * time.Second

func (r *report) fromAgent(ctx context.Context, client *api.Client, flows int) {
	ctx, cancel := context.WithTimeout(ctx, agentPatience)
	defer cancel()
	status, err := client.Status(ctx)
	r.json("status.json", status, err)
	if errors.Is(err, api.ErrNotRunning) || errors.Is(err, api.ErrPermission) {
		return // so would be all the others
	}
	identities, err := client.Identities(ctx)
	r.json("identities.json", identities, err)
	zones, err := client.Zones(ctx)
	r.json("zones.json", zones, err)
	metrics, err := client.Metrics(ctx)
	if err != nil {
		r.failed("metrics.txt", err)
	} else {
		r.add("metrics.txt", metrics)
	}
	encoded, err := client.Image(ctx)
	var img *image.Image
	if err == nil {
		img, err = image.Decode(encoded)
	}
	r.json("policy.json", img, err)
	r.audit(ctx, client)
	if flows > 0 {
		r.flows(ctx, client, flows)
	}
}

// auditKept is how much of the audit log's end is of interest.
const auditKept = 200

func (r *report) audit(ctx context.Context, client *api.Client) {
	log, _, err := client.Audit(ctx)
	if err != nil {
		r.failed("audit.jsonl", err)
		return
	}
	defer log.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(log); err != nil {
		r.failed("audit.jsonl", err)
		return
	}
	lines := bytes.SplitAfter(b.Bytes(), []byte("\n"))
	r.add("audit.jsonl", bytes.Join(lines[max(0, len(lines)-1-auditKept):], nil))
}

func (r *report) flows(ctx context.Context, client *api.Client, n int) {
	var b bytes.Buffer
	out := json.NewEncoder(&b)
	for line, err := range client.Flows(ctx, url.Values{"last": {strconv.Itoa(n)}}) {
		if err != nil {
			r.failed("flows.jsonl", err)
			return
		}
		if err := out.Encode(line); err != nil {
			r.failed("flows.jsonl", err)
			return
		}
	}
	r.add("flows.jsonl", b.Bytes())
}

// configuration takes in a configuration without what it keeps to itself.
func (r *report) configuration(name, file string) {
	b, err := os.ReadFile(file)
	if err != nil {
		r.failed(name, err)
		return
	}
	r.add(name, redact.Config(b))
}

// kernelFiles say what the kernel offers, and what guards it.
var kernelFiles = []string{
	"/proc/version", "/proc/self/cgroup", "/proc/meminfo",
	"/sys/kernel/security/lsm", "/sys/kernel/security/lockdown", "/sys/fs/cgroup/cgroup.controllers",
	"/proc/sys/kernel/unprivileged_bpf_disabled", "/proc/sys/net/core/bpf_jit_enable", "/proc/sys/net/core/bpf_jit_harden",
	"/proc/sys/net/ipv4/tcp_syncookies", "/proc/sys/net/ipv4/tcp_timestamps", "/proc/sys/net/ipv4/tcp_fastopen",
	"/etc/os-release",
}

func (r *report) kernel() {
	var b strings.Builder
	for _, file := range kernelFiles {
		text, err := os.ReadFile(file)
		if err != nil {
			text = []byte(err.Error())
		}
		fmt.Fprintf(&b, "== %s\n%s\n", file, strings.TrimSpace(string(text)))
	}
	if text, err := os.ReadFile("/proc/cmdline"); err == nil {
		fmt.Fprintf(&b, "== /proc/cmdline, as far as it matters\n%s\n", bootWords(string(text)))
	}
	var uname unix.Utsname
	if err := unix.Uname(&uname); err == nil {
		fmt.Fprintf(&b, "== uname\n%s %s\n", unix.ByteSliceToString(uname.Release[:]), unix.ByteSliceToString(uname.Machine[:]))
	}
	for _, place := range []string{"/sys/kernel/btf/vmlinux", "/sys/fs/bpf"} {
		if info, err := os.Stat(place); err != nil {
			fmt.Fprintf(&b, "== %s\n%v\n", place, err)
		} else {
			fmt.Fprintf(&b, "== %s\n%s, %d bytes\n", place, info.Mode(), info.Size())
		}
	}
	r.add("kernel.txt", []byte(b.String()))

	// Mounts of the kinds that matter: others may name what is nobody's business.
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		r.failed("mounts.txt", err)
		return
	}
	b.Reset()
	for line := range strings.Lines(string(mounts)) {
		_, kind, _ := strings.Cut(line, " - ")
		if strings.HasPrefix(kind, "cgroup") || strings.HasPrefix(kind, "bpf ") || strings.HasPrefix(kind, "securityfs ") || strings.HasPrefix(kind, "tracefs ") {
			b.WriteString(line)
		}
	}
	r.add("mounts.txt", []byte(b.String()))
	r.pins()
}

// bootParameters are those of the kernel that matter here. Others may hold what is
// nobody's business, such as credentials for the service manager.
var bootParameters = []string{"lsm", "lockdown", "security", "apparmor", "selinux", "cgroup_no_v1", "cgroup_enable", "cgroup_disable",
	"systemd.unified_cgroup_hierarchy", "systemd.legacy_systemd_cgroup_controller", "mitigations", "module.sig_enforce"}

func bootWords(line string) string {
	var kept []string
	for _, word := range strings.Fields(line) {
		name, _, _ := strings.Cut(word, "=")
		if slices.Contains(bootParameters, name) {
			kept = append(kept, word)
		}
	}
	return strings.Join(kept, " ")
}

// pins lists what is pinned below the usual places.
func (r *report) pins() {
	var b strings.Builder
	err := filepath.WalkDir("/sys/fs/bpf", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %s\n", d.Type(), path)
		if b.Len() > longestPart {
			return fs.SkipAll
		}
		return nil
	})
	if err != nil {
		r.failed("pins.txt", err)
	}
	if b.Len() > 0 {
		r.add("pins.txt", []byte(b.String()))
	}
}

// links lists network devices by name and kind, without addresses.
func (r *report) links() {
	all, err := netlink.LinkList()
	if err != nil {
		r.failed("devices.txt", err)
		return
	}
	var b strings.Builder
	for _, l := range all {
		a := l.Attrs()
		fmt.Fprintf(&b, "%d %s %s mtu %d %s\n", a.Index, a.Name, l.Type(), a.MTU, a.OperState)
	}
	r.add("devices.txt", []byte(b.String()))
}

// pack is the report as a tar.gz, below one directory.
func (r *report) pack(dir string, now time.Time) ([]byte, error) {
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	t := tar.NewWriter(z)
	for _, f := range r.files {
		if err := t.WriteHeader(&tar.Header{Name: dir + "/" + f.name, Mode: 0o600, Size: int64(len(f.text)), ModTime: now}); err != nil {
			return nil, err
		}
		if _, err := t.Write(f.text); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(t.Close(), z.Close()); err != nil {
		return nil, err
	}
	return packed.Bytes(), nil
}
