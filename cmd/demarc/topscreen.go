package main

import (
	"fmt"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/bpf/abi"
)

// screen is demarc top's model: what is counted, and what of it is looked at.
type screen struct {
	board   *board
	node    string
	printer *flowPrinter
	color   bool

	width, height int
	by            order
	filter        string
	typing        bool // a filter
	paused        bool
	help          bool
	row           int
	open          *edge  // whose flows are looked at
	missed        uint64 // flows while paused
	broken        error
}

func newScreen(b *board, node string, o *topOptions, color bool) *screen {
	s := &screen{board: b, node: inert(node), filter: o.filter, color: color, width: 80, height: 24, printer: &flowPrinter{layout: timeFormats["compact"], color: color}}
	for by := range orders {
		if by.String() == o.sort {
			s.by = by
		}
	}
	return s
}

func tick() tea.Cmd {
	return tea.Tick(time.Second, func(t time.Time) tea.Msg { return tickMessage(t) })
}

func (s *screen) Init() tea.Cmd { return tick() }

// Update takes what happened.
func (s *screen) Update(m tea.Msg) (tea.Model, tea.Cmd) {
	switch m := m.(type) {
	case tea.WindowSizeMsg:
		s.width, s.height = m.Width, m.Height
	case tickMessage:
		if !s.paused {
			s.board.second()
		}
		return s, tick()
	case flowMessage:
		if s.paused {
			s.missed += uint64(len(m))
			break
		}
		for i := range m {
			s.board.add(&m[i])
		}
	case lostMessage:
		s.board.lost += uint64(m)
	case findingMessage:
		f := detect.Finding(m)
		f.Title = inert(f.Title)
		s.board.find(f)
	case brokenMessage:
		s.broken = m.error
		return s, tea.Quit
	case tea.KeyPressMsg:
		return s, s.key(m)
	}
	return s, nil
}

func (s *screen) key(k tea.KeyPressMsg) tea.Cmd {
	name := k.String()
	if name == "ctrl+c" {
		return tea.Quit
	}
	if s.typing {
		switch {
		case name == "enter":
			s.typing = false
		case name == "esc":
			s.typing, s.filter = false, ""
		case name == "backspace":
			if s.filter != "" {
				s.filter = s.filter[:len(s.filter)-1]
			}
		case k.Text != "" && len(s.filter) < 60:
			s.filter += inert(k.Text)
		}
		s.row = 0
		return nil
	}
	switch name {
	case "q":
		return tea.Quit
	case "esc":
		switch {
		case s.help:
			s.help = false
		case s.open != nil:
			s.open = nil
		default:
			s.filter = ""
		}
	case "?":
		s.help = !s.help
	case "/":
		s.typing, s.open = true, nil
	case "s":
		s.by = (s.by + 1) % orders
	case "p", "space":
		s.paused = !s.paused
		s.missed = 0
	case "c":
		s.board = newBoard()
		s.open = nil
	case "up", "k":
		s.row--
	case "down", "j":
		s.row++
	case "enter":
		if rows := s.board.rows(s.filter, s.by); s.open == nil && s.row < len(rows) {
			s.open = rows[s.row]
		}
	}
	s.row = max(0, min(s.row, len(s.board.rows(s.filter, s.by))-1))
	return nil
}

const topHelp = `
  /       filter by a text         enter   the flows of the row
  s       sort by something else   p       pause and go on
  up, k   the row above            down, j the row below
  c       forget what was counted  esc     back; clear the filter
  ?       this help                q       quit
`

// View draws everything.
func (s *screen) View() tea.View {
	var b strings.Builder
	state := ""
	if s.paused {
		state = fmt.Sprintf("  PAUSED, %d not counted", s.missed)
	}
	if s.board.lost > 0 {
		state += fmt.Sprintf("  %d lost", s.board.lost)
	}
	if s.board.forgotten > 0 {
		state += fmt.Sprintf("  %d rows forgotten", s.board.forgotten)
	}
	s.line(&b, fmt.Sprintf("demarc top  %s  %d flows, %d denied%s", s.node, s.board.total, s.board.denied, state), lipgloss.NewStyle().Bold(true))
	filter := s.filter
	if s.typing {
		filter += "_"
	}
	s.line(&b, fmt.Sprintf("sort: %s  filter: %s", s.by, filter), lipgloss.NewStyle().Faint(true))
	switch {
	case s.help:
		b.WriteString(topHelp)
	case s.open != nil:
		s.flows(&b)
	default:
		s.rows(&b)
	}
	used := strings.Count(b.String(), "\n")
	foot := s.findings(max(0, s.height-used-2))
	for range s.height - used - 1 - strings.Count(foot, "\n") {
		b.WriteByte('\n')
	}
	b.WriteString(foot)
	b.WriteString(s.cut("/ filter  enter flows  s sort  p pause  ? help  q quit"))
	v := tea.NewView(b.String())
	v.AltScreen = true
	return v
}

// cut is a line no longer than the screen is wide. Lines hold ASCII only.
func (s *screen) cut(line string) string { return line[:min(len(line), s.width)] }

func (s *screen) line(b *strings.Builder, text string, style lipgloss.Style) {
	if text = s.cut(text); s.color {
		text = style.Render(text)
	}
	b.WriteString(text + "\n")
}

// bodyHeight leaves room for the head, the findings and the foot.
func (s *screen) bodyHeight() int { return max(1, s.height-4-min(len(s.board.findings)+1, s.height/4)) }

func (s *screen) rows(b *strings.Builder) {
	ends := max(10, (s.width-68)/2)
	s.line(b, fmt.Sprintf("  %-*s %-*s %-10s %8s %8s %8s  %s", ends, "SOURCE", ends, "DESTINATION", "PORT", "RATE/S", "TOTAL", "DENIED", "LAST"), lipgloss.NewStyle().Underline(true))
	rows := s.board.rows(s.filter, s.by)
	first := max(0, s.row-s.bodyHeight()+1)
	for i := first; i < len(rows) && i < first+s.bodyHeight(); i++ {
		e := rows[i]
		mark, style := " ", lipgloss.NewStyle()
		if i == s.row {
			mark = ">"
			style = style.Reverse(true)
		}
		if e.verdict == abi.Deny {
			style = style.Foreground(lipgloss.Red)
		}
		s.line(b, fmt.Sprintf("%s %-*.*s %-*.*s %-10.10s %8.1f %8d %8d  %s", mark, ends, ends, e.source, ends, ends, e.destination, e.port, e.rate(), e.total, e.denied, e.reason), style)
	}
}

func (s *screen) flows(b *strings.Builder) {
	e := s.open
	s.line(b, fmt.Sprintf("%s  %d flows, %d denied", e, e.total, e.denied), lipgloss.NewStyle().Underline(true))
	plain := *s.printer
	plain.color = false
	for i := len(e.flows) - 1; i >= 0 && i > len(e.flows)-1-s.bodyHeight(); i-- {
		style := lipgloss.NewStyle()
		if e.flows[i].Verdict == abi.Deny {
			style = style.Foreground(lipgloss.Red)
		}
		s.line(b, plain.compact(&e.flows[i]), style)
	}
}

// findings are the newest ones, in so many lines.
func (s *screen) findings(room int) string {
	var b strings.Builder
	room = min(room, s.height/4)
	n := min(len(s.board.findings), room-1)
	if n <= 0 {
		return ""
	}
	s.line(&b, fmt.Sprintf("FINDINGS: %d", len(s.board.findings)), lipgloss.NewStyle().Bold(true))
	for i := range n {
		f := s.board.findings[len(s.board.findings)-1-i]
		s.line(&b, fmt.Sprintf("  %s  %-8s %s", f.LastSeen.Local().Format("15:04:05"), f.Severity, f.Title), lipgloss.NewStyle())
	}
	return b.String()
}
