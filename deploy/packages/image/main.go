// Command image writes an OCI image of several architectures, as a layout in one tar
// file, from directories with its programs and, in sbom/, what is in them. It asks no daemon and no registry, and the
// same programs make the same bytes.
//
//	image -o FILE -version V -time SECONDS [-etc DIR] ARCH=DIR...
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// name is what runtimes call the image once it is imported.
const name = "demarc.dev/demarc"

func main() {
	out := flag.String("o", "", "tar `file` to write")
	version := flag.String("version", "", "version of the programs, and the image's tag")
	seconds := flag.Int64("time", 0, "time of everything in the image, in `seconds` since 1970")
	etc := flag.String("etc", "", "`directory` whose files are /etc/demarc")
	flag.Parse()
	if *out == "" || *version == "" || flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*out, *version, time.Unix(*seconds, 0).UTC(), *etc, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(out, version string, at time.Time, etc string, platforms []string) error {
	var index v1.ImageIndex = mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range platforms {
		arch, dir, found := strings.Cut(p, "=")
		if !found {
			return fmt.Errorf("read arguments: %q is no ARCH=DIR", p)
		}
		image, err := build(dir, etc, arch, version, at)
		if err != nil {
			return fmt.Errorf("build image for %s: %w", arch, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	dir, err := os.MkdirTemp("", "demarc-image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	// Both names that importers look for: containerd's, and the specification's.
	err = path.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          name + ":" + version,
		"org.opencontainers.image.ref.name": version,
	}))
	if err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	return pack(dir, out, at)
}

// build makes the image of one architecture: the programs, what is in them, their
// configuration, and the agent's user.
func build(bin, etc, arch, version string, at time.Time) (v1.Image, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, dir := range []string{"etc", "etc/demarc", "run", "run/demarc", "run/demarc-agent", "tmp", "usr", "usr/bin", "usr/share", "usr/share/demarc", "usr/share/demarc/sbom", "var", "var/lib", "var/lib/demarc"} {
		mode := int64(0o755)
		switch dir {
		case "tmp":
			mode = 0o1777
		case "var/lib/demarc":
			mode = 0o700
		}
		h := tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: mode, ModTime: at}
		if dir == "run/demarc-agent" {
			h.Uid, h.Gid = agentUser, agentUser
		}
		if err := w.WriteHeader(&h); err != nil {
			return nil, err
		}
	}
	files := map[string]string{}
	for _, program := range []string{"demarc", "demarc-agent", "demarc-core"} {
		files["usr/bin/"+program] = filepath.Join(bin, program)
		files["usr/share/demarc/sbom/"+program+".cdx.json"] = filepath.Join(bin, "sbom", program+".cdx.json")
	}
	if etc != "" {
		for _, file := range []string{"agent.yaml", "core.json"} {
			files["etc/demarc/"+file] = filepath.Join(etc, file)
		}
	}
	texts := map[string][]byte{
		"etc/passwd": fmt.Appendf(nil, "root:x:0:0:root:/:/sbin/nologin\ndemarc:x:%d:%d:demarc agent:/:/sbin/nologin\n", agentUser, agentUser),
		"etc/group":  fmt.Appendf(nil, "root:x:0:\ndemarc:x:%d:\n", agentUser),
	}
	for to, from := range files {
		content, err := os.ReadFile(from)
		if err != nil {
			return nil, err
		}
		texts[to] = content
	}
	for _, to := range sorted(texts) {
		mode := int64(0o644)
		if strings.HasPrefix(to, "usr/bin/") {
			mode = 0o755
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: to, Mode: mode, Size: int64(len(texts[to])), ModTime: at}); err != nil {
			return nil, err
		}
		if _, err := w.Write(texts[to]); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil },
		tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	image, err := mutate.Append(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON),
		mutate.Addendum{Layer: layer, History: v1.History{Created: v1.Time{Time: at}, CreatedBy: "demarc " + version}})
	if err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = "linux", arch, v1.Time{Time: at}
	config.Config = v1.Config{
		Entrypoint: []string{"/usr/bin/demarc"}, Env: []string{"PATH=/usr/bin"}, WorkingDir: "/",
		Labels: map[string]string{
			"org.opencontainers.image.title": "demarc", "org.opencontainers.image.version": version,
			"org.opencontainers.image.source": "https://github.com/demarc/demarc", "org.opencontainers.image.licenses": "Apache-2.0 AND (Apache-2.0 OR GPL-2.0-only)",
		},
	}
	return mutate.ConfigFile(image, config)
}

// agentUser is demarc in the image's /etc/passwd.
const agentUser = 65532

func sorted[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// pack writes a directory as a tar file, in one order and with one time.
func pack(dir, out string, at time.Time) (err error) {
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error { // in lexical order
		if err != nil || path == dir {
			return err
		}
		name := strings.TrimPrefix(path, dir+"/")
		if d.IsDir() {
			return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755, ModTime: at})
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content)), ModTime: at}); err != nil {
			return err
		}
		_, err = w.Write(content)
		return err
	})
	return errors.Join(err, w.Close())
}
