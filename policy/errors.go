package policy

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Error is one thing wrong with a policy: what, where, and how to mend it.
type Error struct {
	File    string
	Pos     Pos    // zero when the problem is not at one place
	Msg     string // lowercase, no full stop
	Hint    string // how to mend it; may be empty
	Excerpt string // the source line, cut to a readable width; may be empty
	Caret   int    // column of Pos within Excerpt, from 1; 0 = no caret
}

// Error prints the problem, the line it is on and the hint.
func (e *Error) Error() string {
	var b strings.Builder
	if e.Pos.Line > 0 {
		fmt.Fprintf(&b, "%s:%d:%d: %s", e.File, e.Pos.Line, e.Pos.Column, e.Msg)
	} else {
		fmt.Fprintf(&b, "%s: %s", e.File, e.Msg)
	}
	if e.Excerpt != "" {
		fmt.Fprintf(&b, "\n    %s", e.Excerpt)
		if e.Caret > 0 {
			fmt.Fprintf(&b, "\n    %s^", strings.Repeat(" ", e.Caret-1))
		}
	}
	if e.Hint != "" {
		fmt.Fprintf(&b, "\n    hint: %s", e.Hint)
	}
	return b.String()
}

// Errors is everything wrong with a policy, in the order of the source.
type Errors []*Error

// Error prints each problem.
func (es Errors) Error() string {
	lines := make([]string, len(es))
	for i, e := range es {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap gives errors.As each problem.
func (es Errors) Unwrap() []error {
	out := make([]error, len(es))
	for i, e := range es {
		out[i] = e
	}
	return out
}

// maxErrors bounds what one bad document can make us keep and print.
const maxErrors = 1000

// reporter collects the problems of one document.
type reporter struct {
	file    string
	src     []byte
	errs    Errors
	dropped int
	lines   []int // offset of each line's start, made when first needed
	guesses int   // suggestions made; see nearest
}

// add reports a problem at a position. The zero position is the whole document.
func (r *reporter) add(at Pos, hint, format string, args ...any) {
	if len(r.errs) >= maxErrors {
		r.dropped++
		return
	}
	e := &Error{File: r.file, Pos: at, Msg: fmt.Sprintf(format, args...), Hint: hint}
	e.Excerpt, e.Caret = r.excerpt(at)
	r.errs = append(r.errs, e)
}

// err returns everything reported, sorted by position, or nil.
func (r *reporter) err() error {
	if len(r.errs) == 0 {
		return nil
	}
	slices.SortStableFunc(r.errs, func(a, b *Error) int { return a.Pos.compare(b.Pos) })
	if r.dropped > 0 {
		r.errs = append(r.errs, &Error{File: r.file, Msg: fmt.Sprintf("%d more problems are not listed", r.dropped)})
		r.dropped = 0
	}
	return r.errs
}

func (p Pos) compare(q Pos) int {
	if p.Line != q.Line {
		return p.Line - q.Line
	}
	return p.Column - q.Column
}

// excerptWidth is how much of a line an error shows, in characters.
const excerptWidth = 100

// excerpt returns the source line of a position, cut around the column, with
// everything that a terminal would act on made visible.
func (r *reporter) excerpt(at Pos) (string, int) {
	if at.Line < 1 {
		return "", 0
	}
	if r.lines == nil {
		r.lines = append(r.lines, 0)
		for i, c := range r.src {
			if c == '\n' {
				r.lines = append(r.lines, i+1)
			}
		}
	}
	if at.Line > len(r.lines) {
		return "", 0
	}
	line := r.src[r.lines[at.Line-1]:]
	if end := bytes.IndexByte(line, '\n'); end >= 0 {
		line = line[:end]
	}
	start, column := 0, max(at.Column, 1)
	for column > excerptWidth*3/4 && start < len(line) {
		_, n := utf8.DecodeRune(line[start:])
		start += n
		column--
	}
	var b strings.Builder
	width := 0
	for rest := line[start:]; len(rest) > 0 && width < excerptWidth; width++ {
		c, n := utf8.DecodeRune(rest)
		if !allowedRune(c) || (c == utf8.RuneError && n == 1) {
			c = '\ufffd'
		}
		b.WriteRune(c)
		rest = rest[n:]
	}
	text := strings.TrimRight(b.String(), " ")
	if text == "" {
		return "", 0
	}
	return text, min(column, width+1)
}

// maxGuesses bounds the work on suggestions: a document wrong in a hundred
// thousand places needs no hundred thousand guesses.
const maxGuesses = 50

// nearest suggests the candidate that a misspelt word most likely means, as
// "did you mean ...?", or nothing. Candidates in sorted order make it stable.
func (r *reporter) nearest(word string, candidates []string) string {
	if r.guesses >= maxGuesses || len(word) > 128 {
		return ""
	}
	r.guesses++
	best, bestDistance := "", 1+min(3, max(1, len(word)/3), max(0, len(word)-1))
	for _, c := range candidates {
		if d := editDistance(word, c, bestDistance); d < bestDistance {
			best, bestDistance = c, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("did you mean %s?", best)
}

// editDistance counts the insertions, deletions, replacements and swaps of
// neighbours that turn a into b, or returns limit when they are at least that many.
func editDistance(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return min(last[len(b)], limit)
}
