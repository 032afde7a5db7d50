/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* The boundary of sockets: every packet that a socket of the managed tree sends
 * or receives. */
#ifndef DEMARC_SKB_H
#define DEMARC_SKB_H

/* Whether an established connection carries a verdict that lets the packet pass. Only
 * TCP sockets whose handshake was admitted have one. */
static __always_inline bool carried(struct __sk_buff *skb, struct bpf_sock *sk, __u64 cookie, __u32 tcp_state,
				    bool outgoing, __u64 active)
{
	struct demarc_socket *kept;

	if (tcp_state == TCP_SYN_SENT || tcp_state == TCP_LISTEN || tcp_state == TCP_SYN_RECV)
		return false;
	if (goes_on_young(skb, cookie, tcp_state, outgoing, active))
		return true;
	kept = bpf_sk_storage_get(&sockets, sk, 0, 0);
	return kept && kept->verdict == DEMARC_ALLOW && kept->epoch == DEMARC_ACTIVE_EPOCH(active) && !over(kept->until);
}

/* A socket that the kernel made for itself, as for ND and MLD. It is in the cgroup of
 * whoever made the namespace, which says nothing of what it sends. */
static __always_inline bool socket_of_kernel(struct __sk_buff *skb)
{
	struct sk_buff *kernel;
	struct sock *sk;

	if (!bpf_cast_to_kern_ctx) /* before Linux 6.2 they are known where they mostly are */
		return skb->sk && bpf_skb_cgroup_id(skb) == managed_root;
	kernel = bpf_cast_to_kern_ctx(skb);
	sk = kernel->sk;
	return !sk || !BPF_CORE_READ_BITFIELD(sk, __sk_common.skc_net_refcnt);
}

/* The kernel's own control sockets are raw: resets, ICMP errors and answers,
 * neighbour discovery. */
static __always_inline bool kernel_control(struct __sk_buff *skb, const struct packet *p)
{
	if (!socket_of_kernel(skb))
		return false;
	if (p->tuple.proto == PROTO_ICMP || p->tuple.proto == PROTO_ICMP6)
		return true;
	return p->tuple.proto == PROTO_TCP && !(p->flags & FLAG_SYN);
}

/* One of the core's, by which it tells refused callers. */
static __always_inline bool answers(struct bpf_sock *sk)
{
	return bpf_sk_storage_get(&answering, sk, 0, 0);
}

/* True: the packet may pass. */
static __always_inline bool judge_closely(struct __sk_buff *skb, struct bpf_sock *sk, bool stream, __u32 tcp_state,
					  bool outgoing, __u64 active, struct outcome *o)
{
	struct packet p;
	__u32 subject;
	__u64 cgroup;
	bool free_to;
	int reason;

	reason = parse(skb, 0, &p);
	cgroup = bpf_sk_cgroup_id(sk);
	o->reported = false;
	o->asked = ASKED_NOTHING;
	if (stream && !reason && (outgoing || p.flags & FLAG_ACK) &&
	    (tcp_state == TCP_LISTEN || (outgoing ? tcp_state == TCP_SYN_SENT : tcp_state == TCP_SYN_RECV))) {
		subject = expected(skb, &p, cgroup, DEMARC_ACTIVE_EPOCH(active),
				   outgoing ? STAGE_OUT : tcp_state == TCP_SYN_RECV ? STAGE_CHILD : STAGE_IN);
		if (subject == EXPECTED || (subject && speaks_as(skb, &p, subject)))
			return true;
	}
	subject = identity_of(DEMARC_ACTIVE_SLOT(active), cgroup);
	free_to = carefree(DEMARC_ACTIVE_SLOT(active), subject);
	if (free_to && sk->type == SOCK_STREAM && tcp_state != TCP_SYN_SENT && tcp_state != TCP_LISTEN)
		return true; /* only a handshake could bring a bad proof */
	begin(o, active, subject, cgroup, outgoing ? DEMARC_HOOK_EGRESS : DEMARC_HOOK_INGRESS);
	o->query.direction = outgoing ? DEMARC_EGRESS : DEMARC_INGRESS;
	if (!(DEMARC_ACTIVE_FLAGS(active) & DEMARC_ACTIVE_ON))
		return !refused(o, DEMARC_NO_POLICY);
	__builtin_memcpy(&o->opener, &p.tuple, sizeof(o->opener));
	if (free_to) {
		if (reason || sk->type == SOCK_RAW)
			return true;
		return p.tuple.proto == PROTO_TCP ? carefree_stream(skb, &p, o, tcp_state, outgoing) :
						    carefree_datagram(&p, o, outgoing);
	}
	if (subject == DEMARC_ID_NONE)
		return !refused(o, DEMARC_UNBOUND);
	if (subject == DEMARC_ID_PENDING || subject == DEMARC_ID_CANARY) /* silently: whoever calls tries again */
		return !refused(o, DEMARC_PENDING);
	if (reason)
		return !refused(o, reason);
	if (sk->type == SOCK_RAW) {
		if (kernel_control(skb, &p) || (subject == DEMARC_ID_UNMANAGED && answers(sk)))
			return true;
		return !refused(o, DEMARC_RAW_SOCKET);
	}
	if (p.tuple.proto == PROTO_TCP)
		return outgoing ? stream_out(skb, &p, o, tcp_state) : stream_in(skb, &p, o, tcp_state);
	if (!(outgoing ? datagram_out(&p, o) : datagram_in(&p, o)))
		return false;
	if (o->asked)
		contrast(o);
	if (o->reported) {
		remark(o); /* before the talk, which writes where the outcome is */
		o->reported = false;
	}
	talk(skb, &p, o, outgoing);
	return true;
}

/* What the socket is comes beside it, so that a test can say it: packets without a
 * network have a socket that is nothing. */
static __always_inline bool judge_packet(struct __sk_buff *skb, struct bpf_sock *sk, __u64 cookie, bool stream,
					 __u32 tcp_state, bool outgoing)
{
	__u64 active = active_word();
	struct outcome o;
	bool pass;

	if (stream ? carried(skb, sk, cookie, tcp_state, outgoing, active) : goes_on(skb, cookie, outgoing, true, active))
		return true;
	sk = bpf_sk_fullsock(sk);
	if (!sk) /* the hook runs with full sockets only; without one nobody can be judged */
		return false;
	pass = judge_closely(skb, sk, stream, tcp_state, outgoing, active, &o);
	if (o.asked)
		contrast(&o);
	if (o.reported)
		remark(&o);
	return pass;
}

/* Whether a packet says to be TCP is enough at first: what it is, and what its socket is,
 * is found out by a closer look; a TCP socket's verdict lets nothing else through, as only
 * its own packets meet it. */
static __always_inline int skb_hook(struct __sk_buff *skb, __u8 protocol, bool outgoing)
{
	struct bpf_sock *sk = skb->sk;

	return sk && judge_packet(skb, sk, cookie_of(skb), protocol == PROTO_TCP, sk->state, outgoing);
}

/* The self-test's packets: who opens (outgoing) or accepts a flow comes from a map,
 * and what the peer proved, unless its SYN or SYN-ACK is to prove it by a tag. The rest is the same parser
 * and the same decision, in the generation under test. */
static __always_inline int selftest_hook(struct __sk_buff *skb, bool outgoing)
{
	struct demarc_selftest *test;
	struct packet p;
	struct outcome o;
	__u32 zero = 0;
	bool answer;

	test = bpf_map_lookup_elem(&selftest, &zero);
	if (!test || parse(skb, 0, &p))
		return 0;
	answer = p.tuple.proto == PROTO_TCP && (p.flags & (FLAG_SYN | FLAG_ACK)) == (FLAG_SYN | FLAG_ACK);
	begin(&o, 0, test->subject, 0, 0);
	o.query.slot = test->slot;
	if (answer)
		ask_back(&o, &p, outgoing ? DEMARC_EGRESS : DEMARC_INGRESS);
	else
		ask_forward(&o, &p, outgoing ? DEMARC_EGRESS : DEMARC_INGRESS);
	o.query.proof = test->proof;
	o.query.peer = test->peer;
	o.query.bad = DEMARC_TAG_BAD_MAC;
	o.query.crossing = DEMARC_TABLES_ALONE;
	if (test->proof == DEMARC_PROOF_UNKNOWN && (answer || !outgoing)) /* it brings its own */
		read_proof(skb, &p, answer ? DEMARC_TAG_ANSWER : 0, answer ? p.ack : 0, &o);
	decide(&o.query);
	return o.query.verdict == DEMARC_ALLOW || o.query.verdict == DEMARC_PROVISIONAL;
}

#endif
