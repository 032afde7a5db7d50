// Demarc-core is the trusted part of demarc: it loads policies into the kernel
// and keeps the programs attached that enforce them.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/demarc/demarc/agent/core"
	"github.com/demarc/demarc/agent/core/proto"
)

const usage = `usage:
  demarc-core [run] --config FILE                  enforce; ends at SIGTERM, enforcement stays
  demarc-core preflight --config FILE              check what enforcement needs, as JSON; leaves nothing behind
  demarc-core detach --config FILE --yes           end enforcement: remove everything from the kernel
  demarc-core version
`

// version is set by the linker.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	signal.Ignore(syscall.SIGHUP) // there is nothing to read again: what can change is followed
	status := run(ctx, os.Args[1:], os.Stdout, os.Stderr, os.Getenv)
	stop()
	os.Exit(status)
}

// errUsage is an error that was told to the user already.
var errUsage = errors.New("usage")

// run is the program: 0 good, 1 failed or refused, 2 usage.
func run(ctx context.Context, args []string, stdout, stderr io.Writer, getenv func(string) string) int {
	command := "run"
	if len(args) > 0 && len(args[0]) > 0 && args[0][0] != '-' {
		command, args = args[0], args[1:]
	}
	var err error
	switch command {
	case "run":
		err = enforce(ctx, args, stderr, getenv)
	case "preflight":
		err = preflight(args, stdout, stderr)
	case "detach":
		err = detach(args, stderr)
	case core.CanaryCommand: // the core's own child
		err = core.Canary()
	case "version":
		fmt.Fprintln(stdout, "demarc-core", version)
	case "help":
		fmt.Fprint(stdout, usage)
	default:
		fmt.Fprintf(stderr, "demarc-core: unknown command %q\n%s", command, usage)
		return 2
	}
	if errors.Is(err, errUsage) {
		return 2
	}
	if err != nil {
		fmt.Fprintf(stderr, "demarc-core: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
		var refused *proto.Refused
		if errors.As(err, &refused) && refused.Hint != "" {
			fmt.Fprintf(stderr, "hint: %s\n", refused.Hint)
		}
		return 1
	}
	return 0
}

// configure parses the flags of a command and reads the configuration.
func configure(command string, args []string, stderr io.Writer, define func(*flag.FlagSet)) (core.Config, error) {
	flags := flag.NewFlagSet("demarc-core "+command, flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { fmt.Fprint(stderr, usage) }
	file := flags.String("config", "/etc/demarc/core.json", "configuration `file`")
	if define != nil {
		define(flags)
	}
	if err := flags.Parse(args); err != nil {
		return core.Config{}, errUsage
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "demarc-core: unexpected argument %q\n%s", flags.Arg(0), usage)
		return core.Config{}, errUsage
	}
	return core.LoadConfig(*file)
}

func enforce(ctx context.Context, args []string, stderr io.Writer, getenv func(string) string) error {
	config, err := configure("run", args, stderr, nil)
	if err != nil {
		return err
	}
	options := &slog.HandlerOptions{Level: config.LogLevel}
	log := slog.New(slog.NewTextHandler(stderr, options))
	if config.LogJSON {
		log = slog.New(slog.NewJSONHandler(stderr, options))
	}
	c, err := core.Open(config, log)
	if err != nil {
		return err
	}
	l, err := c.Listen()
	if err == nil {
		err = core.DropPrivileges()
	}
	if err == nil {
		log.Info("ready", "state", c.Status().State, "socket", config.Socket(), "version", version)
		if err := notify(getenv("NOTIFY_SOCKET"), "READY=1"); err != nil {
			log.Warn("service manager is not told", "problem", err)
		}
		// A core that hangs is restarted by the watchdog, if there is one.
		c.Beat = func() { _ = notify(getenv("NOTIFY_SOCKET"), "WATCHDOG=1") } // the next one tells again
		err = c.Serve(ctx, l)
	}
	return errors.Join(err, c.Close())
}

func preflight(args []string, stdout, stderr io.Writer) error {
	config, err := configure("preflight", args, stderr, nil)
	if err != nil {
		return err
	}
	results := core.Preflight(config)
	text, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return err
	}
	if _, err := stdout.Write(append(text, '\n')); err != nil {
		return err
	}
	if !core.Passed(results) {
		return errors.New("preflight: enforcement would be refused")
	}
	return nil
}

func detach(args []string, stderr io.Writer) error {
	var yes bool
	config, err := configure("detach", args, stderr, func(f *flag.FlagSet) {
		f.BoolVar(&yes, "yes", false, "end enforcement")
	})
	if err != nil {
		return err
	}
	if !yes {
		return proto.Refuse("say --yes if that is wanted", "detach would end enforcement")
	}
	return core.Detach(config)
}

// notify tells the service manager; see sd_notify(3). Without one it does nothing.
func notify(socket, state string) error {
	if socket == "" {
		return nil
	}
	if socket[0] == '@' {
		socket = "\x00" + socket[1:]
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer conn.Close()
	// A manager that does not read must not keep the core from its work.
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	_, err = conn.Write([]byte(state))
	return err
}
