package strict

import (
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
		{"bad unknown", "{\n \"nam\": 1}", `f:2:2: unknown key "nam": use name, list`},
		{"bad case", `{"Name": "a"}`, `f:1:2: unknown key "Name": use name, list`},
		{"bad twice", `{"name": "a", "name": "b"}`, `f:1:15: "name" is given twice`},
		{"bad type", `{"name": 7}`, "f:1:10: a number is not expected here"},
		{"bad element", `{"list": [1, "2"]}`, "f:1:14: a string is not expected here"},
		{"bad no list", `{"list": {}}`, "f:1:10: a JSON list is needed"},
		{"bad comma", `{"list": [1,]}`, "f:1:13: invalid character ']' looking for beginning of value"},
		{"bad cut off", `{"name": "a"`, "f:1:13: the file ends too early"},
		{"bad trailing", "{}\n{}", "f:2:1: something follows the object"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var name string
			var list []int
			r := New("f", []byte(tt.text))
			err := r.Object(func(key string) error {
				if key == "name" {
					return r.Value(&name)
				}
				return r.List(func() error {
					var n int
					err := r.Value(&n)
					list = append(list, n)
					return err
				})
			}, "name", "list")
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
