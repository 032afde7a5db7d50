package main

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/core/keyring"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/internal/keyfile"
)

func newKeysCommand(env *environment) *cobra.Command {
	generate := group("generate", "Make a key", newKeysGenerateTagCommand(env), newKeysGenerateSigningCommand(env))
	return group("keys", "Make and list keys: those that prove identities, and those that sign images", generate, newKeysShowCommand(env))
}

// tagKeyOptions is what generate tag was asked for.
type tagKeyOptions struct {
	out, add  string
	validFor  time.Duration // from its first sending on; 0 = until there is another
	overlap   time.Duration // that it is accepted before it is sent with, and its predecessor afterwards
	sendAfter time.Duration // until it is sent with
	paced     bool          // overlap or sendAfter was given
}

func newKeysGenerateTagCommand(env *environment) *cobra.Command {
	var o tagKeyOptions
	c := &cobra.Command{
		Use:   "tag {--out FILE | --add FILE}",
		Short: "Make a keyring with a new tag key, or add the next key to one",
		Long: `Makes a key for the tags that prove identities between hosts. All hosts that
are to believe each other need the same keyring.

--out makes a keyring with one key that holds from now on. --add adds the next key
to a keyring: every host accepts it --overlap before any host sends with it, and
accepts the key before it for as long afterwards, if that one has no end yet. Copy the file to all hosts in
that time; each follows the change by itself. Keys that have ended are taken out.`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			o.paced = c.Flags().Changed("overlap") || c.Flags().Changed("send-after")
			if !c.Flags().Changed("send-after") {
				o.sendAfter = o.overlap
			}
			return tagKeyRun(env, o, time.Now())
		},
	}
	f := c.Flags()
	f.StringVar(&o.out, "out", "", "make this keyring `file`")
	f.StringVar(&o.add, "add", "", "add a key to this keyring `file`")
	f.DurationVar(&o.validFor, "valid-for", 0, "how long it holds once it is sent with, such as 2160h; 0 = until there is another")
	f.DurationVar(&o.overlap, "overlap", time.Hour, "how long it is accepted before it is sent with, and the one before it afterwards")
	f.DurationVar(&o.sendAfter, "send-after", 0, "when it is sent with, counted from now (default --overlap)")
	return c
}

func tagKeyRun(env *environment, o tagKeyOptions, now time.Time) error {
	switch {
	case (o.out == "") == (o.add == ""):
		return usagef("name the keyring with --out FILE or with --add FILE")
	case o.validFor < 0 || o.overlap < 0 || o.sendAfter < 0:
		return usagef("--valid-for, --overlap and --send-after are not negative")
	case o.out != "" && o.paced:
		return usagef("--overlap and --send-after go with --add: the first key holds from now on")
	}
	o.validFor, o.overlap, o.sendAfter = wholeSeconds(o.validFor), wholeSeconds(o.overlap), wholeSeconds(o.sendAfter)
	now = now.UTC().Truncate(time.Second)
	if o.out != "" {
		return makeKeyring(env, o, now)
	}
	ring, err := keyring.Read(o.add)
	if err != nil {
		return withHint(err)
	}
	defer ring.Wipe()
	said, err := addKey(ring, o, now)
	if err != nil {
		return err
	}
	if err := keyfile.Replace(o.add, ring); err != nil {
		return err
	}
	for _, line := range said {
		if _, err := fmt.Fprintf(env.Stdout, "%s: %s\n", o.add, line); err != nil {
			return err
		}
	}
	return nil
}

// wholeSeconds rounds up: keyrings have no fractions.
func wholeSeconds(d time.Duration) time.Duration { return (d + time.Second - 1).Truncate(time.Second) }

// withHint makes the hint of a refusal one of ours.
func withHint(err error) error {
	var refused *proto.Refused
	if errors.As(err, &refused) {
		return hintError{err, refused.Hint}
	}
	return err
}

func makeKeyring(env *environment, o tagKeyOptions, now time.Time) error {
	k, err := keyring.New(1)
	if err != nil {
		return err
	}
	defer k.Wipe()
	if o.validFor > 0 {
		k.Until = now.Add(o.validFor)
	}
	err = keyfile.Create(o.out, &keyring.Ring{Keys: []keyring.Key{k}})
	if errors.Is(err, fs.ErrExist) {
		return hintError{fmt.Errorf("%s is there already", o.out), "add a key to it with --add, or choose another file"}
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(env.Stdout, "%s: made %v, in use from now on, %s\n", o.out, k, untilText(k.Until))
	return err
}

// addKey adds the next key, and says what it did.
func addKey(ring *keyring.Ring, o tagKeyOptions, now time.Time) (said []string, err error) {
	sending := ring.Sending(now)
	if sending == nil && !o.paced {
		// Nothing to overlap with: every crossing between hosts is refused now.
		o.overlap, o.sendAfter = 0, 0
	}
	if o.sendAfter < o.overlap {
		return nil, usagef("--send-after %v is less than --overlap %v: it would be sent with before every host accepts it", o.sendAfter, o.overlap)
	}
	epoch, err := nextEpoch(ring, now)
	if err != nil {
		return nil, err
	}
	said = dropExpired(ring, now)
	send := now.Add(o.sendAfter)
	for i := range ring.Keys {
		old := &ring.Keys[i]
		if from := old.SendFrom(); !from.Before(send) {
			return nil, hintError{fmt.Errorf("epoch %d is only sent with from %s on", old.Epoch, stamp(from)),
				"wait for that, or choose a later --send-after"}
		}
		if old.Until.IsZero() {
			old.Until = send.Add(max(o.overlap, time.Second))
			said = append(said, fmt.Sprintf("epoch %d is accepted %s", old.Epoch, untilText(old.Until)))
		}
	}
	k, err := keyring.New(epoch)
	if err != nil {
		return nil, err
	}
	k.Send, k.Accept = send, send.Add(-o.overlap)
	if o.validFor > 0 {
		k.Until = send.Add(o.validFor)
	}
	ring.Keys = append(ring.Keys, k)
	slices.SortFunc(ring.Keys, func(a, b keyring.Key) int { return int(a.Epoch) - int(b.Epoch) })
	if gap, found := gapIn(ring, now, send); found && sending != nil {
		return nil, hintError{fmt.Errorf("no key could be sent with from %s to %s", stamp(gap), stamp(send)),
			"choose an earlier --send-after, with a shorter --overlap"}
	}
	said = append(said, fmt.Sprintf("added %v, accepted from %s, sent with from %s, %s", k, stamp(k.Accept), stamp(send), untilText(k.Until)))
	if sending != nil {
		said = append(said, fmt.Sprintf("copy it to every host before %s", stamp(send)))
	}
	return said, nil
}

// nextEpoch is the one after that of the latest key, so that an epoch is used
// again as late as possible.
func nextEpoch(ring *keyring.Ring, now time.Time) (uint8, error) {
	var latest *keyring.Key
	used := map[uint8]bool{}
	for i := range ring.Keys {
		k := &ring.Keys[i]
		if latest == nil || k.SendFrom().After(latest.SendFrom()) {
			latest = k
		}
		used[k.Epoch] = !k.Expired(now)
	}
	for i := range abi.Epochs {
		if epoch := (latest.Epoch + 1 + uint8(i)) % abi.Epochs; !used[epoch] {
			return epoch, nil
		}
	}
	return 0, hintError{fmt.Errorf("all %d epochs are in use", abi.Epochs), "wait until a key ends: demarc keys show"}
}

func dropExpired(ring *keyring.Ring, now time.Time) (said []string) {
	ring.Keys = slices.DeleteFunc(ring.Keys, func(k keyring.Key) bool {
		if !k.Expired(now) {
			return false
		}
		k.Wipe()
		said = append(said, fmt.Sprintf("dropped epoch %d, which ended at %s", k.Epoch, stamp(k.Until)))
		return true
	})
	return said
}

// stamp writes a time as keyrings have it; "" for no bound.
func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

func untilText(t time.Time) string {
	if t.IsZero() {
		return "without end"
	}
	return "until " + stamp(t)
}

func newKeysShowCommand(env *environment) *cobra.Command {
	var form string
	c := &cobra.Command{
		Use: "show FILE", Short: "Say what a key file holds, without showing a key", Args: oneArgument("file"),
		Long: "Say what a file holds, without showing a key: the keys of a keyring, or the id of either half of a signing key.",
		RunE: func(_ *cobra.Command, args []string) error {
			if isPEM(args[0]) {
				return showSigningKey(env, args[0], form)
			}
			return keysShowRun(env, args[0], form, time.Now())
		},
	}
	outputFlag(c, &form, listForms...)
	return c
}

// keyLine is one key as it is listed.
type keyLine struct {
	Epoch       uint8  `json:"epoch"`
	Fingerprint string `json:"fingerprint"` // first 8 hex digits of the key's SHA-256
	State       string `json:"state"`       // sending, accepted, waiting, expired
	Accept      string `json:"accept,omitempty"`
	Send        string `json:"send,omitempty"`
	Until       string `json:"until,omitempty"`
}

// runsOut is how long before it does that a keyring running out is told.
const runsOut = 24 * time.Hour

func keysShowRun(env *environment, file, form string, now time.Time) error {
	ring, err := keyring.Read(file)
	if err != nil {
		return withHint(err)
	}
	ring.Wipe() // only times and fingerprints are needed
	sending := ring.Sending(now)
	lines := make([]keyLine, len(ring.Keys))
	for i := range ring.Keys {
		k := &ring.Keys[i]
		lines[i] = keyLine{k.Epoch, k.Fingerprint(), "accepted", stamp(k.Accept), stamp(k.Send), stamp(k.Until)}
		switch {
		case k == sending:
			lines[i].State = "sending"
		case k.Expired(now):
			lines[i].State = "expired"
		case !k.Accepted(now):
			lines[i].State = "waiting"
		}
	}
	row := func(l keyLine) []string {
		return []string{strconv.Itoa(int(l.Epoch)), l.Fingerprint, l.State, l.Accept, l.Send, l.Until}
	}
	if err := list(env, form, []string{"EPOCH", "FINGERPRINT", "STATE", "ACCEPTED FROM", "SENT FROM", "UNTIL"}, lines, row); err != nil {
		return err
	}
	gap, found := gapIn(ring, now, now.Add(runsOut))
	if !found {
		return nil
	}
	when := "now"
	if gap.After(now) {
		when = "from " + stamp(gap) + " on"
	}
	_, err = fmt.Fprintf(env.Stderr, "demarc: warning: no key may be sent with %s\nhint: demarc keys generate tag --add %s\n", when, file)
	return err
}

// gapIn is the first moment in [from, to) when no key may be sent with.
func gapIn(r *keyring.Ring, from, to time.Time) (time.Time, bool) {
	// Between two bounds nothing changes; a gap starts now or where a key ends.
	moments := []time.Time{from}
	for i := range r.Keys {
		if u := r.Keys[i].Until; u.After(from) && u.Before(to) {
			moments = append(moments, u)
		}
	}
	slices.SortFunc(moments, time.Time.Compare)
	for _, m := range moments {
		if r.Sending(m) == nil {
			return m, true
		}
	}
	return time.Time{}, false
}
