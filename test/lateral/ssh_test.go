package lateral_test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

// keys are those of every sshd of a test, and of those who may log in there.
type keys struct{ dir string }

func newKeys(t *testing.T, dir string) *keys {
	t.Helper()
	k := &keys{filepath.Join(dir, "ssh")}
	if err := os.Mkdir(k.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"host", "user", "stranger"} {
		if out, err := exec.Command(lookPath(t, "ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(k.dir, name)).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v\n%s", err, out)
		}
	}
	return k
}

func (k *keys) file(name string) string { return filepath.Join(k.dir, name) }

// sshd starts an OpenSSH server in a cgroup, and waits until it answers.
func (k *keys) sshd(t *testing.T, ns *netlab.Namespace, c *netlab.Cgroup, at netip.AddrPort) *netlab.Process {
	t.Helper()
	p := k.start(t, ns, c, at)
	await(t, "sshd listens on "+at.String(), func() bool {
		answers := false
		_ = ns.Do(func() error {
			c, err := net.DialTimeout("tcp", at.String(), time.Second)
			if err == nil {
				c.Close()
				answers = true
			}
			return nil
		})
		select {
		case <-p.Ended():
			t.Fatalf("sshd ended:\n%s", p.Output())
		default:
		}
		return answers
	})
	return p
}

// start starts the server. It wants a directory below /run, which is its own here.
func (k *keys) start(t *testing.T, ns *netlab.Namespace, c *netlab.Cgroup, at netip.AddrPort) *netlab.Process {
	t.Helper()
	config := k.file(fmt.Sprintf("sshd-%s-%s", ns.Name, at))
	text := fmt.Sprintf(`ListenAddress %s
HostKey %s
AuthorizedKeysFile %s
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowTcpForwarding yes
GatewayPorts clientspecified
MaxStartups 100
MaxAuthTries 10
UseDNS no
PrintMotd no
`, at, k.file("host"), k.file("user.pub"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	script := `mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec "$@"`
	return ns.Start(c, netlab.Command{Path: lookPath(t, "unshare"), Args: []string{"--mount", "sh", "-c", script, "sh", lookPath(t, "sshd"), "-D", "-e", "-f", config}})
}

// ssh is the client's arguments: as whom, where, and what to do there.
func (k *keys) ssh(key string, at netip.AddrPort, more ...string) []string {
	return append([]string{
		"-F", "none", "-i", k.file(key), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no",
		"-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=10", "-p", fmt.Sprint(at.Port()),
		"-l", "root", at.Addr().String(),
	}, more...)
}

// await waits for what takes a moment.
func await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 30 s", what)
		}
	}
}
