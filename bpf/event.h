/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* What is counted and what is told. */
#ifndef DEMARC_EVENT_H
#define DEMARC_EVENT_H

static __always_inline void count(const struct demarc_query *q, __u32 number)
{
	struct demarc_count_key key = {
		.subject = q->subject,
		.peer = q->proof == DEMARC_PROOF_IDENTITY ? q->peer : 0,
		.crossing = number,
		.direction = q->direction,
		.verdict = q->verdict,
		.reason = q->reason,
	};
	__u64 one = 1, *n = bpf_map_lookup_elem(&counts, &key);

	if (n) {
		/* Atomic although the counter is this CPU's: a softirq may come
		 * between reading and writing. */
		__sync_fetch_and_add(n, 1);
		return;
	}
	if (bpf_map_update_elem(&counts, &key, &one, BPF_NOEXIST)) {
		/* Another program of this CPU may have made it meanwhile. */
		n = bpf_map_lookup_elem(&counts, &key);
		if (n)
			__sync_fetch_and_add(n, 1);
		else
			fault(DEMARC_FAULT_COUNT_FULL);
	}
}

static __always_inline void tell(void *ring, __u32 which, const struct outcome *o, __u32 number)
{
	struct demarc_ring_state *counter = bpf_map_lookup_elem(&ring_state, &which);
	struct demarc_event *e;
	__u64 seq;

	if (!counter)
		return;
	seq = __sync_fetch_and_add(&counter->seq, 1) + 1;
	e = bpf_ringbuf_reserve(ring, sizeof(*e), 0);
	if (!e) {
		__sync_fetch_and_add(&counter->lost, 1);
		return;
	}
	e->time = bpf_ktime_get_boot_ns();
	e->seq = seq;
	e->cgroup = o->cgroup;
	e->cpu = bpf_get_smp_processor_id();
	e->subject = o->query.subject;
	e->peer = o->query.peer;
	e->crossing = number;
	e->epoch = DEMARC_ACTIVE_EPOCH(o->active);
	e->kind = DEMARC_EVENT_VERDICT;
	e->hook = o->hook;
	e->verdict = o->query.verdict;
	e->reason = o->query.reason;
	e->direction = o->query.direction;
	e->proof = o->query.proof;
	e->slot = o->query.slot;
	e->zero = 0;
	e->zero2 = 0;
	__builtin_memcpy(&e->tuple, &o->opener, sizeof(e->tuple));
	e->pid = 0;
	__builtin_memset(e->comm, 0, sizeof(e->comm));
	if (o->task) {
		/* Read from the task itself: Linux 6.12 does not offer the helpers
		 * for it to programs of packets, 6.18 does. */
		struct task_struct *task = bpf_get_current_task_btf();

		e->pid = task->tgid;
		bpf_probe_read_kernel(e->comm, sizeof(e->comm), task->comm);
	}
	bpf_ringbuf_submit(e, 0);
}

/* Counts a verdict and tells it, except that verdicts which nobody would call
 * news are only counted: flows between unmanaged peers, what waits for proof,
 * and subjects without a name yet, whose callers try again. */
GLOBAL int report(struct outcome *o)
{
	__u8 log = 0;
	__u32 number;

	if (!o)
		return 0;
	number = crossing_number(o->query.slot, o->query.crossing, &log);
	count(&o->query, number);
	o->reported = true;
	if (o->query.verdict == DEMARC_WOULD_DENY || o->query.verdict == DEMARC_WOULD_ALLOW) {
		tell(&denied_events, DEMARC_RING_DENIED, o, number);
		return 0;
	}
	switch (o->query.reason) {
	case DEMARC_BY_UNMANAGED:
	case DEMARC_BY_KERNEL:
	case DEMARC_UNPROVEN:
	case DEMARC_PENDING:
		return 0;
	}
	if (o->query.verdict == DEMARC_DENY || o->query.verdict == DEMARC_AUDIT)
		tell(&denied_events, DEMARC_RING_DENIED, o, number);
	else if (log != 2)
		tell(&allowed_events, DEMARC_RING_ALLOWED, o, number);
	return 0;
}

/* Reports a denial and says whether it is carried out: in mode observe it is
 * reported as an audit and then let pass. */
static __always_inline bool refused(struct outcome *o, __u8 reason)
{
	bool observe = DEMARC_ACTIVE_FLAGS(o->active) & DEMARC_ACTIVE_OBSERVE;

	o->query.reason = reason;
	o->query.verdict = observe ? DEMARC_AUDIT : DEMARC_DENY;
	report(o);
	return !observe;
}

/* The same with its signal: for callers that have the stack for it. */
static __always_inline bool refused_aloud(struct outcome *o, __u8 reason)
{
	bool no = refused(o, reason);

	remark(o);
	return no;
}

#endif
