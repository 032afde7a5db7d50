/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* A decision with its consequences: limit, count, event, mode. */
#ifndef DEMARC_JUDGE_H
#define DEMARC_JUDGE_H

static __always_inline void begin(struct outcome *o, __u64 active, __u32 subject, __u64 cgroup, __u8 hook)
{
	__builtin_memset(o, 0, sizeof(*o));
	o->active = active;
	o->cgroup = cgroup;
	o->hook = hook;
	o->query.slot = DEMARC_ACTIVE_SLOT(active);
	o->query.subject = subject;
	o->query.crossing = DEMARC_NO_CROSSING_INDEX;
	o->query.now = recently();
}

/* Puts the question about o->opener: the port that policy speaks of, and the
 * address of the other side. */
static __always_inline void ask(struct outcome *o, __u8 icmp, __u8 direction)
{
	struct demarc_query *q = &o->query;

	q->direction = direction;
	q->proto = o->opener.proto;
	q->port = q->proto == PROTO_ICMP || q->proto == PROTO_ICMP6 ? icmp : o->opener.dport;
	__builtin_memcpy(q->address, direction == DEMARC_EGRESS ? o->opener.daddr : o->opener.saddr, 16);
}

/* The same about a packet that goes the way the flow was opened, */
static __always_inline void ask_forward(struct outcome *o, const struct packet *p, __u8 direction)
{
	__builtin_memcpy(&o->opener, &p->tuple, sizeof(o->opener));
	ask(o, p->icmp, direction);
}

/* and about one that answers. An ICMP answer is of another type than what was
 * asked for. */
static __always_inline void ask_back(struct outcome *o, const struct packet *p, __u8 direction)
{
	reverse(&o->opener, &p->tuple);
	ask(o, p->tuple.proto == PROTO_ICMP ? 8 : 128, direction);
}

/* What the crossing lets a tag leave out. */
static __always_inline __u8 omission_of(__u32 slot, __u32 index, bool answer)
{
	struct demarc_crossing *crossing = table_crossing(slot, index);

	return crossing ? omission(crossing->nat, answer) : 0;
}

/* A tag may leave out only what the crossing it is admitted by says is translated. */
static __always_inline bool bound_enough(const struct outcome *o)
{
	struct demarc_crossing *crossing;

	if (!o->omitted)
		return true;
	crossing = o->query.crossing == DEMARC_NO_CROSSING_INDEX ? 0 : table_crossing(o->query.slot, o->query.crossing);
	return crossing && o->omitted == omission(crossing->nat, o->query.direction == DEMARC_EGRESS);
}

/* IPv4 224.0.0.0/3 (multicast, limited broadcast and what is reserved), IPv6 ff00::/8. */
static __always_inline bool is_group(const __u8 *address)
{
	static const __u8 mapped[12] = { [10] = 0xff, [11] = 0xff };

	if (address[0] == 0xff)
		return true;
	for (int i = 0; i < 12; i++) {
		if (address[i] != mapped[i])
			return false;
	}
	return address[12] >= 224;
}

/* Waiting for the proof of a group would be waiting for any of its members, while
 * all of them receive: only a crossing that admits the address will do. */
static __always_inline bool waits_for_group(const struct demarc_query *q)
{
	return q->verdict == DEMARC_PROVISIONAL && is_group(q->address);
}

/* The address is a decoy's, whoever may prove himself there: no SYN leaves for it. */
static __always_inline bool at_decoy(struct outcome *o)
{
	__u32 crossing = o->query.crossing;
	bool decoy;

	if (!(DEMARC_ACTIVE_FLAGS(o->active) & DEMARC_ACTIVE_DECOY))
		return false;
	decide(&o->query);
	decoy = o->query.reason == DEMARC_DECOY_TOUCHED;
	o->query.crossing = crossing;
	return decoy;
}

/* Judges a flow for good: what it returns may be cached. True: let it pass. */
GLOBAL int settle(struct outcome *o)
{
	if (!o)
		return 0;
	decide(&o->query);
	ask_shadow(o);
	if (o->query.verdict == DEMARC_DENY)
		return !refused(o, o->query.reason);
	if (waits_for_group(&o->query))
		return !refused(o, DEMARC_NO_CROSSING);
	if (!bound_enough(o))
		return !refused(o, DEMARC_TAG_UNBOUND);
	if (o->query.verdict == DEMARC_ALLOW && !within_limit(&o->query))
		return !refused(o, DEMARC_OVER_LIMIT);
	return true;
}

/* Judges a flow that was admitted before: its limit is not charged again. */
GLOBAL int settle_again(struct outcome *o)
{
	if (!o)
		return 0;
	decide(&o->query);
	ask_shadow(o);
	if (o->query.verdict == DEMARC_DENY || waits_for_group(&o->query))
		return !refused(o, o->query.reason == DEMARC_QUARANTINED ? DEMARC_QUARANTINED : DEMARC_REVOKED);
	return true;
}

/* When the verdict ends by itself. */
static __always_inline __u64 window_end(const struct demarc_query *q)
{
	struct demarc_crossing *crossing;

	if (q->crossing == DEMARC_NO_CROSSING_INDEX)
		return 0;
	crossing = table_crossing(q->slot, q->crossing);
	return crossing ? crossing->until : 0;
}

static __always_inline bool over(__u64 until)
{
	return until && bpf_ktime_get_boot_ns() >= until;
}

#endif
