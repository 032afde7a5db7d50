package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"sync"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/agent/flow"
)

// topOptions are those of demarc top.
type topOptions struct {
	filter string
	sort   string
}

func newTopCommand(env *environment) *cobra.Command {
	o := topOptions{sort: sortRate.String()}
	c := &cobra.Command{
		Use:   "top",
		Short: "Watch who talks to whom, and who is refused, on the whole screen",
		Long: `Watch who talks to whom, and who is refused, on the whole screen.

Flows are summed up by who opened them, to whom, on which port: with their rate over
the last seconds, how many were refused, and why the last one was. Findings show
below. Keys: / filter, enter look at one row's flows, s sort, p pause, c forget what
was counted, ? help, esc back, q quit.`,
		Example: `  demarc top
  demarc top --filter data/ --sort denied`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return topRun(c.Context(), env, &o) },
	}
	c.Flags().StringVar(&o.filter, "filter", "", "show rows that hold this `TEXT` only")
	words := []string{sortRate.String(), sortDenied.String(), sortTotal.String(), sortName.String()}
	c.Flags().Var(&choice{&o.sort, words}, "sort", "what rows are sorted by: rate, denied, total or name")
	complete(c, "sort", words...)
	return c
}

// Messages to the screen.
type (
	flowMessage    []flow.Flow
	lostMessage    uint64
	findingMessage detect.Finding
	brokenMessage  struct{ error }
	tickMessage    time.Time
)

func topRun(ctx context.Context, env *environment, o *topOptions) error {
	if !env.Interactive {
		return usagef("top needs a terminal; for a pipe there is: demarc flows -f")
	}
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	// An agent that is away is an error like that of any other command.
	status, err := client.Status(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	color := env.Getenv("NO_COLOR") == ""
	p := tea.NewProgram(newScreen(newBoard(), status.Node, o, color), tea.WithContext(ctx), tea.WithInput(env.Stdin), tea.WithOutput(env.Stdout))
	go follow(ctx, client, p.Send)
	go func() {
		for f, err := range client.Findings(ctx, url.Values{"follow": {"true"}}) {
			if err != nil {
				return // findings are beside the point; the flows tell that the agent is away
			}
			p.Send(findingMessage(f))
		}
	}()
	last, err := p.Run()
	if s, ok := last.(*screen); ok && s.broken != nil {
		return s.broken
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// topBatch and topWait bound how often the screen is told of flows.
const (
	topBatch = 512
	topWait  = 200 * time.Millisecond
)

// follow sends flows to the screen by the batch, until the stream ends. A screen that
// is slower than the flows makes the agent lose some for it, and tell how many.
func follow(ctx context.Context, client *api.Client, send func(tea.Msg)) {
	var mu sync.Mutex
	var batch []flow.Flow
	hand := func() {
		mu.Lock()
		defer mu.Unlock()
		if len(batch) > 0 {
			send(flowMessage(batch))
			batch = nil
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		for tick := time.NewTicker(topWait); ; {
			select {
			case <-ctx.Done():
				tick.Stop()
				return
			case <-tick.C:
				hand()
			}
		}
	}()
	for text, err := range client.FlowLines(ctx, url.Values{"follow": {"true"}, "last": {"0"}}) {
		var l api.Line
		if err == nil {
			err = json.Unmarshal(text, &l)
		}
		if err != nil {
			send(brokenMessage{err})
			return
		}
		if l.Flow == nil {
			send(lostMessage(l.Lost))
			continue
		}
		l.Flow.Inert()
		mu.Lock()
		batch = append(batch, *l.Flow)
		full := len(batch) >= topBatch
		mu.Unlock()
		if full {
			hand()
		}
	}
	if ctx.Err() == nil {
		send(brokenMessage{fmt.Errorf("the agent ended the stream of flows")})
	}
}
