package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// Task is long-lived work.
type Task interface {
	// Run works until ctx ends, and then returns nil, or until it cannot go on,
	// and then says why. It leaves nothing running behind.
	Run(ctx context.Context) error
	// Ready is closed once the task does its work.
	Ready() <-chan struct{}
	// String names the task for logs.
	fmt.Stringer
}

// runTasks runs all tasks until ctx ends or one of them fails, which ends the
// others. ready is called once all of them are ready.
func runTasks(ctx context.Context, ready func(), tasks ...Task) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make([]error, len(tasks))
	var group sync.WaitGroup
	for i, t := range tasks {
		group.Go(func() {
			defer cancel()
			if err := t.Run(ctx); err != nil {
				errs[i] = fmt.Errorf("%s: %w", t, err)
			}
		})
	}
	group.Go(func() {
		for _, t := range tasks {
			select {
			case <-t.Ready():
			case <-ctx.Done():
				return
			}
		}
		ready()
	})
	group.Wait()
	return errors.Join(errs...)
}
