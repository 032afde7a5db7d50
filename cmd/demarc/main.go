// Command demarc checks, builds and explains boundary policies anywhere, and talks
// to the agent of this node.
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"
)

func main() { os.Exit(run(os.Args[1:])) }

// run is the program with this process's environment.
func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return execute(ctx, systemEnvironment(), args)
}

// execute is the program as a function of its environment and arguments.
func execute(ctx context.Context, env *environment, args []string) int {
	root := newRootCommand(env)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	switch {
	case ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)):
		return exitInterrupt
	case errors.Is(err, syscall.EPIPE):
		return exitGood // whoever read our output has seen enough
	case err != nil:
		return env.report(err)
	}
	return exitGood
}
