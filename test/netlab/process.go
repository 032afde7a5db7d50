package netlab

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/probe"
)

// Process is a program that runs in a namespace and, from its first instruction,
// in a cgroup. It ends with the lab at the latest.
type Process struct {
	Name string

	lab    *Lab
	cmd    *exec.Cmd
	output output
	ended  chan struct{}
	err    error // of the wait, once ended
}

// output keeps what a program says.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// Command describes a program to be run; the zero value of each field is good.
type Command struct {
	Path  string
	Args  []string // behind the name
	Env   []string // beside that of the test
	User  uint32   // and group
	Dir   string
	Stdin io.Reader
}

// Start starts a program. Its output is in Output.
func (ns *Namespace) Start(c *Cgroup, command Command) *Process {
	ns.lab.t.Helper()
	p := &Process{}
	cmd := exec.Command(command.Path, command.Args...)
	cmd.Env, cmd.Dir, cmd.Stdin = append(os.Environ(), command.Env...), command.Dir, command.Stdin
	cmd.Stdout, cmd.Stderr = &p.output, &p.output
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if command.User != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: command.User, Gid: command.User}
	}
	ns.start(p, c, cmd)
	return p
}

func (ns *Namespace) start(p *Process, c *Cgroup, cmd *exec.Cmd) {
	ns.lab.t.Helper()
	p.lab, p.cmd, p.ended, p.Name = ns.lab, cmd, make(chan struct{}), cmd.Args[0]
	dir, err := os.Open(c.dir)
	ns.lab.check(err, "open cgroup")
	defer dir.Close()
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	ns.lab.check(ns.Do(cmd.Start), "start %s in %s", p.Name, ns.Name)
	go func() {
		p.err = cmd.Wait()
		close(p.ended)
	}()
	ns.lab.later(func() error {
		p.Kill()
		return nil
	})
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Output is what the program has said so far, on standard output and error.
func (p *Process) Output() string { return p.output.String() }

// Signal sends a signal.
func (p *Process) Signal(s os.Signal) {
	p.lab.t.Helper()
	p.lab.check(p.cmd.Process.Signal(s), "signal %s", p.Name)
}

// Kill ends the program at once and waits for its end.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// Ended is closed when the program has ended.
func (p *Process) Ended() <-chan struct{} { return p.ended }

// Wait waits for the program's end and returns its exit status, -1 if a signal
// ended it.
func (p *Process) Wait(timeout time.Duration) int {
	p.lab.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(timeout):
		p.lab.t.Fatalf("%s did not end within %s; it said:\n%s", p.Name, timeout, p.Output())
	}
	var exit *exec.ExitError
	if p.err != nil && !errors.As(p.err, &exit) {
		p.lab.t.Fatalf("wait for %s: %v", p.Name, p.err)
	}
	return p.cmd.ProcessState.ExitCode()
}

// Probe is a process that makes the socket calls a test asks for. Its methods
// that start with Must end the test where the kernel says no.
type Probe struct {
	*Process
	calls   *json.Encoder
	results *bufio.Reader
}

// Probe starts a probe in a namespace and a cgroup.
func (ns *Namespace) Probe(c *Cgroup) *Probe {
	ns.lab.t.Helper()
	p := &Probe{Process: &Process{}}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{probeName}
	cmd.Stderr = &p.output
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	in, err := cmd.StdinPipe()
	ns.lab.check(err, "make pipe")
	// A pipe of our own: Wait would close one of Cmd's while an answer is read.
	out, answers, err := os.Pipe()
	ns.lab.check(err, "make pipe")
	cmd.Stdout = answers
	p.calls, p.results = json.NewEncoder(in), bufio.NewReader(out)
	ns.start(p.Process, c, cmd)
	answers.Close()
	ns.lab.later(out.Close)
	return p
}

// Do makes a call and returns its result.
func (p *Probe) Do(c probe.Call) probe.Result {
	p.lab.t.Helper()
	p.Send(c)
	return p.Result()
}

// Send asks for a call without waiting for it; Result waits.
func (p *Probe) Send(c probe.Call) {
	p.lab.t.Helper()
	if err := p.calls.Encode(c); err != nil {
		p.lab.t.Fatalf("ask probe to %s: %v; it said:\n%s", c.Op, err, p.Output())
	}
}

// Result waits for the result of the oldest call that was sent.
func (p *Probe) Result() (r probe.Result) {
	p.lab.t.Helper()
	line, err := p.results.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	if err != nil {
		p.lab.t.Fatalf("read result of probe: %v; it said:\n%s", err, p.Output())
	}
	return r
}

// Must makes a call that has to succeed.
func (p *Probe) Must(c probe.Call) probe.Result {
	p.lab.t.Helper()
	r := p.Do(c)
	if r.Error != "" {
		p.lab.t.Fatalf("%s: %s", describeCall(c), r.Error)
	}
	return r
}

// Refused makes a call that has to fail with the error.
func (p *Probe) Refused(c probe.Call, want string) {
	p.lab.t.Helper()
	if r := p.Do(c); r.Error != want {
		p.lab.t.Errorf("%s: %q, want %q", describeCall(c), r.Error, want)
	}
}

// Echoed sends data on a connected socket and wants the same back.
func (p *Probe) Echoed(socket, data string) {
	p.lab.t.Helper()
	p.Must(probe.Call{Op: "send", Socket: socket, Data: []byte(data)})
	if r := p.Must(probe.Call{Op: "recv", Socket: socket}); string(r.Data) != data {
		p.lab.t.Errorf("sent %q on %s, got %q back", data, socket, r.Data)
	}
}

// Socket makes a socket: "tcp4", "tcp6", "udp4" or "udp6".
func (p *Probe) Socket(name, kind string) {
	p.lab.t.Helper()
	c := probe.Call{Op: "socket", New: name, Domain: unix.AF_INET, Type: unix.SOCK_STREAM}
	if strings.HasPrefix(kind, "udp") {
		c.Type = unix.SOCK_DGRAM
	}
	if strings.HasSuffix(kind, "6") {
		c.Domain = unix.AF_INET6
	}
	p.Must(c)
}

// Connect connects a socket.
func (p *Probe) Connect(socket, address string) {
	p.lab.t.Helper()
	p.Must(probe.Call{Op: "connect", Socket: socket, Address: address})
}

func describeCall(c probe.Call) string {
	return strings.TrimSpace(fmt.Sprintf("%s %s %s %s", c.Op, c.Socket, c.New, c.Address))
}
