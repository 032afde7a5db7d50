/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Telling a caller at once that it was refused. The packet hooks can only drop, so
 * the core sends the answer. Only callers of the fleet are told, and those of a crossing
 * that says so: to anybody else a refusal looks like nothing.
 */
#ifndef DEMARC_REFUSAL_H
#define DEMARC_REFUSAL_H

/* Whether a crossing that concerns a refused flow says to stay silent. */
static __always_inline bool says_drop(__u32 slot, __u32 index)
{
	struct demarc_crossing *crossing = index == DEMARC_NO_CROSSING_INDEX ? 0 : table_crossing(slot, index);

	return crossing && crossing->flags & DEMARC_CROSSING_DROP;
}

/* What will not go away when it is tried again, between peers that belong to us: a
 * bad proof may be a key that is just being changed, and nobody owes its sender an
 * answer. */
static __always_inline bool told(const struct demarc_query *q)
{
	__u32 index = q->crossing;

	switch (q->reason) {
	case DEMARC_OVER_LIMIT: /* its crossing says, whoever it is for */
		break;
	case DEMARC_NO_CROSSING:
	case DEMARC_NOT_IN_WINDOW:
	case DEMARC_TAG_UNBOUND:
		if (q->proof != DEMARC_PROOF_IDENTITY)
			return false;
		break;
	case DEMARC_TAG_MISSING:
		index = provable_crossing(q->slot, q->subject, q->direction, q->proto, q->port, q->now);
		break;
	default:
		return false;
	}
	return !says_drop(q->slot, index);
}

static __always_inline bool within_budget(__u64 now)
{
	__u32 zero = 0;
	__u64 *due = bpf_map_lookup_elem(&refusals_due, &zero), old, from;

	if (!due)
		return false;
	old = *(volatile __u64 *)due;
	from = old > now ? old : now;
	return from - now <= DEMARC_REFUSAL_SLACK &&
	       __sync_val_compare_and_swap(due, old, from + DEMARC_REFUSAL_INTERVAL) == old;
}

/* Has the opener of a refused flow told. `ack` is what a reset must acknowledge. */
GLOBAL int tell_refusal(const struct outcome *o, __u32 ack)
{
	struct demarc_refusal *r;

	if (!o || !told(&o->query) || !within_budget(o->query.now))
		return 0;
	r = bpf_ringbuf_reserve(&refusals, sizeof(*r), 0);
	if (!r)
		return 0;
	__builtin_memcpy(&r->tuple, &o->opener, sizeof(r->tuple));
	r->ack = ack;
	r->zero = 0;
	bpf_ringbuf_submit(r, 0);
	return 0;
}

#endif
