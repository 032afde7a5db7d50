package main

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/core/trust"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/envelope"
	"github.com/demarc/demarc/policy/image"
)

func newImageCommand(env *environment) *cobra.Command {
	return group("image", "Look into compiled policies", newImageShowCommand(env), newImageVerifyCommand(env))
}

func newImageShowCommand(env *environment) *cobra.Command {
	var form string
	var o trustOptions
	c := &cobra.Command{
		Use: "show FILE", Short: "Show what an image holds", Args: oneArgument("file"),
		Long: `Show what an image holds, and who signed it. A signature says something only beside
a key that it is checked with: --trust or --key.`,
		RunE: func(_ *cobra.Command, args []string) error {
			img, err := openImage(env, args[0], o)
			if err != nil {
				return err
			}
			if form == "json" {
				return document(env.Stdout, form, img)
			}
			return showImage(env.Stdout, img)
		},
	}
	outputFlag(c, &form, "text", "json")
	o.flags(c)
	return c
}

func newImageVerifyCommand(env *environment) *cobra.Command {
	var o trustOptions
	c := &cobra.Command{
		Use: "verify FILE", Short: "Check an image as the core does", Args: oneArgument("file"),
		Long: `Check an image as the core does. With --trust or --key it must be signed by one of
those keys.`,
		RunE: func(_ *cobra.Command, args []string) error {
			img, err := openImage(env, args[0], o)
			if err != nil {
				return err
			}
			signed := "not signed"
			if n := len(img.Signatures); n > 0 {
				signed = plural(n, "signature") + ", not checked: name a key with --trust or --key"
			}
			if o.given() {
				if img.Signer == "" {
					return hintError{fmt.Errorf("%s: none of the given keys signed it", args[0]), "sign it with: demarc policy build --sign KEYFILE"}
				}
				signed = "signed by " + img.Signer
			}
			_, err = fmt.Fprintf(env.Stdout, "%s version %d: ok, sha256 %s, %s\n", img.Name, img.Version, img.SHA256, signed)
			return err
		},
	}
	o.flags(c)
	return c
}

// trustOptions are the keys that signatures are checked with.
type trustOptions struct {
	dir  string
	keys []string
}

func (o *trustOptions) flags(c *cobra.Command) {
	c.Flags().StringVar(&o.dir, "trust", "", "check signatures with the keys of this `directory`, as the core does with trust_dir")
	c.Flags().StringArrayVar(&o.keys, "key", nil, "check signatures with this public key `file`; may be repeated")
}

func (o *trustOptions) given() bool { return o.dir != "" || len(o.keys) > 0 }

func (o *trustOptions) read() (all []envelope.Key, err error) {
	if o.dir != "" {
		if all, err = trust.Read(o.dir); err != nil {
			return nil, withHint(err)
		}
		if len(all) == 0 {
			return nil, fmt.Errorf("trust directory %s holds no key: every image would do", o.dir)
		}
	}
	for _, file := range o.keys {
		text, err := policy.ReadFileUpTo(file, maxKeyFile)
		if err != nil {
			return nil, err
		}
		k, err := envelope.ParseKey(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		all = append(all, k)
	}
	return all, nil
}

// openedImage is an image with what was found out about it.
type openedImage struct {
	*image.Image
	SHA256     string          // of the image, without envelope
	Signatures []signatureLine `json:",omitempty"`
	Signer     string          `json:",omitempty"` // id of the first given key that signed it
}

type signatureLine struct {
	KeyID string // as the envelope says: nobody signed that
	State string // good, of no given key, not checked
}

// openImage reads an image and checks everything that the core would, but for a
// missing signature.
func openImage(env *environment, file string, o trustOptions) (*openedImage, error) {
	keys, err := o.read()
	if err != nil {
		return nil, err
	}
	b, err := readInput(env, file)
	if err != nil {
		return nil, err
	}
	if !isImage(b) {
		return nil, hintError{fmt.Errorf("%s is not an image", file), "make one with: demarc policy build FILE -o IMAGE"}
	}
	out := &openedImage{}
	body, signed, err := envelope.Open(b)
	if err == nil {
		out.Image, err = image.Decode(body)
	}
	if err == nil {
		err = image.Verify(out.Image)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	sum := sha256.Sum256(body)
	out.SHA256 = hex.EncodeToString(sum[:])
	if signed == nil {
		return out, nil
	}
	for _, s := range signed.Signatures {
		line := signatureLine{s.KeyID, "not checked"}
		if o.given() {
			line.State = "of no given key"
			one := envelope.Envelope{Payload: body, Signatures: []envelope.Signature{s}}
			if k, good := one.Signer(keys); good {
				line.State = "good"
				out.Signer = cmp.Or(out.Signer, k.ID)
			}
		}
		out.Signatures = append(out.Signatures, line)
	}
	return out, nil
}

func showImage(w io.Writer, img *openedImage) error {
	p := printer{w: w}
	mode := "enforce"
	if img.Mode == image.Observe {
		mode = "observe"
	}
	p.row("Policy", "%s version %d, %s", img.Name, img.Version, mode)
	p.row("Trust", "%s", img.TrustDomain)
	p.row("Image", "sha256 %s", img.SHA256)
	for _, s := range img.Signatures {
		p.row("Signature", "%s, %s", cmp.Or(s.KeyID, "unnamed"), s.State)
	}
	p.row("Source", "sha256 %s", hex.EncodeToString(img.Digest[:]))
	if img.NotAfter != 0 {
		p.row("Not after", "%s", time.Unix(img.NotAfter, 0).UTC().Format(time.RFC3339))
	}
	p.row("Tables", "%s, %s, %s", plural(len(img.Rules), "rule"), plural(len(img.Ports), "port range"), plural(len(img.Addresses), "prefix range"))
	for _, z := range img.Zones {
		p.row("Zone", "%s, trust %d", z.Name, z.Trust)
	}
	for _, wl := range img.Workloads {
		p.row("Workload", "%s/%s, identity %d", img.Zones[wl.Zone].Name, wl.Name, wl.ID)
	}
	for _, n := range img.Networks {
		p.row("Network", "%s/%s, %s", img.Zones[n.Zone].Name, n.Name, plural(len(n.CIDRs), "block"))
	}
	for _, c := range img.Crossings {
		p.row("Crossing", "%s, line %d, number %d", c.Name, c.Line, c.Number)
	}
	return p.err
}
