package fault

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/core/proto"
)

// images are the files that hold images in state_dir.
func (s *scene) images() (all []string) {
	s.t.Helper()
	for _, pattern := range []string{"active.*", "previous.*"} {
		found, err := filepath.Glob(filepath.Join(s.node.Dir(), "state", pattern))
		if err != nil {
			s.t.Fatal(err)
		}
		all = append(all, found...)
	}
	if len(all) == 0 {
		s.t.Fatal("there are no images in state_dir")
	}
	return all
}

// Wherever policies come from, a core that starts does not wait for it: what it
// enforces is on disk, and the kernel goes on while the disk is slow, the images
// are corrupt, or they are gone. (X3, I03)
func TestX3Boot(t *testing.T) {
	tests := []struct {
		name   string
		damage func(t *testing.T, file string) // nil = the disk is slow
	}{
		{"slow", nil},
		{"corrupt", func(t *testing.T, file string) {
			if err := os.WriteFile(file, []byte("no image at all"), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"absent", func(t *testing.T, file string) {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newScene(t)
			s.traffic()
			s.node.KillCore()
			images := s.images()
			read, go_on := make(chan string, 1), make(chan struct{})
			core := s.supervise(Machine{}, func(c *Call) Answer {
				if tt.damage == nil && strings.HasPrefix(c.Name, "openat") && slices.Contains(images, c.Path) {
					select {
					case read <- c.Path:
						<-go_on
					default: // the one that was slow is enough
					}
				}
				return Answer{}
			})
			if tt.damage == nil {
				select {
				case <-read:
				case <-core.Ended():
					t.Fatalf("the core ended; it said:\n%s", core.Output())
				}
				// Meanwhile traffic is what it was, and nobody is told anything.
				s.await(20)
				s.check("while the disk is slow")
				if client, err := s.dial(); err == nil {
					client.Close()
					t.Error("the core answers before it has read what it enforces")
				}
				close(go_on)
			}
			want := proto.StateEnforcing
			if tt.damage != nil {
				core.Kill()
				core.Gone(t, time.Minute)
				for _, file := range images {
					tt.damage(t, file)
				}
				core = s.supervise(Machine{}, record)
				want = proto.StateDegraded
			}
			client := s.ready(core)
			if client == nil {
				t.Fatalf("the core does not start; it said:\n%s", core.Output())
			}
			defer client.Close()
			status, err := client.Status()
			if err != nil {
				t.Fatal(err)
			}
			if status.State != want {
				t.Errorf("status %+v, want %s", status, want)
			}
			s.await(20)
			s.quiet()
			s.report()
		})
	}
}

// The first policy of a machine that has just booted is the one on disk: the core
// is not there before it is in force. A disk that cannot be read refuses the
// start. (I03)
func TestI03FirstBoot(t *testing.T) {
	s := newScene(t)
	s.node.Detach()
	core := s.supervise(Machine{}, record)
	client := s.ready(core)
	if client == nil {
		t.Fatalf("the core does not start; it said:\n%s", core.Output())
	}
	status, err := client.Status()
	if err != nil || status.State != proto.StateEnforcing || status.Active.Version != 1 {
		t.Errorf("the first answer: %+v, %v", status, err)
	}
	client.Close()
	core.Kill()
	core.Gone(t, time.Minute)
	s.detach()
	for _, file := range s.images() {
		if err := os.WriteFile(file, []byte("no image at all"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got, said := s.try(Machine{}, record); got != refused || !strings.Contains(said, "stored") {
		t.Errorf("with corrupt images: %s, %s", got, said)
	}
}
