package policy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

func compiledSchema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(Schema()))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("policy.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("policy.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// asJSON is a document as an editor's YAML plugin shows it to a schema.
func asJSON(n *node) any {
	switch n.kind {
	case mapNode:
		out := map[string]any{}
		for _, e := range n.entries {
			out[e.key] = asJSON(e.value)
		}
		return out
	case listNode:
		out := []any{}
		for _, item := range n.items {
			out = append(out, asJSON(item))
		}
		return out
	case intNode:
		return json.Number(n.text)
	case otherNode:
		return n.text == "true"
	case nullNode:
		return nil
	}
	return n.text
}

func TestSchemaAcceptsGoodPolicies(t *testing.T) {
	schema := compiledSchema(t)
	for name, src := range goodSources(t) {
		t.Run(name, func(t *testing.T) {
			root := (&reporter{src: src}).readYAML()
			if err := schema.Validate(asJSON(root)); err != nil {
				t.Errorf("%#v", err)
			}
		})
	}
}

// TestSchemaRefusesBadStructure knows which files of the corpus are wrong in a way
// that a schema can see; the others are wrong in what they refer to.
func TestSchemaRefusesBadStructure(t *testing.T) {
	schema := compiledSchema(t)
	beyond := map[string]bool{
		// Overlaps, trust, references within one document: Parse alone knows.
		"overlapping-units.yaml": true, "overlapping-slices.yaml": true, "overlapping-metadata.yaml": true,
		"higher.yaml": true, "unreachable.yaml": true, "no-crossings.yaml": true,
	}
	refused := 0
	for path, a := range readCorpus(t, "bad_*.txtar") {
		for _, f := range a.Files {
			if !strings.HasSuffix(f.Name, ".yaml") {
				continue
			}
			root := (&reporter{src: corpusSource(f)}).readYAML()
			if root == nil {
				continue // not YAML that has a structure
			}
			err := schema.Validate(asJSON(root))
			if err != nil {
				refused++
			}
			if (err == nil) != beyond[f.Name] && f.Name != "duplicate-keys.yaml" {
				t.Errorf("%s %s: refused is %t", path, f.Name, err != nil)
			}
		}
	}
	if refused < 15 {
		t.Errorf("only %d refused", refused)
	}
}

// TestSchemaIsNotStricter mutates good policies: what the schema refuses, Parse
// must refuse, or editors would complain about policies that work.
func TestSchemaIsNotStricter(t *testing.T) {
	schema := compiledSchema(t)
	for name, src := range goodSources(t) {
		root := (&reporter{src: src}).readYAML()
		eachValue(root, func(path string, slot **node, remove func() func()) {
			was := *slot
			for _, v := range []*node{
				{kind: stringNode, text: "any"}, {kind: stringNode, text: "tcp/1"}, {kind: stringNode, text: "x"}, {kind: intNode, text: "1"},
				{kind: otherNode, text: "true"}, {kind: listNode}, {kind: mapNode}, {text: "null"},
			} {
				v.pos = was.pos
				*slot = v
				if p := reparse(t, root); p != nil {
					if err := schema.Validate(asJSON(root)); err != nil {
						t.Errorf("%s: %s = %s: Parse accepts, the schema does not: %v", name, path, inline(v), err)
					}
				}
			}
			*slot = was
			undo := remove()
			if p := reparse(t, root); p != nil {
				if err := schema.Validate(asJSON(root)); err != nil {
					t.Errorf("%s: without %s: Parse accepts, the schema does not: %v", name, path, err)
				}
			}
			undo()
		})
	}
}

// TestSchemaKnowsTheKeys compares the closed sets of keys and words.
func TestSchemaKnowsTheKeys(t *testing.T) {
	var doc struct {
		Properties map[string]json.RawMessage
		Defs       map[string]struct {
			Properties map[string]json.RawMessage
			Enum       []string
		} `json:"$defs"`
	}
	if err := json.Unmarshal(Schema(), &doc); err != nil {
		t.Fatal(err)
	}
	same := func(what string, want []string, got map[string]json.RawMessage) {
		for _, k := range want {
			if _, ok := got[k]; !ok {
				t.Errorf("%s: the schema lacks %s", what, k)
			}
		}
		if len(got) != len(want) {
			t.Errorf("%s: %d keys in the schema, %d in the language", what, len(got), len(want))
		}
	}
	same("policy", policyKeys, doc.Properties)
	same("crossing", crossingKeys, doc.Defs["crossing"].Properties)
	same("selector", selectorKeys, doc.Defs["selector"].Properties)
	same("assertion", assertionKeys, doc.Defs["assertion"].Properties)
	if got, want := fmt.Sprint(doc.Defs["roleName"].Enum), fmt.Sprint(roleNames); got != want {
		t.Errorf("roles %s, want %s", got, want)
	}
	var waiver struct{ Rule struct{ Enum []string } }
	for def, want := range map[string][]string{"crossingWaiver": crossingRules, "workloadWaiver": workloadRules} {
		if err := json.Unmarshal(doc.Defs[def].Properties["rule"], &waiver.Rule); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(waiver.Rule.Enum); got != fmt.Sprint(want) {
			t.Errorf("%s %s, want %s", def, got, want)
		}
	}
}
