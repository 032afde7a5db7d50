package main

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/envelope"
	"github.com/demarc/demarc/policy/signing"
)

// maxKeyFile bounds the file of one key, in bytes.
const maxKeyFile = 4096

func newKeysGenerateSigningCommand(env *environment) *cobra.Command {
	var out string
	c := &cobra.Command{
		Use: "signing [-o FILE]", Short: "Make a key that signs images", Args: noArguments,
		Long: `Makes an Ed25519 key that signs images: FILE with the private half, for its user
alone, and FILE.pub with the public half, for the trust_dir of every host. Neither
is overwritten.`,
		RunE: func(*cobra.Command, []string) error { return signingKeyRun(env, out) },
	}
	c.Flags().StringVarP(&out, "out", "o", "signing.key", "make this `file` and FILE.pub")
	return c
}

func signingKeyRun(env *environment, out string) error {
	k, err := signing.NewKey()
	if err != nil {
		return err
	}
	private, err := signing.FormatKey(k)
	if err != nil {
		return err
	}
	public := out + ".pub"
	if err := createFile(out, private, 0o600); err != nil {
		return err
	}
	if err := createFile(public, signing.FormatPublic(signing.Public(k)), 0o644); err != nil {
		return errors.Join(err, os.Remove(out))
	}
	_, err = fmt.Fprintf(env.Stdout, "%s: made signing key %s\n%s: its public half, for the trust_dir of every host\n",
		out, envelope.KeyID(signing.Public(k)), public)
	return err
}

// createFile writes a whole file where there is none.
func createFile(path string, content []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(content)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err == nil {
		err = os.Link(f.Name(), path)
	}
	if errors.Is(err, fs.ErrExist) {
		return hintError{fmt.Errorf("%s is there already", path), "choose another file"}
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// readSigningKey reads a private key. A file that others could have read is refused.
func readSigningKey(file string) (ed25519.PrivateKey, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open signing key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("check signing key: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, hintError{fmt.Errorf("signing key %s has mode %v", file, info.Mode()), "make it a file that only its user can read: chmod 600 " + file}
	}
	text, err := io.ReadAll(io.LimitReader(f, maxKeyFile))
	defer clear(text)
	if err != nil {
		return nil, fmt.Errorf("read signing key: %w", err)
	}
	k, err := signing.ParseKey(text)
	if err != nil {
		return nil, hintError{fmt.Errorf("signing key %s: %w", file, err), "make one with: demarc keys generate signing"}
	}
	return k, nil
}

// sign puts an image into an envelope, signed with the keys of the files, and says
// which keys those are.
func sign(img []byte, files []string) (out []byte, by string, err error) {
	keys := make([]ed25519.PrivateKey, len(files))
	ids := make([]string, len(files))
	for i, file := range files {
		if keys[i], err = readSigningKey(file); err != nil {
			return nil, "", err
		}
		defer clear(keys[i])
		ids[i] = envelope.KeyID(signing.Public(keys[i]))
	}
	out, err = signing.Sign(img, keys...)
	return out, strings.Join(ids, ", "), err
}

// isPEM says whether a file starts as one half of a signing key does; a keyring is
// not read for that.
func isPEM(file string) bool {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	start := make([]byte, len("-----BEGIN "))
	_, err = io.ReadFull(f, start)
	return err == nil && string(start) == "-----BEGIN "
}

// signingLine is one half of a signing key as it is listed.
type signingLine struct {
	Kind string `json:"kind"` // signing key, public key
	ID   string `json:"id"`   // SHA-256 of the public key's DER encoding
}

func showSigningKey(env *environment, file, form string) error {
	line := signingLine{Kind: "public key"}
	text, err := policy.ReadFileUpTo(file, maxKeyFile)
	if err != nil {
		return err
	}
	defer clear(text)
	k, err := envelope.ParseKey(text)
	if line.ID = k.ID; err != nil {
		private, bad := readSigningKey(file)
		if bad != nil {
			return bad
		}
		defer clear(private)
		line = signingLine{"signing key", envelope.KeyID(signing.Public(private))}
	}
	return list(env, form, []string{"KIND", "ID"}, []signingLine{line}, func(l signingLine) []string { return []string{l.Kind, l.ID} })
}
