package agent

import (
	"encoding/json"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/demarc/demarc/agent/detect"
)

// findingsRequest is one request for findings.
type findingsRequest struct {
	filter *detect.Filter
	follow bool
}

func parseFindingsRequest(v url.Values) (*findingsRequest, error) {
	filter, err := detect.ParseFilter(v)
	if err != nil {
		return nil, badRequest("%s", err)
	}
	q := &findingsRequest{filter: filter}
	for name, values := range v {
		if name != "follow" {
			return nil, badRequest("unknown parameter %q", name)
		}
		if q.follow, err = strconv.ParseBool(values[len(values)-1]); err != nil {
			return nil, badRequest("follow: %q is no truth value", values[len(values)-1])
		}
	}
	return q, nil
}

// findings streams findings as JSON lines. Who follows gets a finding again when it
// has changed so that it is worth telling.
func (s *service) findings(w http.ResponseWriter, r *http.Request) {
	q, err := parseFindingsRequest(r.URL.Query())
	if err != nil {
		refuse(w, err)
		return
	}
	ctx := r.Context()
	s.link.catchUp(ctx)
	s.detection.catchUp(ctx)
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.WriteHeader(http.StatusOK)
	rc := http.NewResponseController(w)
	encoder := json.NewEncoder(w)
	revision := uint64(0)
	for {
		var found []detect.Finding
		found, revision = s.detection.found.After(revision)
		for i := range found {
			if !q.filter.Match(&found[i]) {
				continue
			}
			if err := encoder.Encode(&found[i]); err != nil {
				return // the reader has gone
			}
		}
		if err := rc.Flush(); err != nil {
			return
		}
		if err := rc.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
			return
		}
		if !q.follow || !s.detection.found.Wait(ctx, revision) {
			return
		}
	}
}
