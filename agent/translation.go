package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"sync"

	"go.uber.org/zap"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/envelope"
	"github.com/demarc/demarc/policy/image"
)

// checkedImage remembers the image that was last found good: a preview is followed by the
// application of the same, and most images differ little from the one before.
type checkedImage struct {
	mu       sync.Mutex
	digest   [sha256.Size]byte // of it as it came
	encoded  string            // its own, in hex, without the envelope
	title    title
	subjects policy.Memory
}

// is says whether an image that was last found good has this digest.
func (c *checkedImage) is(encoded string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.encoded == encoded
}

// title is what the log says of an image.
type title struct {
	name    string
	version uint64
}

// judge says whether an image may be handed on, as it came: it compares what a verified
// image decides with what it declares. Verified says whether somebody else, who will
// have to believe in it, has verified these bytes; otherwise they are verified here. The
// very bytes that were good the last time are good.
func (s *service) judge(offered []byte, verified func() error) (title, error) {
	digest := sha256.Sum256(offered)
	s.checked.mu.Lock()
	defer s.checked.mu.Unlock()
	if s.checked.digest == digest {
		return s.checked.title, nil
	}
	var img *image.Image
	encoded, signed, err := envelope.Open(offered)
	if err == nil {
		img, err = image.Decode(encoded)
	}
	if err == nil && verified() != nil {
		err = image.Verify(img)
	}
	if err == nil {
		err = s.translated(img)
	}
	if err != nil {
		return title{}, err
	}
	sum := digest
	if signed != nil {
		sum = sha256.Sum256(encoded)
	}
	s.checked.digest, s.checked.encoded, s.checked.title = digest, hex.EncodeToString(sum[:]), title{img.Name, img.Version}
	return s.checked.title, nil
}

// translated compares the answers of an image's tables with those of the policy that it
// declares, all of them, as the build did. Verify has made the tables again; this asks them, by
// the code that defines what a policy means. The policy's text is not here: what the
// image declares is taken for it, so a compiler that declared something else than was
// written is not found here, but by the build and by policy diff. The caller holds the
// lock.
func (s *service) translated(img *image.Image) error {
	coverage, err := s.checked.subjects.Check(img)
	if err == nil {
		s.log.Info("the image decides as it declares", zap.String("name", img.Name), zap.Stringer("coverage", coverage))
	}
	return err
}
