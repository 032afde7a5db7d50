// SPDX-License-Identifier: Apache-2.0
/*
 * The load of the benchmark: a client and a server, each in a network namespace, in
 * a cgroup and on a CPU of its own. Prints one line of JSON.
 *
 *	load MODE ADDRESS SECONDS CLIENT SERVER
 *
 * MODE     crr   connect, one byte each way, close by the client; 16 at a time on 4 ports
 *          crr:N the same, at most N a second
 *          rr    one byte each way on one connection, both ends spin
 *          udp   echo of 64 bytes, 32 on their way, the client's socket connected
 *          udpu  the same, unconnected
 *          try   one connection to a port: `try:PORT`; says whether it came about
 * ADDRESS  IPv4 address of the server
 * CLIENT,  NETNS,CGROUP,CPU: path of a network namespace, directory of a cgroup,
 * SERVER   number of a CPU
 *
 * CPU time is user and system time of the process (getrusage) over the operations
 * that were timed. On a veth pair the packets are processed on the sender's time, so
 * the sum of both ends is the whole path. Both processes end by themselves: no
 * operation waits for more than a second, no run lasts for more than 60.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
	FIRST_PORT = 7000, /* crr: and the three after it */
	PORTS = 4,
	UDP_PORT = 7100,
	CLOSED_PORT = 7200, /* somebody listens; no policy declares it */
	OUTSTANDING = 16,
	WINDOW = 32,
	DATAGRAM = 64,
	SAMPLES = 1 << 18,
	EVENTS = 64,
};

static const char *doing = "start";

static void __attribute__((noreturn)) fail(const char *what)
{
	fprintf(stderr, "load: %s: %s: %s\n", doing, what, strerror(errno));
	exit(1);
}

static double seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

struct usage {
	double cpu; /* seconds */
	long involuntary, sleeps; /* switches of context */
};

static struct usage usage(void)
{
	struct rusage r;

	getrusage(RUSAGE_SELF, &r);
	return (struct usage){
		.cpu = r.ru_utime.tv_sec + r.ru_stime.tv_sec + (r.ru_utime.tv_usec + r.ru_stime.tv_usec) / 1e6,
		.involuntary = r.ru_nivcsw,
		.sleeps = r.ru_nvcsw,
	};
}

static struct usage since(struct usage before)
{
	struct usage now = usage();

	return (struct usage){ now.cpu - before.cpu, now.involuntary - before.involuntary, now.sleeps - before.sleeps };
}

/* What a side did. Both share the page that these lie in. */
struct side {
	struct usage used;
	long operations; /* client: that came to their end while timed */
	long made;	 /* client: connections, also those before and after that */
	long lost;	 /* client: failed, or not answered within a second */
	double lasted;	 /* client: seconds that were timed */
	double p50, p99; /* client: microseconds */
};

struct shared {
	volatile int ready; /* server listens */
	volatile int stop;  /* client ended */
	struct side client, server;
};

static struct shared *shared;
static float *samples;
static long sampled;

static void sample(double from, double to)
{
	samples[sampled++ % SAMPLES] = (to - from) * 1e6;
}

static int ascending(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return (x > y) - (x < y);
}

/* Enters namespace, cgroup and CPU as the argument says. */
static void enter(char *where)
{
	char *netns = strsep(&where, ","), *cgroup = strsep(&where, ","), *cpu = strsep(&where, ",");
	char path[4096];
	cpu_set_t set;
	int fd;

	doing = "enter";
	if (!netns || !cgroup || !cpu)
		fail("NETNS,CGROUP,CPU");
	snprintf(path, sizeof(path), "%s/cgroup.procs", cgroup);
	fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, "0", 1) != 1)
		fail(path);
	close(fd);
	fd = open(netns, O_RDONLY);
	if (fd < 0 || setns(fd, CLONE_NEWNET))
		fail(netns);
	close(fd);
	CPU_ZERO(&set);
	CPU_SET(atoi(cpu), &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		fail("CPU");
}

static struct sockaddr_in address(const char *host, int port)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(port) };

	if (inet_pton(AF_INET, host, &a.sin_addr) != 1)
		fail("address");
	return a;
}

static int listener(const char *host, int port)
{
	struct sockaddr_in a = address(host, port);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(fd, (struct sockaddr *)&a, sizeof(a)) || listen(fd, 4096))
		fail("listen");
	return fd;
}

static void watch(int poll, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event e = { .events = events, .data.u64 = data };

	if (epoll_ctl(poll, EPOLL_CTL_ADD, fd, &e))
		fail("epoll");
}

/* Serves the TCP modes that wait: whatever it listens to is told apart by a bit. */
#define LISTENS (1ULL << 32)

static void serve(const char *host)
{
	int poll = epoll_create1(0);
	struct epoll_event events[EVENTS];
	char byte;

	for (int i = 0; i < PORTS; i++) {
		int fd = listener(host, FIRST_PORT + i);

		watch(poll, fd, EPOLLIN, LISTENS | fd);
	}
	int undeclared = listener(host, CLOSED_PORT);
	watch(poll, undeclared, EPOLLIN, LISTENS | undeclared);
	shared->ready = 1;
	while (!shared->stop) {
		int n = epoll_wait(poll, events, EVENTS, 50);

		for (int i = 0; i < n; i++) {
			int fd = (int)events[i].data.u64;

			if (events[i].data.u64 & LISTENS) {
				int on = 1, c;

				while ((c = accept4(fd, 0, 0, SOCK_NONBLOCK)) >= 0) {
					setsockopt(c, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
					watch(poll, c, EPOLLIN, c);
				}
				continue;
			}
			if (read(fd, &byte, 1) == 1) {
				if (write(fd, &byte, 1) != 1)
					close(fd);
			} else if (errno != EAGAIN || !(events[i].events & EPOLLIN)) {
				close(fd);
			}
			errno = 0;
		}
	}
}

/* One connection after the other is echoed, spinning. */
static void serve_spinning(const char *host)
{
	int fd = listener(host, FIRST_PORT), c = -1, on = 1;
	char byte;

	shared->ready = 1;
	while (!shared->stop) {
		if (c < 0) {
			c = accept4(fd, 0, 0, SOCK_NONBLOCK);
			if (c >= 0)
				setsockopt(c, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
			continue;
		}
		if (recv(c, &byte, 1, 0) == 1 && send(c, &byte, 1, 0) != 1)
			fail("send");
	}
}

static void serve_datagrams(const char *host)
{
	struct sockaddr_in a = address(host, UDP_PORT), from;
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	struct timeval patience = { .tv_usec = 50000 };
	char b[DATAGRAM];

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (bind(fd, (struct sockaddr *)&a, sizeof(a)))
		fail("bind");
	shared->ready = 1;
	while (!shared->stop) {
		socklen_t length = sizeof(from);
		ssize_t n = recvfrom(fd, b, sizeof(b), 0, (struct sockaddr *)&from, &length);

		if (n > 0)
			sendto(fd, b, n, 0, (struct sockaddr *)&from, length);
	}
}

/* A connection of crr. */
struct call {
	int fd; /* -1: it waits for its time */
	bool asked;
	double since;
};

static int poll_fd;

static void open_call(struct call *c, long index, const struct sockaddr_in *to)
{
	c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (c->fd < 0)
		fail("socket");
	c->asked = false;
	c->since = seconds();
	shared->client.made++;
	if (connect(c->fd, (const struct sockaddr *)to, sizeof(*to)) && errno != EINPROGRESS)
		fail("connect");
	watch(poll_fd, c->fd, EPOLLIN | EPOLLOUT | EPOLLET, index);
}

/* Makes connections for so long, at most so many a second; 0: as many as go. */
static void call(const char *host, double last, double rate)
{
	struct call calls[OUTSTANDING];
	struct sockaddr_in to[PORTS];
	struct epoll_event events[EVENTS];
	double begin = seconds(), now = begin, moved = begin;
	long open = 0, next = 0;
	struct usage before = usage();

	poll_fd = epoll_create1(0);
	for (int i = 0; i < PORTS; i++)
		to[i] = address(host, FIRST_PORT + i);
	for (int i = 0; i < OUTSTANDING; i++)
		calls[i].fd = -1;
	for (;;) {
		bool going_on = now - begin < last, waiting = false;

		for (int i = 0; i < OUTSTANDING && going_on; i++) {
			if (calls[i].fd >= 0)
				continue;
			if (rate && next > (now - begin) * rate) {
				waiting = true;
				break;
			}
			open_call(&calls[i], i, &to[next++ % PORTS]);
			open++;
		}
		if (!open && !going_on)
			break;
		int n = epoll_wait(poll_fd, events, EVENTS, waiting ? 1 : 1000);

		now = seconds();
		if (n)
			moved = now;
		if (open && now - moved >= 1) { /* nothing moves any more */
			shared->client.lost += open;
			break;
		}
		for (int i = 0; i < n; i++) {
			struct call *c = &calls[events[i].data.u64];
			char byte = 1;
			bool done = false;

			if (events[i].events & (EPOLLERR | EPOLLHUP)) {
				shared->client.lost++;
				done = true;
			} else {
				if (!c->asked && events[i].events & EPOLLOUT)
					c->asked = send(c->fd, &byte, 1, MSG_NOSIGNAL) == 1;
				if (c->asked && events[i].events & EPOLLIN && recv(c->fd, &byte, 1, 0) == 1) {
					now = seconds();
					sample(c->since, now);
					shared->client.operations++;
					done = true;
				}
			}
			if (!done)
				continue;
			close(c->fd);
			c->fd = -1;
			open--;
			now = seconds();
			if (now - begin < last && !rate) {
				open_call(c, events[i].data.u64, &to[next++ % PORTS]);
				open++;
			}
		}
	}
	shared->client.lasted = seconds() - begin;
	shared->client.used = since(before);
}

static void ask_spinning(const char *host, double last)
{
	struct sockaddr_in to = address(host, FIRST_PORT);
	int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
	double begin, from, now;
	struct usage before;
	char byte = 1;

	shared->client.made++;
	if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
		fail("connect");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	fcntl(fd, F_SETFL, O_NONBLOCK);
	before = usage();
	begin = now = seconds();
	while (now - begin < last) {
		from = now;
		if (send(fd, &byte, 1, 0) != 1)
			fail("send");
		while (recv(fd, &byte, 1, 0) != 1) {
			now = seconds();
			if (errno != EAGAIN || now - from > 1)
				fail("receive");
		}
		now = seconds();
		sample(from, now);
		shared->client.operations++;
	}
	shared->client.lasted = now - begin;
	shared->client.used = since(before);
}

/* Keeps a window of datagrams on their way. Each carries the time it left. What is
 * not back after 100 ms of silence is lost, and replaced. */
static void ask_datagrams(const char *host, double last, bool connected)
{
	struct sockaddr_in to = address(host, UDP_PORT);
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	struct timeval patience = { .tv_usec = 100000 };
	double begin, now;
	struct usage before;
	int away = 0;

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (connected && connect(fd, (struct sockaddr *)&to, sizeof(to)))
		fail("connect");
	before = usage();
	begin = now = seconds();
	shared->client.made++;
	while (now - begin < last || away) {
		char b[DATAGRAM] = { 0 };
		double left;

		while (away < WINDOW && now - begin < last) {
			memcpy(b, &now, sizeof(now));
			if (connected ? send(fd, b, sizeof(b), 0) < 0 :
					sendto(fd, b, sizeof(b), 0, (struct sockaddr *)&to, sizeof(to)) < 0)
				fail("send");
			away++;
		}
		if (recv(fd, b, sizeof(b), 0) != sizeof(b)) {
			shared->client.lost += away;
			away = 0;
			now = seconds();
			continue;
		}
		away -= away > 0;
		memcpy(&left, b, sizeof(left));
		now = seconds();
		sample(left, now);
		shared->client.operations++;
	}
	shared->client.lasted = now - begin;
	shared->client.used = since(before);
}

/* One connection, and at most half a second for it: lost says that there was none. */
static void try_port(const char *host, int port)
{
	struct sockaddr_in to = address(host, port);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), problem = 0;
	socklen_t length = sizeof(problem);
	struct pollfd p = { .fd = fd, .events = POLLOUT };

	shared->client.made++;
	if (connect(fd, (struct sockaddr *)&to, sizeof(to)) && errno != EINPROGRESS)
		problem = errno;
	else if (poll(&p, 1, 500) != 1)
		problem = ETIMEDOUT;
	else
		getsockopt(fd, SOL_SOCKET, SO_ERROR, &problem, &length);
	shared->client.lost = problem != 0;
	shared->client.operations = problem == 0;
	samples[sampled++] = 0;
	close(fd);
}

static void server(const char *mode, const char *host, char *where)
{
	struct usage before;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	alarm(70);
	enter(where);
	doing = "serve";
	before = usage();
	if (!strcmp(mode, "rr"))
		serve_spinning(host);
	else if (!strncmp(mode, "udp", 3))
		serve_datagrams(host);
	else
		serve(host);
	shared->server.used = since(before);
	_exit(0);
}

static void client(const char *mode, const char *host, double last, char *where)
{
	long kept;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	alarm(70);
	enter(where);
	doing = mode;
	memset(samples, 0, SAMPLES * sizeof(*samples)); /* no page faults while it counts */
	if (!strcmp(mode, "crr"))
		call(host, last, 0);
	else if (!strncmp(mode, "crr:", 4))
		call(host, last, atof(mode + 4));
	else if (!strcmp(mode, "rr"))
		ask_spinning(host, last);
	else if (!strcmp(mode, "udp") || !strcmp(mode, "udpu"))
		ask_datagrams(host, last, !strcmp(mode, "udp"));
	else if (!strncmp(mode, "try:", 4))
		try_port(host, atoi(mode + 4));
	else
		fail("unknown mode");
	shared->stop = 1;
	kept = sampled < SAMPLES ? sampled : SAMPLES;
	if (kept) {
		qsort(samples, kept, sizeof(*samples), ascending);
		shared->client.p50 = samples[kept / 2];
		shared->client.p99 = samples[kept * 99 / 100];
	}
	_exit(0);
}

int main(int argc, char **argv)
{
	int left = 2, status, failed = 0;
	double last, operations;
	char *end;

	last = argc == 6 ? strtod(argv[3], &end) : 0;
	if (argc != 6 || *end || !(last > 0 && last <= 60)) {
		fprintf(stderr, "usage: load MODE ADDRESS SECONDS CLIENT SERVER\n");
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	shared = mmap(0, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	samples = malloc(SAMPLES * sizeof(*samples));
	if (shared == MAP_FAILED || !samples)
		fail("memory");
	if (fork() == 0)
		server(argv[1], argv[2], argv[5]);
	while (!shared->ready && waitpid(-1, &status, WNOHANG) == 0)
		usleep(100);
	if (!shared->ready)
		return 1;
	if (fork() == 0)
		client(argv[1], argv[2], last, argv[4]);
	while (left && wait(&status) > 0) {
		left--;
		failed |= status;
		shared->stop = 1; /* whoever ends first, the other has nothing to do */
	}
	if (failed)
		return 1;
	operations = shared->client.operations > 0 ? shared->client.operations : 1;
	printf("{\"operations\": %ld, \"made\": %ld, \"lost\": %ld, \"seconds\": %.6f, \"rate\": %.1f, "
	       "\"p50_us\": %.3f, \"p99_us\": %.3f, \"client_cpu_us\": %.4f, \"server_cpu_us\": %.4f, "
	       "\"client_involuntary\": %ld, \"server_involuntary\": %ld, \"client_sleeps\": %ld, \"server_sleeps\": %ld}\n",
	       shared->client.operations, shared->client.made, shared->client.lost, shared->client.lasted,
	       shared->client.lasted > 0 ? shared->client.operations / shared->client.lasted : 0, shared->client.p50,
	       shared->client.p99, shared->client.used.cpu * 1e6 / operations, shared->server.used.cpu * 1e6 / operations,
	       shared->client.used.involuntary, shared->server.used.involuntary, shared->client.used.sleeps,
	       shared->server.used.sleeps);
	return 0;
}
