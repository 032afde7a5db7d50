package detect

// Technique is an entry of MITRE ATT&CK (Enterprise, version 16), with the tactic
// under which it is reported here.
type Technique struct {
	ID     string `json:"id" yaml:"id"`
	Name   string `json:"name" yaml:"name"`
	Tactic string `json:"tactic" yaml:"tactic"` // id and name, "TA0007 Discovery"
}

const (
	discovery       = "TA0007 Discovery"
	lateralMovement = "TA0008 Lateral Movement"
	credentials     = "TA0006 Credential Access"
	control         = "TA0011 Command and Control"
	evasion         = "TA0005 Defense Evasion"
	escalation      = "TA0004 Privilege Escalation"
	execution       = "TA0002 Execution"
)

// The techniques that detectors name.
var (
	serviceDiscovery = Technique{"T1046", "Network Service Discovery", discovery}
	systemDiscovery  = Technique{"T1018", "Remote System Discovery", discovery}
	remoteServices   = Technique{"T1021", "Remote Services", lateralMovement}
	remoteDesktop    = Technique{"T1021.001", "Remote Services: Remote Desktop Protocol", lateralMovement}
	adminShares      = Technique{"T1021.002", "Remote Services: SMB/Windows Admin Shares", lateralMovement}
	sshService       = Technique{"T1021.004", "Remote Services: SSH", lateralMovement}
	remoteManagement = Technique{"T1021.006", "Remote Services: Windows Remote Management", lateralMovement}
	exploitation     = Technique{"T1210", "Exploitation of Remote Services", lateralMovement}
	toolTransfer     = Technique{"T1570", "Lateral Tool Transfer", lateralMovement}
	internalProxy    = Technique{"T1090.001", "Proxy: Internal Proxy", control}
	nonApplication   = Technique{"T1095", "Non-Application Layer Protocol", control}
	dnsTunnel        = Technique{"T1071.004", "Application Layer Protocol: DNS", control}
	nonStandardPort  = Technique{"T1571", "Non-Standard Port", control}
	protocolTunnel   = Technique{"T1572", "Protocol Tunneling", control}
	sniffing         = Technique{"T1040", "Network Sniffing", credentials}
	bruteForce       = Technique{"T1110", "Brute Force", credentials}
	metadataAPI      = Technique{"T1552.005", "Unsecured Credentials: Cloud Instance Metadata API", credentials}
	masquerading     = Technique{"T1036", "Masquerading", evasion}
	impairDefenses   = Technique{"T1562.006", "Impair Defenses: Indicator Blocking", evasion}
	trafficSignaling = Technique{"T1205", "Traffic Signaling", evasion}
	escape           = Technique{"T1611", "Escape to Host", escalation}
	unixShell        = Technique{"T1059.004", "Command and Scripting Interpreter: Unix Shell", execution}
	interprocess     = Technique{"T1559", "Inter-Process Communication", execution}
)

// Techniques lists every technique that a finding can name, by id.
var Techniques = []Technique{
	systemDiscovery, remoteServices, remoteDesktop, adminShares, sshService, remoteManagement, masquerading, sniffing,
	serviceDiscovery, unixShell, dnsTunnel, internalProxy, nonApplication, bruteForce, trafficSignaling, exploitation,
	metadataAPI, interprocess, impairDefenses, toolTransfer, nonStandardPort, protocolTunnel, escape,
}
