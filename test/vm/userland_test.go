//go:build kernels

package vm_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// userland are the packages of this machine's distribution that a virtual machine
// starts with, and what they depend on is added.
var userland = []string{"systemd", "bash", "coreutils", "util-linux", "mount", "iproute2", "base-passwd", "tar"}

// unused is what nobody reads in a machine that lives for a minute.
var unused = regexp.MustCompile(`^/usr/share/(doc|man|locale|info|lintian|bug|perl5|zoneinfo|bash-completion|zsh)|/gconv/|/usr/lib/udev/hwdb`)

// addUserland puts this machine's packages there, as they are installed here.
func addUserland(t *testing.T, a *archive) {
	t.Helper()
	ask := func(args ...string) string {
		out, err := exec.Command("dpkg-query", args...).Output()
		check(t, err, "dpkg-query "+strings.Join(args, " "))
		return string(out)
	}
	depends := map[string]string{}
	for line := range strings.Lines(ask("-W", "-f", "${db:Status-Status}\t${Package}\t${Pre-Depends}, ${Depends}\n")) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), "\t", 3)
		if f[0] == "installed" {
			depends[f[1]] = f[2]
		}
	}
	name := regexp.MustCompile(`^[a-z0-9][a-z0-9.+-]+`)
	packages := slices.Clone(userland)
	for i := 0; i < len(packages); i++ {
		for _, d := range strings.Split(depends[packages[i]], ",") {
			// The first alternative that is installed; what is only provided is somebody else's.
			for _, alternative := range strings.Split(d, "|") {
				p := name.FindString(strings.TrimSpace(alternative))
				if _, installed := depends[p]; installed {
					if !slices.Contains(packages, p) {
						packages = append(packages, p)
					}
					break
				}
			}
		}
	}
	for _, p := range userland {
		if _, installed := depends[p]; !installed {
			t.Fatalf("package %s is not installed: run scripts/install kernels", p)
		}
	}
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} { // merged, as on this machine
		if to, err := os.Readlink("/" + dir); err == nil {
			a.link("/"+dir, to)
		}
	}
	for _, dir := range []string{"/proc", "/sys", "/dev", "/run", "/root", "/var/lib", "/etc"} {
		a.directory(dir, 0o755)
	}
	a.directory("/tmp", 0o1777)
	for file := range strings.Lines(ask(append([]string{"-L"}, packages...)...)) {
		file = strings.TrimSuffix(file, "\n")
		if file == "" || file[0] != '/' || unused.MatchString(file) {
			continue
		}
		addFile(t, a, file)
	}
	for _, name := range []string{"passwd", "group"} {
		content, err := os.ReadFile("/usr/share/base-passwd/" + name + ".master")
		check(t, err, "read users")
		a.add("/etc/"+name, 0o644, content)
	}
	a.add("/etc/fstab", 0o644, nil)
}

// addFile puts a file of this machine's where it is here, without the links on the way.
func addFile(t *testing.T, a *archive, file string) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(filepath.Dir(file))
	if err != nil {
		return // some of a package's are not kept
	}
	at := filepath.Join(dir, filepath.Base(file))
	info, err := os.Lstat(at)
	if err != nil {
		return
	}
	addAs(t, a, at, at, info)
}

func addAs(t *testing.T, a *archive, name, from string, info fs.FileInfo) {
	t.Helper()
	switch mode := info.Mode(); {
	case mode.IsDir():
		a.directory(name, uint32(mode.Perm()))
	case mode&fs.ModeSymlink != 0:
		to, err := os.Readlink(from)
		check(t, err, "read link")
		a.link(name, to)
	case mode.IsRegular() && !a.made[name]:
		content, err := os.ReadFile(from)
		check(t, err, "read file")
		a.add(name, uint32(mode.Perm()), content)
		a.made[name] = true
	}
}

// addPackage takes a deb apart and puts in what it holds. Who enables its units is
// systemd, by the package's preset, when it starts for the first time.
func addPackage(t *testing.T, a *archive, deb string) {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command("dpkg-deb", "-x", deb, dir).CombinedOutput()
	check(t, err, "take package apart: "+string(out))
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, dir)
		if name == "" || unused.MatchString(name) {
			return nil
		}
		if resolved, err := filepath.EvalSymlinks(filepath.Dir(name)); err == nil {
			name = filepath.Join(resolved, filepath.Base(name))
		}
		info, err := d.Info()
		if err == nil {
			addAs(t, a, name, path, info)
		}
		return err
	}), "read package")
}
