package detect

// explains says which roles explain what a detector finds. A role is declared in
// the policy, which is signed, and may end by itself.
var explains = map[string][]string{
	"port-scan":    {"scanner"},
	"host-sweep":   {"scanner", "monitor", "management"},
	"slow-scan":    {"scanner", "monitor"},
	"upward-probe": {"scanner"},
	"decoy":        {"scanner"},
	"fan-out":      {"bastion", "management", "scanner"},
	"brute-force":  {"bastion", "management", "scanner"},
	"chain":        {"bastion"},
	"relay":        {"proxy", "bastion"},
	"raw-socket":   {"scanner", "monitor", "management"},
	"icmp-tunnel":  {"monitor"},
	"transfer":     {"bastion", "management"},
	"cgroup-move":  {"management"},
	"namespace":    {"management"},
	"banner":       {"bastion"},
	"new-edge":     {"scanner", "monitor", "bastion", "management"},
}

// suppresses returns the role of a finding's workload that explains it, or "".
func (p *Policy) suppresses(f *Finding) string {
	if f.Subject.Workload == "" {
		return ""
	}
	return p.role(f.Subject.Workload, f.LastSeen, explains[f.Detector])
}
