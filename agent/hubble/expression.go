package hubble

// expressions refuses CEL: the interpreter is larger than the rest of the agent, and
// would run what a client wrote for every flow.
func expressions(b *builder, values []string) {
	if len(values) > 0 {
		b.fail("cel_expression", "this server takes no CEL; filter what it sends with: demarc flows --cel-expression")
	}
}
