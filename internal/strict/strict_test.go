package strict

import (
	"encoding/json"
	"slices"
	"testing"
)

// TestReader reads {"name": text, "list": [numbers]}.
func TestReader(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"OK", `{"name": "a", "list": [1, 2]}`, ""},
		{"OK empty", "{}\n", ""},
		{"bad nothing", "", "f:1:1: the file ends too early"},
		{"bad list", "[]", "f:1:1: a JSON object is needed"},
		{"bad unknown", "{\n \"nam\": 1}", `f:2:2: unknown key "nam": use list, name`},
		{"bad case", `{"Name": "a"}`, `f:1:2: unknown key "Name": use list, name`},
		{"bad twice", `{"name": "a", "name": "b"}`, `f:1:15: "name" is given twice`},
		{"bad type", `{"name": 7}`, "f:1:10: a number is not expected here"},
		{"bad element", `{"list": [1, "2"]}`, "f:1:14: a string is not expected here"},
		{"bad no list", `{"list": {}}`, "f:1:10: a JSON list is needed"},
		{"bad comma", `{"list": [1,]}`, "f:1:13: a plain value is needed here"},
		{"bad cut off", `{"name": "a"`, "f:1:13: the file ends too early"},
		{"bad string cut off", `{"name": "a`, "f:1:10: the string does not end"},
		{"bad escape cut off", `{"name": "a\"`, "f:1:10: the string does not end"},
		{"bad after the colon", `{"name":`, "f:1:9: the file ends too early"},
		{"bad no colon", `{"name" 1}`, "f:1:9: a colon is needed here"},
		{"bad no comma", `{"name": "a" "list": []}`, "f:1:14: a comma or the end of the object is needed here"},
		{"bad comma in object", `{"name": "a",}`, "f:1:14: a string is needed here"},
		{"bad name", `{1: 2}`, "f:1:2: a string is needed here"},
		{"bad name in escapes", `{"n\u0061me": "a"}`, "f:1:2: character 0x5c is not used here"},
		{"bad word", `{"name": nul}`, "f:1:10: this is no JSON value: invalid character ' ' in literal null (expecting 'l')"},
		{"bad object as value", `{"name": {}}`, "f:1:10: a plain value is needed here"},
		{"bad control character", "{\"name\": \"a\nb\"}", "f:1:10: this is no JSON value: invalid character '\\n' in string literal"},
		{"bad zero byte", "{\x00}", "f:1:2: a string is needed here"},
		{"bad zero byte behind", "{}\x00", "f:1:3: something follows the object"},
		{"OK escapes", `{"name": "\u0061\"\\", "list" : [ ] } `, ""},
		{"bad trailing", "{}\n{}", "f:2:1: something follows the object"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var name string
			var list []int
			r := New("f", []byte(tt.text))
			err := r.Object(map[string]func() error{
				"name": func() error { return r.Value(&name) },
				"list": func() error {
					return r.List(func() error {
						var n int
						err := r.Value(&n)
						list = append(list, n)
						return err
					})
				},
			})
			if err == nil {
				err = r.End()
			}
			got := ""
			if err != nil {
				got = err.Error()
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if tt.name == "OK" && (name != "a" || !slices.Equal(list, []int{1, 2})) {
				t.Errorf("read %q, %d", name, list)
			}
		})
	}
}

// FuzzReader reads what encoding/json takes too, and means the same by it.
func FuzzReader(f *testing.F) {
	f.Add([]byte(`{"name": "a\u0062", "list": [1, -2]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var got, want struct {
			Name string
			List []int
		}
		r := New("f", text)
		err := r.Object(map[string]func() error{
			"name": func() error { return r.Value(&got.Name) },
			"list": func() error {
				return r.List(func() error {
					got.List = append(got.List, 0)
					return r.Value(&got.List[len(got.List)-1])
				})
			},
		})
		if err != nil || r.End() != nil {
			return
		}
		if err := json.Unmarshal(text, &want); err != nil || got.Name != want.Name || !slices.Equal(got.List, want.List) {
			t.Errorf("read %+v; encoding/json reads %+v, %v", got, want, err)
		}
	})
}
