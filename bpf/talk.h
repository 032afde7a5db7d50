/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * What a UDP socket carries, as a TCP socket carries its verdict: with whom it
 * talked last, and that both ways were admitted. Good for a second, while nothing
 * was decided anew and nobody took anybody's place; then its flow is asked again.
 * Both ends' CPUs read this with each packet, so readers write nothing: they look
 * at its version before and after.
 */
#ifndef DEMARC_TALK_H
#define DEMARC_TALK_H

#define TALK_TIME 1000000000ULL /* ns */

/* Orders the loads around it, also where the processor would not. */
static __always_inline void fence(void)
{
	__u64 nothing = 0;

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

/* The ends of a plain datagram whose headers lie together at `network`, with this
 * host's end first. Returns false for anything that takes a closer look. */
static __always_inline bool plain_datagram(struct __sk_buff *skb, __u32 network, bool outgoing, struct demarc_tuple *t)
{
	void *data = (void *)(long)skb->data + (network & 15), *end = (void *)(long)skb->data_end;
	struct udphdr *udp;
	__u32 length = skb->len - network;

	__builtin_memset(t, 0, sizeof(*t));
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data;

		udp = (void *)(ip + 1);
		if ((void *)(udp + 1) > end || *(__u8 *)ip != 0x45 || ip->frag_off & bpf_htons(0x3fff) ||
		    ip->protocol != PROTO_UDP || bpf_ntohs(ip->tot_len) != length)
			return false;
		length -= sizeof(*ip);
		map_ipv4(t->saddr, outgoing ? ip->saddr : ip->daddr);
		map_ipv4(t->daddr, outgoing ? ip->daddr : ip->saddr);
	} else {
		struct ipv6hdr *ip = data;

		udp = (void *)(ip + 1);
		if (skb->protocol != bpf_htons(ETH_P_IPV6) || (void *)(udp + 1) > end || ip->version != 6 ||
		    ip->nexthdr != PROTO_UDP || bpf_ntohs(ip->payload_len) + sizeof(*ip) != length)
			return false;
		length -= sizeof(*ip);
		__builtin_memcpy(t->saddr, outgoing ? &ip->saddr : &ip->daddr, 16);
		__builtin_memcpy(t->daddr, outgoing ? &ip->daddr : &ip->saddr, 16);
	}
	t->sport = bpf_ntohs(outgoing ? udp->source : udp->dest);
	t->dport = bpf_ntohs(outgoing ? udp->dest : udp->source);
	t->proto = PROTO_UDP;
	return bpf_ntohs(udp->len) == length;
}

static __always_inline bool same_tuple(const struct demarc_tuple *a, const struct demarc_tuple *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3] && x[4] == y[4];
}

/* Whether a datagram goes on with what its socket carries: `admitted` at the
 * socket, otherwise that no tag is owed where it leaves the host. */
GLOBAL int goes_on(struct __sk_buff *skb, __u32 network, bool outgoing, bool admitted, __u64 active)
{
	struct bpf_sock *sk = skb->sk;
	struct demarc_endpoint *e;
	struct demarc_tuple t;
	__u32 version;
	bool on;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk || sk->type != SOCK_DGRAM)
		return false;
	e = bpf_sk_storage_get(&endpoints, sk, 0, 0);
	if (!e || !plain_datagram(skb, network, outgoing, &t))
		return false;
	version = version_of(e);
	fence();
	on = e->epoch == DEMARC_ACTIVE_EPOCH(active) && e->turns == turns_so_far() &&
	     bpf_ktime_get_coarse_ns() < (admitted ? e->admitted : e->untagged) && same_tuple(&e->talk, &t);
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
	until = bpf_ktime_get_coarse_ns() + TALK_TIME;
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
