package policy

import (
	"bytes"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/rogpeppe/go-internal/txtar"
)

var update = flag.Bool("update", false, "write the expected messages of testdata/bad_*.txtar anew")

// corpusTime is when the corpus is judged: nothing in it depends on the day.
var corpusTime = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)

// corpusHeader stands before corpus files that have none of their own.
const corpusHeader = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: test, version: 1}
trustDomain: test.example
`

func corpusSource(f txtar.File) []byte {
	if bytes.Contains(f.Data, []byte("apiVersion")) {
		return f.Data
	}
	return append([]byte(corpusHeader), f.Data...)
}

func readCorpus(t testing.TB, pattern string) map[string]*txtar.Archive {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join("testdata", pattern))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no corpus %s: %v", pattern, err)
	}
	out := map[string]*txtar.Archive{}
	for _, path := range paths {
		a, err := txtar.ParseFile(path)
		if err != nil {
			t.Fatal(err)
		}
		out[path] = a
	}
	return out
}

// goodSources are the valid policies of the corpus by name.
func goodSources(t testing.TB) map[string][]byte {
	t.Helper()
	shop, err := os.ReadFile("testdata/shop.yaml")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{"shop.yaml": shop}
	for _, a := range readCorpus(t, "good.txtar") {
		for _, f := range a.Files {
			out[f.Name] = corpusSource(f)
		}
	}
	return out
}

func TestBadPoliciesSayWhy(t *testing.T) {
	for path, a := range readCorpus(t, "bad_*.txtar") {
		want := map[string]string{}
		for _, f := range a.Files {
			want[f.Name] = string(f.Data)
		}
		var files []txtar.File
		for _, f := range a.Files {
			name, ok := strings.CutSuffix(f.Name, ".yaml")
			if !ok {
				continue
			}
			t.Run(filepath.Base(path)+"/"+name, func(t *testing.T) {
				p, err := parse(f.Name, corpusSource(f), corpusTime)
				if err == nil {
					t.Fatalf("accepted: %+v", p)
				}
				if p != nil {
					t.Error("a policy and an error")
				}
				got := err.Error() + "\n"
				files = append(files, f, txtar.File{Name: name + ".err", Data: []byte(got)})
				if diff := cmp.Diff(want[name+".err"], got); diff != "" && !*update {
					t.Errorf("messages differ (-want +got):\n%s", diff)
				}
			})
		}
		if *update {
			if err := os.WriteFile(path, txtar.Format(&txtar.Archive{Comment: a.Comment, Files: files}), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestGoodPoliciesParse(t *testing.T) {
	for name, src := range goodSources(t) {
		t.Run(name, func(t *testing.T) {
			p, err := parse(name, src, corpusTime)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p.Source, src) {
				t.Error("Source is not the text")
			}
		})
	}
}

// ignorePlaces compares policies but for where they were written.
var ignorePlaces = cmp.Options{
	cmpopts.IgnoreTypes(Pos{}), cmpopts.IgnoreFields(Policy{}, "Source", "File"), cmpopts.EquateEmpty(),
	cmpopts.EquateComparable(netip.Prefix{}),
}
