package fault

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// variant is another version of demarc-core, built from this checkout with a few
// lines changed.
type variant struct {
	file, old, new string // in the checkout
	add            string // content of one more file beside it; "" = none
}

var (
	// otherPrograms begins every program with an instruction that means nothing: its
	// tag is another one.
	otherPrograms = variant{"agent/core/demarc_bpfel.go", "func loadDemarc(", "func loadOriginal(", `package core

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

func loadDemarc() (*ebpf.CollectionSpec, error) {
	spec, err := loadOriginal()
	if err != nil {
		return nil, err
	}
	for _, p := range spec.Programs {
		was := p.Instructions[0]
		first := btf.WithFuncMetadata(asm.Mov.Imm(asm.R0, 1).WithSymbol(was.Symbol()), btf.FuncMetadata(&was)).WithSource(was.Source())
		p.Instructions[0] = btf.WithFuncMetadata(was.WithSymbol(""), nil)
		p.Instructions = append(asm.Instructions{first}, p.Instructions...)
	}
	return spec, nil
}
`}
	// otherLayout has a larger map.
	otherLayout = variant{"agent/core/demarc_bpfel.go", "func loadDemarc(", "func loadOriginal(", `package core

import "github.com/cilium/ebpf"

func loadDemarc() (*ebpf.CollectionSpec, error) {
	spec, err := loadOriginal()
	if err == nil {
		spec.Maps["port_owners"].MaxEntries *= 2
	}
	return spec, err
}
`}
	// otherABI says that its layouts mean something else.
	otherABI = variant{file: "bpf/abi/abi.go", old: "const Version = ", new: "const Version = 1000 + "}
)

// build makes the variant's demarc-core.
func build(t *testing.T, v variant) string {
	t.Helper()
	dir := t.TempDir()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	original := filepath.Join(root, v.file)
	text, err := os.ReadFile(original)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(text), v.old); n != 1 {
		t.Fatalf("%s has %q %d times, not once", v.file, v.old, n)
	}
	replace := map[string]string{original: filepath.Join(dir, "changed.go")}
	files := map[string]string{replace[original]: strings.Replace(string(text), v.old, v.new, 1)}
	if v.add != "" {
		added := filepath.Join(filepath.Dir(original), "variant.go")
		replace[added] = filepath.Join(dir, "added.go")
		files[replace[added]] = v.add
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	files[filepath.Join(dir, "overlay.json")] = string(overlay)
	for name, content := range files {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(dir, "demarc-core")
	command := exec.Command("go", "build", "-overlay", filepath.Join(dir, "overlay.json"), "-o", out, "github.com/demarc/demarc/cmd/demarc-core")
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := command.CombinedOutput(); err != nil {
		t.Fatalf("build variant: %v\n%s", err, said)
	}
	return out
}
