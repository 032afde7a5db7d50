package agent

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
)

// quarantine leaves a workload of the policy in force its forensic crossings only.
// Automatic is what no person ordered: the core allows few of those at a time.
func (l *link) quarantine(workload string, lasting time.Duration, reason string, automatic bool) error {
	id, err := l.identityOf(workload)
	if err != nil {
		return err
	}
	return l.change(func(c core) (*proto.Status, error) { return c.Quarantine(id, lasting, reason, automatic) })
}

// release ends a workload's quarantine.
func (l *link) release(workload string) error {
	id, err := l.identityOf(workload)
	if err != nil {
		return err
	}
	return l.change(func(c core) (*proto.Status, error) { return c.Release(id) })
}

// identityOf finds a workload of the policy in force by its name, NAME or ZONE/NAME.
func (l *link) identityOf(workload string) (uint32, error) {
	names := l.view().Names
	if names == nil {
		if !l.view().Connected {
			return 0, errAway
		}
		return 0, errNoPolicy
	}
	zone, name, qualified := strings.Cut(workload, "/")
	if !qualified {
		zone, name = "", workload
	}
	for _, w := range names.Image.Workloads {
		if w.Name == name && (!qualified || names.Image.Zones[w.Zone].Name == zone) {
			return uint32(w.ID), nil
		}
	}
	return 0, &api.Error{Code: http.StatusNotFound, Message: fmt.Sprintf("the policy in force has no workload %.100q", workload), Hint: "see `demarc identities`"}
}

func (s *service) quarantine(_ http.ResponseWriter, r *http.Request) (any, error) {
	q := r.URL.Query()
	lasting, err := time.ParseDuration(q.Get("for"))
	if err != nil || lasting <= 0 {
		return nil, &api.Error{Code: http.StatusBadRequest, Message: fmt.Sprintf("for: %.40q is not a time", q.Get("for")), Hint: "give one like 1h"}
	}
	workload, reason := q.Get("workload"), q.Get("reason")
	s.log.Info("quarantine", zap.String("workload", workload), zap.Duration("for", lasting), zap.String("reason", reason), zap.Uint32("uid", uid(r)))
	if err := s.link.quarantine(workload, lasting, reason, false); err != nil {
		s.log.Warn("quarantine refused", zap.Error(err))
		return nil, err
	}
	return s.status(), nil
}

func (s *service) release(_ http.ResponseWriter, r *http.Request) (any, error) {
	workload := r.URL.Query().Get("workload")
	s.log.Info("release", zap.String("workload", workload), zap.Uint32("uid", uid(r)))
	if err := s.link.release(workload); err != nil {
		s.log.Warn("release refused", zap.Error(err))
		return nil, err
	}
	return s.status(), nil
}
