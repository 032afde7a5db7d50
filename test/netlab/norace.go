//go:build !race

package netlab

const raceDetector = false
