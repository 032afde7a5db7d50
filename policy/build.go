package policy

import (
	"fmt"

	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/image/encode"
)

// Build makes the bytes of a policy's image, and believes none of its own steps:
// it proves the assertions, decodes what it encoded, verifies it, and compares
// its answers with Evaluate.
func Build(p *Policy) ([]byte, error) {
	if err := p.Prove(); err != nil {
		return nil, err
	}
	compiled, err := Compile(p)
	if err != nil {
		return nil, err
	}
	b, err := encode.Image(compiled)
	if err != nil {
		return nil, fmt.Errorf("build policy %s: %w", p.Name, err)
	}
	img, err := image.Decode(b)
	if err != nil {
		return nil, fmt.Errorf("build policy %s: %w", p.Name, err)
	}
	if err := image.Verify(img); err != nil {
		return nil, fmt.Errorf("build policy %s: %w", p.Name, err)
	}
	if _, err := Check(p, img); err != nil {
		return nil, fmt.Errorf("build policy %s: %w", p.Name, err)
	}
	return b, nil
}
