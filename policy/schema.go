package policy

import (
	"bytes"
	_ "embed"
)

//go:embed schema.json
var schemaJSON []byte

// Schema returns the JSON Schema (draft 2020-12) of the language, for editors. A
// document that it refuses is refused by Parse; the reverse does not hold.
func Schema() []byte { return bytes.Clone(schemaJSON) }
