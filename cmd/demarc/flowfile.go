package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/flow"
)

// maxLine bounds a line of flows, in bytes: it is far longer than any.
const maxLine = 64 << 10

// flowFile reads what "demarc flows -o json" wrote. Whoever wrote it, its strings are
// made harmless.
func flowFile(env *environment, file string, take func(*api.Line)) error {
	in := env.Stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return fmt.Errorf("read flows: %w", err)
		}
		defer f.Close()
		in = f
	}
	const hint = "demarc flows -o json writes them, one a line"
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxLine)
	for n := 1; lines.Scan(); n++ {
		if len(lines.Bytes()) == 0 {
			continue
		}
		var line api.Line
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			return hintError{fmt.Errorf("%s:%d: this is no flow: %s", file, n, flow.Escape(err.Error())), hint}
		}
		if line.Flow != nil && !line.Time.IsZero() {
			line.Inert()
		} else if line.Lost == 0 {
			return hintError{fmt.Errorf("%s:%d: this is no flow: it has no time", file, n), hint}
		} else {
			line.Flow = nil
		}
		take(&line)
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read flows from %s: %w", file, err)
	}
	return nil
}
