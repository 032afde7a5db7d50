package agent

import (
	"context"
	"time"
)

// Attest calls alive again and again, as long as the agent answers what the command
// line asks; an agent that hangs does not. It returns when ctx ends.
func (a *Agent) Attest(ctx context.Context, every time.Duration, alive func()) {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		a.service.status()
		alive()
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}
