package detect

import (
	"path"
	"slices"
	"strings"
)

// shells are programs that take commands from their standard input.
var shells = []string{
	"sh", "bash", "dash", "zsh", "ksh", "mksh", "ash", "fish", "csh", "tcsh", "busybox", "rbash",
	"python", "perl", "ruby", "php", "lua", "node", "irb", "expect", "tclsh", "awk", "gawk", "mawk",
}

// isShell knows versions in names, too: python3.11, lua5.4.
func isShell(name string) bool {
	return slices.Contains(shells, name) || slices.Contains(shells, strings.TrimRight(name, "0123456789."))
}

// shell finds a program whose standard input is a connection. Of a shell that is
// somebody typing. Others may be started so by inetd or socket activation, and sshd
// starts itself so for each connection: where a crossing leads to that port, that is
// what was declared, and no finding.
func shell(g *Engine, m *moment) []Finding {
	if m.kind() != Shell {
		return nil
	}
	s := m.event.Signal
	name := path.Base(s.Exe)
	if s.Exe == "" {
		name = s.Comm
	}
	if !isShell(name) && !isShell(s.Comm) {
		if g.policy.serves(m.actor.Workload, m.actor.Zone, s.Local.Port) {
			return nil
		}
		f := m.finding("shell", unixShell, Low, 30, name, "runs %s with a connection for its standard input", name)
		f.Advice = "inetd and socket activation do so. If neither started it, look at the other end of the connection."
		return []Finding{f}
	}
	f := m.finding("shell", unixShell, Critical, 95, "", "runs %s on a connection with %s", name, where(m))
	f.Certain = true
	f.Advice = "Somebody gives commands from there. Quarantine the workload, and keep the process for who looks into it."
	return []Finding{f}
}

// where is the peer in words.
func where(m *moment) string {
	if place := m.peer.Place(); place != "" {
		return place
	}
	return m.peer.Label()
}
