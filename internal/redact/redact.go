// Package redact takes secrets out of text that is given away.
//
// It knows how demarc's own secrets look, and those that configurations mostly hold.
// It rather takes out too much: what it leaves is read by strangers.
package redact

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"github.com/goccy/go-yaml"
)

// Mark stands where something was taken out.
const Mark = "[redacted]"

// shapes are secrets that are known by how they look.
var shapes = []struct {
	look *regexp.Regexp
	into string
}{
	{regexp.MustCompile(`(?s)-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(-----END [A-Z0-9 ]*PRIVATE KEY-----|\z)`), Mark},
	{regexp.MustCompile(`\$(2[abxy]?|5|6|y|argon2id?|7)\$[A-Za-z0-9./$=,+-]{8,}`), Mark},                        // password hashes
	{regexp.MustCompile(`\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*`), Mark},                     // JSON web tokens
	{regexp.MustCompile(`\b(gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|sk-|AKIA|ASIA)[A-Za-z0-9_-]{8,}`), Mark}, // tokens of services
	{regexp.MustCompile(`://[^/\s:@"']*:[^/\s@"']+@`), "://" + Mark + "@"},
	{regexp.MustCompile(`(?i)\b(bearer|basic|digest|negotiate)\s+[A-Za-z0-9._~+/=-]{8,}`), "$1 " + Mark},
	{regexp.MustCompile(`\b(MC4CAQAwBQYDK2Vw)[A-Za-z0-9+/=]+`), Mark}, // PKCS#8 of Ed25519, without its frame
	{regexp.MustCompile(`\b[0-9A-Fa-f]{32}\b`), Mark},                 // tag keys; digests are longer, fingerprints shorter
	{regexp.MustCompile(`(?i)((?:[a-z0-9]+[_-])*(?:pass(?:word|wd|phrase)?|secret|token|api[_-]?key|private[_-]?key|credentials?|authorization|cookie))(["']?\s*[:=]\s*)("[^"\n]*"|'[^'\n]*'|[^\s,;}"']+)`), "$1$2" + Mark},
}

// Text takes secrets out of text of any form.
func Text(b []byte) []byte {
	for _, s := range shapes {
		b = s.look.ReplaceAll(b, []byte(s.into))
	}
	return b
}

// named are keys of configurations whose values nobody else may see, whatever they
// look like.
var named = regexp.MustCompile(`(?i)pass|secret|token|credential|authorization|cookie|webhook|users|headers|private|(^|_)key$|api_?key`)

// Config takes secrets out of a configuration in YAML or JSON. Comments, which may hold
// anything, go with them. What cannot be read is left out as a whole.
func Config(b []byte) []byte {
	var v any
	if err := yaml.NewDecoder(bytes.NewReader(b), yaml.UseOrderedMap()).Decode(&v); err != nil {
		return []byte("# left out: it is no YAML\n")
	}
	out, err := yaml.Marshal(clean(v))
	if err != nil {
		return []byte("# left out: it cannot be written\n")
	}
	return Text(out)
}

func clean(v any) any {
	switch v := v.(type) {
	case yaml.MapSlice:
		for i, item := range v {
			if named.MatchString(fmt.Sprint(item.Key)) && item.Value != nil {
				v[i].Value = Mark
			} else {
				v[i].Value = clean(item.Value)
			}
		}
	case []any:
		for i := range v {
			v[i] = clean(v[i])
		}
	case string:
		return strings.ToValidUTF8(string(Text([]byte(v))), "?")
	}
	return v
}
