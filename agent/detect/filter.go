package detect

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Filter selects findings. The zero value selects everything that no role explains.
type Filter struct {
	Severity   Severity  // at least
	Technique  string    // id; a technique selects its sub-techniques, too
	Workload   string    // WORKLOAD or ZONE/WORKLOAD
	ID         string    // or its beginning
	Since      time.Time // last seen then or later
	Suppressed bool      // those that a role explains, too
}

// Match says whether the filter selects a finding.
func (f *Filter) Match(found *Finding) bool {
	t := found.Technique.ID
	return found.Severity >= f.Severity &&
		(f.Technique == "" || t == f.Technique || strings.HasPrefix(t, f.Technique+".")) &&
		(f.Workload == "" || found.Subject.Workload == f.Workload || found.Subject.Label() == f.Workload) &&
		strings.HasPrefix(found.ID, f.ID) &&
		!found.LastSeen.Before(f.Since) &&
		(f.Suppressed || found.SuppressedBy == "")
}

// Values is the filter as query parameters; ParseFilter reads them back.
func (f *Filter) Values() url.Values {
	v := url.Values{}
	set := func(name, value string) {
		if value != "" {
			v.Set(name, value)
		}
	}
	if f.Severity != 0 {
		set("severity", f.Severity.String())
	}
	set("technique", f.Technique)
	set("workload", f.Workload)
	set("id", f.ID)
	if !f.Since.IsZero() {
		set("since", f.Since.Format(time.RFC3339Nano))
	}
	if f.Suppressed {
		set("suppressed", "true")
	}
	return v
}

// ParseFilter takes the parameters that are filters off v.
func ParseFilter(v url.Values) (*Filter, error) {
	f := &Filter{}
	for _, name := range []string{"severity", "technique", "workload", "id", "since", "suppressed"} {
		if !v.Has(name) {
			continue
		}
		value := v.Get(name)
		var err error
		switch name {
		case "severity":
			err = f.Severity.UnmarshalText([]byte(value))
		case "technique":
			f.Technique = strings.ToUpper(value)
		case "workload":
			f.Workload = strings.TrimPrefix(value, "workload/")
		case "id":
			f.ID = value
		case "since":
			if f.Since, err = time.Parse(time.RFC3339Nano, value); err != nil {
				err = fmt.Errorf("since: %q is no time (RFC 3339)", value)
			}
		case "suppressed":
			if f.Suppressed, err = strconv.ParseBool(value); err != nil {
				err = fmt.Errorf("suppressed: %q is no truth value", value)
			}
		}
		if err != nil {
			return nil, err
		}
		v.Del(name)
	}
	return f, nil
}
