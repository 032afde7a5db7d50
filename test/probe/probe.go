// Package probe makes the odd socket calls that a test asks for, one line of JSON
// at a time: nothing happens until the test says so, and nothing has to be waited
// for by sleeping. A test says what to call; the probe says what the kernel said.
package probe

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Call is one thing to do. Sockets are known by names that the test chooses.
type Call struct {
	Op      string // a name in calls
	Socket  string `json:",omitempty"` // the socket that is acted upon
	New     string `json:",omitempty"` // name of what the call makes
	Domain  int    `json:",omitempty"`
	Type    int    `json:",omitempty"`
	Proto   int    `json:",omitempty"`
	Address string `json:",omitempty"` // "10.66.0.2:7000", "[fd66::2%eth0]:7000"; "[::ffff:10.66.0.2]:7000" stays mapped
	Family  *int   `json:",omitempty"` // in place of the address's own family
	Data    []byte `json:",omitempty"`
	Size    int    `json:",omitempty"`
	Flags   int    `json:",omitempty"`
	Level   int    `json:",omitempty"`
	Option  int    `json:",omitempty"`
	Value   int    `json:",omitempty"`
	Control []byte `json:",omitempty"` // ancillary data, as it is
	Batch   []string
	Path    string `json:",omitempty"`
	PID     int    `json:",omitempty"`
	FD      int    `json:",omitempty"`
	Timeout int    `json:",omitempty"` // ms to wait for what does not happen at once; 0 = 3000
}

// Result is what came of it. Error is a name of errno(3), TIMEOUT, or a sentence.
type Result struct {
	Error string `json:",omitempty"`
	N     int    `json:",omitempty"` // bytes, messages, a value or a descriptor
	Data  []byte `json:",omitempty"`
	From  string `json:",omitempty"`
}

// Timeout is the error of a call that the kernel did not answer in time.
const Timeout = "TIMEOUT"

var errTimeout = errors.New(Timeout)

// handlesVariable hands the descriptors over to the next program (Exec).
const handlesVariable = "DEMARC_PROBE_HANDLES"

// Main serves standard input and output until the input ends. It does not return.
func Main() {
	runtime.LockOSThread()
	p := &prober{sockets: inherited(), out: os.Stdout, rings: map[string]*ring{}}
	if _, ok := os.LookupEnv(handlesVariable); ok {
		fmt.Println("{}") // the answer to exec
	}
	if err := p.serve(os.Stdin); err != nil {
		fmt.Fprintf(os.Stderr, "probe: %v\n", err)
		os.Exit(1)
	}
	os.Exit(0)
}

type prober struct {
	sockets map[string]int // descriptors by name
	rings   map[string]*ring
	out     io.Writer
}

func (p *prober) serve(in io.Reader) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var c Call
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			return err
		}
		if err := json.NewEncoder(p.out).Encode(p.do(&c)); err != nil {
			return err
		}
	}
	return lines.Err()
}

func (p *prober) do(c *Call) Result {
	call, ok := calls[c.Op]
	if !ok {
		return Result{Error: "no call " + c.Op}
	}
	if c.Timeout == 0 {
		c.Timeout = 3000
	}
	r, err := call(p, c)
	if err != nil {
		r.Error = describe(err)
	}
	return r
}

func describe(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

func (p *prober) fd(c *Call) (int, error) {
	fd, ok := p.sockets[c.Socket]
	if !ok {
		return -1, fmt.Errorf("no socket %q", c.Socket)
	}
	return fd, nil
}

// keep names a descriptor.
func (p *prober) keep(c *Call, fd int) (Result, error) {
	if old, ok := p.sockets[c.New]; ok {
		unix.Close(old)
	}
	p.sockets[c.New] = fd
	return Result{N: fd}, nil
}

// inherited are the sockets of the program that this one took the place of.
func inherited() map[string]int {
	sockets := map[string]int{}
	for _, pair := range strings.Fields(os.Getenv(handlesVariable)) {
		var name string
		var fd int
		if _, err := fmt.Sscanf(strings.Replace(pair, "=", " ", 1), "%s %d", &name, &fd); err == nil {
			sockets[name] = fd
		}
	}
	return sockets
}
