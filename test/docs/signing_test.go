package docs_test

import (
	"crypto/ed25519"
	"fmt"
	"strings"
	"testing"

	"github.com/demarc/demarc/policy/envelope"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/signing"
)

// docs/signing.md shows the envelope and the key that its example says, and the
// bounds that the code has.
func TestSigningDocument(t *testing.T) {
	text := read(t, "../../docs/signing.md")
	k := ed25519.NewKeyFromSeed([]byte("demarc: a seed for documentation"))
	b, err := signing.Sign([]byte(image.Magic), k)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		string(b), string(signing.FormatPublic(signing.Public(k))),
		fmt.Sprintf("DSSEv1 %d %s ", len(envelope.PayloadType), envelope.PayloadType),
		"an image " + grouped(image.MaxSize) + ", the envelope " + grouped(envelope.MaxSize) + ".",
		fmt.Sprintf("a list of 1 to %d objects", envelope.MaxSignatures),
	} {
		if !strings.Contains(text, want) {
			t.Errorf("docs/signing.md does not show:\n%s", want)
		}
	}
}

// grouped writes a number with commas.
func grouped(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%s,%03d", grouped(n/1000), n%1000)
}
