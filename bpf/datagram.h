/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Everything without a handshake: UDP, UDP-Lite, ping, SCTP, unknown protocols.
 * The sending hook of this host writes who opened a flow; the receiving hook of
 * this host takes that as the peer's proof. Nothing is ever taken from an
 * address alone but membership in a declared network.
 */
#ifndef DEMARC_DATAGRAM_H
#define DEMARC_DATAGRAM_H

static __always_inline bool fresh_flow(const struct demarc_flow *flow, __u64 now)
{
	return now - flow->last <= DEMARC_FLOW_IDLE || flow->last > now;
}

#define FLOW_GRAIN 1000000000LL /* ns */

/* Keeps a flow from growing idle. A second does not matter to that, but both ends'
 * CPUs write here: with each packet they would take the line from each other. */
static __always_inline void keep(struct demarc_flow *flow, __u64 now)
{
	if ((__s64)(now - flow->last) > FLOW_GRAIN)
		flow->last = now;
}

static __always_inline bool icmp_answer(const struct packet *p)
{
	return (p->tuple.proto == PROTO_ICMP && p->icmp == 0) || (p->tuple.proto == PROTO_ICMP6 && p->icmp == 129);
}

/* ICMP cannot prove itself: its answers come from the kernel. */
static __always_inline bool asks_no_answer(const struct demarc_query *q)
{
	struct demarc_crossing *crossing;

	if (q->proto == PROTO_ICMP || q->proto == PROTO_ICMP6)
		return true;
	crossing = q->crossing == DEMARC_NO_CROSSING_INDEX ? 0 : table_crossing(q->slot, q->crossing);
	return crossing && crossing->need == DEMARC_NEED_SENDER;
}

/* Somebody else is where the acceptor was. What was proven holds no longer, and
 * the opener judges whoever it is. In a group there may be many. */
static __always_inline void take_over(struct demarc_flow *flow, const struct demarc_tuple *opener, __u32 subject)
{
	if (!flow->epoch_out || !flow->acceptor || flow->acceptor == subject || is_group(opener->daddr))
		return;
	flow->acceptor = subject;
	flow->verdict_out = DEMARC_PROVISIONAL;
	turn();
}

/* The opener's side of a flow that exists: may this packet leave? */
GLOBAL int opened_out(struct demarc_flow *flow, struct outcome *o)
{
	__u32 epoch;

	if (!flow || !o)
		return 0;
	epoch = DEMARC_ACTIVE_EPOCH(o->active);
	if (flow->epoch_out != epoch || (flow->until_out && o->query.now >= flow->until_out) ||
	    (flow->verdict_out == DEMARC_PROVISIONAL && flow->acceptor)) {
		if (flow->acceptor && !is_group(o->query.address)) {
			o->query.proof = DEMARC_PROOF_IDENTITY;
			o->query.peer = flow->acceptor;
		} else {
			o->query.proof = DEMARC_PROOF_UNKNOWN;
		}
		if (!(flow->verdict_out == DEMARC_PROVISIONAL ? settle(o) : settle_again(o)))
			return false;
		if (flow->verdict_out == DEMARC_PROVISIONAL && o->query.verdict == DEMARC_ALLOW)
			report(o);
		flow->verdict_out = o->query.verdict == DEMARC_PROVISIONAL ? DEMARC_PROVISIONAL : DEMARC_ALLOW;
		flow->sender_only = asks_no_answer(&o->query);
		flow->until_out = window_end(&o->query);
		flow->epoch_out = epoch;
	}
	if (flow->verdict_out == DEMARC_PROVISIONAL && !flow->sender_only) {
		if (__sync_fetch_and_add(&flow->unproven, 1) >= DEMARC_UNPROVEN_MAX)
			return !refused(o, DEMARC_UNPROVEN_LIMIT);
	}
	keep(flow, o->query.now);
	return true;
}

/* The entry of a flow that opens here, under the verdict that it was given. */
GLOBAL int note_flow(struct packet *p, struct outcome *o)
{
	struct demarc_flow fresh = {};
	struct demarc_tuple key;
	__u32 provable;

	if (!p || !o)
		return 0;
	key = p->tuple;
	fresh.opener = o->query.subject;
	fresh.epoch_out = DEMARC_ACTIVE_EPOCH(o->active);
	fresh.verdict_out = o->query.verdict == DEMARC_PROVISIONAL ? DEMARC_PROVISIONAL : DEMARC_ALLOW;
	fresh.sender_only = asks_no_answer(&o->query);
	provable = o->query.proto != PROTO_UDP ?
			   DEMARC_NO_CROSSING_INDEX :
			   provable_crossing(o->query.slot, o->query.subject, DEMARC_EGRESS, PROTO_UDP, o->query.port,
					     o->query.now);
	if (provable != DEMARC_NO_CROSSING_INDEX) {
		fresh.provable = 1;
		fresh.omits = omission_of(o->query.slot, provable, false);
	}
	fresh.unproven = fresh.verdict_out == DEMARC_PROVISIONAL;
	fresh.until_out = window_end(&o->query);
	fresh.last = o->query.now;
	return !bpf_map_update_elem(&flows, &key, &fresh, BPF_ANY);
}

/* A new flow leaves. Its entry is made by a function of its own: frames of the
 * stack add up, in steps of 32 bytes on Linux 6.1. */
GLOBAL int open_flow(struct packet *p, struct outcome *o)
{
	if (!p || !o)
		return 0;
	o->query.proof = DEMARC_PROOF_UNKNOWN;
	if (!settle(o))
		return false;
	if (!note_flow(p, o)) {
		fault(DEMARC_FAULT_FLOW);
		return !refused(o, DEMARC_MAP_FULL);
	}
	if (o->query.verdict != DEMARC_DENY && o->query.verdict != DEMARC_AUDIT)
		report(o);
	return true;
}

/* The acceptor answers what it admitted, perhaps under another generation: the
 * policy may have changed between question and answer. */
GLOBAL int accepted_out(struct demarc_flow *flow, struct outcome *o)
{
	__u32 epoch;

	if (!flow || !o)
		return 0;
	epoch = DEMARC_ACTIVE_EPOCH(o->active);
	if (flow->epoch_in != epoch || over(flow->until_in)) {
		o->query.proof = flow->opener ? DEMARC_PROOF_IDENTITY : DEMARC_PROOF_NONE;
		o->query.peer = flow->opener;
		if (!settle_again(o)) {
			/* Told once. What else goes there is no answer any more, but
			 * a flow of its own. */
			flow->verdict_in = DEMARC_DENY;
			return false;
		}
		flow->until_in = window_end(&o->query);
		flow->epoch_in = epoch;
	}
	keep(flow, o->query.now);
	return true;
}

GLOBAL int datagram_out(struct packet *p, struct outcome *o)
{
	struct demarc_flow *flow;
	struct demarc_tuple other;

	if (!p || !o)
		return 0;
	ask_forward(o, p, DEMARC_EGRESS);
	flow = icmp_answer(p) ? 0 : flow_at(&p->tuple);
	if (flow && flow->opener == o->query.subject && flow->epoch_out && fresh_flow(flow, o->query.now))
		return opened_out(flow, o);

	reverse(&other, &p->tuple);
	flow = bpf_map_lookup_elem(&flows, &other);
	if (flow && flow->acceptor == o->query.subject && flow->verdict_in == DEMARC_ALLOW &&
	    fresh_flow(flow, o->query.now)) {
		ask_back(o, p, DEMARC_INGRESS);
		return accepted_out(flow, o);
	}
	if (flow && fresh_flow(flow, o->query.now))
		take_over(flow, &other, o->query.subject);

	return open_flow(p, o);
}

/* An answer to a flow that we opened. */
GLOBAL int answered_in(struct demarc_flow *flow, struct outcome *o)
{
	__u32 epoch;

	if (!flow || !o)
		return 0;
	epoch = DEMARC_ACTIVE_EPOCH(o->active);
	if (flow->verdict_out == DEMARC_ALLOW && flow->epoch_out == epoch && !over(flow->until_out))
		goto pass;
	o->query.proof = flow->acceptor ? DEMARC_PROOF_IDENTITY : DEMARC_PROOF_NONE;
	o->query.peer = flow->acceptor;
	if (o->query.proof == DEMARC_PROOF_NONE && flow->sender_only && flow->epoch_out == epoch &&
	    !over(flow->until_out))
		goto pass;
	if (!(flow->verdict_out == DEMARC_PROVISIONAL ? settle(o) : settle_again(o))) {
		tell_refusal(o, 0);
		return false;
	}
	flow->verdict_out = DEMARC_ALLOW;
	flow->until_out = window_end(&o->query);
	flow->epoch_out = epoch;
	if (o->query.verdict == DEMARC_ALLOW)
		report(o);
pass:
	keep(flow, o->query.now);
	return true;
}

/* The entry of a flow that came from elsewhere. */
GLOBAL int accept_flow(struct packet *p, struct outcome *o)
{
	struct demarc_flow fresh = {};

	if (!p || !o)
		return 0;
	fresh.acceptor = o->query.subject;
	fresh.verdict_in = DEMARC_ALLOW;
	fresh.until_in = window_end(&o->query);
	fresh.epoch_in = DEMARC_ACTIVE_EPOCH(o->active);
	fresh.last = o->query.now;
	if (put_flow(&p->tuple, &fresh, BPF_ANY)) {
		fault(DEMARC_FAULT_FLOW);
		return !refused(o, DEMARC_MAP_FULL);
	}
	return true;
}

GLOBAL int datagram_in(struct packet *p, struct outcome *o)
{
	struct demarc_tuple other;
	struct demarc_flow *flow;
	__u32 epoch;
	bool again;

	if (!p || !o)
		return 0;
	epoch = DEMARC_ACTIVE_EPOCH(o->active);
	reverse(&other, &p->tuple);
	flow = bpf_map_lookup_elem(&flows, &other);
	if (flow && flow->opener == o->query.subject && flow->epoch_out && fresh_flow(flow, o->query.now)) {
		ask_back(o, p, DEMARC_EGRESS);
		return answered_in(flow, o);
	}

	ask_forward(o, p, DEMARC_INGRESS);
	flow = flow_at(&p->tuple);
	if (flow && !fresh_flow(flow, o->query.now))
		flow = 0;
	if (flow && flow->acceptor == o->query.subject && flow->verdict_in == DEMARC_ALLOW && flow->epoch_in == epoch &&
	    !over(flow->until_in)) {
		keep(flow, o->query.now);
		return true;
	}
	o->query.proof = flow && flow->opener ? DEMARC_PROOF_IDENTITY : DEMARC_PROOF_NONE;
	o->query.peer = flow ? flow->opener : DEMARC_ID_NONE;
	o->omitted = flow && !flow->epoch_out ? flow->omits : 0; /* one that opens here has its proof from here */
	again = flow && flow->acceptor == o->query.subject && flow->epoch_in;
	if (!(again ? settle_again(o) : settle(o))) {
		tell_refusal(o, 0);
		return false;
	}
	if (!flow) {
		if (!accept_flow(p, o))
			return false;
	} else {
		take_over(flow, &p->tuple, o->query.subject);
		flow->acceptor = o->query.subject;
		flow->verdict_in = DEMARC_ALLOW;
		flow->until_in = window_end(&o->query);
		flow->epoch_in = epoch;
		keep(flow, o->query.now);
	}
	if (o->query.verdict == DEMARC_ALLOW)
		report(o);
	return true;
}

/* Whether nothing about a flow is open: both its ways were admitted to its end here,
 * for as long as the policy stands. */
static __always_inline bool settled(const struct demarc_flow *flow, __u32 subject, __u32 epoch, bool opener)
{
	if (opener)
		return flow->opener == subject && flow->epoch_out == epoch && flow->verdict_out == DEMARC_ALLOW && !flow->until_out;
	return flow->acceptor == subject && flow->epoch_in == epoch && flow->verdict_in == DEMARC_ALLOW && !flow->until_in;
}

/* Lets a socket carry what was decided of its talk. */
GLOBAL int talk(struct __sk_buff *skb, const struct packet *p, struct outcome *o, bool outgoing)
{
	__u64 since = talk_begins();
	struct demarc_flow *flow;
	__u32 epoch;
	struct demarc_tuple mine, *other = &o->opener; /* which is not needed any more */

	if (!p || !o || p->tuple.proto != PROTO_UDP || DEMARC_ACTIVE_FLAGS(o->active) & DEMARC_ACTIVE_OBSERVE)
		return 0;
	epoch = DEMARC_ACTIVE_EPOCH(o->active);
	if (outgoing) {
		__builtin_memcpy(&mine, &p->tuple, sizeof(mine));
		reverse(other, &p->tuple);
	} else {
		reverse(&mine, &p->tuple);
		__builtin_memcpy(other, &p->tuple, sizeof(mine));
	}
	flow = bpf_map_lookup_elem(&flows, &mine);
	if (!flow || !settled(flow, o->query.subject, epoch, true)) {
		flow = flow_at(other);
		if (!flow || !settled(flow, o->query.subject, epoch, false))
			return 0;
	}
	return carry_on(skb, &mine, epoch, since, true);
}

/* Unmanaged processes among themselves: only who they are is written down, and
 * only where some crossing names them. They do not come into a workload's
 * conversations: whose port they have now is not who they are. */
GLOBAL int carefree_datagram(struct packet *p, struct outcome *o, bool outgoing)
{
	struct demarc_tuple other;
	struct demarc_flow *flow;

	if (!p || !o)
		return 0;
	if (outgoing)
		reverse(&other, &p->tuple);
	else
		__builtin_memcpy(&other, &p->tuple, sizeof(other));
	flow = bpf_map_lookup_elem(&flows, &other);
	if (flow && flow->acceptor >= DEMARC_ID_FIRST && !is_group(other.daddr) && fresh_flow(flow, o->query.now)) {
		take_over(flow, &other, DEMARC_ID_UNMANAGED);
		__builtin_memcpy(&o->opener, &other, sizeof(other));
		o->query.direction = DEMARC_INGRESS;
		return !refused(o, DEMARC_NO_STATE);
	}
	if (!outgoing || !(DEMARC_ACTIVE_FLAGS(o->active) & DEMARC_ACTIVE_UNMANAGED))
		return true;
	if (flow && flow->opener && flow->opener != DEMARC_ID_UNMANAGED && fresh_flow(flow, o->query.now)) {
		if (flow->acceptor != DEMARC_ID_UNMANAGED) {
			flow->acceptor = DEMARC_ID_UNMANAGED;
			turn();
		}
	} else {
		vouch(&p->tuple, DEMARC_ID_UNMANAGED, false);
	}
	return true;
}

#endif
