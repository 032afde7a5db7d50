// Package detect finds lateral movement in what the kernel reports: flows and signals
// in, findings out.
package detect
