package agent

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/demarc/demarc/agent/detect"
)

// recordingMost bounds a recording, in bytes. What comes later is not in it.
const recordingMost = 256 << 20

// recording is a file of everything that the detectors are given, as detect.Replay
// reads it.
type recording struct {
	file *os.File
	size int64
}

// openRecording opens the file, to add to it, before the agent gives up its rights to do
// so.
func openRecording(name string) (*recording, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, fmt.Errorf("open detect.record: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open detect.record: %w", err)
	}
	return &recording{f, info.Size()}, nil
}

func (r *recording) add(e detect.Event) error {
	line, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("record an event: %w", err)
	}
	if r.size += int64(len(line)) + 1; r.size > recordingMost {
		return fmt.Errorf("detect.record: it has its %d bytes, and nothing more is recorded", recordingMost)
	}
	if _, err := r.file.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("record an event: %w", err)
	}
	return nil
}
