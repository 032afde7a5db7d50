// Command render writes what deploy/kubernetes means into a directory, one file for each
// way of installing it, for an API server to judge.
//
//	render DEPLOY DIRECTORY
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/demarc/demarc/test/kubernetes"
)

// charts are the values that a chart is rendered with.
var charts = map[string]string{
	"chart":            "",
	"chart-kubernetes": "identity: {provider: kubernetes}",
	"chart-file":       "identity: {provider: file}",
	"chart-none":       "identity: {provider: ''}\npolicy: {kind: Secret, name: shop}\ntrust: {keys: [a.pub, b.pub]}",
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: render DEPLOY DIRECTORY")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "render:", err)
		os.Exit(1)
	}
}

func run(deploy, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	write := func(name string, text []byte, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return os.WriteFile(filepath.Join(to, name+".yaml"), text, 0o644)
	}
	for _, dir := range []string{"base", "api"} {
		text, err := kubernetes.Kustomize(filepath.Join(deploy, dir))
		if err := write("kustomize-"+dir, text, err); err != nil {
			return err
		}
	}
	for name, values := range charts {
		text, err := kubernetes.Chart(filepath.Join(deploy, "chart"), values)
		if err := write(name, text, err); err != nil {
			return err
		}
	}
	return nil
}
