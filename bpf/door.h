/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Doors: the host's ends of workloads' veths. Inside, a workload with
 * CAP_NET_ADMIN can do what no socket hook sees: route for others, tunnel, inject,
 * rewrite what a socket sent. What comes out of the door must be what a socket of
 * the workload sent and the socket hook judged, or one of the few things that a
 * kernel says by itself.
 */
#ifndef DEMARC_DOOR_H
#define DEMARC_DOOR_H

#define PROTO_IGMP 2

/* A frame that no socket of a process sent. Nothing that carries data is one. */
static __always_inline int kernel_frame(const struct packet *p, int parsed)
{
	if (p->tuple.proto == PROTO_IGMP && is_group(p->tuple.daddr)) /* it has an IP option */
		return 0;
	if (parsed)
		return parsed;
	if (is_icmp(p) && icmp_of_kernel(p))
		return 0;
	if (p->tuple.proto == PROTO_TCP && (p->flags & (FLAG_SYN | FLAG_ACK)) != FLAG_SYN &&
	    p->end == p->transport + 20 + p->options)
		return 0;
	return DEMARC_NO_SOCKET;
}

/* Whether a TCP packet has both ends of its socket. What a connection says last may
 * be on its way when the socket has no port any more. */
static __always_inline bool of_connection(struct bpf_sock *sk, const struct packet *p)
{
	const __u32 *from = (const __u32 *)p->tuple.saddr, *to = (const __u32 *)p->tuple.daddr;

	if (sk->protocol != PROTO_TCP || bpf_ntohs(sk->dst_port) != p->tuple.dport ||
	    (sk->src_port && sk->src_port != p->tuple.sport))
		return false;
	if (is_ipv4(p->tuple.daddr))
		return sk->src_ip4 == from[3] && sk->dst_ip4 == to[3];
	return sk->family == AF_INET6 && sk->src_ip6[0] == from[0] && sk->src_ip6[1] == from[1] &&
	       sk->src_ip6[2] == from[2] && sk->src_ip6[3] == from[3] && sk->dst_ip6[0] == to[0] &&
	       sk->dst_ip6[1] == to[1] && sk->dst_ip6[2] == to[2] && sk->dst_ip6[3] == to[3];
}

/* Whether the socket hook saw a datagram between these two places leave. */
static __always_inline bool flow_left(const struct demarc_tuple *t)
{
	struct demarc_flow *flow = flow_at(t);
	struct demarc_tuple other;

	if (flow && flow->epoch_out)
		return true;
	reverse(&other, t);
	flow = bpf_map_lookup_elem(&flows, &other);
	return flow && flow->acceptor;
}

/* A frame that a workload's socket sent: is it still what the hook judged? */
GLOBAL int socket_frame(struct __sk_buff *skb, struct packet *p, int parsed)
{
	struct bpf_sock *sk = skb->sk;
	__u16 ports[2];

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk || !p || sk->protocol != p->tuple.proto)
		return DEMARC_NO_SOCKET;
	if (parsed == DEMARC_FRAGMENT && p->tuple.proto == PROTO_UDP) {
		if (p->length) /* useless without the first */
			return 0;
		if (bpf_skb_load_bytes(skb, p->transport, ports, sizeof(ports)))
			return DEMARC_MALFORMED;
		p->tuple.sport = bpf_ntohs(ports[0]);
		p->tuple.dport = bpf_ntohs(ports[1]);
	} else if (parsed) {
		return parsed;
	}
	if (p->tuple.proto == PROTO_TCP)
		return of_connection(sk, p) ? 0 : DEMARC_NO_SOCKET;
	return flow_left(&p->tuple) ? 0 : DEMARC_NO_SOCKET;
}

/* Whether the host would send to this packet's source through the device that it
 * came from. A host that does not forward has no opinion. */
GLOBAL int leads_back(struct __sk_buff *skb, const struct packet *p, __u32 via)
{
	struct bpf_fib_lookup fib = { .ifindex = via };

	if (!p)
		return 0;
	if (link_local_or_none(p->tuple.saddr))
		return 1;
	switch (routes(skb, p->tuple.daddr, p->tuple.saddr, p->tuple.proto, BPF_FIB_LOOKUP_OUTPUT, &fib)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_NO_NEIGH:
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
	case BPF_FIB_LKUP_RET_FWD_DISABLED:
		return 1;
	}
	return 0;
}

/* Who sent a frame that comes out of a door. */
enum door_sender {
	SENDER_KERNEL, /* or nobody knows */
	SENDER_ANSWER, /* a listener's SYN-ACK */
	SENDER_SOCKET,
	SENDER_CAREFREE,
};

static __always_inline enum door_sender door_sender(struct __sk_buff *skb, struct outcome *o, struct demarc_door *door)
{
	struct bpf_sock *sk = skb->sk, *full;
	bool answers;

	if (!sk)
		return SENDER_KERNEL;
	answers = sk->state == TCP_NEW_SYN_RECV;
	full = bpf_sk_fullsock(sk);
	if (!full && !answers)
		return SENDER_KERNEL;
	if (full && socket_of_kernel(skb))
		return SENDER_KERNEL;
	o->cgroup = bpf_skb_cgroup_id(skb);
	o->query.subject = identity_of(o->query.slot, o->cgroup);
	if (carefree(o->query.slot, o->query.subject)) {
		if (door->lodger == DEMARC_LODGER_UNKNOWN)
			door->lodger = DEMARC_LODGER_CAREFREE;
		return SENDER_CAREFREE;
	}
	if (o->query.subject >= DEMARC_ID_FIRST || o->query.subject == DEMARC_ID_PENDING) {
		if (door->lodger != DEMARC_LODGER_WORKLOAD)
			door->lodger = DEMARC_LODGER_WORKLOAD;
		if (door->cgroup != o->cgroup)
			door->cgroup = o->cgroup;
	}
	return answers ? SENDER_ANSWER : SENDER_SOCKET;
}

GLOBAL int frame_from_workload(struct __sk_buff *skb)
{
	__u32 device = skb->ifindex;
	struct demarc_door *door;
	enum door_sender sender;
	struct outcome o;
	struct packet p;
	int parsed, wrong;

	begin(&o, active_word(), DEMARC_ID_NONE, 0, DEMARC_HOOK_DEVICE);
	if (!(DEMARC_ACTIVE_FLAGS(o.active) & DEMARC_ACTIVE_ON) || skb->protocol == bpf_htons(ETH_P_ARP))
		return TCX_NEXT;
	door = bpf_map_lookup_elem(&doors, &device);
	if (!door) /* the core makes its entry before it attaches this program */
		return refused(&o, DEMARC_NO_SOCKET) ? TCX_DROP : TCX_NEXT;
	if (frame_of_workload(skb, &o)) {
		door->lodger = DEMARC_LODGER_WORKLOAD;
		return refused_aloud(&o, DEMARC_RAW_SOCKET) ? TCX_DROP : TCX_NEXT;
	}
	sender = door_sender(skb, &o, door);
	if (sender == SENDER_CAREFREE || (sender == SENDER_KERNEL && door->lodger == DEMARC_LODGER_CAREFREE))
		return TCX_NEXT;
	parsed = parse(skb, ETHERNET_HEADER, &p);
	__builtin_memcpy(&o.opener, &p.tuple, sizeof(o.opener));
	if (sender == SENDER_SOCKET)
		wrong = socket_frame(skb, &p, parsed);
	else
		wrong = kernel_frame(&p, parsed);
	if (!wrong && !leads_back(skb, &p, door->via))
		wrong = DEMARC_SPOOF;
	if (!wrong && sender != SENDER_SOCKET && p.tuple.proto == PROTO_TCP && foreign_tag(skb, &p, &o))
		wrong = DEMARC_TAG_BAD_IDENTITY;
	return wrong && refused(&o, wrong) ? TCX_DROP : TCX_NEXT;
}

#endif
