/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The decision, a function of values: who (subject), which way, on what port, to
 * or from which address, with what proof, at what time. It reads policy tables
 * and nothing else: no context, no packet, no clock. The same text is compiled
 * for the kernel and natively, and both are compared with policy/eval.go, which
 * defines the meaning of the language.
 */
#ifndef DEMARC_VERDICT_H
#define DEMARC_VERDICT_H

#include "abi/abi.h"

static __always_inline __u16 port_class(__u32 slot, __u8 proto, __u16 port)
{
	switch (proto) {
	case PROTO_TCP:
		return table_port(slot, DEMARC_ROW_TCP, port);
	case PROTO_UDP:
		return table_port(slot, DEMARC_ROW_UDP, port);
	case PROTO_SCTP:
		return table_port(slot, DEMARC_ROW_SCTP, port);
	case PROTO_ICMP:
		return table_port(slot, DEMARC_ROW_OTHER, port & 0xff);
	case PROTO_ICMP6:
		return table_port(slot, DEMARC_ROW_OTHER, 256 + (port & 0xff));
	default:
		return table_port(slot, DEMARC_ROW_OTHER, 512);
	}
}

static __always_inline bool crossing_open(const struct demarc_crossing *crossing, __u64 now)
{
	return now >= crossing->since && (!crossing->until || now < crossing->until);
}

/* What the look-ups of one decision found so far. */
struct demarc_match {
	__u32 crossing; /* lowest index whose window is open */
	bool closed;	/* some crossing matched outside its window */
};

/* Whether it is worth looking. */
static __always_inline bool meets(const struct demarc_subject *subject, __u8 direction, __u32 kind)
{
	return subject->flags & (direction == DEMARC_EGRESS ? DEMARC_SUBJECT_MEETS(DEMARC_EGRESS, kind) :
							      DEMARC_SUBJECT_MEETS(DEMARC_INGRESS, kind));
}

/* Looks one peer up and keeps the lowest open crossing. */
static __always_inline void match_peer(__u32 slot, struct demarc_rule_key *key, __u32 kind, __u32 value, __u64 now,
				       struct demarc_match *match)
{
	struct demarc_rule *rule;

	key->peer = kind << 24 | (value & 0xffffff);
	rule = table_rule(slot, key);
	if (!rule)
		return;
	for (int i = 0; i < DEMARC_ALTERNATIVES; i++) {
		__u32 index = rule->crossing[i];
		struct demarc_crossing *crossing;

		if (index == DEMARC_NO_CROSSING_INDEX)
			return;
		crossing = table_crossing(slot, index);
		if (!crossing) /* a rule without its crossing admits nothing */
			return;
		if (crossing_open(crossing, now)) {
			if (index < match->crossing)
				match->crossing = index;
			return;
		}
		match->closed = true;
	}
}

/* Says whether some crossing lets the subject meet a peer that proves itself on
 * this port: such a SYN carries a tag. */
static __always_inline __u32 provable_crossing(__u32 slot, __u32 subject, __u8 direction, __u8 proto, __u16 port,
					       __u64 now)
{
	struct demarc_match match = { .crossing = DEMARC_NO_CROSSING_INDEX };
	struct demarc_rule_key key = {
		.subject = subject,
		.class = port_class(slot, proto, port),
		.direction = direction,
	};

	match_peer(slot, &key, DEMARC_PEER_PROVEN, 0, now, &match);
	return match.crossing;
}

static __always_inline void answer(struct demarc_query *q, __u8 verdict, __u8 reason, __u32 crossing)
{
	q->verdict = verdict;
	q->reason = reason;
	q->crossing = crossing;
}

/* A subject that is quarantined for now, and a crossing that it may not keep. */
static __always_inline bool quarantined(__u32 slot, __u32 subject, __u32 index, __u64 now)
{
	__u64 until = table_quarantine(subject);
	struct demarc_crossing *crossing;

	if (!until || now >= until)
		return false;
	crossing = index == DEMARC_NO_CROSSING_INDEX ? 0 : table_crossing(slot, index);
	return !crossing || !(crossing->flags & DEMARC_CROSSING_FORENSIC);
}

/* A crossing that nobody should touch, and that lets nobody through. */
static __always_inline bool touches_decoy(__u32 slot, __u32 index)
{
	struct demarc_crossing *crossing = index == DEMARC_NO_CROSSING_INDEX ? 0 : table_crossing(slot, index);

	return crossing && crossing->flags & DEMARC_CROSSING_DECOY;
}

/* What is declared for a subject that is known, quarantined or not. */
static __always_inline int declared(struct demarc_query *q, struct demarc_subject *subject)
{
	struct demarc_match allowed = { .crossing = DEMARC_NO_CROSSING_INDEX };
	struct demarc_match proven = { .crossing = DEMARC_NO_CROSSING_INDEX };
	struct demarc_rule_key key = {};
	struct demarc_subject *peer;
	__u32 networks;

	key.subject = q->subject;
	key.direction = q->direction;
	key.class = port_class(q->slot, q->proto, q->port);
	if (q->proof == DEMARC_PROOF_IDENTITY) {
		if (meets(subject, q->direction, DEMARC_PEER_IDENTITY))
			match_peer(q->slot, &key, DEMARC_PEER_IDENTITY, q->peer, q->now, &allowed);
		peer = q->peer >= DEMARC_ID_FIRST && meets(subject, q->direction, DEMARC_PEER_ZONE) ?
			       table_subject(q->slot, q->peer) :
			       0;
		if (peer)
			match_peer(q->slot, &key, DEMARC_PEER_ZONE, peer->zone, q->now, &allowed);
	}
	networks = meets(subject, q->direction, DEMARC_PEER_ADDRESS) ? table_address(q->slot, q->address) : 0;
	if (networks)
		match_peer(q->slot, &key, DEMARC_PEER_ADDRESS, networks, q->now, &allowed);
	if (meets(subject, q->direction, DEMARC_PEER_ANY))
		match_peer(q->slot, &key, DEMARC_PEER_ANY, 0, q->now, &allowed);
	if (allowed.crossing != DEMARC_NO_CROSSING_INDEX) {
		answer(q, DEMARC_ALLOW, DEMARC_BY_CROSSING, allowed.crossing);
		return 0;
	}

	if (q->proof == DEMARC_PROOF_UNKNOWN && q->direction == DEMARC_EGRESS) {
		if (meets(subject, q->direction, DEMARC_PEER_PROVEN))
			match_peer(q->slot, &key, DEMARC_PEER_PROVEN, 0, q->now, &proven);
		if (meets(subject, q->direction, DEMARC_PEER_IDENTITY))
			match_peer(q->slot, &key, DEMARC_PEER_IDENTITY, DEMARC_ID_UNMANAGED, q->now, &proven);
		if (proven.crossing != DEMARC_NO_CROSSING_INDEX) {
			answer(q, DEMARC_PROVISIONAL, DEMARC_UNPROVEN, proven.crossing);
			return 0;
		}
		allowed.closed |= proven.closed;
	}
	if (subject->flags & (q->direction == DEMARC_EGRESS ? DEMARC_SUBJECT_OUTBOUND : DEMARC_SUBJECT_INBOUND)) {
		answer(q, DEMARC_ALLOW, DEMARC_BY_UNMANAGED, DEMARC_NO_CROSSING_INDEX);
		return 0;
	}
	if (allowed.closed) {
		q->reason = DEMARC_NOT_IN_WINDOW;
		return 0;
	}
	if (q->proof == DEMARC_PROOF_NONE && meets(subject, q->direction, DEMARC_PEER_PROVEN))
		match_peer(q->slot, &key, DEMARC_PEER_PROVEN, 0, q->now, &proven);
	q->reason = proven.crossing != DEMARC_NO_CROSSING_INDEX ? DEMARC_TAG_MISSING : DEMARC_NO_CROSSING;
	return 0;
}

GLOBAL int decide(struct demarc_query *q)
{
	struct demarc_subject *subject;
	bool alone;

	if (!q)
		return 0;
	alone = q->crossing == DEMARC_TABLES_ALONE;
	answer(q, DEMARC_DENY, DEMARC_UNDECIDED, DEMARC_NO_CROSSING_INDEX);
	if (q->proof == DEMARC_PROOF_BAD) {
		q->reason = q->bad;
		return 0;
	}
	if (q->subject == DEMARC_ID_PENDING) {
		q->reason = DEMARC_PENDING;
		return 0;
	}
	subject = table_subject(q->slot, q->subject);
	if (!subject) {
		q->reason = DEMARC_UNBOUND;
		return 0;
	}
	declared(q, subject);
	if (q->verdict == DEMARC_ALLOW && touches_decoy(q->slot, q->crossing)) {
		q->verdict = DEMARC_DENY;
		q->reason = DEMARC_DECOY_TOUCHED;
	}
	if (!alone && quarantined(q->slot, q->subject, q->crossing, q->now))
		answer(q, DEMARC_DENY, DEMARC_QUARANTINED, DEMARC_NO_CROSSING_INDEX);
	return 0;
}

#endif
