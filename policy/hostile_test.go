package policy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestJ03PolicyPathRace changes a path under the reader by links and renames. What
// ReadFile returns must be one whole version of the honest file, or an error.
func TestJ03PolicyPathRace(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil { // past the umask
			t.Fatal(err)
		}
		return path
	}
	const size = 64 << 10
	versions := []string{strings.Repeat("a", size), strings.Repeat("b", size)}
	write("evil", strings.Repeat("e", size), 0o644)
	target := write("policy.yaml", versions[0], 0o644)

	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			next := filepath.Join(dir, "next")
			var err error
			switch i % 4 {
			case 0: // an honest change
				err = os.WriteFile(next, []byte(versions[i/4%2]), 0o644)
			case 1: // a link to what is not the policy
				err = os.Symlink("evil", next)
			case 2: // a file that everyone may write
				if err = os.WriteFile(next, []byte(strings.Repeat("w", size)), 0o644); err == nil {
					err = os.Chmod(next, 0o666)
				}
			case 3: // a pipe, which would hang a careless reader
				err = unix.Mkfifo(next, 0o644)
			}
			if err == nil {
				err = os.Rename(next, target)
			}
			if err != nil {
				t.Errorf("change the path: %v", err)
				return
			}
		}
	})
	honest, refused := 0, 0
	for honest+refused < 100_000 {
		b, err := ReadFile(target)
		switch {
		case err != nil:
			refused++
		case string(b) == versions[0] || string(b) == versions[1]:
			honest++
		default:
			t.Errorf("read %d bytes that start with %.4q", len(b), b)
			honest++
		}
	}
	close(stop)
	wg.Wait()
	if honest == 0 || refused == 0 {
		t.Errorf("the race was not run: %d honest reads, %d refused", honest, refused)
	}
}

func TestReadFileRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "policy.yaml")
	if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("policy.yaml", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(".", filepath.Join(dir, "linked")); err != nil {
		t.Fatal(err)
	}
	large := filepath.Join(dir, "large")
	if err := os.WriteFile(large, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(large, maxSource+1); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, path, want string }{
		{"OK", path, ""},
		{"bad link", filepath.Join(dir, "link"), "a symbolic link is in the path"},
		{"bad link on the way", filepath.Join(dir, "linked", "policy.yaml"), "a symbolic link is in the path"},
		{"bad directory", dir, "not a regular file"},
		{"bad device", "/dev/null", "not a regular file"},
		{"bad magic link", "/proc/self/exe", "a symbolic link is in the path"},
		{"bad size", large, "larger than the limit"},
		{"bad absence", filepath.Join(dir, "none"), "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ReadFile(tt.path)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestTrustedFile(t *testing.T) {
	const regular = unix.S_IFREG
	for _, tt := range []struct {
		name string
		st   unix.Stat_t
		euid uint32
		want string
	}{
		{"OK root's", unix.Stat_t{Mode: regular | 0o644}, 0, ""},
		{"OK root's for a user", unix.Stat_t{Mode: regular | 0o644}, 1000, ""},
		{"OK own", unix.Stat_t{Mode: regular | 0o600, Uid: 1000, Gid: 1000}, 1000, ""},
		{"OK own and its group", unix.Stat_t{Mode: regular | 0o664, Uid: 1000, Gid: 1000}, 1000, ""},
		{"OK root's group", unix.Stat_t{Mode: regular | 0o664}, 0, ""},
		{"bad group as root", unix.Stat_t{Mode: regular | 0o664, Gid: 50}, 0, "writable by group 50; remove that with chmod g-w"},
		{"bad everyone", unix.Stat_t{Mode: regular | 0o646}, 0, "writable by everyone; remove that with chmod o-w"},
		{"bad owner", unix.Stat_t{Mode: regular | 0o600, Uid: 1000}, 0, "owned by user 1000; it must belong to root or to you"},
		{"bad other owner", unix.Stat_t{Mode: regular | 0o644, Uid: 1001}, 1000, "owned by user 1001; it must belong to root or to you"},
		{"bad kind", unix.Stat_t{Mode: unix.S_IFIFO | 0o600}, 0, "not a regular file"},
		{"bad size", unix.Stat_t{Mode: regular | 0o600, Size: maxSource + 1}, 0, fmt.Sprintf("%d bytes are larger than the limit of %d", maxSource+1, maxSource)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := ""
			if err := trustedFile(&tt.st, tt.euid, maxSource); err != nil {
				got = err.Error()
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// TestJ04YAMLCorpus holds texts that make YAML parsers slow, large, deep, or of
// two minds. Each is refused for its own reason; one that took for ever would end
// the test by its deadline.
func TestJ04YAMLCorpus(t *testing.T) {
	shop := string(goodSources(t)["shop.yaml"])
	bomb := "a: &a [x, x, x, x, x, x, x, x, x]\n"
	for i := range 9 {
		ref := strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*%c, ", 'a'+i), 9), ", ")
		bomb += fmt.Sprintf("%c: &%c [%s]\n", 'b'+i, 'b'+i, ref)
	}
	for _, tt := range []struct{ name, src, want string }{
		{"bomb", bomb, "alias *a inside an anchor"},
		{"aliases", "a: &a x\nb: [" + strings.Repeat("*a, ", 17) + "x]\n", "more than 16 aliases"},
		{"anchor in itself", "a: &a [*a]\n", "alias *a inside an anchor"},
		{"merge bomb", "a: &a {x: y}\nb: {<<: [*a, *a]}\n", "merge keys are not used"},
		{"nested flow", strings.Repeat("[", 100_000), "exceeded max depth"},
		{"nested flow, closed", "a: " + strings.Repeat("[", 5000) + strings.Repeat("]", 5000), "nested deeper than 32 levels"},
		{"nested on lines", strings.Repeat("[\n", 1<<20), "exceeded max depth"},
		{"nested maps", strings.Repeat("{a: ", 5000) + strings.Repeat("}", 5000), "nested deeper than 32 levels"},
		{"nested dashes", strings.Repeat("- ", 5000) + "a\n", "nested deeper than 32 levels"},
		{"nested keys", strings.Repeat("? ", 100_000), "not YAML"},
		{"values", strings.Repeat("[\n", maxValues+1), "policy has more than 8388608 values"},
		{"line", "a: " + strings.Repeat("x", maxLine), "line is longer than 1048576 bytes"},
		{"size", strings.Repeat("#\n", maxSource/2+1), "is larger than the limit of 67108864"},
		{"same key 200,000 times", strings.Repeat("a: b\n", 200_000), `unknown key "a" in policy`},
		{"same zone twice", strings.Replace(shop, "  app: {trust: 20}", "  app: {trust: 20}\n  app: {trust: 30}", 1), "zone app is already declared at line 9"},
		{"same key twice", strings.Replace(shop, "trustDomain:", "trustDomain: evil.example\ntrustDomain:", 1), `key "trustDomain" is given twice`},
		{"second document", shop + "---\n" + shop, "more than one YAML document"},
		{"second document, empty", shop + "---\n", "more than one YAML document"},
		{"NUL", strings.Replace(shop, "shop", "sh\x00op", 1), "3:20: NUL byte"},
		{"BOM", "\ufeff" + shop, "1:1: byte order mark at the start"},
		{"BOM inside", strings.Replace(shop, "shop", "sh\ufeffop", 1), "character U+FEFF is not allowed"},
		{"UTF-16", "\xff\xfea\x00:\x00", "1:1: text is not UTF-8"},
		{"invalid UTF-8", strings.Replace(shop, "shop", "sh\xffop", 1), "3:20: text is not UTF-8"},
		{"CRLF", strings.ReplaceAll(shop, "\n", "\r\n"), "1:32: carriage return"},
		{"CR", strings.Replace(shop, "# version", "# \rversion", 1), "carriage return"},
		{"tab", strings.Replace(shop, "  edge", "\tedge", 1), "8:1: tab"},
		{"escape", strings.Replace(shop, "# version", "# \x1b[2Jversion", 1), "character U+001B is not allowed"},
		{"bidi override", strings.Replace(shop, "# version", "# \u202eversion", 1), "character U+202E is not allowed"},
		{"zero width", strings.ReplaceAll(shop, "web", "we\u200bb"), "character U+200B is not allowed"},
		{"line separator", strings.Replace(shop, "# version", "# \u2028version", 1), "character U+2028 is not allowed"},
		{"next line", strings.Replace(shop, "# version", "# \u0085version", 1), "character U+0085 is not allowed"},
		{"homoglyph", strings.ReplaceAll(shop, "  web:", "  w\u0435b:"), `workload "w\u0435b" is not a valid name`},
		{"tag", strings.Replace(shop, "version: 7", "version: !!int 7", 1), "tags are not used"},
		{"own tag", strings.Replace(shop, "version: 7", "version: !x 7", 1), "tags are not used"},
		{"directive", "%TAG ! tag:x,2020:\n---\n" + shop, "directives are not used"},
		{"empty", "", "document is empty"},
		{"only comments", strings.Repeat("# x\n", 100_000), "document is empty"},
		{"only separators", strings.Repeat("---\n", 100_000), "document is empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := parse("j04.yaml", []byte(tt.src), corpusTime)
			var all Errors
			if !errors.As(err, &all) {
				t.Fatalf("got %v, want Errors", err)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %.300s\nwant %q", err, tt.want)
			}
			if n := len(err.Error()); n > 1<<20 {
				t.Errorf("message of %d bytes", n)
			}
			if strings.ContainsAny(err.Error(), "\x00\x1b\r\u202e\u200b") {
				t.Error("message repeats characters that a terminal acts on")
			}
		})
	}
}

// TestJ09EmptySelectorSelectsNothing empties, and then removes, every value of
// every good policy. Nothing empty is a policy, and nothing that is left out
// selects or admits more.
func TestJ09EmptySelectorSelectsNothing(t *testing.T) {
	for name, src := range goodSources(t) {
		t.Run(name, func(t *testing.T) {
			whole, err := parse(name, src, corpusTime)
			if err != nil {
				t.Fatal(err)
			}
			root := (&reporter{src: src}).readYAML()
			count := 0
			eachValue(root, func(path string, slot **node, remove func() func()) {
				was := *slot
				for what, empty := range map[string]*node{
					"null": {text: "null", pos: was.pos}, "text": {kind: stringNode, pos: was.pos},
					"map": {kind: mapNode, flow: true, pos: was.pos}, "list": {kind: listNode, flow: true, pos: was.pos},
				} {
					if path == "crossings" && what == "list" {
						continue // no crossings: everything is denied, and said to be
					}
					*slot = empty
					if p := reparse(t, root); p != nil {
						t.Errorf("%s as an empty %s is accepted", path, what)
					}
					count++
				}
				*slot = was
				undo := remove()
				if p := reparse(t, root); p != nil {
					if wider := widened(whole, p, path); wider != "" {
						t.Errorf("without %s: %s", path, wider)
					}
				}
				undo()
			})
			if count < 50 {
				t.Errorf("only %d mutations", count)
			}
			if p := reparse(t, root); p == nil {
				t.Error("the policy is not what it was")
			}
		})
	}
}

// reparse writes a tree as text and parses that; nil means refused.
func reparse(t *testing.T, root *node) *Policy {
	t.Helper()
	f := &formatter{}
	f.value(root, 0)
	p, err := parse("mutant.yaml", f.out.Bytes(), corpusTime)
	if err != nil {
		return nil
	}
	return p
}

// eachValue visits every value below a node with its path, a way to replace it and
// a way to remove it, which returns the way back.
func eachValue(n *node, visit func(path string, slot **node, remove func() func())) {
	var walk func(n *node, path string)
	walk = func(n *node, path string) {
		if n.alias != "" {
			return // its anchor is visited
		}
		for i := range n.entries {
			at := strings.TrimPrefix(path+"."+n.entries[i].key, ".")
			visit(at, &n.entries[i].value, func() func() {
				was := n.entries
				n.entries = append(append([]entry{}, was[:i]...), was[i+1:]...)
				return func() { n.entries = was }
			})
			walk(n.entries[i].value, at)
		}
		for i := range n.items {
			visit(path+"[]", &n.items[i], func() func() {
				was := n.items
				n.items = append(append([]*node{}, was[:i]...), was[i+1:]...)
				return func() { n.items = was }
			})
			walk(n.items[i], path+"[]")
		}
	}
	walk(n, "")
}

// widened says what a policy selects or admits that another does not, knowing that
// a restriction whose absence the language defines was removed on purpose.
func widened(whole, p *Policy, path string) string {
	for _, restriction := range []string{
		".limit", ".until", ".since", ".namespace", ".serviceAccount", ".name", ".image", ".podLabels", ".labels", "unmanaged",
	} {
		if strings.Contains(path, restriction) {
			return selectsAll(p)
		}
	}
	selectors := map[string]bool{}
	for _, w := range whole.Workloads {
		for _, s := range w.Match {
			s.Pos = Pos{}
			selectors[fmt.Sprintf("%s %+v", w.Name, s)] = true
		}
	}
	for _, w := range p.Workloads {
		for _, s := range w.Match {
			s.Pos = Pos{}
			if !selectors[fmt.Sprintf("%s %+v", w.Name, s)] {
				return "selects more: workload " + w.Name
			}
		}
	}
	was := map[string]Crossing{}
	for _, c := range whole.Crossings {
		was[c.Name] = c
	}
	for _, c := range p.Crossings {
		old := was[c.Name]
		terms := func(ts []Term) string { return fmt.Sprint(ts) }
		subset := func(some, all []Term) bool {
			for _, s := range some {
				if !strings.Contains(terms(all), s.String()) {
					return false
				}
			}
			return len(some) > 0
		}
		if !subset(c.From, old.From) || !subset(c.To, old.To) || len(c.Ports) == 0 || len(c.Ports) > len(old.Ports) {
			return "admits more: crossing " + c.Name
		}
	}
	return selectsAll(p)
}

// selectsAll names a selector that asks for nothing.
func selectsAll(p *Policy) string {
	for _, w := range p.Workloads {
		if len(w.Match) == 0 {
			return "workload " + w.Name + " has no selector"
		}
		for _, s := range w.Match {
			if s.Path == "" && len(s.attributes()) == 0 {
				return "workload " + w.Name + " selects everything"
			}
		}
	}
	return ""
}

// FuzzParse parses any bytes, and formats what can be parsed. Neither may panic,
// and the formatted policy must mean the same.
func FuzzParse(f *testing.F) {
	for _, src := range goodSources(f) {
		f.Add(src)
	}
	for _, a := range readCorpus(f, "bad_*.txtar") {
		for _, file := range a.Files {
			if strings.HasSuffix(file.Name, ".yaml") {
				f.Add(corpusSource(file))
			}
		}
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		p, err := parse("fuzz.yaml", src, corpusTime)
		if (p == nil) == (err == nil) {
			t.Fatal("neither a policy nor an error, or both")
		}
		if err != nil {
			_ = err.Error()
			return
		}
		checkFormat(t, p, src)
	})
}
