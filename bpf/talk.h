/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * What a UDP socket carries, as a TCP socket carries its verdict: with whom it
 * talked last, and that both ways were admitted. Good for about a second, while nothing
 * was decided anew and nobody took anybody's place; then its flow is asked again.
 * Both ends' CPUs read this with each packet, so readers write nothing: they look
 * at its version before and after.
 */
#ifndef DEMARC_TALK_H
#define DEMARC_TALK_H

#define TALK_TIME 128 /* jiffies, which are 1 to 10 ms */

/* Whether the processor keeps loads in their order by itself, as x86 does. */
const volatile bool loads_in_order;

/* Orders the loads around it. */
static __always_inline void fence(void)
{
	__u64 nothing = 0;

	barrier();
	if (!loads_in_order)
		__sync_fetch_and_add((volatile __u64 *)&nothing, 1);
}

static __always_inline __u32 version_of(const struct demarc_endpoint *e)
{
	return *(volatile __u32 *)&e->version;
}

static __always_inline __u32 turns_so_far(void)
{
	__u32 zero = 0, *n = bpf_map_lookup_elem(&turns, &zero);

	return n ? *(volatile __u32 *)n : 0;
}

/* Somebody else speaks in a flow that was judged: nobody's last talk counts. */
static __always_inline void turn(void)
{
	__u32 zero = 0, *n = bpf_map_lookup_elem(&turns, &zero);

	if (n)
		__sync_fetch_and_add(n, 1);
}

/* Whether a datagram with its headers together at `network` is plain, and between the
 * two ends of a talk. Anything else takes a closer look. */
static __always_inline bool part_of(struct __sk_buff *skb, __u32 network, bool outgoing, const struct demarc_tuple *talk)
{
	const __u32 *mine = (const __u32 *)talk->saddr, *theirs = (const __u32 *)talk->daddr;
	void *data = (void *)(long)skb->data + network, *end = (void *)(long)skb->data_end;
	const __u32 *from = outgoing ? mine : theirs, *to = outgoing ? theirs : mine;
	__u16 sport = outgoing ? talk->sport : talk->dport, dport = outgoing ? talk->dport : talk->sport;
	__u32 length = skb->len - network;
	struct udphdr *udp;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data;

		udp = (void *)(ip + 1);
		if ((void *)(udp + 1) > end || *(__u8 *)ip != 0x45 || ip->frag_off & bpf_htons(0x3fff) ||
		    ip->protocol != PROTO_UDP || bpf_ntohs(ip->tot_len) != length)
			return false;
		if (ip->saddr != from[3] || ip->daddr != to[3] || !is_ipv4(talk->saddr))
			return false;
		length -= sizeof(*ip);
	} else {
		struct ipv6hdr *ip = data;
		const __u32 *saddr = (const __u32 *)&ip->saddr, *daddr = (const __u32 *)&ip->daddr;

		udp = (void *)(ip + 1);
		if (skb->protocol != bpf_htons(ETH_P_IPV6) || (void *)(udp + 1) > end || ip->version != 6 ||
		    ip->nexthdr != PROTO_UDP || bpf_ntohs(ip->payload_len) + sizeof(*ip) != length)
			return false;
		if (saddr[0] != from[0] || saddr[1] != from[1] || saddr[2] != from[2] || saddr[3] != from[3] ||
		    daddr[0] != to[0] || daddr[1] != to[1] || daddr[2] != to[2] || daddr[3] != to[3])
			return false;
		length -= sizeof(*ip);
	}
	return udp->source == bpf_htons(sport) && udp->dest == bpf_htons(dport) && bpf_ntohs(udp->len) == length;
}

/* Whether a datagram goes on with what its socket carries: `admitted` at the
 * socket, otherwise that no tag is owed where it leaves the host. */
static __always_inline bool goes_on(struct __sk_buff *skb, struct bpf_sock *sk, __u32 network, bool outgoing,
				    bool admitted, __u64 active)
{
	struct demarc_endpoint *e;
	__u32 version;
	bool on;

	e = bpf_sk_storage_get(&endpoints, sk, 0, 0);
	if (!e)
		return false;
	version = version_of(e);
	fence();
	on = e->epoch == DEMARC_ACTIVE_EPOCH(active) && e->turns == turns_so_far() &&
	     part_of(skb, network, outgoing, &e->talk) &&
	     bpf_jiffies64() < (admitted ? e->admitted : e->untagged);
	fence();
	return on && !(version & 1) && version_of(e) == version;
}

/* Notes that the socket's talk goes on without a look for a while. The first
 * datagram to another place only notes the place: who talks with many at once
 * should not pay for what he does not use. */
GLOBAL int carry_on(struct __sk_buff *skb, const struct demarc_tuple *t, __u32 epoch, __u32 now_turns, bool admitted)
{
	struct bpf_sock *sk = skb->sk;
	struct demarc_endpoint *e;
	__u32 version;
	__u64 until;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	e = sk && t ? bpf_sk_storage_get(&endpoints, sk, 0, 0) : 0;
	if (!e || !t)
		return 0;
	until = bpf_jiffies64() + TALK_TIME;
	version = version_of(e);
	if (version & 1 || __sync_val_compare_and_swap(&e->version, version, version + 1) != version)
		return 0; /* somebody else does */
	if (e->epoch != epoch || e->turns != now_turns || !same_tuple(&e->talk, t)) {
		e->admitted = 0;
		e->untagged = 0;
		e->epoch = epoch;
		e->turns = now_turns;
		e->talk = *t;
	} else if (admitted) {
		e->admitted = until;
	} else {
		e->untagged = until;
	}
	__sync_fetch_and_add(&e->version, 1);
	return 0;
}

#endif
