package keyring

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
)

// No page of a process that read keyrings holds a key that it wiped, whatever became of the
// stacks it was read on. The key is remembered turned over, so that this test does not hold it.
func TestWipedKeyIsNowhere(t *testing.T) {
	var over [KeySize]byte
	if _, err := rand.Read(over[:]); err != nil {
		t.Fatal(err)
	}
	read := func(epoch int) *Ring {
		text := fmt.Appendf(nil, `{"keys": [{"epoch": %d, "key": "`, epoch)
		at := len(text)
		text = append(text, strings.Repeat("0", 2*KeySize)+`"}]}`...)
		for i, b := range over {
			b = ^b
			text[at+2*i], text[at+2*i+1] = "0123456789abcdef"[b>>4], "0123456789abcdef"[b&15]
		}
		r, err := Parse("test", text)
		if err != nil {
			t.Error(err)
		}
		return r
	}
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() { read(i % 16).Wipe() }) // each on a stack of its own, which ends with it
	}
	all.Wait()
	kept := read(3) // control: one that is not wiped is found
	if n := places(t, over); n != 1 {
		t.Errorf("a key that is still there once is found %d times", n)
	}
	kept.Wipe()
	if n := places(t, over); n != 0 {
		t.Errorf("a wiped key is found %d times", n)
	}
}

// places counts where this process's memory has the bytes that over is turned over.
func places(t *testing.T, over [KeySize]byte) (n int) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	memory, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	page := make([]byte, 1<<16)
	for line := range strings.Lines(string(maps)) {
		var low, high int64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &low, &high, &mode); err != nil || !strings.HasPrefix(mode, "rw") {
			continue
		}
		for ; low < high; low += int64(len(page)) - (KeySize - 1) { // none is in two looks, nor between them
			got, _ := memory.ReadAt(page, low)
			for i := range got { // turned over, so that what is looked through is found once
				page[i] = ^page[i]
			}
			n += bytes.Count(page[:max(got, 0)], over[:])
		}
	}
	return n
}
