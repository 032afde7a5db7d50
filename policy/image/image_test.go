package image_test

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/image/encode"
	"github.com/demarc/demarc/policy/policytest"
)

// shop is a compiled policy with every kind of record.
func shop(t testing.TB) *image.Image {
	t.Helper()
	p := policytest.Shop()
	p.Workloads[0].Match = append(p.Workloads[0].Match,
		policy.Selector{Kind: image.SelectKubernetes, Namespace: "shop", Labels: map[string]string{"app": "api", "tier": "1"}},
		policy.Selector{Kind: image.SelectContainer, Image: "shop/api"})
	return compile(t, p)
}

func compile(t testing.TB, p *policy.Policy) *image.Image {
	t.Helper()
	img, err := policy.Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func encoded(t testing.TB, img *image.Image) []byte {
	t.Helper()
	b, err := encode.Image(img)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// seal writes the checksum that the content should have.
func seal(b []byte) {
	sum := sha256.Sum256(b[:len(b)-32])
	copy(b[len(b)-32:], sum[:])
}

var comparePrefix = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

func TestEncodeDecode(t *testing.T) {
	images := map[string]*image.Image{"shop": shop(t), "empty": {}}
	for seed := range uint64(100) {
		images[fmt.Sprintf("random %d", seed)] = compile(t, policytest.Random(rand.New(rand.NewPCG(seed, 3)), policytest.Small))
	}
	for name, want := range images {
		b := encoded(t, want)
		got, err := image.Decode(b)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want, got, comparePrefix); diff != "" {
			t.Errorf("%s (-encoded +decoded):\n%s", name, diff)
		}
		if again := encoded(t, got); string(again) != string(b) {
			t.Errorf("%s: encodes in two ways", name)
		}
	}
}

func TestEncodeRefuses(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(*image.Image)
		want  string
	}{
		{"bad v4-mapped block", func(img *image.Image) {
			img.Networks[0].CIDRs[0] = netip.MustParsePrefix("::ffff:10.0.0.0/104")
		}, "encode image: address block ::ffff:10.0.0.0/104: not IPv4 or plain IPv6"},
		{"bad zero block", func(img *image.Image) { img.Addresses[0].Prefix = netip.Prefix{} },
			"encode image: address block invalid Prefix: not IPv4 or plain IPv6"},
		{"bad long string", func(img *image.Image) { img.Name = strings.Repeat("x", 65536) },
			"encode image: string of 65536 bytes"},
		{"bad many alternatives", func(img *image.Image) { img.Rules[0].Crossings = make([]uint32, 256) },
			"encode image: list of 256, at most 255 fit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img := shop(t)
			tt.spoil(img)
			if _, err := encode.Image(img); err == nil || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}

func TestDecodeRefuses(t *testing.T) {
	// Offsets in the table of sections: header 24, then offset and count of each.
	const table = 24
	put := func(b []byte, at int, v uint32) { binary.LittleEndian.PutUint32(b[at:], v) }
	get := func(b []byte, at int) uint32 { return binary.LittleEndian.Uint32(b[at:]) }
	section := func(b []byte, i int) int { return int(get(b, table+8*i)) }
	for _, tt := range []struct {
		name  string
		spoil func(b []byte) []byte
		want  string
	}{
		{"OK", func(b []byte) []byte { return b }, ""},
		{"bad empty", func(b []byte) []byte { return nil }, "0 bytes are too few"},
		{"bad truncated", func(b []byte) []byte { return b[:len(b)-1] }, "header says 1698 bytes, there are 1697"},
		{"bad extended", func(b []byte) []byte { return append(b, 0) }, "header says 1698 bytes, there are 1699"},
		{"bad magic", func(b []byte) []byte { b[0] = 'X'; return b }, "not a policy image"},
		{"bad format", func(b []byte) []byte { put(b, 8, 2); return b }, "format 2, this program reads 1"},
		{"bad sections", func(b []byte) []byte { put(b, 12, 18); return b }, "18 sections, want 17"},
		{"bad count", func(b []byte) []byte { put(b, table+8+4, 0xffffffff); return b },
			"section 1: 4294967295 records at 220 do not fit"},
		{"bad overlap", func(b []byte) []byte { put(b, table+8, get(b, table+8)-1); return b },
			"section 1: 4 records at 219 do not fit"},
		{"bad slack", func(b []byte) []byte { put(b, table+8*16+4, get(b, table+8*16+4)-1); return b },
			"1 bytes after the last section"},
		{"bad flags", func(b []byte) []byte { b[section(b, 1)-1] = 4; return b }, "policy flags 0x4 are unknown"},
		{"bad string reference", func(b []byte) []byte { put(b, section(b, 1), 1000); return b }, "string 1000 of 28"},
		{"bad unused string", func(b []byte) []byte { put(b, section(b, 1)+18, get(b, section(b, 1))); return b },
			`string "internet" is not used`},
		{"bad role count", func(b []byte) []byte { b[section(b, 2)+10] = 9; return b },
			"section 3: 9 records wanted, 1 are left"},
		{"bad role left over", func(b []byte) []byte { b[section(b, 2)+12+10] = 0; return b },
			"section 3: 12 bytes belong to nothing"},
		{"bad prefix length", func(b []byte) []byte { b[section(b, 5)+16] = 129; return b },
			"address block ::: length 129"},
		{"bad v4 prefix length", func(b []byte) []byte { b[section(b, 5)+17+16] = 95; return b },
			"address block 0.0.0.0: length -1"},
		{"bad alternatives", func(b []byte) []byte { b[section(b, 13)+11] = 250; return b },
			"250 alternatives wanted, 15 are left"},
		{"bad alternatives left over", func(b []byte) []byte { b[section(b, 13)+11] = 0; return b },
			"1 crossings belong to no rule"},
		{"bad string order", func(b []byte) []byte {
			text := section(b, 16) // "" then "/lab/bastion", "/lab/postgres"
			b[text+5] = 'z'
			return b
		}, "string 2: out of order"},
		{"bad string length", func(b []byte) []byte { b[section(b, 15)+1] = 0xff; return b }, "string 0: 65280 bytes, 216 are left"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := tt.spoil(encoded(t, shop(t)))
			if len(b) > 32 && string(b[:8]) == "DEMARCIM" {
				seal(b)
			}
			_, err := image.Decode(b)
			got := ""
			if err != nil {
				got = strings.TrimPrefix(err.Error(), "decode image: ")
			}
			if got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// TestDecodeRefusesEveryFlip: no single changed byte passes the checksum.
func TestDecodeRefusesEveryFlip(t *testing.T) {
	b := encoded(t, shop(t))
	for i := range b {
		for _, mask := range []byte{1, 0x80, 0xff} {
			b[i] ^= mask
			if _, err := image.Decode(b); err == nil {
				t.Fatalf("byte %d changed by %#x is accepted", i, mask)
			}
			b[i] ^= mask
		}
	}
}

// TestVerifyEveryFlip changes every byte and makes the checksum good again, as a
// broken compiler or a dishonest signer could. What is still accepted must be an
// image in its own right: it encodes to the same bytes, and its tables answer
// what its crossings declare.
func TestVerifyEveryFlip(t *testing.T) {
	b := encoded(t, shop(t))
	refused, accepted := 0, 0
	for i := range len(b) - 32 {
		for _, mask := range []byte{1, 0x10, 0x80} {
			changed := slices.Clone(b)
			changed[i] ^= mask
			seal(changed)
			img, err := image.Decode(changed)
			if err != nil {
				refused++
				continue
			}
			if string(encoded(t, img)) != string(changed) {
				t.Fatalf("byte %d changed by %#x: decoded, but encodes differently", i, mask)
			}
			if image.Verify(img) != nil {
				refused++
				continue
			}
			accepted++
			compareWithDeclarations(t, img, i)
		}
	}
	if refused < accepted || accepted == 0 {
		t.Errorf("%d refused, %d accepted", refused, accepted)
	}
}

// compareWithDeclarations compares Decide with a reading of the image's crossings.
func compareWithDeclarations(t *testing.T, img *image.Image, flipped int) {
	t.Helper()
	x := img.Index()
	ids := []image.ID{image.Unmanaged}
	for _, w := range img.Workloads {
		ids = append(ids, w.ID)
	}
	addresses := []netip.Addr{{}, netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("2001:db8::1")}
	for _, subject := range ids {
		for _, peer := range append(ids, image.None) {
			for _, r := range img.Ports {
				for d := range abi.Direction(2) {
					q := image.Query{
						Subject: subject, Direction: d, Port: image.Port{Proto: r.Proto, Number: r.High},
						Address: addresses[int(r.High+uint16(peer))%len(addresses)], Proof: abi.ProofIdentity, Peer: peer,
						Now: policytest.Epoch,
					}
					if peer == image.None {
						q.Proof = abi.ProofNone
					}
					want := declared(img, q)
					if got := x.Decide(q); got.Verdict == abi.Allow && got.Reason == abi.ByCrossing && got.Crossing != want ||
						got.Reason != abi.ByCrossing && want >= 0 && !(img.Crossings[want].Decoy && got.Reason == abi.DecoyTouched) {
						t.Fatalf("byte %d: %+v: crossing %d declares it, decided %+v", flipped, q, want, got)
					}
				}
			}
		}
	}
}

// declared is the first crossing that admits the query; -1 if none does.
func declared(img *image.Image, q image.Query) int {
	is := func(id image.ID, t image.Term) bool {
		i := slices.IndexFunc(img.Workloads, func(w image.Workload) bool { return w.ID == id })
		switch t.Kind {
		case image.TermWorkload:
			return i == int(t.Index)
		case image.TermZone:
			return i >= 0 && img.Workloads[i].Zone == uint16(t.Index)
		case image.TermUnmanaged:
			return id == image.Unmanaged
		}
		return t.Kind == image.TermAny
	}
	return slices.IndexFunc(img.Crossings, func(c image.Crossing) bool {
		mine, theirs := c.From, c.To
		if q.Direction == abi.Ingress {
			mine, theirs = c.To, c.From
		}
		open := (c.Since == 0 || c.Since <= q.Now.Unix()) && (c.Until == 0 || q.Now.Unix() < c.Until)
		port := slices.ContainsFunc(c.Ports, func(s image.Span) bool {
			return s.Proto == q.Port.Proto && s.Low <= q.Port.Number && q.Port.Number <= s.High
		})
		return open && port &&
			slices.ContainsFunc(mine, func(t image.Term) bool { return is(q.Subject, t) }) &&
			slices.ContainsFunc(theirs, func(t image.Term) bool {
				if t.Kind == image.TermNetwork {
					return slices.ContainsFunc(img.Networks[t.Index].CIDRs, func(p netip.Prefix) bool { return p.Contains(q.Address) })
				}
				return t.Kind == image.TermAny || q.Proof == abi.ProofIdentity && is(q.Peer, t)
			})
	})
}

func TestDecideAtWindowEdges(t *testing.T) {
	p := policytest.Shop()
	p.Crossings[3].Since = policytest.Epoch.Add(-time.Hour)
	img := compile(t, p)
	ids := p.IDs()
	for _, tt := range []struct {
		name string
		at   time.Duration
		want image.Decision
	}{
		{"bad a nanosecond before", -time.Hour - 1, image.Decision{Verdict: abi.Deny, Reason: abi.NotInWindow, Crossing: -1}},
		{"OK when it opens", -time.Hour, image.Decision{Verdict: abi.Allow, Reason: abi.ByCrossing, Crossing: 3}},
		{"OK the last nanosecond", time.Hour - 1, image.Decision{Verdict: abi.Allow, Reason: abi.ByCrossing, Crossing: 3}},
		{"bad when it closes", time.Hour, image.Decision{Verdict: abi.Deny, Reason: abi.NotInWindow, Crossing: -1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := image.Query{
				Subject: ids["bastion"], Port: image.Port{Proto: image.TCP, Number: 22}, Proof: abi.ProofIdentity,
				Peer: ids["postgres"], Now: policytest.Epoch.Add(tt.at),
			}
			if got := img.Index().Decide(q); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
			if got := p.Evaluate(q); got != tt.want {
				t.Errorf("evaluator: got %+v, want %+v", got, tt.want)
			}
		})
	}
}

// FuzzDecode: any bytes are refused or are the one encoding of what they decode
// to, and neither that nor verifying it panics.
func FuzzDecode(f *testing.F) {
	b := encoded(f, shop(f))
	f.Add(b)
	f.Add(encoded(f, &image.Image{}))
	f.Add(b[:100])
	f.Fuzz(func(t *testing.T, b []byte) {
		for range 2 {
			if img, err := image.Decode(b); err == nil {
				_ = image.Verify(img)
				again, err := encode.Image(img)
				if err != nil || string(again) != string(b) {
					t.Fatalf("decoded image does not encode to its bytes: %v", err)
				}
			}
			if len(b) < 32 {
				return
			}
			b = slices.Clone(b)
			seal(b) // past the checksum, where the rest of the decoder is
		}
	})
}
