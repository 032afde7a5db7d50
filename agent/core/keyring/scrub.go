package keyring

import (
	"crypto/sha256"
	"runtime"
)

// Print is a key's SHA-256. The hash copies what it is given onto the stack: that is
// made large enough before, so that it is not moved meanwhile, and written over behind it.
func Print(secret *[KeySize]byte) [sha256.Size]byte {
	scrub()
	defer scrub()
	return sha256.Sum256(secret[:])
}

// scrub writes over what calls that have returned left on the stack, 8 KiB deep.
//
//go:noinline
func scrub() {
	var below [8 << 10]byte
	runtime.KeepAlive(&below)
}
