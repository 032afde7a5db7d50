package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/goccy/go-yaml"
)

// table writes rows below a heading, with columns as wide as their widest cell. An
// empty cell shows as "-", so that columns can be counted.
func table(w io.Writer, heading []string, rows [][]string) error {
	width := make([]int, len(heading))
	all := append([][]string{heading}, rows...)
	for _, row := range all {
		for i, cell := range row {
			width[i] = max(width[i], len(cell), 1)
		}
	}
	var b strings.Builder
	for _, row := range all {
		line := ""
		for i, cell := range row {
			if cell == "" {
				cell = "-"
			}
			line += fmt.Sprintf("%-*s  ", width[i], cell)
		}
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// document writes a value as indented JSON or as YAML.
func document(w io.Writer, form string, v any) error {
	if form == "yaml" {
		b, err := yaml.Marshal(v)
		if err != nil {
			return fmt.Errorf("write yaml: %w", err)
		}
		_, err = w.Write(b)
		return err
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
