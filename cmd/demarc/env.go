package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/term"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/kubernetes"
)

// environment is everything that the command takes from outside its arguments.
type environment struct {
	Stdin       io.Reader
	Stdout      io.Writer
	Stderr      io.Writer
	Getenv      func(string) string
	IsTerminal  bool // Stdout is one, so that people read it
	Interactive bool // Stdin is one too, so that people can be asked

	server string // --server
}

// systemEnvironment is the environment of this process.
func systemEnvironment() *environment {
	return &environment{
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv,
		IsTerminal:  term.IsTerminal(int(os.Stdout.Fd())),
		Interactive: term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd())),
	}
}

// client makes a client for the chosen agent. The caller closes it.
func (env *environment) client() (*api.Client, error) {
	c, err := api.NewClient(env.server)
	if err != nil {
		return nil, usageError{err}
	}
	return c, nil
}

// Exit codes of every command.
const (
	exitGood       = 0
	exitFailed     = 1 // failed, refused, or differs
	exitUsage      = 2
	exitNotRunning = 3
	exitPermission = 4
	exitInterrupt  = 130
)

// usageError is a wrong use of the command line; exit code 2.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// exitError ends the command with a code; a nil error prints nothing, because the
// command has said what there is to say.
type exitError struct {
	code int
	error
}

func (e exitError) Error() string {
	if e.error == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.error.Error()
}

func (e exitError) Unwrap() error { return e.error }

// hintError is an error with advice for its own line.
type hintError struct {
	error
	hint string
}

func (e hintError) Unwrap() error { return e.error }

// report prints an error, with a hint where there is one, and returns the exit code
// it stands for.
func (env *environment) report(err error) int {
	var exit exitError
	if errors.As(err, &exit) && exit.error == nil {
		return exit.code
	}
	var problems policy.Errors
	if errors.As(err, &problems) {
		// Several lines that each start with the place; editors jump there.
		fmt.Fprintln(env.Stderr, problems)
		return exitFailed
	}
	var objects kubernetes.Problems
	if errors.As(err, &objects) {
		fmt.Fprintln(env.Stderr, objects)
		return exitFailed
	}
	code, hint := exitFailed, ""
	var usage usageError
	var hinted hintError
	var refused *api.Error
	switch {
	case errors.As(err, &exit):
		code = exit.code
	case errors.As(err, &usage):
		code, hint = exitUsage, "see: demarc --help"
	case errors.Is(err, api.ErrNotRunning):
		code, hint = exitNotRunning, "start demarc-agent, or choose its socket with --server or DEMARC_SERVER"
	case errors.Is(err, api.ErrPermission):
		code, hint = exitPermission, "run it as root or as a user who may open the agent's socket"
	}
	if errors.As(err, &refused) && refused.Hint != "" {
		hint = refused.Hint
	}
	if errors.As(err, &hinted) {
		hint = hinted.hint
	}
	fmt.Fprintf(env.Stderr, "demarc: %s\n", err)
	if hint != "" {
		fmt.Fprintf(env.Stderr, "hint: %s\n", hint)
	}
	return code
}
