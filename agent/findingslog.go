package agent

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/demarc/demarc/agent/detect"
)

// findingsLog is a file of findings for whoever collects logs: a line of JSON each
// time that one is new or has changed so that it is worth telling. It is only ever
// added to; who rotates it copies and truncates.
type findingsLog struct {
	file *os.File
	form string // json or ocsf
}

// openFindingsLog opens the file before the agent gives up its rights to do so.
func openFindingsLog(c detect.Log) (*findingsLog, error) {
	f, err := os.OpenFile(c.File, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, fmt.Errorf("open detect.log.file: %w", err)
	}
	return &findingsLog{f, c.Form}, nil
}

func (l *findingsLog) write(f *detect.Finding) error {
	var v any = f
	if l.form == "ocsf" {
		v = f.OCSF()
	}
	line, err := json.Marshal(v)
	if err == nil {
		_, err = l.file.Write(append(line, '\n'))
	}
	if err != nil {
		return fmt.Errorf("log a finding: %w", err)
	}
	return nil
}
