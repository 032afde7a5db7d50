/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * How much passes over connections, and which process hands on what it receives: what
 * comes in on connections that it accepted goes on over those that it opened; or over
 * another that it opened, or accepted, as where `ssh -R` forwards. Processes that have a
 * part each (a shell's pipeline, a child behind a terminal or a pair of sockets) are taken
 * together with the one that started them.
 *
 * Bytes are looked at when a connection ends, and every few seconds in a round over all
 * files of all processes (survey); no packet is.
 */
#ifndef DEMARC_RELAY_H
#define DEMARC_RELAY_H

#define RELAY_BYTES 512 /* both ways and on both sides, below which nothing is told */
#define RELAY_PARTS 8	/* segments each way and on each side, as of somebody who types */
#define RELAY_SMALL 128 /* bytes of one of them, on average */
#define RELAY_AGAIN (4ULL * 1000000000ULL) /* ns; a round later it is told again */
#define ELDERS 3 /* generations that are gone back */
#define TRANSFER_BYTES (1ULL << 20) /* of a connection that ended; detectors want more */
#define TRANSFER_STEP (16ULL << 20) /* of one that goes on */

/* What passes on both sides, by enum demarc_way. */
struct flows {
	__u64 ways[DEMARC_WAYS];
	__u32 parts[DEMARC_WAYS];
};

static __always_inline __u64 apart(__u64 a, __u64 b) { return a > b ? a - b : b - a; }

/* More or less the same bytes on both sides. Detectors say how much less is enough. */
static __always_inline bool same_bytes(const __u64 *w)
{
	__u64 all = w[DEMARC_CAME_IN] + w[DEMARC_WENT_BACK] + w[DEMARC_WENT_ON] + w[DEMARC_CAME_BACK];

	if (all < RELAY_BYTES || !(w[DEMARC_CAME_IN] + w[DEMARC_WENT_BACK]) || !(w[DEMARC_WENT_ON] + w[DEMARC_CAME_BACK]))
		return false;
	return apart(w[DEMARC_CAME_IN], w[DEMARC_WENT_ON]) + apart(w[DEMARC_WENT_BACK], w[DEMARC_CAME_BACK]) <= all / 4;
}

/* More or less as many small segments. */
static __always_inline bool same_parts(const struct flows *f)
{
	const __u32 *n = f->parts;

	for (int i = 0; i < DEMARC_WAYS; i++)
		if (n[i] < RELAY_PARTS || f->ways[i] > (__u64)n[i] * RELAY_SMALL)
			return false;
	return apart(n[DEMARC_CAME_IN], n[DEMARC_WENT_ON]) <= n[DEMARC_CAME_IN] / 4 &&
	       apart(n[DEMARC_WENT_BACK], n[DEMARC_CAME_BACK]) <= n[DEMARC_WENT_BACK] / 4;
}

static __always_inline bool mirrored(const struct flows *f) { return same_bytes(f->ways) || same_parts(f); }

/* What passed since a connection was last looked at. Its mark then has it. */
static __always_inline void advance(struct demarc_mark *m, struct sock *sk, struct demarc_passed *new)
{
	struct tcp_sock *tcp = bpf_skc_to_tcp_sock(sk);
	__u64 sent, got;

	__builtin_memset(new, 0, sizeof(*new));
	if (!tcp)
		return;
	sent = tcp->bytes_acked + (tcp->write_seq - tcp->snd_una);
	got = tcp->bytes_received;
	new->bytes = sent > m->upto.bytes ? sent - m->upto.bytes : 0;
	new->back = got > m->upto.back ? got - m->upto.back : 0;
	new->parts = tcp->data_segs_out - m->upto.parts;
	new->parts_back = tcp->data_segs_in - m->upto.parts_back;
	m->upto.bytes = sent;
	m->upto.back = got;
	m->upto.parts = tcp->data_segs_out;
	m->upto.parts_back = tcp->data_segs_in;
}

/* Many bytes of one connection, of which so many were not told yet. */
static __noinline int tell_transfer(struct demarc_mark *m, struct sock *sk, __u64 least)
{
	__u64 bytes, back;
	struct demarc_signal *e;
	struct outcome o;

	if (!m || !sk)
		return 0;
	bytes = m->upto.bytes - m->told;
	back = m->upto.back - m->told_back;
	if ((bytes < least && back < least) || !about(&o, cgroup_of_sock(sk)))
		return 0;
	m->told = m->upto.bytes;
	m->told_back = m->upto.back;
	o.query.direction = m->inbound ? DEMARC_INGRESS : DEMARC_EGRESS;
	o.query.peer = m->inbound ? m->origin : 0;
	o.query.proof = o.query.peer ? DEMARC_PROOF_IDENTITY : DEMARC_PROOF_UNKNOWN;
	if (m->inbound)
		ends_turned(sk, &o.opener);
	else
		ends(sk, &o.opener);
	e = begin_signal(&o, told_of(o.query.subject, o.query.direction, o.query.now), DEMARC_SIGNAL_TRANSFER, 0, 0);
	if (!e)
		return 0;
	e->pid = m->pid;
	__builtin_memcpy(e->comm, m->comm, sizeof(e->comm));
	e->bytes = m->inbound ? back : bytes;
	e->back = m->inbound ? bytes : back;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* A process is a relay if what passed since the last round matches once its connections
 * have ended, or, where a round lay between what came in and what went on, all that
 * passed over the last two. */
static __noinline int tell_ended(struct demarc_lineage *l, __u64 cgroup)
{
	struct demarc_signal *e;
	struct outcome o;

	if (!l)
		return 0;
	if (!same_bytes(l->ended) && l->spanned && same_bytes(l->whole))
		__builtin_memcpy(l->ended, l->whole, sizeof(l->ended));
	if (!same_bytes(l->ended) || !about(&o, cgroup) || o.query.now - l->relayed < RELAY_AGAIN)
		return 0;
	l->relayed = o.query.now;
	__builtin_memcpy(&o.opener, &l->on, sizeof(o.opener));
	e = begin_signal(&o, told_of(o.query.subject, DEMARC_EGRESS, o.query.now), DEMARC_SIGNAL_RELAY, 0, 0);
	if (e) {
		name_task(e, bpf_get_current_task_btf());
		e->received = l->ended[DEMARC_CAME_IN];
		e->answered = l->ended[DEMARC_WENT_BACK];
		e->bytes = l->ended[DEMARC_WENT_ON];
		e->back = l->ended[DEMARC_CAME_BACK];
		e->origin = l->origin;
		bpf_ringbuf_submit(e, 0);
	}
	__builtin_memset(l->ended, 0, sizeof(l->ended));
	__builtin_memset(l->whole, 0, sizeof(l->whole));
	return 0;
}

static __always_inline void put_down(struct demarc_lineage *l, const struct demarc_mark *m, const struct demarc_passed *new)
{
	__u8 spanned = m->inbound ? 1 : 2;

	l->spanned = m->round ? l->spanned | spanned : l->spanned & ~spanned;
	if (m->inbound) {
		l->ended[DEMARC_CAME_IN] += new->back;
		l->ended[DEMARC_WENT_BACK] += new->bytes;
		l->whole[DEMARC_CAME_IN] = m->upto.back;
		l->whole[DEMARC_WENT_BACK] = m->upto.bytes;
		if (m->origin)
			l->origin = m->origin;
	} else {
		l->ended[DEMARC_WENT_ON] += new->bytes;
		l->ended[DEMARC_CAME_BACK] += new->back;
		l->whole[DEMARC_WENT_ON] = m->upto.bytes;
		l->whole[DEMARC_CAME_BACK] = m->upto.back;
	}
}

/* What still came in a connection after this process had ended its own side. */
static __always_inline void collect(struct demarc_lineage *l, __u64 cookie)
{
	struct demarc_mark *m = mark_at(cookie, mark_way(cookie | DEMARC_MARK_CLOSED));

	if (!m)
		return;
	put_down(l, m, &m->fresh);
	mark_rekey(cookie, cookie | DEMARC_MARK_CLOSED, 0);
}

/* A connection ends: what passed since it was last looked at is put down to its
 * process, which is the current one when it ends its own side. What the network closes
 * is collected when the process ends the next. */
static __noinline int ending(struct sock *sk, struct demarc_mark *m, __u64 cookie, bool closed)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct demarc_passed new;
	struct demarc_lineage *l;

	if (!sk || !m)
		return 0;
	if (closed) {
		advance(m, sk, &m->fresh);
		mark_rekey(cookie, cookie, cookie | DEMARC_MARK_CLOSED);
		return tell_transfer(m, sk, TRANSFER_BYTES);
	}
	l = known_lineage(task);
	if (!l || (m->pid && m->pid != task->tgid))
		return 0;
	if (!m->pid) {
		m->pid = task->tgid;
		bpf_probe_read_kernel(m->comm, sizeof(m->comm), task->comm);
	}
	collect(l, l->ending[0]);
	collect(l, l->ending[1]);
	l->ending[m->inbound ? 0 : 1] = cookie;
	advance(m, sk, &new);
	put_down(l, m, &new);
	if (!m->inbound)
		ends_of_argument(sk, &l->on);
	return tell_ended(l, cgroup_of_sock(sk));
}

/* The round: the process that is looked at, and what passed through it since the last.
 * Only one round is made at a time. */
struct {
	struct demarc_passing passing;
	struct demarc_passing others; /* through the process that it descends from, and its others */
	struct demarc_strand strand;  /* the connection that is looked at */
	__u64 told[64];		      /* connections of this round that were told as relays, by hash */
	__u64 cgroup;
	__u32 subject;
	__u32 round; /* when it began */
	bool ours; /* it is a workload's */
} survey;

static __always_inline __u64 size_of(const struct demarc_strand *s) { return s->passed.bytes + s->passed.back; }

static __always_inline bool anything(const struct demarc_passing *p) { return size_of(&p->trunk); }

/* The connection over which most passed is kept, and one of the others. */
static __noinline int keep_strand(struct demarc_passing *p, const struct demarc_strand *s)
{
	if (!p || !s || !size_of(s))
		return 0;
	if (size_of(s) > size_of(&p->trunk)) {
		if (size_of(&p->trunk) && (!p->trunk.inbound || p->next.inbound || !size_of(&p->next)))
			p->next = p->trunk;
		p->trunk = *s;
	} else if (!size_of(&p->next) || s->inbound < p->next.inbound || (s->inbound == p->next.inbound && size_of(s) > size_of(&p->next))) {
		p->next = *s;
	}
	return 0;
}

/* One more connection. */
static __noinline int add_strand(struct demarc_passing *p, const struct demarc_strand *s, __u32 origin)
{
	const struct demarc_passed *new;

	if (!p || !s)
		return 0;
	new = &s->passed;
	if (s->inbound) {
		p->ways[DEMARC_CAME_IN] += new->back;
		p->parts[DEMARC_CAME_IN] += new->parts_back;
		p->ways[DEMARC_WENT_BACK] += new->bytes;
		p->parts[DEMARC_WENT_BACK] += new->parts;
		if (origin)
			p->origin = origin;
	} else {
		p->ways[DEMARC_WENT_ON] += new->bytes;
		p->parts[DEMARC_WENT_ON] += new->parts;
		p->ways[DEMARC_CAME_BACK] += new->back;
		p->parts[DEMARC_CAME_BACK] += new->parts_back;
	}
	return keep_strand(p, s);
}

/* What passed through one process, to what passed through others. */
static __noinline int fold(struct demarc_passing *into, const struct demarc_passing *p)
{
	if (!into || !p)
		return 0;
	for (int i = 0; i < DEMARC_WAYS; i++) {
		into->ways[i] += p->ways[i];
		into->parts[i] += p->parts[i];
	}
	if (p->origin)
		into->origin = p->origin;
	keep_strand(into, &p->trunk);
	return keep_strand(into, &p->next);
}

/* What passed over connections of one kind, where it is two that are joined: the larger
 * one is as if it had come in. */
static __always_inline bool joined(const struct demarc_passing *p, struct flows *f)
{
	const struct demarc_passed *t = &p->trunk.passed;

	f->ways[DEMARC_WENT_ON] = (p->trunk.inbound ? p->ways[DEMARC_WENT_BACK] : p->ways[DEMARC_WENT_ON]) - t->bytes;
	f->ways[DEMARC_CAME_BACK] = (p->trunk.inbound ? p->ways[DEMARC_CAME_IN] : p->ways[DEMARC_CAME_BACK]) - t->back;
	f->parts[DEMARC_WENT_ON] = (p->trunk.inbound ? p->parts[DEMARC_WENT_BACK] : p->parts[DEMARC_WENT_ON]) - t->parts;
	f->parts[DEMARC_CAME_BACK] = (p->trunk.inbound ? p->parts[DEMARC_CAME_IN] : p->parts[DEMARC_CAME_BACK]) - t->parts_back;
	f->ways[DEMARC_CAME_IN] = t->back;
	f->ways[DEMARC_WENT_BACK] = t->bytes;
	f->parts[DEMARC_CAME_IN] = t->parts_back;
	f->parts[DEMARC_WENT_BACK] = t->parts;
	return mirrored(f);
}

/* A process, or several, that relay are told; once in a round by the connection that
 * leads on. */
static __noinline int tell_relay(const struct demarc_passing *p)
{
	__u8 pairing = DEMARC_PAIR_CALLERS;
	const struct demarc_strand *on;
	struct demarc_signal *e;
	struct outcome o;
	struct flows f;
	__u64 hash;

	if (!p || !anything(p))
		return 0;
	on = p->trunk.inbound ? &p->next : &p->trunk;
	__builtin_memcpy(f.ways, p->ways, sizeof(f.ways));
	__builtin_memcpy(f.parts, p->parts, sizeof(f.parts));
	if (!mirrored(&f)) {
		if (!joined(p, &f))
			return 0;
		pairing = p->trunk.inbound ? DEMARC_PAIR_ACCEPTED : DEMARC_PAIR_OPENED;
		on = p->next.inbound == p->trunk.inbound ? &p->next : &p->trunk;
	}
	hash = hash_of(&on->ends) ^ survey.round;
	if (survey.told[hash % 64] == hash || !about(&o, survey.cgroup))
		return 0;
	survey.told[hash % 64] = hash;
	__builtin_memcpy(&o.opener, &on->ends, sizeof(o.opener));
	e = begin_signal(&o, told_of(o.query.subject, DEMARC_EGRESS, o.query.now), DEMARC_SIGNAL_RELAY, 0, 0);
	if (!e)
		return 0;
	e->pid = on->pid;
	e->uid = on->uid;
	e->start = on->start;
	__builtin_memcpy(e->comm, on->comm, sizeof(e->comm));
	e->received = f.ways[DEMARC_CAME_IN];
	e->answered = f.ways[DEMARC_WENT_BACK];
	e->bytes = f.ways[DEMARC_WENT_ON];
	e->back = f.ways[DEMARC_CAME_BACK];
	__builtin_memcpy(e->parts, f.parts, sizeof(e->parts));
	e->pairing = pairing;
	e->ssh = p->trunk.ssh | p->next.ssh;
	e->origin = p->origin;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* What passed over connections that ended since the last round. */
static __noinline int survey_ended(struct demarc_lineage *l)
{
	struct demarc_passing *p = &survey.passing;
	struct demarc_strand *s = &survey.strand;

	if (!l)
		return 0;
	p->origin = l->origin;
	s->passed.parts = s->passed.parts_back = 0;
	s->ssh = 0;
	s->inbound = 1;
	s->passed.bytes = l->ended[DEMARC_WENT_BACK];
	s->passed.back = l->ended[DEMARC_CAME_IN];
	__builtin_memset(&s->ends, 0, sizeof(s->ends));
	add_strand(p, s, 0);
	s->inbound = 0;
	s->passed.bytes = l->ended[DEMARC_WENT_ON];
	s->passed.back = l->ended[DEMARC_CAME_BACK];
	__builtin_memcpy(&s->ends, &l->on, sizeof(s->ends));
	add_strand(p, s, 0);
	__builtin_memset(l->ended, 0, sizeof(l->ended));
	return 0;
}

/* The last file of a process was seen. */
static __noinline int tell_survey(void)
{
	if (!survey.ours || !anything(&survey.passing))
		return 0;
	tell_relay(&survey.passing);
	if (!anything(&survey.others))
		return 0;
	fold(&survey.others, &survey.passing);
	return tell_relay(&survey.others);
}

/* What passed in this round through a process and those that it started; 0 = nothing did
 * yet, unless it is to be made. */
static __always_inline struct demarc_family *family_of(struct task_struct *task, bool make)
{
	struct task_struct *leader = task->group_leader;
	struct demarc_family *f = leader ? bpf_task_storage_get(&families, leader, 0, make ? BPF_LOCAL_STORAGE_GET_F_CREATE : 0) : 0;

	if (!f || f->round == survey.round)
		return f;
	if (!make)
		return 0;
	__builtin_memset(f, 0, sizeof(*f));
	f->round = survey.round;
	return f;
}

/* The family that a process is taken together with: that of the nearest process which it
 * descends from and which has connections, or else that of its parent, where they are of
 * one workload. Who started it has the smaller number, unless numbers began anew, and
 * was looked at before. */
static __noinline struct demarc_family *elder_of(struct task_struct *task, bool make)
{
	struct task_struct *at = task, *parent;
	struct demarc_lineage *l;
	struct demarc_family *f;

	if (!task)
		return 0;
	for (int i = 0; i < ELDERS; i++) {
		at = at->group_leader;
		parent = at ? at->real_parent : 0;
		l = parent ? known_lineage(parent) : 0;
		if (!l || l->subject != survey.subject)
			break;
		f = family_of(parent, false);
		if (f && f->holds)
			return f;
		at = parent;
	}
	at = task->group_leader;
	parent = at ? at->real_parent : 0;
	l = parent ? known_lineage(parent) : 0;
	return l && l->subject == survey.subject ? family_of(parent, make) : 0;
}

/* A connection that a process holds. Others may hold it, too. */
static __noinline int survey_connection(struct task_struct *task, struct sock *sk)
{
	struct demarc_strand *s = &survey.strand;
	struct demarc_family *f;
	struct demarc_mark *m;

	if (!task || !sk)
		return 0;
	m = mark_of(BPF_CORE_READ(sk, __sk_common.skc_cookie.counter));
	if (!m)
		return 0;
	if (m->round != survey.round) {
		advance(m, sk, &m->fresh);
		m->round = survey.round;
		m->seen = recently();
		tell_transfer(m, sk, TRANSFER_STEP);
	}
	if (!m->pid) {
		m->pid = s->pid;
		__builtin_memcpy(m->comm, s->comm, sizeof(m->comm));
	}
	s->passed = m->fresh;
	s->inbound = m->inbound;
	s->ssh = m->ssh;
	if (!size_of(s))
		return 0;
	ends(sk, &s->ends);
	add_strand(&survey.passing, s, m->origin);
	f = elder_of(task, true);
	if (f)
		add_strand(&f->passing, s, m->origin);
	f = family_of(task, true);
	if (f) {
		f->holds = 1;
		add_strand(&f->passing, s, m->origin);
	}
	return 0;
}

#endif
