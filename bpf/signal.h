/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Signals, from verdicts (remark) and from what observes tasks and connections
 * (signal.bpf.c). Nothing here changes a verdict. Each identity has a memory and
 * quotas of its own, so that one's flood does not cost another's signal.
 */
#ifndef DEMARC_SIGNAL_H
#define DEMARC_SIGNAL_H

static __always_inline __u64 mix(__u64 h)
{
	h ^= h >> 33;
	h *= 0xff51afd7ed558ccdULL;
	h ^= h >> 33;
	h *= 0xc4ceb9fe1a85ec53ULL;
	return h ^ h >> 33;
}

static __always_inline __u64 address_hash(const __u8 *address)
{
	const __u32 *w = (const __u32 *)address;

	return mix(mix((__u64)w[0] << 32 | w[1]) ^ ((__u64)w[2] << 32 | w[3]));
}

/* Sets one bit, and says whether it was set. */
static __always_inline bool test_and_set(__u32 *bits, __u32 mask, __u32 n)
{
	__u32 word = (n >> 5) & mask, bit = 1U << (n & 31);

	barrier_var(word);
	return __sync_fetch_and_or(&bits[word & mask], bit) & bit;
}

static const struct demarc_seen nothing;

/* What was told of an identity in this epoch; 0 where there is no room. */
static __always_inline struct demarc_told *told_of(__u32 subject, __u8 direction, __u64 now)
{
	__u32 key = subject << 1 | (direction & 1);
	struct demarc_told *t = bpf_map_lookup_elem(&tellings, &key);

	if (!t) {
		bpf_map_update_elem(&tellings, &key, &nothing, BPF_NOEXIST);
		t = bpf_map_lookup_elem(&tellings, &key);
		if (!t)
			return 0;
	}
	if (now - t->began > DEMARC_SIGNAL_EPOCH) { /* a new one begins: what was told is forgotten */
		t->began = now;
		__builtin_memset(t->contacts, 0, sizeof(t->contacts));
		__builtin_memset(t->deeds, 0, sizeof(t->deeds));
	}
	return t;
}

/* What an identity was seen to do in it; 0 where there is no room. */
static __always_inline struct demarc_seen *seen_doing(__u32 subject, __u64 now)
{
	struct demarc_seen *s = bpf_map_lookup_elem(&seen, &subject);

	if (!s) {
		bpf_map_update_elem(&seen, &subject, &nothing, BPF_NOEXIST);
		s = bpf_map_lookup_elem(&seen, &subject);
		if (!s)
			return 0;
	}
	if (now - s->began > DEMARC_SIGNAL_EPOCH) {
		__builtin_memset(s, 0, sizeof(*s));
		s->began = now;
	}
	return s;
}

static __always_inline bool is_deed(__u8 kind)
{
	switch (kind) {
	case DEMARC_SIGNAL_CONTACT:
	case DEMARC_SIGNAL_FAILED:
	case DEMARC_SIGNAL_EDGE:
	case DEMARC_SIGNAL_TRANSFER:
	case DEMARC_SIGNAL_DNS:
	case DEMARC_SIGNAL_ICMP:
		return false;
	}
	return true;
}

/* True: it was told in this epoch already. */
static __always_inline bool known_already(struct demarc_told *s, __u8 kind, __u64 what)
{
	__u64 h = mix(what ^ (__u64)kind << 56);
	bool one, two;

	if (is_deed(kind)) {
		one = test_and_set(s->deeds, 7, h);
		two = test_and_set(s->deeds, 7, h >> 32);
	} else {
		one = test_and_set(s->contacts, 15, h);
		two = test_and_set(s->contacts, 15, h >> 32);
	}
	return one && two;
}

/* Charges a lane, by the same algorithm as a crossing's limit. */
static __always_inline bool within_quota(struct demarc_told *s, bool deed, __u64 now)
{
	__u64 *due = deed ? &s->due[DEMARC_LANE_DEEDS] : &s->due[DEMARC_LANE_CONTACTS];

	for (int i = 0; i < 4; i++) {
		__u64 old = *(volatile __u64 *)due, from = old > now ? old : now;

		if (from - now > DEMARC_LANE_SLACK)
			break;
		if (__sync_val_compare_and_swap(due, old, from + DEMARC_LANE_INTERVAL) == old)
			return true;
	}
	__sync_fetch_and_add(&s->missed, 1);
	return false;
}

/* Counts one value among the distinct ones of its group. Returns how many bits are set
 * if that is a step that was not told yet, else 0. A group that finds no place takes
 * that of the one with the fewest. */
static __noinline __u32 distinct(struct demarc_distinct *all, __u32 of, __u32 value)
{
	struct demarc_distinct *d = 0, *least;
	__u32 set;

	if (!all)
		return 0;
	least = &all[0];
	for (int i = 0; i < DEMARC_SEEN_SLOTS; i++) {
		if (all[i].of == of) {
			d = &all[i];
			break;
		}
		if (all[i].set < least->set)
			least = &all[i];
	}
	if (!d) {
		d = least;
		d->of = of;
		d->set = d->told = 0;
		__builtin_memset(d->bits, 0, sizeof(d->bits));
	}
	if (test_and_set(d->bits, 7, value & 255))
		return 0;
	set = ++d->set;
	switch (set) {
	case 5:
	case 10:
	case 15:
	case 24: /* of about 25 */
	case 46: /* 50 */
	case 83: /* 100 */
	case 139: /* 200 */
	case 200: /* 390 */
		d->told = set;
		return set;
	}
	return 0;
}

/* By its first thread: what others are called says less. */
static __always_inline void name_task(struct demarc_signal *e, struct task_struct *task)
{
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);

	e->pid = task->tgid;
	e->uid = BPF_CORE_READ(task, cred, uid.val);
	e->start = BPF_CORE_READ(leader, start_boottime);
	bpf_core_read(e->comm, sizeof(e->comm), &leader->comm);
}

/* A record to be filled and submitted, or 0 if it is not to be told. `what` is the
 * same for what needs to be told once; the constant 0 = it is told each time. */
static __always_inline struct demarc_signal *begin_signal(const struct outcome *o, struct demarc_told *s, __u8 kind,
							  __u8 cause, __u64 what)
{
	struct demarc_ring_state *counter;
	__u32 which = DEMARC_RING_SIGNALS;
	struct demarc_signal *e;
	__u64 seq;

	/* Where nothing is told once only, that is known here, and costs the verifier nothing. */
	if (s && ((!(__builtin_constant_p(what) && !what) && known_already(s, kind, what)) || !within_quota(s, is_deed(kind), o->query.now)))
		return 0;
	counter = bpf_map_lookup_elem(&ring_state, &which);
	if (!counter)
		return 0;
	if (!s) {
		__sync_fetch_and_add(&counter->lost, 1);
		return 0;
	}
	seq = __sync_fetch_and_add(&counter->seq, 1) + 1;
	e = bpf_ringbuf_reserve(&signals, sizeof(*e), 0);
	if (!e) {
		__sync_fetch_and_add(&counter->lost, 1);
		return 0;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->time = bpf_ktime_get_boot_ns();
	e->seq = seq;
	e->cgroup = o->cgroup;
	e->cpu = bpf_get_smp_processor_id();
	e->subject = o->query.subject;
	e->peer = o->query.peer;
	e->epoch = DEMARC_ACTIVE_EPOCH(o->active);
	e->missed = __sync_lock_test_and_set(&s->missed, 0);
	e->kind = kind;
	e->cause = cause;
	e->direction = o->query.direction;
	e->proof = o->query.proof;
	__builtin_memcpy(&e->tuple, &o->opener, sizeof(e->tuple));
	return e;
}

/* Cloud metadata: 169.254.169.254, fd00:ec2::254, 100.100.100.200. */
static __always_inline bool is_metadata(const __u8 *address)
{
	const __u32 *w = (const __u32 *)address;

	if (!w[0] && !w[1] && w[2] == bpf_htonl(0xffff))
		return w[3] == bpf_htonl(0xa9fea9fe) || w[3] == bpf_htonl(0x646464c8);
	return w[0] == bpf_htonl(0xfd000ec2) && !w[1] && !w[2] && w[3] == bpf_htonl(0x254);
}

/* What kind of signal a verdict is; 0 = none. A function of its own, so that the verifier
 * need not look at what follows once for each kind. */
GLOBAL int kind_of(const struct demarc_query *q)
{
	bool refused;

	if (!q)
		return 0;
	refused = q->verdict == DEMARC_DENY || q->verdict == DEMARC_AUDIT;

	switch (q->reason) {
	case DEMARC_DECOY_TOUCHED:
		return DEMARC_SIGNAL_DECOY;
	case DEMARC_RAW_SOCKET:
		return DEMARC_SIGNAL_RAW;
	case DEMARC_TAG_MALFORMED:
	case DEMARC_TAG_BAD_MAC:
	case DEMARC_TAG_WRONG_EPOCH:
	case DEMARC_TAG_STALE:
	case DEMARC_TAG_REPLAYED:
		return DEMARC_SIGNAL_PROOF;
	case DEMARC_TAG_BAD_IDENTITY:
	case DEMARC_TAG_UNBOUND:
		return DEMARC_SIGNAL_PROOF;
	}
	if (q->direction == DEMARC_EGRESS && is_metadata(q->address))
		return DEMARC_SIGNAL_METADATA;
	switch (q->reason) {
	case DEMARC_NO_CROSSING:
		return DEMARC_SIGNAL_EDGE;
	case DEMARC_NOT_IN_WINDOW:
	case DEMARC_OVER_LIMIT:
	case DEMARC_TAG_MISSING:
	case DEMARC_UNPROVEN_LIMIT:
		return refused ? DEMARC_SIGNAL_FAILED : 0;
	case DEMARC_BY_CROSSING:
		/* A TCP contact is told where its task is known: signal.bpf.c. */
		return q->direction == DEMARC_EGRESS && q->proto != PROTO_TCP ? DEMARC_SIGNAL_CONTACT : 0;
	}
	return 0;
}

/* A step of distinct ports or peers. */
static __always_inline void tell_step(const struct outcome *o, struct demarc_told *s, __u8 kind, __u32 set, __u32 of)
{
	struct demarc_signal *e = set ? begin_signal(o, s, kind, 0, (__u64)of << 16 | set) : 0;

	if (!e)
		return;
	e->distinct = set;
	if (o->task)
		name_task(e, bpf_get_current_task_btf());
	bpf_ringbuf_submit(e, 0);
}

/* A contact that failed counts toward the distinct ports and peers of who made it. */
GLOBAL int count_failure(struct outcome *o)
{
	struct demarc_seen *s;
	struct demarc_told *t;
	__u32 peer, port;

	if (!o || o->query.direction != DEMARC_EGRESS)
		return 0;
	s = seen_doing(o->query.subject, o->query.now);
	t = told_of(o->query.subject, DEMARC_EGRESS, o->query.now);
	if (!s || !t)
		return 0;
	peer = address_hash(o->query.address);
	port = mix((__u64)o->query.proto << 16 | o->query.port);
	tell_step(o, t, DEMARC_SIGNAL_PORTS, distinct(s->ports, peer | 1, port), peer);
	tell_step(o, t, DEMARC_SIGNAL_PEERS, distinct(s->peers, port | 1, peer), port);
	return 0;
}

/* One verdict may be worth a signal. Called where nothing else stands on the stack, and
 * not where the verdict is given. */
GLOBAL int remark(struct outcome *o)
{
	struct demarc_told *s;
	struct demarc_signal *e;
	bool refused;
	__u8 kind, log;
	__u64 what;

	if (!o)
		return 0;
	kind = kind_of(&o->query);
	if (!kind)
		return 0;
	/* At a device it is not known yet whom a tag is for. */
	if (o->query.subject < DEMARC_ID_FIRST && o->query.subject != DEMARC_ID_UNMANAGED &&
	    !(o->query.subject == DEMARC_ID_NONE && kind == DEMARC_SIGNAL_PROOF))
		return 0;
	refused = o->query.verdict == DEMARC_DENY || o->query.verdict == DEMARC_AUDIT;
	s = told_of(o->query.subject, o->query.direction, o->query.now);
	what = address_hash(o->query.address) ^ ((__u64)o->query.proto << 16 | o->query.port);
	e = begin_signal(o, s, kind, refused ? DEMARC_CAUSE_DENIED + o->query.reason : 0, what);
	if (e) {
		e->crossing = crossing_number(o->query.slot, o->query.crossing, &log);
		if (o->task)
			name_task(e, bpf_get_current_task_btf());
		bpf_ringbuf_submit(e, 0);
	}
	if (refused && (kind == DEMARC_SIGNAL_EDGE || kind == DEMARC_SIGNAL_FAILED || kind == DEMARC_SIGNAL_METADATA))
		count_failure(o);
	return 0;
}

#endif
