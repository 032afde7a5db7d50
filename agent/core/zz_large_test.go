package core

import (
	"testing"
	"time"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/policytest"
)

func TestZZLarge(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	img, err := policy.Compile(policytest.Large(10000, 100000))
	if err != nil {
		t.Fatal(err)
	}
	b, err := img.Encode()
	if err != nil {
		t.Fatal(err)
	}
	t.Log(len(b), len(img.Rules))
	for range 3 {
		g0 := time.Now()
		if _, err := openImage(b); err != nil {
			t.Fatal(err)
		}
		t.Log("open", time.Since(g0))
		g, _ := openImage(b)
		c.mu.Lock()
		g1 := time.Now()
		err = c.install(g, true)
		t.Log("install", time.Since(g1))
		c.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
	}
}
