/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * What another generation would say about live traffic. It is asked where a verdict is
 * made, with what the verdict was made of, and told where it would let pass what does
 * not, or the other way round. No verdict depends on it.
 */
#ifndef DEMARC_SHADOW_H
#define DEMARC_SHADOW_H

static __always_inline bool lets_pass(const struct demarc_query *q, __u64 word)
{
	return q->verdict != DEMARC_DENY || DEMARC_ACTIVE_FLAGS(word) & DEMARC_ACTIVE_OBSERVE;
}

/* Notes what was just decided. Without a shadow this is one branch. The generation in
 * shadow is asked when the packet was judged, for the stack's sake. */
static __always_inline void ask_shadow(struct outcome *o)
{
	if (DEMARC_ACTIVE_FLAGS(o->active) & DEMARC_ACTIVE_SHADOW)
		o->asked = lets_pass(&o->query, o->active) ? ASKED_PASSES : ASKED_DENIED;
}

/* The same where another decision will follow if the flow passes. */
static __always_inline void ask_shadow_if_denied(struct outcome *o)
{
	if (!lets_pass(&o->query, o->active))
		ask_shadow(o);
}

/* Asks, and leaves the outcome as it was. Who is not named yet is not asked about: nor
 * does a verdict on it last. */
GLOBAL int contrast(struct outcome *o)
{
	__u32 zero = 0, slot, subject, crossing;
	struct demarc_state *s = bpf_map_lookup_elem(&state, &zero);
	bool passes, reported;
	__u8 verdict, reason;
	__u64 word;

	if (!o || !s)
		return 0;
	passes = o->asked == ASKED_PASSES;
	o->asked = ASKED_NOTHING;
	word = *(volatile __u64 *)&s->shadow;
	if (!word || o->query.now >= s->shadowed)
		return 0;
	slot = o->query.slot;
	subject = o->query.subject;
	crossing = o->query.crossing;
	verdict = o->query.verdict;
	reason = o->query.reason;
	reported = o->reported;
	o->query.slot = DEMARC_ACTIVE_SLOT(word);
	o->query.subject = identity_of(o->query.slot, o->cgroup);
	o->query.crossing = DEMARC_NO_CROSSING_INDEX;
	decide(&o->query);
	if (o->query.subject != DEMARC_ID_PENDING && lets_pass(&o->query, word) != passes) {
		o->query.verdict = passes ? DEMARC_WOULD_DENY : DEMARC_WOULD_ALLOW;
		report(o);
	}
	o->query.slot = slot;
	o->query.subject = subject;
	o->query.crossing = crossing;
	o->query.verdict = verdict;
	o->query.reason = reason;
	o->reported = reported;
	return 0;
}

#endif
