// Command demarc-agent is the unprivileged agent of a node.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/demarc/demarc/agent"
	"github.com/demarc/demarc/internal/version"
)

// Exit codes, the same as those of the demarc command.
const (
	exitGood   = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr, (*agent.Agent).Confine))
}

// confine gives up what the agent has no use for; tests, which go on afterwards, do
// without.
type confine func(a *agent.Agent, allowRoot bool) error

// run is the program as a function of its arguments.
func run(ctx context.Context, args []string, stdout, stderr io.Writer, c confine) int {
	flags := flag.NewFlagSet("demarc-agent", flag.ContinueOnError)
	flags.SetOutput(stderr)
	config := flags.String("config", "/etc/demarc/agent.yaml", "configuration `file`")
	check := flags.Bool("check", false, "check the configuration and the inventory, and exit")
	allowRoot := flags.Bool("allow-root", false, "run as root, though without its capabilities")
	showVersion := flags.Bool("version", false, "print the version, and exit")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return exitGood
	case err != nil:
		return exitUsage
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "demarc-agent: unexpected argument %q\n", flags.Arg(0))
		return exitUsage
	}
	if *showVersion {
		fmt.Fprintln(stdout, "demarc-agent", version.String())
		return exitGood
	}
	if err := serve(ctx, *config, *check, stderr, func(a *agent.Agent) error { return c(a, *allowRoot) }); err != nil {
		fmt.Fprintf(stderr, "demarc-agent: %s\n", err)
		return exitFailed
	}
	return exitGood
}

func serve(ctx context.Context, file string, checkOnly bool, stderr io.Writer, confine func(*agent.Agent) error) error {
	config, err := agent.ReadConfig(file)
	if err != nil {
		return err
	}
	log := logger(config, stderr)
	a, err := agent.New(config, log)
	if err != nil || checkOnly {
		return err
	}
	log.Info("starting", zap.String("version", version.String()), zap.String("node", config.Node), zap.String("server", config.Server))
	if err := confine(a); err != nil {
		return err
	}
	notify := func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			log.Warn("notify systemd", zap.Error(err))
		}
	}
	context.AfterFunc(ctx, func() { notify(daemon.SdNotifyStopping) })
	err = a.Run(ctx, func() {
		log.Info("ready")
		notify(daemon.SdNotifyReady)
		if within, err := daemon.SdWatchdogEnabled(false); err != nil {
			log.Warn("watchdog of systemd", zap.Error(err))
		} else if within > 0 {
			go a.Attest(ctx, within/4, func() { notify(daemon.SdNotifyWatchdog) })
		}
	})
	log.Info("stopped")
	return err
}

func logger(c *agent.Config, to io.Writer) *zap.Logger {
	e := zap.NewProductionEncoderConfig()
	e.TimeKey, e.EncodeTime = "time", zapcore.RFC3339NanoTimeEncoder
	encoder := zapcore.NewConsoleEncoder(e)
	if c.LogJSON {
		encoder = zapcore.NewJSONEncoder(e)
	}
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(zapcore.AddSync(to)), c.LogLevel))
}
