// Package docs_test holds the documents to what the code does.
package docs_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/dchest/siphash"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func parse(t *testing.T, file, src string) *policy.Policy {
	t.Helper()
	p, err := policy.Parse(file, []byte(src))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// ARCHITECTURE.md tells its story in the numbers of the demo's policy.
func TestArchitectureNumbers(t *testing.T) {
	text := read(t, "../../ARCHITECTURE.md")
	p := parse(t, "shop.yaml", read(t, "../demo/shop.yaml"))
	encoded, err := policy.Build(p)
	if err != nil {
		t.Fatal(err)
	}
	img, err := image.Decode(encoded)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{fmt.Sprintf("%d,%03d bytes", len(encoded)/1000, len(encoded)%1000)}
	ids := map[string]uint32{}
	for _, w := range img.Workloads {
		ids[w.Name] = uint32(w.ID)
		want = append(want, fmt.Sprintf("`%06x`", w.ID))
	}
	rules := []string{"subject peer     class direction crossings"}
	for _, r := range img.Rules {
		rules = append(rules, fmt.Sprintf("%06x  %08x %d     %d         %v", uint32(r.Subject), uint32(r.Peer), r.Class, r.Direction, r.Crossings))
	}
	want = append(want, strings.Join(rules, "\n"))

	input := binary.BigEndian.AppendUint32(nil, ids["web"]<<8)
	input = binary.BigEndian.AppendUint32(input, 0x11223344)
	input = binary.BigEndian.AppendUint32(input, slot)
	input = binary.BigEndian.AppendUint16(input, 40000)
	input = binary.BigEndian.AppendUint16(input, 8080)
	for _, a := range []string{"10.0.1.2", "10.0.2.2"} {
		b := netip.MustParseAddr(a).As16()
		input = append(input, b[:]...)
	}
	key := make([]byte, 16)
	for i := range key {
		key[i] = byte(i)
	}
	mac := siphash.New(key)
	mac.Write(input)
	tag := append([]byte{253, 16, 0xd3, 0xac}, input[:4]...)
	want = append(want, fmt.Sprintf("% x", mac.Sum(tag)))
	for i := 0; i < len(input); i += 16 {
		want = append(want, fmt.Sprintf("% x", input[i:i+16]))
	}
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("ARCHITECTURE.md does not say %q", w)
		}
	}
}

// The policies in README.md are valid as they stand.
func TestReadmePolicy(t *testing.T) {
	n := 0
	for _, block := range strings.Split(read(t, "../../README.md"), "```yaml\n")[1:] {
		src, _, _ := strings.Cut(block, "```")
		if _, err := policy.Build(parse(t, "README.md", src)); err != nil {
			t.Error(err)
		}
		n++
	}
	if n == 0 {
		t.Error("README.md shows no policy")
	}
}

// The make targets that the documents name exist.
func TestMakeTargets(t *testing.T) {
	makefile := read(t, "../../Makefile")
	command := regexp.MustCompile("(?m)(?:`|^)(?:sudo )?make ([a-z-]+)")
	for _, file := range []string{"README.md", "CONTRIBUTING.md"} {
		found := command.FindAllStringSubmatch(read(t, "../../"+file), -1)
		if len(found) == 0 {
			t.Errorf("%s names no target", file)
		}
		for _, m := range found {
			if !strings.Contains(makefile, "\n"+m[1]+":") {
				t.Errorf("%s: no target %q in Makefile", file, m[1])
			}
		}
	}
}
