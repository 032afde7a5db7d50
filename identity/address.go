package identity

import (
	"fmt"
	"net/netip"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
)

// Addresses are of one pod, container or node: plain ones, without a zone.
//
// They decode themselves. For a type that only knows how to read text, as netip.Addr,
// the library writes the text down from the file's tokens, all of them each time: a
// thousand pods would take half a minute.
type Addresses []netip.Addr

// UnmarshalYAML takes a list of addresses.
func (a *Addresses) UnmarshalYAML(n ast.Node) error {
	list, ok := n.(*ast.SequenceNode)
	if !ok {
		if n.Type() == ast.NullType {
			*a = nil
			return nil
		}
		return &yaml.SyntaxError{Message: "want a list of addresses, as [10.0.0.2]", Token: n.GetToken()}
	}
	all := make(Addresses, 0, len(list.Values))
	for _, v := range list.Values {
		t := v.GetToken()
		ip, err := netip.ParseAddr(t.Value)
		if err != nil || ip.Zone() != "" {
			return &yaml.SyntaxError{Message: fmt.Sprintf("%q is no plain address", t.Value), Token: t}
		}
		all = append(all, ip)
	}
	*a = all
	return nil
}
