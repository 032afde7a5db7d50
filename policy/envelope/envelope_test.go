package envelope_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/policy/envelope"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/signing"
)

// key is a signing key that is always the same.
func key(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
}

func trusted(t testing.TB, k ed25519.PrivateKey) envelope.Key {
	t.Helper()
	parsed, err := envelope.ParseKey(signing.FormatPublic(signing.Public(k)))
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

// The example in protocol.md of github.com/secure-systems-lab/dsse.
func TestPublishedPAE(t *testing.T) {
	const want = "DSSEv1 29 http://example.com/HelloWorld 11 hello world"
	if got := string(envelope.PAE("http://example.com/HelloWorld", []byte("hello world"))); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := string(envelope.PAE("", nil)); got != "DSSEv1 0  0 " {
		t.Errorf("of nothing: %q", got)
	}
}

// What is written in docs/signing.md, to the byte.
func TestVector(t *testing.T) {
	k := ed25519.NewKeyFromSeed([]byte("demarc: a seed for documentation"))
	got, err := signing.Sign([]byte("DEMARCIM"), k)
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"payload":"REVNQVJDSU0=","payloadType":"application/vnd.demarc.image","signatures":[` +
		`{"keyid":"d6fce0f1b292de8bcea3a02c426777a11934d468646af22fced9b9b114baa95c","sig":"AEE57yZDeC4X9evA8fvmkbIketf6BklCNQm2VI6PsAHF06po6zreCkgdKjULIMBdGm/m0CMdUD5mgfxl1M8xDA=="}]}` + "\n"
	if string(got) != want {
		t.Errorf("got  %swant %s", got, want)
	}
	const public = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA6X1CbSpHgOzmj7/P1+fbCBwz2KRTuhs8WgHVbpQFIs8=\n-----END PUBLIC KEY-----\n"
	if text := string(signing.FormatPublic(signing.Public(k))); text != public {
		t.Errorf("key:\n%s", text)
	}
}

func TestSigner(t *testing.T) {
	img := []byte(image.Magic + " and the rest")
	one, other, stranger := key(1), key(2), key(3)
	b, err := signing.Sign(img, one, other)
	if err != nil {
		t.Fatal(err)
	}
	good, err := envelope.Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	forOther := ed25519.Sign(one, envelope.PAE("application/vnd.in-toto+json", img))
	bare := ed25519.Sign(one, img)
	edit := func(change func(e *envelope.Envelope)) *envelope.Envelope {
		e := &envelope.Envelope{Payload: bytes.Clone(good.Payload)}
		for _, s := range good.Signatures {
			e.Signatures = append(e.Signatures, envelope.Signature{KeyID: s.KeyID, Bytes: bytes.Clone(s.Bytes)})
		}
		change(e)
		return e
	}
	keys := []envelope.Key{trusted(t, one)}
	tests := []struct {
		name string
		e    *envelope.Envelope
		keys []envelope.Key
		want string // id of the key; "" = none
	}{
		{"OK first", good, keys, keys[0].ID},
		{"OK second", good, []envelope.Key{trusted(t, stranger), trusted(t, other)}, trusted(t, other).ID},
		{"OK beside a bad one", edit(func(e *envelope.Envelope) { e.Signatures[1].Bytes[0] ^= 1 }), keys, keys[0].ID},
		{"OK beside one of another scheme", edit(func(e *envelope.Envelope) { e.Signatures[1].Bytes = make([]byte, 71) }), keys, keys[0].ID},
		{"OK no keyid", edit(func(e *envelope.Envelope) { e.Signatures[0].KeyID = "" }), keys, keys[0].ID},
		{"OK keyid of another", edit(func(e *envelope.Envelope) { e.Signatures[0].KeyID = e.Signatures[1].KeyID }), keys, keys[0].ID},
		{"bad nobody trusted", good, nil, ""},
		{"bad stranger", good, []envelope.Key{trusted(t, stranger)}, ""},
		{"bad keyid of a trusted one", edit(func(e *envelope.Envelope) {
			e.Signatures = e.Signatures[1:]
			e.Signatures[0].KeyID = keys[0].ID
		}), keys, ""},
		{"bad payload", edit(func(e *envelope.Envelope) { e.Payload[0] ^= 1 }), keys, ""},
		{"bad shorter payload", edit(func(e *envelope.Envelope) { e.Payload = e.Payload[:len(e.Payload)-1] }), keys, ""},
		{"bad signature", edit(func(e *envelope.Envelope) { e.Signatures[0].Bytes[63] ^= 1 }), keys, ""},
		{"bad half a signature", edit(func(e *envelope.Envelope) { e.Signatures[0].Bytes = e.Signatures[0].Bytes[:32] }), keys, ""},
		{"bad empty signature", edit(func(e *envelope.Envelope) { e.Signatures[0].Bytes = nil }), keys, ""},
		{"bad no signature", edit(func(e *envelope.Envelope) { e.Signatures = nil }), keys, ""},
		{"bad signature for another type", edit(func(e *envelope.Envelope) { e.Signatures[0].Bytes = forOther }), keys, ""},
		{"bad signature of the bare payload", edit(func(e *envelope.Envelope) { e.Signatures[0].Bytes = bare }), keys, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k, ok := tt.e.Signer(tt.keys)
			if k.ID != tt.want || ok != (tt.want != "") {
				t.Errorf("got %q, %v; want %q", k.ID, ok, tt.want)
			}
		})
	}
}

// An envelope as others write it, too.
func TestDecode(t *testing.T) {
	want := &envelope.Envelope{Payload: []byte{0xfb, 0xff, 0xbf}, Signatures: []envelope.Signature{{KeyID: "a b", Bytes: []byte{0xff}}, {Bytes: []byte("x")}}}
	for name, text := range map[string]string{
		"OK": `{"payload":"+/+/","payloadType":"application/vnd.demarc.image","signatures":[{"keyid":"a b","sig":"/w=="},{"sig":"eA=="}]}`,
		"OK other order, spaced": " {\n\t\"signatures\" : [ { \"sig\" :\"/w==\", \"keyid\": \"a b\" } ,{\"keyid\":\"\",\"sig\":\"eA==\"} ] ,\r\n" +
			" \"payloadType\": \"application/vnd.demarc.image\" , \"payload\": \"+/+/\" } \n",
		"OK URL alphabet": `{"payload":"-_-_","payloadType":"application/vnd.demarc.image","signatures":[{"keyid":"a b","sig":"_w=="},{"sig":"eA=="}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			got, err := envelope.Decode([]byte(text))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("envelope (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeRefuses(t *testing.T) {
	const typ = `"payloadType":"application/vnd.demarc.image"`
	whole := func(payload, signatures string) string {
		return `{"payload":"` + payload + `",` + typ + `,"signatures":` + signatures + `}`
	}
	const sig = `{"sig":"eA=="}`
	tests := []struct{ name, text, want string }{
		{"bad empty", "", "envelope:1:1: the file ends too early"},
		{"bad list", "[]", "envelope:1:1: a JSON object is needed"},
		{"bad null", "null", "envelope:1:1: a JSON object is needed"},
		{"bad empty object", "{}", `envelope:1:2: the object holds no "payload"`},
		{"bad cut off", `{"payload":"eA==",`, "the file ends too early"},
		{"bad unknown member", `{"payloads":"eA=="}`, `envelope:1:2: unknown key "payloads": use payload, payloadType, signatures`},
		{"bad other case", `{"Payload":"eA=="}`, `unknown key "Payload"`},
		{"bad payload twice", `{"payload":"eA==","payload":"eA==",` + typ + `,"signatures":[` + sig + `]}`, `envelope:1:19: "payload" is given twice`},
		{"bad no payload", `{` + typ + `,"signatures":[` + sig + `]}`, `the object holds no "payload"`},
		{"bad no type", `{"payload":"eA==","signatures":[` + sig + `]}`, `the object holds no "payloadType"`},
		{"bad no signatures", `{"payload":"eA==",` + typ + `}`, `the object holds no "signatures"`},
		{"bad other type", `{"payload":"eA==","payloadType":"application/vnd.in-toto+json","signatures":[` + sig + `]}`, `payloadType is "application/vnd.in-toto+json", not "application/vnd.demarc.image"`},
		{"bad type in escapes", `{"payload":"eA==","payloadType":"application\/vnd.demarc.image","signatures":[` + sig + `]}`, "character 0x5c is not used here"},
		{"bad trailing", whole("eA==", "["+sig+"]") + "{}", "something follows the object"},
		{"bad trailing NUL", whole("eA==", "["+sig+"]") + "\x00", "something follows the object"},
		{"bad comma at the end", `{"payload":"eA==",}`, "a string is needed here"},
		{"bad no colon", `{"payload" "eA=="}`, "a colon is needed here"},
		{"bad payload is no string", `{"payload":1}`, "a string is needed here"},
		{"bad payload without end", `{"payload":"eA==`, "the string does not end"},
		{"bad newline in base64", whole("eA\n==", "["+sig+"]"), "character 0xa is not used here"},
		{"bad carriage return in base64", whole("eA==\r", "["+sig+"]"), "character 0xd is not used here"},
		{"bad space in base64", whole("eA= =", "["+sig+"]"), "illegal base64 data"},
		{"bad escape in base64", whole(`eA\u003d=`, "["+sig+"]"), "character 0x5c is not used here"},
		{"bad no padding", whole("eA", "["+sig+"]"), "illegal base64 data"},
		{"bad bits after the end", whole("eB==", "["+sig+"]"), "illegal base64 data"},
		{"bad mixed alphabets", whole("+_+_", "["+sig+"]"), "illegal base64 data"},
		{"bad UTF-8", whole("é", "["+sig+"]"), "character 0xc3 is not used here"},
		{"bad empty list", whole("eA==", "[]"), "there is no signature"},
		{"bad signatures is an object", whole("eA==", sig), "a JSON list is needed"},
		{"bad list without end", `{"payload":"eA==",` + typ + `,"signatures":[` + sig + `}`, "a comma or the end of the list is needed here"},
		{"bad nine signatures", whole("eA==", "["+strings.TrimSuffix(strings.Repeat(sig+",", 9), ",")+"]"), "more than 8 signatures"},
		{"bad signature without sig", whole("eA==", `[{"keyid":"x"}]`), `the object holds no "sig"`},
		{"bad cert", whole("eA==", `[{"sig":"eA==","cert":"x"}]`), `unknown key "cert"`},
		{"bad two keyids", whole("eA==", `[{"keyid":"a","sig":"eA==","keyid":"b"}]`), `"keyid" is given twice`},
		{"bad long keyid", whole("eA==", `[{"keyid":"`+strings.Repeat("a", 257)+`","sig":"eA=="}]`), "keyid is longer than 256 bytes"},
		{"bad long sig", whole("eA==", `[{"sig":"`+strings.Repeat("AAAA", 400)+`"}]`), "more than 1024 bytes"},
		{"bad deep", strings.Repeat(`{"signatures":[`, 100_000), `unknown key "signatures": use keyid, sig`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := envelope.Decode([]byte(tt.text))
			if err == nil || !strings.HasPrefix(err.Error(), "envelope:1:") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
	if _, err := envelope.Decode(make([]byte, envelope.MaxSize+1)); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("too large: %v", err)
	}
}

// The largest image still fits, and one byte more does not.
func TestLargestPayload(t *testing.T) {
	if most := base64.StdEncoding.EncodedLen(image.MaxSize); most+1<<10*envelope.MaxSignatures > envelope.MaxSize {
		t.Errorf("an image of %d bytes is %d in an envelope, at most %d are read", image.MaxSize, most, envelope.MaxSize)
	}
}

func TestKey(t *testing.T) {
	k := key(1)
	der, err := x509.MarshalPKIXPublicKey(signing.Public(k))
	if err != nil {
		t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	if got := signing.FormatPublic(signing.Public(k)); !bytes.Equal(got, text) {
		t.Errorf("key in PEM:\n%s want\n%s", got, text)
	}
	parsed := trusted(t, k)
	if !bytes.Equal(parsed.Public, signing.Public(k)) || parsed.ID != envelope.KeyID(signing.Public(k)) {
		t.Errorf("parsed %+v", parsed)
	}
	private, err := signing.FormatKey(k)
	if err != nil {
		t.Fatal(err)
	}
	again, err := signing.ParseKey(private)
	if err != nil || !again.Equal(k) {
		t.Errorf("private key: %v", err)
	}
	block := func(typ string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}))
	}
	rsaLike, _ := hex.DecodeString("302a300506032b656e032100" + strings.Repeat("00", 32)) // X25519
	for _, tt := range []struct{ name, text, want string }{
		{"bad empty", "", "not one PEM block and nothing else"},
		{"bad text", "key", "not one PEM block and nothing else"},
		{"bad text before", "key\n" + string(text), "not one PEM block and nothing else"},
		{"bad two keys", string(text) + string(text), "not one PEM block and nothing else"},
		{"bad header", strings.Replace(string(text), "-----\n", "-----\nA: b\n\n", 1), "not one PEM block and nothing else"},
		{"bad private key", string(private), `a "PRIVATE KEY", not a "PUBLIC KEY"`},
		{"bad certificate", block("CERTIFICATE", der), `a "CERTIFICATE", not a "PUBLIC KEY"`},
		{"bad X25519", block("PUBLIC KEY", rsaLike), "not an Ed25519 key"},
		{"bad long", block("PUBLIC KEY", append(bytes.Clone(der), 0)), "not an Ed25519 key"},
		{"bad short", block("PUBLIC KEY", der[:43]), "not an Ed25519 key"},
		{"bad cut off", string(text[:60]), "not one PEM block and nothing else"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := envelope.ParseKey([]byte(tt.text)); err == nil || err.Error() != tt.want {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
}

// FuzzDecode decodes any bytes. What is accepted can be said in one way, and means
// the same then.
func FuzzDecode(f *testing.F) {
	b, err := signing.Sign([]byte(image.Magic), key(1), key(2))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"signatures":[{"sig":"_w=="}],"payloadType":"application/vnd.demarc.image","payload":""}`))
	f.Add([]byte(`{"payload":"eA==","payload":"eA=="}`))
	keys := []envelope.Key{trusted(f, key(1))}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := envelope.Decode(b)
		if (e == nil) == (err == nil) {
			t.Fatal("neither an envelope nor an error, or both")
		}
		if err != nil {
			return
		}
		text := fmt.Sprintf(`{"payload":%q,"payloadType":%q,"signatures":[`, base64.StdEncoding.EncodeToString(e.Payload), envelope.PayloadType)
		for i, s := range e.Signatures {
			text += strings.Repeat(",", min(i, 1)) + `{"keyid":"` + s.KeyID + `","sig":"` + base64.URLEncoding.EncodeToString(s.Bytes) + `"}`
		}
		again, err := envelope.Decode([]byte(text + "]}"))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(e, again); diff != "" {
			t.Errorf("envelope (-first +again):\n%s", diff)
		}
		if k, ok := e.Signer(keys); ok && (k.ID != keys[0].ID || string(e.Payload) != image.Magic) {
			t.Errorf("forged: %q by %q", e.Payload, k.ID)
		}
	})
}
