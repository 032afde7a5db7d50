package policy

// SameDeclarations is for tests that come to Check's end by another way.
var SameDeclarations = sameDeclarations

// CheckBy is Check, by each identity or by classes.
var CheckBy = check
