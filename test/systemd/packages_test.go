//go:build packages

package systemd_test

import (
	"bytes"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/netlab"
)

// Packages are made by `make test-packages`: version 0.1.0, 0.2.0, and 0.2.0 again.
const (
	oldDeb, newDeb, armDeb = "old/demarc_0.1.0-1_amd64.deb", "new/demarc_0.2.0-1_amd64.deb", "new/demarc_0.2.0-1_arm64.deb"
	oldRPM, newRPM, armRPM = "old/demarc-0.1.0-1.x86_64.rpm", "new/demarc-0.2.0-1.x86_64.rpm", "new/demarc-0.2.0-1.aarch64.rpm"
)

func packageFile(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("DEMARC_PACKAGES")
	if dir == "" {
		t.Fatal("DEMARC_PACKAGES names no directory: run `make test-packages`")
	}
	return filepath.Join(dir, name)
}

func command(t *testing.T, program string, args ...string) string {
	t.Helper()
	c := exec.Command(program, args...)
	c.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "TMPDIR="+t.TempDir()) // lintian leaves files
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", program, args, err, out)
	}
	return string(out)
}

// The same commit makes the same bytes.
func TestPackagesAreReproducible(t *testing.T) {
	for _, name := range []string{newDeb, newRPM} {
		first, err := os.ReadFile(packageFile(t, name))
		if err != nil {
			t.Fatal(err)
		}
		second, err := os.ReadFile(packageFile(t, strings.Replace(name, "new/", "again/", 1)))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(first, second) {
			t.Errorf("%s: two builds differ", name)
		}
	}
}

// Debian's own judge has nothing to say.
func TestPackagesAreClean(t *testing.T) {
	for _, name := range []string{newDeb, armDeb} {
		if out := command(t, "lintian", "--allow-root", "--display-info", "--tag-display-limit", "0", packageFile(t, name)); out != "" {
			t.Errorf("%s:\n%s", name, out)
		}
	}
}

// listed compares a program's list of what is in it with the modules that the compiler
// says are.
func listed(t *testing.T, program, list string) {
	t.Helper()
	text, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	var bom struct {
		Format   string `json:"bomFormat"`
		Metadata struct {
			Timestamp string
			Component struct{ Name, Version string }
		}
		Components []struct{ Name, Version, Purl string }
	}
	if err := json.Unmarshal(text, &bom); err != nil {
		t.Fatalf("%s: %v", list, err)
	}
	if bom.Format != "CycloneDX" || bom.Metadata.Component.Name != "github.com/demarc/demarc" || bom.Metadata.Component.Version == "" || bom.Metadata.Timestamp != "" {
		t.Errorf("%s is of %+v, format %s", list, bom.Metadata, bom.Format)
	}
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"std " + info.GoVersion}
	for _, m := range info.Deps {
		want = append(want, m.Path+" "+m.Version)
	}
	var got []string
	for _, c := range bom.Components {
		got = append(got, c.Name+" "+c.Version)
		if !strings.HasPrefix(c.Purl, "pkg:golang/"+c.Name+"@") {
			t.Errorf("%s: %s is %s", list, c.Name, c.Purl)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-in the program +listed):\n%s", list, diff)
	}
}

// Both kinds of package, of both architectures, hold the same files; what the
// administrator changes is marked so; programs are of their architecture.
func TestPackageContents(t *testing.T) {
	var lists [][]string
	for _, name := range []string{newDeb, armDeb, newRPM, armRPM} {
		dir := t.TempDir()
		var list []string
		if strings.HasSuffix(name, ".deb") {
			command(t, "dpkg-deb", "-x", packageFile(t, name), dir)
			command(t, "dpkg-deb", "-e", packageFile(t, name), filepath.Join(dir, "DEBIAN"))
			conffiles, err := os.ReadFile(filepath.Join(dir, "DEBIAN/conffiles"))
			if err != nil || string(conffiles) != "/etc/demarc/agent.yaml\n/etc/demarc/core.json\n" && string(conffiles) != "/etc/demarc/core.json\n/etc/demarc/agent.yaml\n" {
				t.Errorf("%s: conffiles %q, %v", name, conffiles, err)
			}
			for _, script := range []string{"postinst", "prerm", "postrm"} {
				command(t, "sh", "-n", filepath.Join(dir, "DEBIAN", script))
			}
			if err := os.RemoveAll(filepath.Join(dir, "DEBIAN")); err != nil {
				t.Fatal(err)
			}
		} else {
			// Its names are absolute: without the option it would be unpacked over this machine.
			command(t, "sh", "-c", `rpm2cpio "$2" | cpio --extract --make-directories --no-absolute-filenames --quiet --directory "$1" 2>/dev/null`,
				"sh", dir, packageFile(t, name))
			if out := command(t, "rpm", "-qpc", packageFile(t, name)); out != "/etc/demarc/agent.yaml\n/etc/demarc/core.json\n" {
				t.Errorf("%s: configuration %q", name, out)
			}
			if out := command(t, "rpm", "-qp", "--scripts", packageFile(t, name)); !strings.Contains(out, "end-enforcement") {
				t.Errorf("%s: scripts\n%s", name, out)
			}
		}
		if err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() && !strings.Contains(path, "/usr/share/lintian/") {
				list = append(list, strings.TrimPrefix(path, dir))
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		slices.Sort(list)
		lists = append(lists, list)
		for _, program := range []string{"demarc", "demarc-agent", "demarc-core"} {
			f, err := elf.Open(filepath.Join(dir, "usr/bin", program))
			if err != nil {
				t.Fatal(err)
			}
			want := elf.EM_X86_64
			if name == armDeb || name == armRPM {
				want = elf.EM_AARCH64
			}
			if f.Machine != want || f.Section(".interp") != nil {
				t.Errorf("%s: %s is for %v, or not static", name, program, f.Machine)
			}
			f.Close()
			listed(t, filepath.Join(dir, "usr/bin", program), filepath.Join(dir, "usr/share/demarc/sbom", program+".cdx.json"))
		}
	}
	for i := 1; i < len(lists); i++ {
		if diff := cmp.Diff(lists[0], lists[i]); diff != "" {
			t.Errorf("files differ (-deb +another):\n%s", diff)
		}
	}
	for _, want := range []string{"/usr/bin/demarc", "/usr/lib/systemd/system/demarc-core.service", "/usr/share/man/man8/demarc-core.8.gz",
		"/usr/share/man/man1/demarc.1.gz", "/usr/share/bash-completion/completions/demarc", "/usr/lib/sysusers.d/demarc.conf",
		"/usr/lib/tmpfiles.d/demarc.conf", "/usr/lib/systemd/system-preset/80-demarc.preset"} {
		if !slices.Contains(lists[0], want) {
			t.Errorf("there is no %s", want)
		}
	}
}

// packaging is what differs between dpkg and rpm.
type packaging struct {
	old, new             string // files
	install, remove      string // shell
	purge                string // "" = there is no such thing
	kept                 string // what remains of a changed configuration
	startsAtInstallation bool
}

// TestI17PackageLife installs a package, enforces, upgrades, and removes it, while a
// worker talks: an upgrade opens and breaks nothing, and a removal wants to be told
// that enforcement is to end.
func TestI17PackageLife(t *testing.T) {
	for name, p := range map[string]packaging{
		"deb": {
			old: oldDeb, new: newDeb, install: "apt-get install -y --allow-downgrades -o Dpkg::Options::=--force-confold ./", remove: "apt-get remove -y demarc",
			purge: "apt-get purge -y demarc", kept: "/etc/demarc/core.json", startsAtInstallation: true,
		},
		"rpm": {
			old: oldRPM, new: newRPM, install: "rpm --upgrade --nodeps --oldpackage ", remove: "rpm --erase demarc", kept: "/etc/demarc/core.json.rpmsave",
		},
	} {
		t.Run(name, func(t *testing.T) { packageLife(t, p) })
	}
}

func packageLife(t *testing.T, p packaging) {
	lab := netlab.New(t)
	h := &host{t: t, lab: lab, Machine: lab.Machine("host"), peer: lab.Namespace("peer")}
	for _, port := range ports {
		h.peer.Echo(port)
	}
	for _, file := range []string{p.old, p.new} {
		b, err := os.ReadFile(packageFile(t, file))
		if err != nil {
			t.Fatal(err)
		}
		h.Write("/root/"+filepath.Base(file), string(b), 0o644)
	}
	h.configure() // the administrator was there before the package
	core := h.written("/etc/demarc/core.json")
	h.Boot()
	install := func(file string) {
		t.Helper()
		h.Run("sh", "-c", "cd /root && "+p.install+filepath.Base(file))
	}
	version := func(want string) {
		t.Helper()
		if out := h.Run("demarc", "version"); !strings.Contains(out, want) {
			t.Errorf("version %s, want %s", out, want)
		}
		h.awaitState("enforcing")
		out := h.Run("demarc", "status")
		if !regexp.MustCompile(`Node: +host, agent ` + regexp.QuoteMeta(want) + `\b`).MatchString(out) {
			t.Errorf("the agent that runs is not %s:\n%s", want, out)
		}
		running := h.Run("sh", "-c", `readlink /proc/$(systemctl show -P MainPID demarc-core)/exe`)
		if strings.TrimSpace(running) != "/usr/bin/demarc-core" { // "(deleted)" is the one before
			t.Errorf("the core that runs is %s", running)
		}
		if got := h.Run("cat", "/etc/demarc/core.json"); got != core {
			t.Errorf("core.json is now %s, was %s", got, core)
		}
	}

	install(p.old)
	if out := h.Run("systemctl", "is-enabled", "demarc-core", "demarc-agent"); out != "enabled\nenabled\n" {
		t.Errorf("after the installation: %s", out)
	}
	if !p.startsAtInstallation {
		h.Run("systemctl", "start", "demarc-core", "demarc-agent")
	}
	h.awaitState("idle")
	h.apply(fmt.Sprintf(workerPolicy, h.peer.IP4))
	version("0.1.0")
	wire := h.Wire()
	goesOn := h.talker()
	goesOn("at first")

	install(p.new)
	goesOn("after the upgrade")
	version("0.2.0")
	install(p.old)
	goesOn("after the way back")
	version("0.1.0")
	install(p.new)
	goesOn("after another upgrade")
	version("0.2.0")

	out, status := h.Try("sh", "-c", p.remove)
	if status == 0 || !strings.Contains(out, "hint: to end enforcement with the removal, touch /run/demarc/end-enforcement first") {
		t.Errorf("removal while it enforces: %d\n%s", status, out)
	}
	goesOn("after a removal that was refused")
	version("0.2.0")
	if got := reached(wire, h.peer); len(got) != 1 || got[0] != 7001 {
		t.Errorf("ports on the wire: %v, want [7001]", got)
	}

	h.Run("systemctl", "stop", "worker")
	h.Run("touch", "/run/demarc/end-enforcement")
	h.Run("sh", "-c", p.remove)
	if out := h.Run("sh", "-c", "ls -d /sys/fs/bpf/demarc /usr/bin/demarc* 2>/dev/null || true; pidof demarc-core demarc-agent || true"); out != "" {
		t.Errorf("after the removal there are still: %s", out)
	}
	if got := h.Run("cat", p.kept); got != core {
		t.Errorf("%s: %s", p.kept, got)
	}
	h.Run("systemctl", "start", "worker") // which sees that it may reach what it may not
	h.Await("is open", func() error {
		if wire.Count(netlab.To(unix.IPPROTO_TCP, h.peer.IP4, 7002)) == 0 {
			return fmt.Errorf("worker: %s", h.Property("worker.service", "ExecMainStatus"))
		}
		return nil
	})
	if p.purge != "" {
		h.Run("sh", "-c", p.purge)
		if out := h.Run("sh", "-c", "ls -d /etc/demarc /var/lib/demarc /run/demarc* /etc/systemd/system/*.wants/demarc* 2>/dev/null || true"); out != "" {
			t.Errorf("after the purge there are still: %s", out)
		}
	}
}
