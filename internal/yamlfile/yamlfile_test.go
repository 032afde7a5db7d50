package yamlfile

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

type sample struct {
	Name string            `yaml:"name"`
	Tags map[string]string `yaml:"tags"`
	List []struct {
		Port int `yaml:"port"`
	} `yaml:"list"`
}

func TestDecode(t *testing.T) {
	for _, c := range []struct{ name, src, want string }{
		{"OK empty", "", ""},
		{"OK block", "name: a\nlist:\n- port: 1\n- port: 2\n", ""},
		{"OK flow", "{name: a, tags: {x: y}}", ""},
		{"OK CRLF", "name: a\r\ntags: {}\r\n", ""},
		{"bad unknown key", "name: a\nnmae: b\n", "f.yaml:2:1: unknown field \"nmae\"\nhint: check the spelling; unknown keys are never ignored"},
		{"bad duplicate key", "name: a\nname: b\n", `f.yaml:2:1: mapping key "name" already defined at [1:1]`},
		{"bad type", "list:\n- port: x\n", "f.yaml:2:9: cannot unmarshal string into Go struct field sample.List of type int"},
		{"bad syntax", "name: [a\n", "f.yaml:1:7: sequence end token ']' not found"},
		{"bad anchor", "name: &x a\n", "f.yaml:1:7: anchors and aliases are not allowed here\nhint: write the value out"},
		{"bad alias", "tags: *x\n", "f.yaml:1:7: anchors and aliases are not allowed here\nhint: write the value out"},
		{"bad tag", "name: !!str a\n", "f.yaml:1:7: tags are not allowed here\nhint: remove !!str"},
		{"bad two documents", "name: a\n---\nname: b\n", "f.yaml: 2 YAML documents\nhint: keep one document in the file"},
		{"bad NUL", "name: a\x00", "f.yaml: contains a NUL byte"},
		{"bad BOM", "\ufeffname: a", "f.yaml: starts with a byte order mark\nhint: save the file as UTF-8 without BOM"},
		{"bad UTF-8", "name: \xff", "f.yaml: not valid UTF-8"},
		{"bad flow depth", "name: " + strings.Repeat("[", 100000), "f.yaml:1:39: nested deeper than 32 levels"},
		{"bad size", strings.Repeat("#", MaxSize+1), "f.yaml: 4194305 bytes, at most 4194304 are read"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out sample
			got := ""
			if _, err := Decode("f.yaml", []byte(c.src), &out); err != nil {
				got = err.Error()
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Errorf("error (-want +got):\n%s", d)
			}
		})
	}
}

func TestEmptyFileKeepsDefaults(t *testing.T) {
	for _, src := range []string{"", "\n", "# only words\n", "---\n"} {
		out := sample{Name: "default"}
		if _, err := Decode("f.yaml", []byte(src), &out); err != nil || out.Name != "default" {
			t.Errorf("%q: %+v, %v", src, out, err)
		}
	}
}

func TestErrorfFindsThePlace(t *testing.T) {
	src := "name: a\nlist:\n- port: 1\n- port: 22\n"
	var out sample
	f, err := Decode("f.yaml", []byte(src), &out)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ path, want string }{
		{"$.list[1].port", "f.yaml:4:9: bad 7"},
		{"$.list[1].missing", "f.yaml:4:3: bad 7"},
		{"$.list[0]", "f.yaml:3:3: bad 7"},
		{"$.nothing", "f.yaml:1:1: bad 7"},
	} {
		if got := f.Errorf(c.path, "", "bad %d", 7).Error(); got != c.want {
			t.Errorf("%s: %q, want %q", c.path, got, c.want)
		}
	}
}
