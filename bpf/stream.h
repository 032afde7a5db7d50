/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * TCP. A connection is judged at its handshake and nowhere else: the caller's
 * side when the SYN leaves (could anything declared be there?) and when the
 * SYN-ACK arrives (is it?), the listener's side when the SYN arrives. After that
 * a socket carries its verdict, good while the generation it was given under is
 * active and its crossing's window is open.
 */
#ifndef DEMARC_STREAM_H
#define DEMARC_STREAM_H

/* Gives the packet's socket the verdict that its connection carries from now on. */
GLOBAL int remember(struct __sk_buff *skb, const struct outcome *o)
{
	struct demarc_socket fresh = {}, *kept;
	struct bpf_sock *sk = skb->sk;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk || !o)
		return 0;
	fresh.peer = o->query.peer;
	fresh.epoch = DEMARC_ACTIVE_EPOCH(o->active);
	fresh.crossing = o->query.crossing;
	fresh.port = o->query.port;
	fresh.verdict = DEMARC_ALLOW;
	fresh.reason = o->query.reason;
	fresh.proof = o->query.proof;
	fresh.direction = o->query.direction;
	fresh.until = window_end(&o->query);
	kept = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (kept) /* the socket had a connection before */
		*kept = fresh;
	else if (!young_take(bpf_get_socket_cookie(skb), &fresh, 0, 0) &&
		 !bpf_sk_storage_get(&sockets, sk, &fresh, BPF_SK_STORAGE_GET_F_CREATE))
		fault(DEMARC_FAULT_STORAGE);
	return 0;
}

/* A flow entry that only says which local process is at an end. */
GLOBAL int vouch(const struct demarc_tuple *opener, __u32 identity, bool accepts)
{
	struct demarc_flow fresh = { .last = recently() }, *flow;

	if (!opener)
		return 0;
	flow = flow_at(opener);
	if (!flow) {
		if (put_flow(opener, &fresh, BPF_NOEXIST))
			fault(DEMARC_FAULT_FLOW);
		flow = flow_at(opener);
	}
	if (!flow)
		return 0;
	flow->last = fresh.last;
	if (accepts)
		flow->acceptor = identity;
	else
		flow->opener = identity;
	return 0;
}

/* No proof in the packet: was it a local process that sent it? Where one end is
 * unmanaged there is no tag, and this is the proof. Between workloads it is none:
 * a tag proves this very connection, and this only that there was one. */
static __always_inline void ask_vouchers(struct outcome *o, bool acceptor)
{
	struct demarc_flow *flow;
	__u32 peer;

	if (o->query.proof != DEMARC_PROOF_NONE || !(DEMARC_ACTIVE_FLAGS(o->active) & DEMARC_ACTIVE_UNMANAGED))
		return;
	flow = flow_at(&o->opener);
	if (!flow || o->query.now - flow->last > DEMARC_FLOW_IDLE)
		return;
	peer = acceptor ? flow->acceptor : flow->opener;
	if (!peer || (peer != DEMARC_ID_UNMANAGED && o->query.subject != DEMARC_ID_UNMANAGED))
		return;
	o->query.proof = DEMARC_PROOF_IDENTITY;
	o->query.peer = peer;
}

/* Whether a segment carries the tag of `identity`, which sockops wrote: 0, or why it may
 * not leave. No room for it, no connection; and a socket must not speak for another
 * identity than its own. */
static __always_inline int own_tag(struct __sk_buff *skb, struct packet *p, __u32 identity)
{
	struct demarc_tag tag = {};

	if (find_tag(skb, p, &tag) != 1)
		return DEMARC_TAG_NO_ROOM;
	return bpf_ntohl(tag.claim) >> 8 == identity ? 0 : DEMARC_TAG_BAD_IDENTITY;
}

GLOBAL int speaks_as(struct __sk_buff *skb, struct packet *p, __u32 identity)
{
	return p && !own_tag(skb, p, identity);
}

/* Between workloads each end proves itself by a tag. */
static __always_inline bool both_tagged(const struct demarc_pending_syn *pending)
{
	return pending->proof == DEMARC_PROOF_IDENTITY && pending->peer >= DEMARC_ID_FIRST &&
	       pending->self >= DEMARC_ID_FIRST;
}

/* Where a packet of a handshake is. */
enum stage {
	STAGE_IN,
	STAGE_OUT,
	STAGE_CHILD, /* at a connection that another processor is just accepting: data may have come, too */
};

/*
 * A packet within a handshake that was judged under the policy that stands: our SYN of
 * whom connect(2) found to open here, our SYN-ACK and its acknowledgement of the SYN that
 * was admitted. Returns whose tag it has to carry to pass, EXPECTED if it may pass as it
 * is, 0 if it takes a closer look. The tag is the caller's to check, for the stack's sake.
 */
#define EXPECTED 0x7fffffff /* no identity */

GLOBAL int expected(struct __sk_buff *skb, struct packet *p, __u64 cgroup, __u32 epoch, enum stage stage)
{
	bool outgoing = stage == STAGE_OUT;
	struct demarc_pending_syn *pending;
	struct demarc_tuple opener;
	__u32 self, seq;
	__u64 mark;
	__u8 omitted;
	bool tagged;

	if (!p)
		return 0;
	switch (p->flags & (FLAG_SYN | FLAG_ACK | FLAG_RST)) {
	case FLAG_SYN:
		return outgoing ? young_opener(bpf_get_socket_cookie(skb), p->tuple.dport, epoch, &omitted) : DEMARC_ID_NONE;
	case FLAG_SYN | FLAG_ACK:
		if (!outgoing)
			return 0;
		reverse(&opener, &p->tuple);
		seq = p->ack;
		break;
	case FLAG_ACK:
		if (outgoing)
			return 0;
		__builtin_memcpy(&opener, &p->tuple, sizeof(opener));
		seq = p->seq;
		break;
	default:
		return 0;
	}
	mark = pending_mark(&opener);
	pending = pending_at(&opener, mark);
	if (!pending)
		return 0;
	self = pending->self;
	tagged = both_tagged(pending);
	if (pending->cgroup != cgroup || pending->epoch != epoch || over(pending->until) ||
	    (pending->seq + 1 != seq && stage != STAGE_CHILD) || (outgoing && !tagged))
		return 0;
	/* That the peer acknowledges our SYN-ACK is checked by the stack, also where that
	 * is a SYN cookie. */
	if (!pending_is(pending, mark))
		return 0;
	return outgoing ? self : EXPECTED;
}

/* Our SYN leaves. */
GLOBAL int syn_out(struct __sk_buff *skb, struct packet *p, struct outcome *o)
{
	bool provable;
	int reason;

	if (!p || !o)
		return 0;
	ask_forward(o, p, DEMARC_EGRESS);
	o->query.proof = DEMARC_PROOF_UNKNOWN;
	/* Where a crossing asks for proof, a SYN may leave whatever else is declared:
	 * the answer decides. */
	if (o->query.subject >= DEMARC_ID_FIRST)
		o->query.crossing = provable_crossing(o->query.slot, o->query.subject, DEMARC_EGRESS, PROTO_TCP,
						      o->query.port, o->query.now);
	provable = o->query.crossing != DEMARC_NO_CROSSING_INDEX &&
		   !quarantined(o->query.slot, o->query.subject, o->query.crossing, o->query.now) && !at_decoy(o);
	if (!provable) {
		decide(&o->query);
		ask_shadow_if_denied(o);
		if (o->query.verdict == DEMARC_DENY)
			return !refused(o, o->query.reason);
	}
	/* The stack resets what still stands from before a crash. That carries
	 * nothing, and no proof. */
	if (!(p->flags & FLAG_SYN) && p->flags & FLAG_RST)
		return true;
	if (!provable) {
		if (DEMARC_ACTIVE_FLAGS(o->active) & DEMARC_ACTIVE_UNMANAGED)
			vouch(&p->tuple, o->query.subject, false);
		return true;
	}
	reason = own_tag(skb, p, o->query.subject);
	return !reason || !refused(o, reason);
}

/* Notes a handshake whose SYN was admitted. A function of its own, as stacks add up. */
GLOBAL int await_handshake(const struct packet *p, struct outcome *o, __u64 mark)
{
	struct demarc_pending_syn *pending;

	if (!p || !o)
		return 0;
	pending = pending_take(&p->tuple, mark);
	if (!pending) {
		fault(DEMARC_FAULT_PENDING);
		return !refused(o, DEMARC_MAP_FULL);
	}
	pending->cgroup = o->cgroup;
	pending->self = o->query.subject;
	pending->peer = o->query.peer;
	pending->seq = p->seq;
	pending->crossing = o->query.crossing;
	pending->epoch = DEMARC_ACTIVE_EPOCH(o->active);
	pending->proof = o->query.proof;
	pending->reason = o->query.reason;
	pending->slot = o->query.slot;
	pending->until = window_end(&o->query);
	pending_publish(pending, mark);
	return true;
}

/* A SYN arrives at a listener. */
GLOBAL int syn_in(struct __sk_buff *skb, struct packet *p, struct outcome *o)
{
	struct demarc_pending_syn *pending;
	__u64 mac = 0, mark;
	bool tagged, again;
	int spent = 0;

	if (!p || !o)
		return 0;
	ask_forward(o, p, DEMARC_INGRESS);
	read_proof(skb, p, 0, 0, o);
	ask_vouchers(o, false);
	mark = pending_mark(&p->tuple);
	tagged = p->tag && o->query.proof == DEMARC_PROOF_IDENTITY;
	if (tagged) {
		mac = mac_of(skb, p);
		spent = spend(mac, o->query.now);
	}
	if (!tagged || spent) { /* a tag that is new is of a SYN that is new */
		pending = pending_at(&p->tuple, mark);
		again = pending && pending->seq == p->seq && pending->self == o->query.subject &&
			pending->proof == o->query.proof && pending->peer == o->query.peer;
		if (again && pending->epoch == DEMARC_ACTIVE_EPOCH(o->active))
			return true;
		if (tagged && !again) {
			if (spent == DEMARC_TAG_REPLAYED) /* it says who was here, not who is */
				o->query.proof = DEMARC_PROOF_BAD;
			return !refused(o, spent);
		}
	}
	if (!settle(o)) {
		if (tagged && !spent) /* the same SYN may be within the limit when it is sent again */
			unspend(mac);
		tell_refusal(o, p->seq + 1);
		return false;
	}
	return await_handshake(p, o, mark);
}

/* Our SYN-ACK leaves: only for a SYN that was admitted, and with our proof if
 * the caller gave its own. */
GLOBAL int synack_out(struct __sk_buff *skb, struct packet *p, struct outcome *o)
{
	struct demarc_pending_syn *pending;
	int reason;

	if (!p || !o)
		return 0;
	ask_back(o, p, DEMARC_INGRESS);
	pending = pending_at(&o->opener, pending_mark(&o->opener));
	if (!pending) {
		/* A redirected port is translated back before packets are judged, so
		 * its entry is not found here. The SYN that is answered was admitted,
		 * or the listener would not have seen it; the caller checks our proof. */
		return (p->flags & (FLAG_SYN | FLAG_ACK | FLAG_RST)) == (FLAG_SYN | FLAG_ACK) ? true :
												!refused(o, DEMARC_NO_STATE);
	}
	if (pending->self != o->query.subject || pending->seq + 1 != p->ack)
		return !refused(o, DEMARC_NO_STATE);
	o->query.peer = pending->peer;
	o->query.proof = pending->proof;
	reason = both_tagged(pending) ? own_tag(skb, p, o->query.subject) : 0;
	if (reason)
		return !refused(o, reason);
	if ((o->query.subject == DEMARC_ID_UNMANAGED || pending->peer == DEMARC_ID_UNMANAGED) &&
	    DEMARC_ACTIVE_FLAGS(o->active) & DEMARC_ACTIVE_UNMANAGED)
		vouch(&o->opener, o->query.subject, true);
	return true;
}

/* The answer to our SYN: now the peer's proof is known. */
GLOBAL int synack_in(struct __sk_buff *skb, struct packet *p, struct outcome *o)
{

	if (!p || !o)
		return 0;
	ask_back(o, p, DEMARC_EGRESS);
	if ((p->flags & (FLAG_SYN | FLAG_ACK | FLAG_RST)) != (FLAG_SYN | FLAG_ACK)) {
		/* A reset tells the caller that nobody listens, an acknowledgement
		 * that a connection from before its crash still stands there: the
		 * stack takes nothing from it and resets that one. Nothing else is
		 * an answer, and two sides that open at once prove nothing. */
		if (!(p->flags & FLAG_SYN) && p->flags & (FLAG_RST | FLAG_ACK))
			return true;
		return !refused(o, p->flags & FLAG_SYN ? DEMARC_PROTOCOL : DEMARC_NO_STATE);
	}
	read_proof(skb, p, DEMARC_TAG_ANSWER, p->ack, o);
	ask_vouchers(o, true);
	if (!settle(o)) {
		tell_refusal(o, p->ack);
		return false;
	}
	remember(skb, o);
	if (o->query.verdict == DEMARC_ALLOW)
		report(o);
	return true;
}

/* Anything but a SYN arrives at a listener: the end of a handshake, or junk. The
 * data that may ride on a handshake's last ACK passes here too. */
GLOBAL int ack_in(struct packet *p, struct outcome *o)
{
	struct demarc_pending_syn *pending;

	if (!p || !o)
		return 0;
	pending = pending_at(&p->tuple, pending_mark(&p->tuple));
	ask_forward(o, p, DEMARC_INGRESS);
	if (!pending || pending->self != o->query.subject || p->flags & FLAG_SYN)
		return !refused(o, DEMARC_NO_STATE);
	if (p->seq != pending->seq + 1 && !(p->flags & FLAG_RST))
		return !refused(o, DEMARC_NO_STATE);
	if (p->flags & FLAG_RST)
		return true;
	/* That the peer acknowledges our SYN-ACK is checked by the stack, also
	 * where that is a SYN cookie. */
	if (pending->epoch == DEMARC_ACTIVE_EPOCH(o->active) && !over(pending->until))
		return true;
	/* The policy changed, or the window closed, within the handshake. */
	o->query.proof = pending->proof;
	o->query.peer = pending->peer;
	if (!settle_again(o))
		return false;
	pending->epoch = DEMARC_ACTIVE_EPOCH(o->active);
	pending->slot = o->query.slot;
	pending->crossing = o->query.crossing;
	pending->reason = o->query.reason;
	pending->until = window_end(&o->query);
	return true;
}

/* A packet of an established connection whose verdict cannot be taken as it is. */
GLOBAL int established(struct __sk_buff *skb, struct packet *p, struct outcome *o, bool outgoing)
{
	struct demarc_socket *kept = 0;
	struct bpf_sock *sk;

	if (!p || !o)
		return 0;
	sk = skb->sk;
	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (sk)
		kept = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (!kept)
		kept = young_verdict(bpf_get_socket_cookie(skb));
	if (kept && o->query.now < kept->spared &&
	    !quarantined(o->query.slot, o->query.subject, DEMARC_NO_CROSSING_INDEX, o->query.now)) {
		kept->verdict = DEMARC_ALLOW;
		kept->until = kept->spared;
		kept->epoch = DEMARC_ACTIVE_EPOCH(o->active);
		return true;
	}
	if (!kept || (kept->spared && kept->reason == DEMARC_NO_STATE)) {
		ask_forward(o, p, outgoing ? DEMARC_EGRESS : DEMARC_INGRESS);
		if (refused(o, DEMARC_NO_STATE))
			return false;
		/* Observed: tell it once, not for every packet. */
		o->query.reason = DEMARC_NO_STATE;
		remember(skb, o);
		return true;
	}
	if (outgoing == (kept->direction == DEMARC_EGRESS))
		ask_forward(o, p, kept->direction);
	else
		ask_back(o, p, kept->direction);
	o->query.proof = kept->proof;
	o->query.peer = kept->peer;
	if (kept->epoch == DEMARC_ACTIVE_EPOCH(o->active) && kept->verdict == DEMARC_DENY) {
		o->query.reason = kept->reason;
		count(&o->query, 0); /* told once, counted each time */
		return false;
	}
	if (settle_again(o)) {
		kept->verdict = DEMARC_ALLOW;
	} else {
		kept->verdict = DEMARC_DENY;
	}
	kept->reason = o->query.reason;
	kept->crossing = o->query.crossing;
	kept->until = window_end(&o->query);
	kept->epoch = DEMARC_ACTIVE_EPOCH(o->active);
	return kept->verdict == DEMARC_ALLOW;
}

/* Between unmanaged peers everything may pass, except what lies about itself. */
GLOBAL int carefree_stream(struct __sk_buff *skb, struct packet *p, struct outcome *o, __u32 tcp_state, bool outgoing)
{

	if (!p || !o)
		return 0;
	if (tcp_state != TCP_SYN_SENT && tcp_state != TCP_LISTEN)
		return true;
	if (!(p->flags & FLAG_SYN))
		return true;
	if (outgoing) {
		if (!(DEMARC_ACTIVE_FLAGS(o->active) & DEMARC_ACTIVE_UNMANAGED))
			return true;
		if (tcp_state == TCP_SYN_SENT) {
			vouch(&p->tuple, DEMARC_ID_UNMANAGED, false);
		} else {
			reverse(&o->opener, &p->tuple);
			vouch(&o->opener, DEMARC_ID_UNMANAGED, true);
		}
		return true;
	}
	if (tcp_state == TCP_SYN_SENT) {
		ask_back(o, p, DEMARC_EGRESS);
		read_proof(skb, p, DEMARC_TAG_ANSWER, p->ack, o);
	} else {
		ask_forward(o, p, DEMARC_INGRESS);
		read_proof(skb, p, 0, 0, o);
	}
	return settle(o);
}

static __always_inline bool stream_out(struct __sk_buff *skb, struct packet *p, struct outcome *o, __u32 tcp_state)
{
	if (tcp_state == TCP_SYN_SENT)
		return syn_out(skb, p, o);
	if (tcp_state == TCP_LISTEN)
		return synack_out(skb, p, o);
	return established(skb, p, o, true);
}

static __always_inline bool stream_in(struct __sk_buff *skb, struct packet *p, struct outcome *o, __u32 tcp_state)
{
	if (tcp_state == TCP_LISTEN)
		return (p->flags & (FLAG_SYN | FLAG_ACK | FLAG_RST)) == FLAG_SYN ? syn_in(skb, p, o) : ack_in(p, o);
	if (tcp_state == TCP_SYN_SENT)
		return synack_in(skb, p, o);
	return established(skb, p, o, false);
}

#endif
