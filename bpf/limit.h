/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * A crossing's limit, by the generic cell rate algorithm (ITU-T I.371): one word
 * says when the next flow is due; a flow may come `slack` ahead of that.
 */
#ifndef DEMARC_LIMIT_H
#define DEMARC_LIMIT_H

#define LIMIT_TRIES 8

/* Charges one flow. Returns true if it is within the limit. */
static __always_inline bool within_limit(const struct demarc_query *q)
{
	__u32 slot = q->slot, index = q->crossing * 2 + q->direction;
	struct demarc_crossing *crossing;
	void *inner;
	__u64 *due, now;

	if (q->crossing == DEMARC_NO_CROSSING_INDEX)
		return true;
	crossing = table_crossing(slot, q->crossing);
	if (!crossing)
		return false;
	if (!crossing->interval)
		return true;
	inner = bpf_map_lookup_elem(&buckets, &slot);
	now = bpf_ktime_get_boot_ns(); /* flows may be due more often than once in a jiffy */
	due = inner ? bpf_map_lookup_elem(inner, &index) : 0;
	if (!due)
		return false;
	for (int i = 0; i < LIMIT_TRIES; i++) {
		__u64 old = *(volatile __u64 *)due;
		__u64 from = old > now ? old : now;

		if (from - now > crossing->slack)
			return false;
		if (__sync_val_compare_and_swap(due, old, from + crossing->interval) == old)
			return true;
	}
	fault(DEMARC_FAULT_LIMIT_RACE);
	return false; /* contended beyond reason: the flow may try again */
}

#endif
