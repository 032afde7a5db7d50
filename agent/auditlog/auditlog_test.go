package auditlog_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/auditlog"
	"github.com/demarc/demarc/agent/core/audit"
)

var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

// write makes a log of some records, after which it ends with the head.
func write(t *testing.T, n int) (lines []string, head audit.Head) {
	t.Helper()
	for i := range n {
		r := audit.Record{What: "apply", Who: "user 0, process 7", Time: noon.Add(time.Duration(i) * time.Minute), Detail: fmt.Sprintf(`n%d ,"hash":"x"`, i)}
		if i == 3 {
			r.Removed = 2
		}
		line, next, err := head.Line(r)
		if err != nil {
			t.Fatal(err)
		}
		lines, head = append(lines, string(line)), next
	}
	return lines, head
}

func read(lines []string, head *audit.Head) (auditlog.Summary, int, error) {
	n := 0
	half := len(lines) / 2
	files := []auditlog.File{
		{Name: "one", Reader: strings.NewReader(strings.Join(lines[:half], ""))},
		{Name: "two", Reader: strings.NewReader(strings.Join(lines[half:], ""))},
	}
	s, err := auditlog.Read(files, head, func(audit.Record) { n++ })
	return s, n, err
}

func TestRead(t *testing.T) {
	lines, head := write(t, 6)
	tests := []struct {
		name  string
		lines []string
		head  *audit.Head
		want  auditlog.Summary
	}{
		{"OK", lines, &head, auditlog.Summary{Records: 6, First: 1, Last: 6, From: noon, To: noon.Add(5 * time.Minute), EndIsProven: true}},
		{"OK without the head", lines, nil, auditlog.Summary{Records: 6, First: 1, Last: 6, From: noon, To: noon.Add(5 * time.Minute)}},
		{"OK oldest removed, and said so", lines[2:], &head, auditlog.Summary{Records: 4, First: 3, Last: 6, From: noon.Add(2 * time.Minute), To: noon.Add(5 * time.Minute), EndIsProven: true}},
		{"OK nothing yet", nil, &audit.Head{}, auditlog.Summary{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, n, err := read(tt.lines, tt.head)
			if err != nil || n != tt.want.Records {
				t.Errorf("%d records, %v", n, err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestReadBroken(t *testing.T) {
	lines, head := write(t, 6)
	with := func(change func([]string) []string) []string { return change(append([]string(nil), lines...)) }
	replace := func(i int, old, new string) []string {
		return with(func(l []string) []string { l[i] = strings.Replace(l[i], old, new, 1); return l })
	}
	forged := func(i int) []string { // with a hash of its own that is right
		return with(func(l []string) []string {
			r, _, err := audit.Parse([]byte(strings.TrimSuffix(l[i], "\n")))
			if err != nil {
				t.Fatal(err)
			}
			_, before, err := audit.Parse([]byte(strings.TrimSuffix(l[i-1], "\n")))
			if err != nil {
				t.Fatal(err)
			}
			r.Who = "nobody"
			line, _, err := before.Line(r)
			if err != nil {
				t.Fatal(err)
			}
			l[i] = string(line)
			return l
		})
	}
	tests := []struct {
		name  string
		lines []string
		want  string
	}{
		{"bad one word", replace(1, "user 0", "user 1"), "one:2: its hash does not match its content"},
		{"bad time", replace(4, "2026", "2027"), "two:2: its hash does not match its content"},
		{"bad hash", replace(2, `"hash":"`, `"hash":"0`), "one:3: its hash does not match its content"},
		{"bad forged", forged(3), "two:2: record 5 does not follow the record before it: that one was changed"},
		{"bad forged end", forged(5), "two:3: record 6 is another one than was written"},
		{"bad missing", with(func(l []string) []string { return append(l[:2], l[3:]...) }), "two:1: record 4 follows record 2"},
		{"bad twice", with(func(l []string) []string { l[2] = l[1]; return l }), "one:3: record 2 follows record 2"},
		{"bad cut short", lines[:4], "two:3: the log ends with record 4, but record 6 was written"},
		{"bad begins late", lines[1:], "one:1: records 1 to 1 are missing before it"},
		{"bad not a record", with(func(l []string) []string { l[0] = "{}\n"; return l }), "one:1: not an audit record"},
		{"bad more than a record", replace(0, `"seq"`, `"more":1,"seq"`), `one:1: not an audit record: json: unknown field "more"`},
		{"bad too long", with(func(l []string) []string { l[4] = strings.Repeat("x", 1<<20) + "\n"; return l }), "two:2: not an audit record: longer than"},
		{"bad empty", nil, "two:1: the log ends with record 0, but record 6 was written"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := read(tt.lines, &head)
			var broken *auditlog.Broken
			if !errors.As(err, &broken) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v\nwant %s", err, tt.want)
			}
		})
	}
}

// Whatever single byte is changed, the chain breaks, and not before its line.
func TestReadEveryByte(t *testing.T) {
	lines, head := write(t, 3)
	text := []byte(strings.Join(lines, ""))
	for i := range text {
		changed := bytes.Clone(text)
		changed[i] ^= 1
		_, err := auditlog.Read([]auditlog.File{{Name: "log", Reader: bytes.NewReader(changed)}}, &head, func(audit.Record) {})
		line := 1 + bytes.Count(text[:i], []byte("\n"))
		var broken *auditlog.Broken
		if !errors.As(err, &broken) || broken.Place < fmt.Sprintf("log:%d", line) {
			t.Fatalf("byte %d of line %d: %v", i, line, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	line, _, err := audit.Head{}.Line(audit.Record{What: "start", Who: "core", Time: noon})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(line[:len(line)-1])
	f.Fuzz(func(t *testing.T, line []byte) {
		if r, head, err := audit.Parse(line); err == nil && r.Seq != head.Seq {
			t.Errorf("record %d ends the log with %d", r.Seq, head.Seq)
		}
	})
}
