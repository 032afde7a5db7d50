package netlab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/policy"
)

// agentUser is who the agent runs as: nobody.
const agentUser = 65534

// Node is one installation of demarc: a managed cgroup tree, the core, and the
// agent unless the node does without. It enforces a policy as soon as Lab.Node
// returns.
type Node struct {
	Core  *Process // nil while stopped
	Agent *Process // nil while stopped, and on a node that has none

	// CoreProgram is the binary of the core: that of this checkout, until a test
	// puts another one there to start next.
	CoreProgram string

	lab     *Lab
	home    *Namespace // where the daemons run: they need no network
	dir     string
	root    *Cgroup // of the managed tree
	options NodeOptions
	link    *coreLink // nil while the core is stopped
	book    book
}

// NodeOptions are what may differ from the usual node; the zero value is the usual
// one.
type NodeOptions struct {
	// CoreOnly does without agent: events are read from the core's rings, and
	// policies handed to the core, by the test itself. It starts faster.
	CoreOnly bool
	// Keyring is the file of the tag keys; "" = the lab's, so that all nodes trust
	// each other.
	Keyring string
	// Inventory is the content of the agent's inventory; "" = none.
	Inventory string
	// Journal has the agent keep flows in Node.JournalDir.
	Journal bool
	// Metrics is where the agent serves them, HOST:PORT in the node's own
	// namespace; "" = nowhere.
	Metrics string
	// AgentLines are more lines of the agent's configuration.
	AgentLines string
	// Home is the namespace of the host itself: its devices are the node's
	// boundary. nil = a namespace of the node's own with nothing but lo.
	Home *Namespace
}

// Node starts a node and applies the policy; "" = none, and nothing is enforced.
func (l *Lab) Node(policy string, o NodeOptions) *Node {
	l.t.Helper()
	l.nodes++
	n := &Node{lab: l, options: o, dir: filepath.Join(l.dir, fmt.Sprintf("node%d", l.nodes))}
	n.root = l.makeCgroup(filepath.Join(l.cgroup, fmt.Sprintf("node%d", l.nodes)))
	if n.home = o.Home; n.home == nil {
		n.home = l.Island(fmt.Sprintf("node%d", l.nodes))
	}
	for _, dir := range []string{"", "bpf", "core", "state", "agent", "trust"} {
		l.check(os.MkdirAll(filepath.Join(n.dir, dir), 0o755), "make directory")
	}
	l.check(os.Chmod(filepath.Join(n.dir, "state"), 0o700), "make directory")
	l.check(os.Chown(filepath.Join(n.dir, "agent"), agentUser, agentUser), "make directory")
	bpffs := filepath.Join(n.dir, "bpf")
	l.check(unix.Mount("bpf", bpffs, "bpf", 0, "mode=0700"), "mount bpffs")
	l.later(func() error { return unix.Unmount(bpffs, 0) })
	l.later(func() error {
		if n.link != nil {
			n.link.close()
		}
		return nil
	})
	n.configure()
	n.CoreProgram = l.binary("demarc-core")
	n.StartCore()
	if !o.CoreOnly {
		n.StartAgent()
	}
	if policy != "" {
		n.Apply(policy)
	}
	return n
}

// configure writes the configuration of both daemons.
func (n *Node) configure() {
	n.lab.t.Helper()
	keyring := n.options.Keyring
	if keyring == "" {
		keyring = n.lab.keyring
	}
	core, err := json.MarshalIndent(map[string]any{
		"cgroup_root": n.root.dir, "bpffs": filepath.Join(n.dir, "bpf", "demarc"), "run_dir": filepath.Join(n.dir, "core"),
		"state_dir": filepath.Join(n.dir, "state"), "trust_dir": filepath.Join(n.dir, "trust"), "keyring": keyring,
		"agent_user": agentUser, "log_level": "debug",
		"guard": false, // tests are who it keeps away; test/vm tries it
	}, "", "  ")
	n.lab.check(err, "write configuration")
	agent := fmt.Sprintf("node: %s\nserver: unix://%s\ncore: unix://%s\n", n.home.Name, n.agentSocket(), n.coreSocket())
	agent += n.options.AgentLines
	if n.options.Journal {
		agent += fmt.Sprintf("journal: {dir: %s, max_size: 64MiB}\n", n.JournalDir())
	}
	if n.options.Metrics != "" {
		agent += fmt.Sprintf("metrics: {listen: %q}\n", n.options.Metrics)
	}
	if n.options.Inventory != "" {
		agent += fmt.Sprintf("identity: {providers: [file], inventory: %s}\n", n.InventoryFile())
		n.lab.check(os.WriteFile(n.InventoryFile(), []byte(n.options.Inventory), 0o644), "write inventory")
	}
	n.lab.check(errors.Join(
		os.WriteFile(n.CoreConfig(), core, 0o644), os.WriteFile(n.AgentConfig(), []byte(agent), 0o644)), "write configuration")
}

func (n *Node) coreSocket() string  { return filepath.Join(n.dir, "core", "core.sock") }
func (n *Node) agentSocket() string { return filepath.Join(n.dir, "agent", "agent.sock") }

// Dir holds everything of the node: core.json, agent.yaml, bpf/demarc, state, ...
func (n *Node) Dir() string { return n.dir }

// CoreConfig, AgentConfig and InventoryFile are the daemons' files.
func (n *Node) CoreConfig() string    { return filepath.Join(n.dir, "core.json") }
func (n *Node) AgentConfig() string   { return filepath.Join(n.dir, "agent.yaml") }
func (n *Node) InventoryFile() string { return filepath.Join(n.dir, "inventory.yaml") }

// Home is the namespace that the daemons run in. It has only lo.
func (n *Node) Home() *Namespace { return n.home }

// Root is the managed root.
func (n *Node) Root() *Cgroup { return n.root }

// Cgroup makes a cgroup of the managed tree, with its parents: "/lab/web".
func (n *Node) Cgroup(path string) *Cgroup {
	n.lab.t.Helper()
	return n.root.Child(path)
}

// StartCore starts the core and waits until it answers. What was in force before
// is in force again then.
func (n *Node) StartCore() {
	n.lab.t.Helper()
	n.Core = n.home.Start(n.lab.Cgroup("daemons"), n.CoreCommand())
	n.await(n.Core, "core answers", func() (err error) {
		n.link, err = dialCore(n.coreSocket(), n.options.CoreOnly, &n.book)
		return err
	})
	if n.options.CoreOnly {
		if s := n.Status(); s.Active != nil {
			n.learn(s)
		}
	}
}

// CoreCommand is how the core is started.
func (n *Node) CoreCommand() Command {
	return Command{Path: n.CoreProgram, Args: []string{"run", "--config", n.CoreConfig()}}
}

// CoreSocket is where the core answers.
func (n *Node) CoreSocket() string { return n.coreSocket() }

// JournalDir is where flows are kept, with NodeOptions.Journal.
func (n *Node) JournalDir() string { return filepath.Join(n.dir, "agent", "journal") }

// AgentSocket is where the agent serves its API.
func (n *Node) AgentSocket() string { return n.agentSocket() }

// StartAgent starts the agent and waits until it is connected to the core.
func (n *Node) StartAgent() {
	n.lab.t.Helper()
	n.Agent = n.home.Start(n.lab.Cgroup("daemons"), Command{
		Path: n.lab.binary("demarc-agent"), Args: []string{"--config", n.AgentConfig()}, User: agentUser,
	})
	n.AwaitAgent()
}

// AwaitAgent waits until the agent is connected to the core.
func (n *Node) AwaitAgent() {
	n.lab.t.Helper()
	client, err := api.NewClient(n.agentSocket())
	n.lab.check(err, "connect to agent")
	defer client.Close()
	n.await(n.Agent, "agent is connected", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		s, err := client.Status(ctx)
		if err == nil && !s.Core.Connected {
			err = errors.New("not connected to the core: " + s.Core.Problem)
		}
		return err
	})
}

// await tries until it works, as long as the process lives: on a machine that has
// much else to do, a core needs its second of CPU time all the same.
func (n *Node) await(p *Process, what string, try func() error) {
	n.lab.t.Helper()
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
		select {
		case <-p.Ended():
			n.lab.t.Fatalf("wait until %s: %s ended: %v; it said:\n%s", what, p.Name, p.err, p.Output())
		default:
		}
	}
	n.lab.t.Fatalf("wait until %s: %v; %s said:\n%s", what, err, p.Name, p.Output())
}

// StopCore ends the core with SIGTERM, as a service manager does; KillCore does so
// with SIGKILL. Enforcement goes on either way.
func (n *Node) StopCore() {
	n.lab.t.Helper()
	n.stop(n.Core)
	n.coreGone()
}

// KillCore ends the core with SIGKILL.
func (n *Node) KillCore() {
	n.lab.t.Helper()
	n.Core.Kill()
	n.coreGone()
}

func (n *Node) coreGone() {
	n.link.close()
	n.Core, n.link = nil, nil
}

// StopAgent ends the agent with SIGTERM; KillAgent does so with SIGKILL.
func (n *Node) StopAgent() {
	n.lab.t.Helper()
	n.stop(n.Agent)
	n.Agent = nil
}

// KillAgent ends the agent with SIGKILL.
func (n *Node) KillAgent() {
	n.lab.t.Helper()
	n.Agent.Kill()
	n.Agent = nil
}

func (n *Node) stop(p *Process) {
	n.lab.t.Helper()
	p.Signal(syscall.SIGTERM)
	if status := p.Wait(30 * time.Second); status != 0 {
		n.lab.t.Fatalf("%s ended with %d; it said:\n%s", p.Name, status, p.Output())
	}
}

// RestartCore stops and starts the core.
func (n *Node) RestartCore() {
	n.lab.t.Helper()
	n.StopCore()
	n.StartCore()
}

// RestartAgent stops and starts the agent.
func (n *Node) RestartAgent() {
	n.lab.t.Helper()
	n.StopAgent()
	n.StartAgent()
}

// Detach ends enforcement and the core.
func (n *Node) Detach() {
	n.lab.t.Helper()
	n.StopCore()
	if out, status := n.Run("demarc-core", "detach", "--config", n.CoreConfig(), "--yes"); status != 0 {
		n.lab.t.Fatalf("detach: %d: %s", status, out)
	}
}

// Run runs one of demarc's programs to its end, in the node's namespace, and
// returns what it said and its exit status.
func (n *Node) Run(program string, args ...string) (output string, status int) {
	n.lab.t.Helper()
	p := n.Start(program, args...)
	status = p.Wait(time.Minute)
	return p.Output(), status
}

// Start starts one of demarc's programs in the node's namespace.
func (n *Node) Start(program string, args ...string) *Process {
	n.lab.t.Helper()
	return n.home.Start(n.lab.Cgroup("daemons"), Command{
		Path: n.lab.binary(program), Args: args, Env: []string{"DEMARC_SERVER=unix://" + n.agentSocket()},
	})
}

// Demarc runs the command line against this node's agent. Standard output and
// error are apart.
func (n *Node) Demarc(args ...string) (stdout, stderr string, status int) {
	n.lab.t.Helper()
	var out, problems output
	c := exec.Command(n.lab.binary("demarc"), args...)
	c.Env = append(os.Environ(), "DEMARC_SERVER=unix://"+n.agentSocket())
	c.Stdout, c.Stderr = &out, &problems
	var exit *exec.ExitError
	if err := c.Run(); err != nil && !errors.As(err, &exit) {
		n.lab.t.Fatalf("run demarc: %v", err)
	}
	return out.String(), problems.String(), c.ProcessState.ExitCode()
}

// DemarcPath and DemarcEnv are for processes that run the command line themselves.
func (n *Node) DemarcPath() string  { return n.lab.binary("demarc") }
func (n *Node) DemarcEnv() []string { return []string{"DEMARC_SERVER=unix://" + n.agentSocket()} }

// DemarcAsked runs the command line on a terminal, where somebody types the answer.
func (n *Node) DemarcAsked(answer string, args ...string) (screen string, status int) {
	n.lab.t.Helper()
	line := "exec '" + strings.Join(append([]string{n.lab.binary("demarc")}, args...), "' '") + "'"
	c := exec.Command("script", "--quiet", "--return", "--command", line, "/dev/null")
	c.Env = append(os.Environ(), "DEMARC_SERVER=unix://"+n.agentSocket())
	c.Stdin = strings.NewReader(answer + "\n")
	out, err := c.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		n.lab.t.Fatalf("run demarc on a terminal: %v", err)
	}
	return string(out), c.ProcessState.ExitCode()
}

// Apply puts a policy in force, which has to work, and waits until it is enforced.
func (n *Node) Apply(text string) {
	n.lab.t.Helper()
	if !n.options.CoreOnly {
		file := filepath.Join(n.dir, "policy.yaml")
		n.lab.check(os.WriteFile(file, []byte(text), 0o644), "write policy")
		for _, args := range [][]string{{"apply", file}, {"status", "--wait", "enforcing", "--timeout", "20s"}} {
			if out, problems, status := n.Demarc(args...); status != 0 {
				n.lab.t.Fatalf("demarc %v: %d\n%s%s", args, status, out, problems)
			}
		}
		return
	}
	s, err := n.link.apply(n.Image(text))
	n.lab.check(err, "apply policy")
	n.learn(s)
}

// Image builds a policy.
func (n *Node) Image(text string) []byte {
	n.lab.t.Helper()
	p, err := policy.Parse("policy.yaml", []byte(text))
	n.lab.check(err, "parse policy")
	b, err := policy.Build(p)
	n.lab.check(err, "build policy")
	return b
}

// Rollback goes back to the previous policy.
func (n *Node) Rollback() {
	n.lab.t.Helper()
	if !n.options.CoreOnly {
		if out, problems, status := n.Demarc("rollback"); status != 0 {
			n.lab.t.Fatalf("demarc rollback: %d\n%s%s", status, out, problems)
		}
		return
	}
	s, err := n.link.client.Rollback()
	n.lab.check(err, "roll back")
	n.learn(s)
}

// Status asks the core what is in force.
func (n *Node) Status() *proto.Status {
	n.lab.t.Helper()
	s, err := n.link.client.Status()
	n.lab.check(err, "ask for status")
	return s
}

// learn keeps the names of the image in force, for events to be read with.
func (n *Node) learn(s *proto.Status) {
	n.lab.t.Helper()
	if s.State != proto.StateEnforcing && s.State != proto.StateObserving {
		n.lab.t.Fatalf("state %s: %v", s.State, s.Problems)
	}
	n.lab.check(n.link.learn(s), "read image")
}
