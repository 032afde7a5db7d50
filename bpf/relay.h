/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * How much passes over connections, and which process hands on what it receives: what
 * comes in on connections that it accepted goes on over those that it opened. Bytes are
 * looked at when a connection ends, and every few seconds in a round over all files of
 * all processes (survey); no packet is.
 */
#ifndef DEMARC_RELAY_H
#define DEMARC_RELAY_H

#define RELAY_BYTES 512 /* both ways and on both sides, below which nothing is told */
#define RELAY_AGAIN (4ULL * 1000000000ULL) /* ns; a round later it is told again */
#define TRANSFER_BYTES (1ULL << 20) /* of a connection that ended; detectors want more */
#define TRANSFER_STEP (16ULL << 20) /* of one that goes on */

struct passing {
	__u64 ways[DEMARC_WAYS];
	struct demarc_tuple on; /* the connection that took most of it on */
	__u64 most;
	__u32 origin;
};

static __always_inline __u64 apart(__u64 a, __u64 b) { return a > b ? a - b : b - a; }

/* More or less the same on both sides. Detectors say how much less is enough. */
static __always_inline bool mirrored(const __u64 *w)
{
	__u64 all = w[DEMARC_CAME_IN] + w[DEMARC_WENT_BACK] + w[DEMARC_WENT_ON] + w[DEMARC_CAME_BACK];

	if (all < RELAY_BYTES || !(w[DEMARC_CAME_IN] + w[DEMARC_WENT_BACK]) || !(w[DEMARC_WENT_ON] + w[DEMARC_CAME_BACK]))
		return false;
	return apart(w[DEMARC_CAME_IN], w[DEMARC_WENT_ON]) + apart(w[DEMARC_WENT_BACK], w[DEMARC_CAME_BACK]) <= all / 4;
}

/* What passed since a connection was last looked at. Its mark then has it. */
static __always_inline void advance(struct demarc_mark *m, struct sock *sk, __u64 *bytes, __u64 *back)
{
	struct tcp_sock *tcp = bpf_skc_to_tcp_sock(sk);
	__u64 sent, got;

	*bytes = *back = 0;
	if (!tcp)
		return;
	sent = tcp->bytes_acked + (tcp->write_seq - tcp->snd_una);
	got = tcp->bytes_received;
	*bytes = sent > m->bytes ? sent - m->bytes : 0;
	*back = got > m->back ? got - m->back : 0;
	m->bytes = sent;
	m->back = got;
}

/* Many bytes of one connection, of which so many were not told yet. */
static __noinline int tell_transfer(struct demarc_mark *m, struct sock *sk, __u64 least)
{
	__u64 bytes, back;
	struct demarc_signal *e;
	struct outcome o;

	if (!m || !sk)
		return 0;
	bytes = m->bytes - m->told;
	back = m->back - m->told_back;
	if ((bytes < least && back < least) || !about(&o, cgroup_of_sock(sk)))
		return 0;
	m->told = m->bytes;
	m->told_back = m->back;
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

/* A process that lives shorter than a round is a relay if what passed matches once its
 * connections have ended. */
static __noinline int tell_ended(struct demarc_lineage *l, __u64 cgroup)
{
	struct demarc_signal *e;
	struct outcome o;

	if (!l || !mirrored(l->ended) || !about(&o, cgroup) || o.query.now - l->relayed < RELAY_AGAIN)
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
	return 0;
}

static __always_inline void put_down(struct demarc_lineage *l, const struct demarc_mark *m, __u64 bytes, __u64 back)
{
	if (m->inbound) {
		l->ended[DEMARC_CAME_IN] += back;
		l->ended[DEMARC_WENT_BACK] += bytes;
		if (m->origin)
			l->origin = m->origin;
	} else {
		l->ended[DEMARC_WENT_ON] += bytes;
		l->ended[DEMARC_CAME_BACK] += back;
	}
}

/* What still came in a connection after this process had ended its own side. */
static __always_inline void collect(struct demarc_lineage *l, __u64 cookie)
{
	struct demarc_mark *m = mark_of(cookie);

	if (!m || !m->closed)
		return;
	put_down(l, m, m->fresh, m->fresh_back);
	m->cookie = 0;
}

/* A connection ends: what passed since it was last looked at is put down to its
 * process, which is the current one when it ends its own side. What the network closes
 * is collected when the process ends the next. */
static __noinline int ending(struct sock *sk, struct demarc_mark *m, bool closed)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct demarc_lineage *l;
	__u64 bytes, back;

	if (!sk || !m || m->closed)
		return 0;
	if (!closed) {
		l = known_lineage(task);
		if (!l || (m->pid && m->pid != task->tgid))
			return 0;
		if (!m->pid) {
			m->pid = task->tgid;
			bpf_probe_read_kernel(m->comm, sizeof(m->comm), task->comm);
		}
		collect(l, l->ending[0]);
		collect(l, l->ending[1]);
		l->ending[m->inbound ? 0 : 1] = m->cookie;
		advance(m, sk, &bytes, &back);
		put_down(l, m, bytes, back);
		if (!m->inbound)
			ends_of_argument(sk, &l->on);
		return tell_ended(l, cgroup_of_sock(sk));
	}
	advance(m, sk, &m->fresh, &m->fresh_back);
	m->closed = 1;
	return tell_transfer(m, sk, TRANSFER_BYTES);
}

/* The round: the process that is looked at, and what passed through it since the last.
 * Only one round is made at a time. */
struct {
	struct passing passing;
	__u64 cgroup;
	__u64 start;
	__u32 tgid; /* 0 = none */
	__u32 uid;
	__u32 round;
	bool ours; /* it is a workload's */
	char comm[16];
} survey;

/* The last file of a process was seen. */
static __noinline int tell_survey(void)
{
	struct demarc_signal *e;
	struct outcome o;

	if (!survey.tgid || !survey.ours || !mirrored(survey.passing.ways) || !about(&o, survey.cgroup))
		return 0;
	__builtin_memcpy(&o.opener, &survey.passing.on, sizeof(o.opener));
	e = begin_signal(&o, told_of(o.query.subject, DEMARC_EGRESS, o.query.now), DEMARC_SIGNAL_RELAY, 0, 0);
	if (!e)
		return 0;
	e->pid = survey.tgid;
	e->uid = survey.uid;
	e->start = survey.start;
	__builtin_memcpy(e->comm, survey.comm, sizeof(e->comm));
	e->received = survey.passing.ways[DEMARC_CAME_IN];
	e->answered = survey.passing.ways[DEMARC_WENT_BACK];
	e->bytes = survey.passing.ways[DEMARC_WENT_ON];
	e->back = survey.passing.ways[DEMARC_CAME_BACK];
	e->origin = survey.passing.origin;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* A connection that a process holds. Others may hold it, too. */
static __noinline int survey_connection(struct sock *sk)
{
	struct passing *p = &survey.passing;
	struct demarc_mark *m;

	m = sk ? mark_of(BPF_CORE_READ(sk, __sk_common.skc_cookie.counter)) : 0;
	if (!m)
		return 0;
	if (m->round != survey.round) {
		advance(m, sk, &m->fresh, &m->fresh_back);
		m->round = survey.round;
		tell_transfer(m, sk, TRANSFER_STEP);
	}
	if (!m->pid) {
		m->pid = survey.tgid;
		__builtin_memcpy(m->comm, survey.comm, sizeof(m->comm));
	}
	if (m->inbound) {
		p->ways[DEMARC_CAME_IN] += m->fresh_back;
		p->ways[DEMARC_WENT_BACK] += m->fresh;
		if (m->origin)
			p->origin = m->origin;
		return 0;
	}
	p->ways[DEMARC_WENT_ON] += m->fresh;
	p->ways[DEMARC_CAME_BACK] += m->fresh_back;
	if (m->fresh + m->fresh_back >= p->most) {
		p->most = m->fresh + m->fresh_back;
		ends(sk, &p->on);
	}
	return 0;
}

#endif
