package agent

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/demarc/demarc/agent/detect"
)

// findingsFile keeps findings over a restart of the agent, as JSON lines: each line
// is a finding as it was then, and the last one of an id counts. When the file has
// grown to its bound it is written anew, with what the store holds.
type findingsFile struct {
	path  string
	found *detect.Findings
	file  *os.File
	size  int64
}

// findingsFileMax bounds the file, in bytes.
const findingsFileMax = 16 << 20

func newFindingsFile(dir string) *findingsFile {
	return &findingsFile{path: filepath.Join(dir, "findings.jsonl")}
}

// load reads the file into a store, and opens it for what is to come. A line that
// was not written to its end is passed over.
func (f *findingsFile) load(found *detect.Findings) error {
	f.found = found
	r, err := os.Open(f.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return f.rewrite()
	case err != nil:
		return fmt.Errorf("read earlier ones: %w", err)
	}
	defer r.Close()
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	bad := 0
	for lines.Scan() {
		var one detect.Finding
		if err := json.Unmarshal(lines.Bytes(), &one); err != nil || one.Key == "" {
			bad++
			continue
		}
		found.Restore(one)
	}
	if err := errors.Join(lines.Err(), f.rewrite()); err != nil {
		return err
	}
	if bad > 1 { // one is what a crash leaves
		return fmt.Errorf("%d lines of %s cannot be read", bad, f.path)
	}
	return nil
}

// rewrite puts the store's content in place of the file.
func (f *findingsFile) rewrite() error {
	f.close()
	next := f.path + ".new"
	w, err := os.OpenFile(next, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o640)
	if err != nil {
		return fmt.Errorf("keep findings: %w", err)
	}
	f.file, f.size = w, 0
	all, _ := f.found.After(0)
	for i := range all {
		if err := f.put(&all[i]); err != nil {
			return err
		}
	}
	if err := w.Sync(); err != nil {
		return fmt.Errorf("keep findings: %w", err)
	}
	if err := os.Rename(next, f.path); err != nil {
		return fmt.Errorf("keep findings: %w", err)
	}
	return nil
}

// write adds a finding as it is now.
func (f *findingsFile) write(one *detect.Finding) error {
	if f.file == nil || f.size > findingsFileMax {
		return f.rewrite() // the store holds it already
	}
	return f.put(one)
}

func (f *findingsFile) put(one *detect.Finding) error {
	line, err := json.Marshal(one)
	if err != nil {
		return fmt.Errorf("keep findings: %w", err)
	}
	n, err := f.file.Write(append(line, '\n'))
	f.size += int64(n)
	if err != nil {
		f.close() // and begin anew with the next one
		return fmt.Errorf("keep findings: %w", err)
	}
	return nil
}

func (f *findingsFile) close() {
	if f.file != nil {
		f.file.Close()
		f.file = nil
	}
}
