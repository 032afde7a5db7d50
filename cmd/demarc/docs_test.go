package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// documents are those that name commands, by their path from here.
func documents(t *testing.T) (files []string) {
	t.Helper()
	for _, pattern := range []string{"../../*.md", "../../docs/*.md", "../../docs/*/*.md", "../../test/*.md", "../../deploy/*/*.md", "../../deploy/*/*.yaml", "../../deploy/*/*.service"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	if len(files) < 20 {
		t.Fatalf("only %d documents", len(files))
	}
	return files
}

// mention is a command line in a document.
type mention struct {
	place string
	words []string
	whole bool // it can be typed as it stands: placeholders aside, nothing is left out
}

// words splits a line as a shell would, up to where demarc's own part ends.
func words(line string) (out []string, whole bool) {
	var word strings.Builder
	quote, started := rune(0), false
	flush := func() {
		if started {
			out = append(out, word.String())
			word.Reset()
			started = false
		}
	}
	for i, c := range line {
		switch {
		case quote != 0:
			if c == quote {
				quote = 0
			} else {
				word.WriteRune(c)
			}
		case c == '\'' || c == '"':
			quote, started = c, true
		case c == ' ' || c == '\t':
			flush()
		case c == '#' && !started, c == '|', c == ';', c == '&', c == '>', c == '<':
			flush()
			return out, true
		case c == '[' || c == '{' || c == '(' || strings.HasPrefix(line[i:], "..."):
			flush()
			return out, false
		default:
			word.WriteRune(c)
			started = true
		}
	}
	flush()
	return out, true
}

var (
	inlineCode = regexp.MustCompile("`(demarc [^`]+)`")
	typed      = regexp.MustCompile(`^(?:\s*(?:\$ |sudo )?)(demarc [^ ].*)$`)
	quoted     = regexp.MustCompile(`(?:with|verified|shows?): (demarc [a-z][^'"]*)`) // in alerts
)

// mentions are all command lines of demarc that a document names.
func mentions(t *testing.T, file string) (all []mention) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	add := func(n int, line string, typed bool) {
		w, whole := words(line)
		if len(w) > 1 {
			all = append(all, mention{fmt.Sprintf("%s:%d", strings.TrimPrefix(file, "../../"), n), w[1:], whole && typed})
		}
	}
	fence := false
	for n, line := range strings.Split(string(text), "\n") {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			fence = !fence
			continue
		}
		if m := typed.FindStringSubmatch(line); m != nil && (fence || strings.HasPrefix(line, "    ")) {
			add(n+1, m[1], true)
			continue
		}
		for _, m := range inlineCode.FindAllStringSubmatch(line, -1) {
			add(n+1, m[1], false)
		}
		for _, m := range quoted.FindAllStringSubmatch(line, -1) {
			add(n+1, m[1], false)
		}
	}
	return all
}

// parses says what is wrong with a command line, or nil.
func (m mention) parses(root *cobra.Command) error {
	var known []string
	for _, w := range m.words {
		if !strings.Contains(w, "{{") { // of an alert's label
			known = append(known, w)
		}
	}
	c, rest, err := root.Find(known)
	if err != nil {
		return err
	}
	if c == root || c.HasSubCommands() && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") {
		return fmt.Errorf("there is no such command")
	}
	for _, w := range rest {
		name, long := strings.CutPrefix(w, "--")
		name, _, _ = strings.Cut(name, "=")
		c.InitDefaultHelpFlag()
		switch {
		case long && c.Flags().Lookup(name) == nil && c.InheritedFlags().Lookup(name) == nil:
			return fmt.Errorf("%s has no flag --%s", c.CommandPath(), name)
		case !long && len(w) == 2 && w[0] == '-' && c.Flags().ShorthandLookup(w[1:]) == nil:
			return fmt.Errorf("%s has no flag %s", c.CommandPath(), w)
		}
	}
	if !m.whole {
		return nil
	}
	// Flags refer to the environment of their command, which is thrown away.
	if err := c.ParseFlags(rest); err != nil {
		return err
	}
	return c.ValidateArgs(c.Flags().Args())
}

// TestDocumentsNameCommands keeps every command line in the documents one that demarc
// takes.
func TestDocumentsNameCommands(t *testing.T) {
	found := map[string]bool{}
	n := 0
	for _, file := range documents(t) {
		for _, m := range mentions(t, file) {
			n++
			root := newRootCommand(systemEnvironment())
			if err := m.parses(root); err != nil {
				t.Errorf("%s: demarc %s: %v", m.place, strings.Join(m.words, " "), err)
			}
			if c, _, err := root.Find(m.words); err == nil {
				found[c.CommandPath()] = true
			}
		}
	}
	if n < 80 {
		t.Errorf("only %d command lines", n)
	}
	// And the other way round: no command that no document names.
	var all func(*cobra.Command)
	all = func(c *cobra.Command) {
		for _, sub := range c.Commands() {
			if sub.IsAvailableCommand() && sub.Name() != "help" && c.Name() != "completion" {
				if !sub.HasSubCommands() && !found[sub.CommandPath()] {
					t.Errorf("no document names %s", sub.CommandPath())
				}
				all(sub)
			}
		}
	}
	all(newRootCommand(systemEnvironment()))
}

// output is a line that is no command.
var output = regexp.MustCompile(`(?m)^[^$\n]`)

// TestConsoleBlocks types what the console blocks of the documents show with its
// output, and wants that output. The files that they name are made of the document's own: the first
// policy in it is shop.yaml.
func TestConsoleBlocks(t *testing.T) {
	blocks := 0
	for _, file := range documents(t) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, after, policy := strings.Cut(string(text), "```yaml\napiVersion: demarc.dev/")
		source, _, _ := strings.Cut(after, "```")
		for _, block := range strings.Split(string(text), "```console\n")[1:] {
			block, _, _ = strings.Cut(block, "```")
			if !strings.Contains("\n"+block, "\n$") || !output.MatchString(block) {
				continue // only commands, which TestDocumentsNameCommands holds
			}
			blocks++
			t.Run(filepath.Base(file), func(t *testing.T) {
				t.Chdir(t.TempDir())
				if policy {
					if err := os.WriteFile("shop.yaml", []byte("apiVersion: demarc.dev/"+source), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				if d := cmp.Diff(block, typeAll(t, block)); d != "" {
					t.Errorf("console (-document +demarc):\n%s", d)
				}
			})
		}
	}
	if blocks == 0 {
		t.Error("no document shows a console")
	}
}

// typeAll runs a block's commands and shows them as the block does.
func typeAll(t *testing.T, block string) string {
	t.Helper()
	var shown bytes.Buffer
	for line := range strings.Lines(block) {
		command, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "$ ")
		if !ok {
			continue
		}
		args, whole := words(command)
		if !whole || args[0] != "demarc" {
			t.Fatalf("cannot type %q", command)
		}
		shown.WriteString("$ " + command + "\n")
		env := &environment{Stdin: strings.NewReader(""), Stdout: &shown, Stderr: &shown, Getenv: func(string) string { return "" }}
		execute(context.Background(), env, args[1:])
	}
	return shown.String()
}

// TestManual says that every command that is shown has a page, with all of its flags,
// and that man can read it.
func TestManual(t *testing.T) {
	dir := t.TempDir()
	env := systemEnvironment()
	env.Getenv = func(name string) string { return map[string]string{"SOURCE_DATE_EPOCH": "1767225600"}[name] }
	if err := writeManual(env, newRootCommand(env), dir); err != nil {
		t.Fatal(err)
	}
	var want []string
	var all func(*cobra.Command)
	all = func(c *cobra.Command) {
		page := strings.ReplaceAll(c.CommandPath(), " ", "-") + ".1"
		want = append(want, page)
		text, err := os.ReadFile(filepath.Join(dir, page))
		if err != nil {
			t.Error(err)
			return
		}
		if !strings.Contains(string(text), `"Jan 2026"`) {
			t.Errorf("%s: its date is not the one that was given", page)
		}
		c.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
			if !f.Hidden && !strings.Contains(string(text), `-`+strings.ReplaceAll(f.Name, "-", `\-`)) && !strings.Contains(string(text), "--"+f.Name) {
				t.Errorf("%s: no flag --%s", page, f.Name)
			}
		})
		for _, sub := range c.Commands() {
			if sub.IsAvailableCommand() && !sub.IsAdditionalHelpTopicCommand() {
				all(sub)
			}
		}
	}
	all(newRootCommand(env))
	found, err := filepath.Glob(dir + "/*.1")
	if err != nil {
		t.Fatal(err)
	}
	for i := range found {
		found[i] = filepath.Base(found[i])
	}
	slices.Sort(want)
	if d := cmp.Diff(want, found); d != "" {
		t.Errorf("pages (-commands +pages):\n%s", d)
	}
	again := t.TempDir()
	if err := writeManual(env, newRootCommand(env), again); err != nil {
		t.Fatal(err)
	}
	for _, page := range found {
		one, _ := os.ReadFile(filepath.Join(dir, page))
		two, _ := os.ReadFile(filepath.Join(again, page))
		if !bytes.Equal(one, two) {
			t.Errorf("%s is another one each time", page)
		}
	}
}

// TestCompletions says that the shells can read their scripts.
func TestCompletions(t *testing.T) {
	dir := t.TempDir()
	if err := writeCompletions(newRootCommand(systemEnvironment()), dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"demarc", "_demarc", "demarc.fish"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() < 1000 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if out, err := exec.Command("bash", "-n", filepath.Join(dir, "demarc")).CombinedOutput(); err != nil {
		t.Errorf("bash: %v\n%s", err, out)
	}
}
