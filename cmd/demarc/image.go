package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/policy/image"
)

func newImageCommand(env *environment) *cobra.Command {
	return group("image", "Look into compiled policies", newImageShowCommand(env), newImageVerifyCommand(env))
}

func newImageShowCommand(env *environment) *cobra.Command {
	var form string
	c := &cobra.Command{
		Use: "show FILE", Short: "Show what an image holds", Args: oneArgument("file"),
		RunE: func(_ *cobra.Command, args []string) error {
			img, digest, err := openImage(env, args[0])
			if err != nil {
				return err
			}
			if form == "json" {
				return document(env.Stdout, form, img)
			}
			return showImage(env.Stdout, img, digest)
		},
	}
	outputFlag(c, &form, "text", "json")
	return c
}

func newImageVerifyCommand(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "verify FILE", Short: "Check an image as the core does", Args: oneArgument("file"),
		RunE: func(_ *cobra.Command, args []string) error {
			img, digest, err := openImage(env, args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(env.Stdout, "%s version %d: ok, sha256 %s\n", img.Name, img.Version, digest)
			return err
		},
	}
}

// openImage reads an image and checks everything that the core would.
func openImage(env *environment, file string) (*image.Image, string, error) {
	b, err := readInput(env, file)
	if err != nil {
		return nil, "", err
	}
	if !bytes.HasPrefix(b, []byte(imageMagic)) {
		return nil, "", hintError{fmt.Errorf("%s is not an image", file), "make one with: demarc policy build FILE -o IMAGE"}
	}
	img, err := image.Decode(b)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", file, err)
	}
	if err := image.Verify(img); err != nil {
		return nil, "", fmt.Errorf("%s: %w", file, err)
	}
	sum := sha256.Sum256(b)
	return img, hex.EncodeToString(sum[:]), nil
}

func showImage(w io.Writer, img *image.Image, digest string) error {
	p := printer{w: w}
	mode := "enforce"
	if img.Mode == image.Observe {
		mode = "observe"
	}
	p.row("Policy", "%s version %d, %s", img.Name, img.Version, mode)
	p.row("Trust", "%s", img.TrustDomain)
	p.row("Image", "sha256 %s", digest)
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
