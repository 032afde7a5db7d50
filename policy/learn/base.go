package learn

import (
	"fmt"
	"regexp"
	"strings"
)

// extend writes a base with what it lacks at the end of its sections, and leaves its
// own lines as they are, but for the version, which grows.
func (d *draft) extend(doc *document, base string) {
	if len(d.workloads)+len(d.networks)+len(d.crossings) == 0 {
		for line := range strings.Lines(base) {
			doc.line("%s", strings.TrimSuffix(line, "\n"))
		}
		return
	}
	lines := strings.Split(strings.TrimRight(base, "\n"), "\n")
	bumped := false
	sections := []struct {
		key   string
		count int
		write func(*document, string)
	}{
		{"workloads", len(d.workloads), d.writeWorkloads},
		{"networks", len(d.networks), d.writeNetworks},
		{"crossings", len(d.crossings), d.writeCrossings},
	}
	ends := map[int]func(){} // behind which line something is added
	var missing []func()
	for _, s := range sections {
		if s.count == 0 {
			continue
		}
		last, indent, found := sectionEnd(lines, s.key)
		if !found {
			missing = append(missing, func() {
				doc.line("%s:", s.key)
				s.write(doc, "  ")
			})
			continue
		}
		ends[last] = func() {
			doc.line("%s# learned:", indent)
			s.write(doc, indent)
		}
	}
	for i, line := range lines {
		if !bumped {
			line, bumped = bump(line, d.options.Base.Version)
		}
		doc.line("%s", line)
		if add := ends[i]; add != nil {
			add()
		}
	}
	for _, add := range missing {
		add()
	}
}

// bump makes a version that stands on a line the next one.
func bump(line string, version uint64) (string, bool) {
	was := regexp.MustCompile(fmt.Sprintf(`\bversion:(\s*)%d\b`, version))
	if strings.HasPrefix(strings.TrimSpace(line), "#") || !was.MatchString(line) {
		return line, false
	}
	return was.ReplaceAllString(line, fmt.Sprintf("version:${1}%d", version+1)), true
}

// sectionEnd is the last line of a top-level section that is written over several
// lines, and the indent of its entries.
func sectionEnd(lines []string, key string) (last int, indent string, found bool) {
	for i, line := range lines {
		if !strings.HasPrefix(line, key+":") {
			continue
		}
		last = i
		for j := i + 1; j < len(lines); j++ {
			text := strings.TrimSpace(lines[j])
			switch {
			case text == "" || strings.HasPrefix(text, "#"):
				continue
			case lines[j][0] != ' ' && lines[j][0] != '-':
				return last, indent, indent != "" || last > i
			}
			if last == i {
				indent = lines[j][:len(lines[j])-len(strings.TrimLeft(lines[j], " "))]
			}
			last = j
		}
		return last, indent, last > i
	}
	return 0, "", false
}

// Extendable says whether a base can be added to: sections in braces on one line
// cannot, and are no fault of it.
func Extendable(base []byte) error {
	lines := strings.Split(string(base), "\n")
	for _, key := range []string{"workloads", "networks", "crossings"} {
		for i, line := range lines {
			rest, ok := strings.CutPrefix(line, key+":")
			rest, _, _ = strings.Cut(rest, "#")
			if ok && strings.TrimSpace(rest) != "" {
				return fmt.Errorf("line %d: section %s is written on one line: write its entries on lines of their own", i+1, key)
			}
		}
	}
	return nil
}
