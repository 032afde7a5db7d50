package main

import (
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/policy/envelope"
	"github.com/demarc/demarc/policy/image"
)

// cutsShown bounds the connections that are named one by one.
const cutsShown = 20

// cuts are the live connections that a change would cut.
type cuts struct {
	Total       int   `json:"total"`
	Connections []cut `json:"connections,omitempty"`     // own sessions first, then the oldest
	Unsure      bool  `json:"session_unknown,omitempty"` // the caller's session may be among them, and nothing shows it
}

// unsure is said where nothing tells by which connection the caller sits here.
const unsure = "whether your own session is among them is not known: root sees it, outside of tmux and screen; --confirm-within 60s takes a change back"

type cut struct {
	proto.Cut
	Workload string `json:"workload"`
	PeerName string `json:"peer_workload,omitempty"`
	Own      bool   `json:"own,omitempty"` // this command was called through it
}

// preview asks what an image would cut.
func preview(ctx context.Context, env *environment, client *api.Client, encoded []byte) (*cuts, error) {
	session := currentSession(env.Getenv)
	p, err := client.Preview(ctx, encoded, session.ends...)
	if err != nil {
		return nil, err
	}
	out := &cuts{Total: p.Total}
	if len(p.Cuts) == 0 {
		return out, nil
	}
	body, _, err := envelope.Open(encoded)
	if err != nil {
		return nil, err
	}
	img, err := image.Decode(body)
	if err != nil {
		return nil, err
	}
	names := map[uint32]string{uint32(image.Unmanaged): "unmanaged"}
	for _, w := range img.Workloads {
		names[uint32(w.ID)] = w.Name
	}
	var own proto.Own
	copy(own[:], session.ends)
	for _, c := range p.Cuts {
		out.Connections = append(out.Connections, cut{Cut: c, Workload: names[c.Subject], PeerName: names[c.Peer], Own: own.Holds(c.Ends)})
	}
	out.Unsure = !session.known && !out.own()
	return out, nil
}

// own says whether the session of this command is among them.
func (c *cuts) own() bool {
	return slices.ContainsFunc(c.Connections, func(x cut) bool { return x.Own })
}

func (c *cuts) print(env *environment, form string) error {
	if form == "json" {
		return document(env.Stdout, form, c)
	}
	if c.Total == 0 {
		_, err := fmt.Fprintln(env.Stdout, "would cut no connection")
		return err
	}
	c.printText(env.Stdout)
	return nil
}

// printText names them for people; nothing if there are none.
func (c *cuts) printText(w io.Writer) {
	if c.Total == 0 {
		return
	}
	fmt.Fprintf(w, "would cut %s:\n", plural(c.Total, "connection"))
	for _, x := range c.Connections[:min(len(c.Connections), cutsShown)] {
		arrow, note := "->", ""
		if x.Inbound {
			arrow = "<-"
		}
		if x.Reason == "no-state" {
			arrow, note = "--", ", older than its workload's policy"
		}
		peer := x.Remote.String()
		if x.PeerName != "" {
			peer += " (" + x.PeerName + ")"
		}
		if x.Own {
			note += ", YOUR SESSION"
		}
		fmt.Fprintf(w, "  %s, %s[%d] %s %s %s: %s%s\n", x.Workload, flow.Escape(x.Process), x.PID, x.Local, arrow, peer, x.Reason, note)
	}
	if more := c.Total - cutsShown; more > 0 {
		fmt.Fprintf(w, "  and %d more\n", more)
	}
	if c.Unsure {
		fmt.Fprintln(w, unsure)
	}
}
