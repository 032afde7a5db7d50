//go:build packages

package systemd_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/netlab"
)

// TestVagrant runs what the Vagrantfile's machines run, on three systemds with a switch
// between them: the shop answers across machines, and nobody else reaches the database.
//
//	client ---- switch ---- web (nginx), api, db (PostgreSQL), each with demarc
func TestVagrant(t *testing.T) {
	command(t, "ruby", "-c", "../../Vagrantfile")
	lab := netlab.New(t)
	client := lab.Namespace("client")
	machines := map[string]*host{}
	roles := []string{"web", "api", "db"}
	var addresses []string
	for _, role := range roles {
		h := &host{t: t, lab: lab, Machine: lab.Machine(role), peer: client}
		machines[role] = h
		addresses = append(addresses, h.IP4.String())
		files, err := filepath.Glob(packageFile(t, "vagrant/*"))
		if err != nil || len(files) < 5 {
			t.Fatalf("files: %v, %v", files, err)
		}
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			h.Write("/shop/"+filepath.Base(file), string(b), 0o755)
		}
		b, err := os.ReadFile("../../deploy/vagrant/provision")
		if err != nil {
			t.Fatal(err)
		}
		h.Write("/root/provision", string(b), 0o755)
		h.configure()
	}
	web, api, db := machines["web"], machines["api"], machines["db"]
	toDatabase := map[string]*netlab.Wire{"web": web.Wire(), "client": client.Wire(), "api": api.Wire()}
	for _, h := range machines {
		h.Boot()
	}
	for _, role := range []string{"db", "api", "web", "db"} { // once more changes nothing
		h := machines[role]
		h.Run("/root/provision", append([]string{role, "/shop"}, addresses...)...)
		h.awaitState("enforcing")
	}
	curl := func(url string) (string, int) {
		t.Helper()
		p := client.Start(lab.Cgroup("client"), netlab.Command{Path: "/usr/bin/curl", Args: []string{"-sS", "--max-time", "10", url}})
		status := p.Wait(time.Minute)
		return p.Output(), status
	}
	web.Await("serves the shop", func() error {
		if out, _ := curl("http://" + web.IP4.String() + "/stock"); out != "apples: 12\npears: 7\n" {
			return errors.New(out)
		}
		return nil
	})
	if out := web.Run("/shop/intrude", db.IP4.String()); !strings.Contains(out, "nginx cannot reach the database") {
		t.Errorf("intrude: %s", out)
	}
	for _, port := range []string{"8080", "5432"} {
		for _, h := range []*host{api, db} {
			if out, status := curl("http://" + h.IP4.String() + ":" + port + "/stock"); status == 0 {
				t.Errorf("a stranger is answered on port %s: %s", port, out)
			}
		}
	}
	if n := toDatabase["web"].Count(netlab.To(unix.IPPROTO_TCP, db.IP4, 5432)); n > 0 {
		t.Errorf("%d packets of nginx's for the database", n)
	}
	tagged := 0
	for _, p := range toDatabase["api"].Packets(netlab.To(unix.IPPROTO_TCP, db.IP4, 5432)) {
		switch syn := p.Flags&2 != 0; {
		case syn && p.Tagged:
			tagged++
		case syn:
			t.Errorf("the API asks the database without a proof: %v", p)
		}
	}
	if tagged == 0 {
		t.Error("the API never asked the database")
	}
	if n := toDatabase["client"].Count(func(p netlab.Packet) bool { return !p.Sent && p.Payload > 0 && p.Src.Addr() == db.IP4 }); n > 0 {
		t.Errorf("%d packets with data from the database to a stranger", n)
	}
	web.Await("tells who tried", func() error {
		out := web.Run("demarc", "flows", "--verdict", "denied", "--last", "20")
		if !strings.Contains(out, "5432") {
			return errors.New(out)
		}
		return nil
	})
}
