package policy_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/policytest"
)

const shopSuite = `policy: shop.yaml
cases:
  - {name: web reaches api, from: workload/web, to: workload/api, port: tcp/8080, expect: allow, crossing: web-api}
  - {name: web never reaches the database, from: workload/web, to: workload/postgres, port: tcp/5432, expect: deny, reason: no crossing}
  - {name: repairs are over, from: workload/bastion, to: workload/postgres, port: tcp/22, at: 2027-01-15T09:00:00Z, expect: allow}
  - {name: "by <another> #1", from: workload/web, to: workload/api, port: tcp/8080, expect: allow, crossing: api-db}
`

func loadShop(path string) (*policy.Policy, error) {
	if path != "dir/shop.yaml" {
		return nil, errors.New("open " + path + ": no such file")
	}
	return policytest.Shop(), nil
}

func TestRunSuite(t *testing.T) {
	result, err := policy.RunSuite("dir/suite.yaml", []byte(shopSuite), loadShop)
	if err != nil {
		t.Fatal(err)
	}
	for format, want := range map[string]string{
		"text": `ok    web reaches api
ok    web never reaches the database
FAIL  repairs are over: want allow, got deny: crossing break-glass (shop.yaml:25) declares it, but only until 2027-01-15T09:00:00Z
FAIL  by <another> #1: want crossing api-db, got web-api
dir/suite.yaml: 4 cases, 2 failed
`,
		"tap": `TAP version 13
1..4
ok 1 - web reaches api
ok 2 - web never reaches the database
not ok 3 - repairs are over
# want allow, got deny: crossing break-glass (shop.yaml:25) declares it, but only until 2027-01-15T09:00:00Z
not ok 4 - by <another> \#1
# want crossing api-db, got web-api
`,
		"junit": `<?xml version="1.0" encoding="UTF-8"?>
<testsuite name="dir/suite.yaml" tests="4" failures="2">
  <testcase name="web reaches api" classname="dir/shop.yaml"></testcase>
  <testcase name="web never reaches the database" classname="dir/shop.yaml"></testcase>
  <testcase name="repairs are over" classname="dir/shop.yaml">
    <failure message="want allow, got deny: crossing break-glass (shop.yaml:25) declares it, but only until 2027-01-15T09:00:00Z"></failure>
  </testcase>
  <testcase name="by &lt;another&gt; #1" classname="dir/shop.yaml">
    <failure message="want crossing api-db, got web-api"></failure>
  </testcase>
</testsuite>
`,
	} {
		var out bytes.Buffer
		if err := result.Write(&out, format); err != nil {
			t.Errorf("%s: %v", format, err)
		}
		if diff := cmp.Diff(want, out.String()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", format, diff)
		}
	}
	if err := result.Write(&bytes.Buffer{}, "html"); err == nil || err.Error() != `unknown format "html": use one of text, tap, junit, json` {
		t.Errorf("unknown format: %v", err)
	}
}

func TestRunSuiteRefuses(t *testing.T) {
	const head = "policy: shop.yaml\ncases:\n"
	for _, tt := range []struct{ name, src, want string }{
		{"bad empty", "", "dir/suite.yaml:1:1: policy is missing\nhint: name the policy to test: `policy: shop.yaml`"},
		{"bad no cases", "policy: shop.yaml\n", "dir/suite.yaml:1:1: no cases\nhint: add at least one case"},
		{"bad policy", "policy: other.yaml\ncases: [{name: a}]\n", "open dir/other.yaml: no such file"},
		{"bad key", head + "  - {name: a, colour: red}\n", "dir/suite.yaml:3:15: unknown field \"colour\"\nhint: check the spelling; unknown keys are never ignored"},
		{"bad no name", head + "  - {from: unmanaged}\n", "dir/suite.yaml:3:5: case 1 has no name\nhint: give each case a name"},
		{"bad expect", head + "  - {name: a, expect: maybe}\n", "dir/suite.yaml:3:23: case a: expect is \"maybe\"\nhint: write allow or deny"},
		{"bad crossing of a denial", head + "  - {name: a, expect: deny, crossing: web-api}\n",
			"dir/suite.yaml:3:39: case a: no crossing decides a denial\nhint: remove crossing, or expect allow"},
		{"bad probe", head + "  - {name: a, expect: deny, from: workload/web, to: workload/x, port: tcp/1}\n",
			"dir/suite.yaml:3:5: case a: to \"workload/x\": the policy declares no such workload"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := policy.RunSuite("dir/suite.yaml", []byte(tt.src), loadShop)
			if err == nil || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}
