package hubble

import (
	"strings"
	"sync"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"github.com/google/cel-go/cel"

	"github.com/demarc/demarc/agent/flow"
)

// Bounds of expressions that clients write: CEL has no loops without an end, but a
// comprehension of comprehensions is as good as one.
const (
	maxExpressions = 8
	maxCost        = 2000 // in CEL's units, for one flow
)

// celEnvironment is where expressions are compiled; made when the first one comes.
var celEnvironment = sync.OnceValues(func() (*cel.Env, error) {
	return cel.NewEnv(cel.Container("flow"), cel.Types(&flowpb.Flow{}), cel.Variable("_flow", cel.ObjectType("flow.Flow")))
})

// expressions adds CEL expressions on the flow, which is called _flow. One that costs
// too much, or fails, does not hold.
func expressions(b *builder, values []string) {
	const field = "cel_expression"
	if len(values) > maxExpressions {
		b.fail(field, "%d expressions, at most %d are taken", len(values), maxExpressions)
	}
	if !bounded(b, field, values) {
		return
	}
	env, err := celEnvironment()
	if err != nil {
		b.fail(field, "%v", err)
		return
	}
	var programs []cel.Program
	for _, v := range values {
		ast, issues := env.Compile(v)
		if issues.Err() != nil {
			b.fail(field, "%s", firstLine(issues.Err().Error()))
			return
		}
		if !ast.OutputType().IsExactType(cel.BoolType) {
			b.fail(field, "it says %s, and must say bool", ast.OutputType())
			return
		}
		p, err := env.Program(ast, cel.CostLimit(maxCost), cel.EvalOptions(cel.OptOptimize))
		if err != nil {
			b.fail(field, "%s", firstLine(err.Error()))
			return
		}
		programs = append(programs, p)
	}
	b.add(func(f *flowpb.Flow) bool {
		for _, p := range programs {
			if out, _, err := p.Eval(map[string]any{"_flow": f}); err == nil && out.Value() == true {
				return true
			}
		}
		return false
	})
}

// Expressions makes a predicate of CEL expressions, any of which may hold; negated,
// none may.
func Expressions(values []string, negated bool) (func(*flow.Flow) bool, error) {
	b := &builder{}
	expressions(b, values)
	if b.err != nil || len(b.fields) == 0 {
		return nil, b.err
	}
	return func(f *flow.Flow) bool { return b.fields[0](Flow(f)) != negated }, nil
}

// firstLine is an error without the excerpt that CEL adds below it.
func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
