// Package kubernetes turns NetworkPolicy and ClusterNetworkPolicy objects into a
// boundary policy that means exactly the same for the pods of an inventory.
//
// Read reads objects, Import judges every pair of ends by the rules of the API and
// writes down the result as crossings. Nothing that enforces imports this package:
// its result is a policy like any other, and is checked like any other.
package kubernetes
