//go:build race

package netlab

const raceDetector = true
