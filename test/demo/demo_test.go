// Package demo_test is the demonstration that `make demo` shows: a web server, an
// API and a database, each in a namespace of its own, under a policy that declares
// who may reach whom. It checks what it shows.
package demo_test

import (
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m) }

// The shop:
//
//	client ---- switch ---- web   (nginx,      nginx.service)
//	              |-------- api   (a Go server, api@1.service)
//	              '-------- db    (PostgreSQL, postgresql@15-main.service)
//
// All four are namespaces of this machine. One demarc enforces on the cgroups of
// the three workloads; the client is somewhere in the internet.
type shop struct {
	t                    *testing.T
	node                 *netlab.Node
	client, web, api, db *netlab.Namespace
	webUnit, apiUnit     *netlab.Cgroup
	outside, unmanaged   *netlab.Cgroup
	dir                  string
	postgres             string // directory of PostgreSQL's programs
	shown                []string
}

func TestDemo(t *testing.T) {
	s := build(t)
	wire := s.web.Wire()

	s.title("What is declared is reached")
	s.show("client", "curl -s http://web/stock", s.curl("/stock"), "bolts: 7\nnuts: 12\n")
	s.demarc("flows", "--last", "5")

	s.title("nginx is taken over and tries the database itself")
	s.show("client", "curl -s -o /dev/null -w '%{http_code}' http://web/shortcut", s.curl("/shortcut", "-o", "/dev/null", "-w", "%{http_code}\n"), "502\n")
	s.say("nginx says: %s", s.errorLog("5432"))
	s.psql("in nginx.service", s.web, s.webUnit, "Operation not permitted")
	s.demarc("flows", "--verdict", "denied", "--from", "web", "--last", "2")
	s.demarc("policy", "explain", filepath.Join(s.dir, "shop.yaml"), "--from", "workload/web", "--to", "workload/postgres", "--port", "tcp/5432")
	sent := wire.Count(netlab.ToAddress(s.db.IP4))
	s.say("\npackets to the database on nginx's wire: %d", sent)
	if sent != 0 {
		t.Errorf("%d packets of nginx for the database reached the wire", sent)
	}

	s.title("An address is not an identity: another process with the API's address")
	s.psql("beside the API, in no workload", s.api, s.unmanaged, "timeout expired")
	s.demarc("flows", "--reason", "tag-missing", "--last", "1")

	s.title("Nobody from the internet reaches the database")
	s.psql("on the client", s.client, s.outside, "timeout expired")
	s.demarc("flows", "--verdict", "denied", "--to", "postgres", "--last", "1")

	s.title("nginx looks around: nmap, in nginx.service")
	s.scan(wire)

	s.title("The policy changes, and comes back")
	s.writePolicy(func(text string) string {
		text = strings.Replace(text, "version: 1", "version: 2", 1)
		text = strings.Replace(text, "ports: [tcp/5432], limit", "ports: [tcp/5433], limit", 1)
		return strings.Replace(text, "port: tcp/5432", "port: tcp/5433", 1)
	})
	s.demarc("policy", "diff", filepath.Join(s.dir, "old.yaml"), filepath.Join(s.dir, "shop.yaml"))
	s.demarc("apply", filepath.Join(s.dir, "shop.yaml"))
	s.show("client", "curl -s -o /dev/null -w '%{http_code}' http://web/stock", s.curl("/stock", "-o", "/dev/null", "-w", "%{http_code}\n"), "502\n")
	s.demarc("rollback")
	s.show("client", "curl -s http://web/stock", s.curl("/stock"), "bolts: 7\nnuts: 12\n")

	s.title("What was counted")
	s.demarc("status")
	s.readme()
}

// build starts everything.
func build(t *testing.T) *shop {
	lab := netlab.New(t)
	s := &shop{t: t, dir: lab.Dir(), postgres: postgresPrograms(t)}
	if err := os.Chmod(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s.client, s.web, s.api, s.db = lab.Namespace("client"), lab.Namespace("web"), lab.Namespace("api"), lab.Namespace("db")
	s.title("A shop: client, nginx, an API, PostgreSQL; one demarc")
	s.say("client %s, web %s, api %s, db %s", s.client.IP4, s.web.IP4, s.api.IP4, s.db.IP4)
	s.writePolicy(func(text string) string { return text })
	s.node = lab.Node("", netlab.NodeOptions{})
	s.demarc("policy", "check", filepath.Join(s.dir, "shop.yaml"))
	s.demarc("apply", filepath.Join(s.dir, "shop.yaml"))
	s.demarc("status")

	s.outside, s.unmanaged = lab.Cgroup("client"), s.node.Cgroup("/system.slice/cron.service")
	s.webUnit = s.node.Cgroup("/system.slice/nginx.service")
	s.apiUnit = s.node.Cgroup("/system.slice/system-api.slice/api@1.service")
	s.startPostgres(s.node.Cgroup("/system.slice/system-postgresql.slice/postgresql@15-main.service"))
	s.startAPI()
	s.startNginx()
	return s
}

func (s *shop) startPostgres(unit *netlab.Cgroup) {
	s.t.Helper()
	owner, err := user.Lookup("postgres")
	if err != nil {
		s.t.Fatal(err)
	}
	uid, err := strconv.ParseUint(owner.Uid, 10, 32)
	if err != nil {
		s.t.Fatal(err)
	}
	gid, err := strconv.Atoi(owner.Gid)
	if err != nil {
		s.t.Fatal(err)
	}
	data := filepath.Join(s.dir, "postgres")
	if err := os.Mkdir(data, 0o700); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Chown(data, int(uid), gid); err != nil {
		s.t.Fatal(err)
	}
	run := func(program string, args ...string) *netlab.Process {
		return s.db.Start(unit, netlab.Command{Path: filepath.Join(s.postgres, program), Args: args, User: uint32(uid), Dir: data})
	}
	made := run("initdb", "-D", data+"/main", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8")
	if status := made.Wait(time.Minute); status != 0 {
		s.t.Fatalf("initdb: %s", made.Output())
	}
	must(s.t, os.WriteFile(data+"/main/pg_hba.conf", []byte("local all all trust\nhost all all 0.0.0.0/0 trust\n"), 0o644))
	server := run("postgres", "-D", data+"/main", "-k", data, "-c", "listen_addresses=*", "-c", "fsync=off")
	await(s.t, server, "PostgreSQL answers", func() bool {
		return s.run(s.db, unit, filepath.Join(s.postgres, "psql"), "-h", data, "-U", "postgres", "-c",
			"CREATE TABLE IF NOT EXISTS stock (item text PRIMARY KEY, amount int); INSERT INTO stock VALUES ('nuts', 12), ('bolts', 7) ON CONFLICT DO NOTHING") == 0
	})
}

func (s *shop) startAPI() {
	s.t.Helper()
	binary := filepath.Join(s.dir, "api")
	if out, err := exec.Command("go", "build", "-o", binary, "./api").CombinedOutput(); err != nil {
		s.t.Fatalf("build api: %v\n%s", err, out)
	}
	server := s.api.Start(s.apiUnit, netlab.Command{
		Path: binary, Args: []string{":8080", fmt.Sprintf("postgres://postgres@%s/postgres?sslmode=disable", s.db.IP4)},
	})
	await(s.t, server, "the API listens", func() bool { return listens(s.api, 8080) })
}

const nginxConf = `daemon off; pid %[1]s/nginx.pid; error_log %[1]s/error.log; user nobody nogroup; worker_processes 1;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fcgi; uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
	server {
		listen 80;
		location /stock { proxy_pass http://%[2]s:8080; }
		location /shortcut { proxy_pass http://%[3]s:5432; }
	}
}
`

func (s *shop) startNginx() {
	s.t.Helper()
	dir := filepath.Join(s.dir, "nginx")
	must(s.t, os.Mkdir(dir, 0o755))
	conf := filepath.Join(dir, "nginx.conf")
	must(s.t, os.WriteFile(conf, fmt.Appendf(nil, nginxConf, dir, s.api.IP4, s.db.IP4), 0o644))
	server := s.web.Start(s.webUnit, netlab.Command{Path: program(s.t, "nginx"), Args: []string{"-p", dir, "-e", dir + "/error.log", "-c", conf}})
	await(s.t, server, "nginx listens", func() bool { return listens(s.web, 80) })
}

// listens says whether a namespace has a TCP listener on a port.
func listens(ns *netlab.Namespace, port uint16) bool {
	found := false
	_ = ns.Do(func() error {
		for _, file := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(text)) {
				f := strings.Fields(line)
				if len(f) > 3 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) && f[3] == "0A" {
					found = true
				}
			}
		}
		return nil
	})
	return found
}

func await(t *testing.T, p *netlab.Process, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(20 * time.Millisecond) {
		select {
		case <-p.Ended():
			t.Fatalf("wait until %s: it ended: %s", what, p.Output())
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("wait until %s: %s", what, p.Output())
		}
	}
}

// run runs a program to its end and returns its exit status.
func (s *shop) run(ns *netlab.Namespace, c *netlab.Cgroup, path string, args ...string) int {
	s.t.Helper()
	return ns.Start(c, netlab.Command{Path: path, Args: args, Env: []string{"PGCONNECT_TIMEOUT=2"}}).Wait(time.Minute)
}

// curl asks nginx, from the client.
func (s *shop) curl(path string, args ...string) string {
	s.t.Helper()
	p := s.client.Start(s.outside, netlab.Command{
		Path: program(s.t, "curl"), Args: append(args, "-sS", "--max-time", "10", fmt.Sprintf("http://%s%s", s.web.IP4, path)),
	})
	p.Wait(time.Minute)
	return p.Output()
}

// psql tries the database, which must fail with the error.
func (s *shop) psql(where string, ns *netlab.Namespace, c *netlab.Cgroup, want string) {
	s.t.Helper()
	p := ns.Start(c, netlab.Command{
		Path: filepath.Join(s.postgres, "psql"), Env: []string{"PGCONNECT_TIMEOUT=2"},
		Args: []string{"-h", s.db.IP4.String(), "-U", "postgres", "-c", "SELECT * FROM stock"},
	})
	status := p.Wait(time.Minute)
	s.say("\n%s$ psql -h db -c 'SELECT * FROM stock'\n%s", where, strings.TrimSpace(p.Output()))
	if status == 0 || !strings.Contains(p.Output(), want) {
		s.t.Errorf("psql %s: status %d and %q, want %q", where, status, p.Output(), want)
	}
}

// scan tries a hundred ports of the database from nginx's unit. None is reached, nothing
// is on the wire, and the scan is found.
func (s *shop) scan(wire *netlab.Wire) {
	s.t.Helper()
	wire.Forget()
	p := s.web.Start(s.webUnit, netlab.Command{Path: program(s.t, "nmap"), Args: []string{"-n", "-Pn", "-sT", "--max-retries", "0", "-p", "1-100", s.db.IP4.String()}})
	status := p.Wait(time.Minute)
	// It says for each port that connect(2) was not permitted, which it did not expect.
	lines := slices.DeleteFunc(strings.Split(strings.TrimSpace(p.Output()), "\n"), func(line string) bool {
		return strings.HasPrefix(line, "Strange read error") && strings.HasSuffix(line, "'Operation not permitted')")
	})
	s.say("\nin nginx.service$ nmap -n -Pn -sT --max-retries 0 -p 1-100 db\n%s", strings.Join(lines, "\n"))
	if status != 0 || strings.Contains(p.Output(), "/tcp open") {
		s.t.Errorf("nmap: status %d", status)
	}
	found := func() bool {
		out, _, _ := s.node.Demarc("findings", "--technique", "T1046", "-o", "jsonl")
		return strings.Contains(out, `"nmap"`)
	}
	for end := time.Now().Add(30 * time.Second); !found(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatal("the scan was not found")
		}
	}
	s.demarc("findings", "--technique", "T1046")
	sent := wire.Count(netlab.ToAddress(s.db.IP4))
	s.say("\npackets of the scan on nginx's wire: %d", sent)
	if sent != 0 {
		s.t.Errorf("%d packets of the scan reached the wire", sent)
	}
}

// errorLog is what nginx wrote last about a port, without its preamble.
func (s *shop) errorLog(port string) string {
	s.t.Helper()
	text, err := os.ReadFile(filepath.Join(s.dir, "nginx", "error.log"))
	must(s.t, err)
	last := ""
	for line := range strings.Lines(string(text)) {
		if i := strings.Index(line, "connect() "); i >= 0 && strings.Contains(line, ":"+port) {
			last, _, _ = strings.Cut(line[i:], " while")
		}
	}
	if !strings.Contains(last, "Operation not permitted") {
		s.t.Errorf("nginx was not refused: %q", last)
	}
	return last
}

// writePolicy writes shop.yaml, and keeps the one before as old.yaml.
func (s *shop) writePolicy(change func(string) string) {
	s.t.Helper()
	file := filepath.Join(s.dir, "shop.yaml")
	if old, err := os.ReadFile(file); err == nil {
		must(s.t, os.WriteFile(filepath.Join(s.dir, "old.yaml"), old, 0o644))
	}
	text, err := os.ReadFile("shop.yaml")
	must(s.t, err)
	must(s.t, os.WriteFile(file, []byte(change(string(text))), 0o644))
}

// demarc runs the command line and shows what it says.
func (s *shop) demarc(args ...string) {
	s.t.Helper()
	shown := make([]string, len(args))
	for i, a := range args {
		shown[i] = filepath.Base(a)
		if !strings.HasPrefix(a, "/") {
			shown[i] = a
		}
	}
	out, problems, status := s.node.Demarc(args...)
	s.say("\n$ demarc %s\n%s%s", strings.Join(shown, " "), out, problems)
	differs := args[0] == "policy" && args[1] == "diff" && status == 1
	if status != 0 && !differs {
		s.t.Errorf("demarc %v: exit status %d", args, status)
	}
}

func (s *shop) show(where, command, got, want string) {
	s.t.Helper()
	s.say("\n%s$ %s\n%s", where, command, strings.TrimSpace(got))
	if got != want {
		s.t.Errorf("%s: %q, want %q", command, got, want)
	}
}

func (s *shop) title(text string) { s.say("\n== %s", text) }

// say prints at once: `make demo` is watched.
func (s *shop) say(format string, args ...any) {
	text := strings.TrimRight(fmt.Sprintf(format, args...), "\n")
	text = strings.ReplaceAll(text, s.dir+"/", "")
	s.shown = append(s.shown, strings.Split(text, "\n")...)
	fmt.Println(text)
}

// varies is what is another one each time: numbers, times, ids.
var varies = regexp.MustCompile(`\b[0-9a-f]{10}\b|[0-9]+`)

// readme shows that the README shows what was shown, line by line, in this order.
func (s *shop) readme() {
	s.t.Helper()
	text, err := os.ReadFile("../../README.md")
	must(s.t, err)
	_, block, _ := strings.Cut(string(text), "```text\n")
	block, _, found := strings.Cut(block, "```")
	if !found {
		s.t.Fatal("README.md shows nothing of the demo")
	}
	plain := func(line string) string { return strings.Join(strings.Fields(varies.ReplaceAllString(line, "N")), " ") }
	at := 0
	for line := range strings.Lines(block) {
		if want := plain(line); want != "" && want != "..." {
			for ; at < len(s.shown) && plain(s.shown[at]) != want; at++ {
			}
			if at++; at > len(s.shown) {
				s.t.Fatalf("README.md shows what the demo does not, or not there: %s", line)
			}
		}
	}
}

func program(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		if path := filepath.Join(dir, name); exec.Command("test", "-x", path).Run() == nil {
			return path
		}
	}
	t.Fatalf("%s is not installed: run scripts/install demo", name)
	return ""
}

// postgresPrograms is where the distribution keeps PostgreSQL's programs.
func postgresPrograms(t *testing.T) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil || len(found) == 0 {
		t.Fatal("PostgreSQL is not installed: run scripts/install demo")
	}
	return filepath.Dir(found[len(found)-1])
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
