package agent

import (
	"slices"
	"strings"
)

// observed says what each of the core's programs that only observe is for, where it
// cannot be had.
var observed = map[string]string{
	"sock_state": "contacts, failures, chains, listeners and transfers of TCP",
	"forked":     "which process goes back to which connection, over fork",
	"executed":   "programs with a connection as standard input, and changes of network namespace at exec",
	"moved":      "moves between cgroups",
	"switched":   "changes of network namespace when they are made; they are seen at exec, at the next connection and every 5 s",
	"opened":     "tun devices that are opened; they are seen every 5 s",
	"payload":    "SSH banners, DNS names and ICMP payloads",
	"surveyed":   "relays that last, and transfers that go on",
}

// neverSeen are signals that this version has no source for.
var neverSeen = []string{
	"packet sockets are seen by their frames, not when they are made",
	"a chain is counted over the connections of this kernel only",
}

// blindness puts into words what cannot be seen here: the core names the program, and why
// it cannot be had.
func blindness(core []string) []string {
	all := slices.Clone(neverSeen)
	for _, what := range core {
		if program, why, _ := strings.Cut(what, ": "); observed[program] != "" {
			// A guess of the library's, which is wrong: the core lifts that limit.
			why, _, _ = strings.Cut(why, " (MEMLOCK may be too low")
			what = observed[program] + ": " + why
		}
		all = append(all, what)
	}
	return all
}
