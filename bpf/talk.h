/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * What a UDP socket carries, as a TCP socket carries its verdict: with whom it
 * talked last, and that both ways were admitted. Good for about a second, while nothing
 * was decided anew and nobody took anybody's place; then its flow is asked again.
 * It stands in a place that the socket's cookie gives it, which costs a packet no call,
 * or, where another one has that place, in the socket's storage.
 * Both ends' CPUs read this with each packet, so readers write nothing: they look
 * at its version before and after.
 */
#ifndef DEMARC_TALK_H
#define DEMARC_TALK_H

#define TALK_TIME 128 /* jiffies, which are 1 to 10 ms */

/* Whether the processor keeps loads in their order by itself, as x86 does. */
const volatile bool loads_in_order;

/* Orders all loads and stores around it. Its result is used: one that nobody wants orders
 * nothing on arm64. */
static __always_inline void full_fence(void)
{
	__u64 nothing = 0, was;

	was = __sync_fetch_and_add((volatile __u64 *)&nothing, 1);
	barrier_var(was);
}

/* Orders the loads around it. */
static __always_inline void fence(void)
{
	barrier();
	if (!loads_in_order)
		full_fence();
}

static __always_inline __u32 version_of(const struct demarc_talk *k)
{
	return *(volatile __u32 *)&k->version;
}

static __always_inline struct demarc_talk *talk_place(__u64 cookie)
{
	__u32 index = cookie & ((1 << DEMARC_TALK_BITS) - 1);

	return bpf_map_lookup_elem(&talks, &index);
}

static __always_inline __u64 talk_owner(__u64 cookie)
{
	return cookie >> DEMARC_TALK_BITS;
}

/* Whether what was admitted or found until then, by what was known TALK_TIME before, still
 * stands: nobody came to speak in another's place since, nor in the same jiffy. */
static __always_inline bool still_good(__u64 until)
{
	__u32 zero = 0;
	__u64 *last = bpf_map_lookup_elem(&turned, &zero);

	return last && bpf_jiffies64() < until && *(volatile __u64 *)last + TALK_TIME < until;
}

/* Somebody else speaks in a flow that was judged, and that already says so: nobody's last
 * talk counts. The time never goes back: who fails eight times has met eight others of
 * earlier jiffies, and is late enough to write at once. */
static __always_inline void turn(void)
{
	__u32 zero = 0;
	__u64 *last = bpf_map_lookup_elem(&turned, &zero), now, old;

	if (!last)
		return;
	full_fence();
	now = bpf_jiffies64();
	for (int i = 0; i < 8; i++) {
		old = *(volatile __u64 *)last;
		if (old >= now || __sync_val_compare_and_swap(last, old, now) == old)
			return;
	}
	__sync_lock_test_and_set(last, now);
}

/* Whether a datagram with its headers together at `network` is plain, and between the
 * two ends of a talk. Anything else takes a closer look. */
static __always_inline bool part_of(struct __sk_buff *skb, __u32 network, bool outgoing, const struct demarc_talk *k)
{
	void *data = (void *)(long)skb->data + network, *end = (void *)(long)skb->data_end;
	const __be32 *from = outgoing ? k->saddr : k->daddr, *to = outgoing ? k->daddr : k->saddr;
	__u32 length = skb->len - network;
	struct udphdr *udp;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data;

		udp = (void *)(ip + 1);
		if ((void *)(udp + 1) > end || *(__u8 *)ip != 0x45 || ip->frag_off & bpf_htons(0x3fff) ||
		    ip->protocol != PROTO_UDP || bpf_ntohs(ip->tot_len) != length)
			return false;
		if (ip->saddr != from[3] || ip->daddr != to[3] || !is_ipv4((const __u8 *)k->saddr))
			return false;
		length -= sizeof(*ip);
	} else {
		struct ipv6hdr *ip = data;
		const __be32 *saddr = (const __be32 *)&ip->saddr, *daddr = (const __be32 *)&ip->daddr;

		udp = (void *)(ip + 1);
		if (skb->protocol != bpf_htons(ETH_P_IPV6) || (void *)(udp + 1) > end || ip->version != 6 ||
		    ip->nexthdr != PROTO_UDP || bpf_ntohs(ip->payload_len) + sizeof(*ip) != length)
			return false;
		if (saddr[0] != from[0] || saddr[1] != from[1] || saddr[2] != from[2] || saddr[3] != from[3] ||
		    daddr[0] != to[0] || daddr[1] != to[1] || daddr[2] != to[2] || daddr[3] != to[3])
			return false;
		length -= sizeof(*ip);
	}
	return udp->source == (outgoing ? k->sport : k->dport) && udp->dest == (outgoing ? k->dport : k->sport) &&
	       bpf_ntohs(udp->len) == length;
}

/* Whether a datagram goes on with a talk: `admitted` at its socket, otherwise that no tag
 * is owed where it leaves the host, as a frame. */
static __always_inline bool goes_on_with(struct __sk_buff *skb, const struct demarc_talk *k, __u64 owner, bool outgoing,
					 bool admitted, __u64 active)
{
	__u32 version = version_of(k);
	bool on;

	fence();
	on = k->owner == owner && k->epoch == DEMARC_ACTIVE_EPOCH(active) && part_of(skb, admitted ? 0 : ETHERNET_HEADER, outgoing, k) &&
	     still_good(admitted ? k->admitted : k->untagged);
	fence();
	return on && !(version & 1) && version_of(k) == version;
}

/* The same with that of a socket that has no place. */
static __noinline bool goes_on_stored(struct __sk_buff *skb, __u64 owner, bool outgoing, bool admitted, __u64 active)
{
	struct bpf_sock *sk = skb->sk;
	struct demarc_endpoint *e;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	e = sk ? bpf_sk_storage_get(&endpoints, sk, 0, 0) : 0;
	return e && goes_on_with(skb, &e->talk, owner, outgoing, admitted, active);
}

/* Whether a datagram goes on with what its socket carries. */
static __always_inline bool goes_on(struct __sk_buff *skb, __u64 cookie, bool outgoing, bool admitted, __u64 active)
{
	struct demarc_talk *place = talk_place(cookie);
	__u64 owner = talk_owner(cookie);

	if (place && goes_on_with(skb, place, owner, outgoing, admitted, active))
		return true;
	return goes_on_stored(skb, owner, outgoing, admitted, active);
}

static __always_inline bool same_talk(const struct demarc_talk *a, const struct demarc_talk *b)
{
	return a->owner == b->owner && a->epoch == b->epoch && a->sport == b->sport && a->dport == b->dport &&
	       a->saddr[0] == b->saddr[0] && a->saddr[1] == b->saddr[1] && a->saddr[2] == b->saddr[2] &&
	       a->saddr[3] == b->saddr[3] && a->daddr[0] == b->daddr[0] && a->daddr[1] == b->daddr[1] &&
	       a->daddr[2] == b->daddr[2] && a->daddr[3] == b->daddr[3];
}

/* Whether what stands there is another socket's, and counts. */
static __always_inline bool talk_taken(const struct demarc_talk *k, __u32 owner)
{
	__u64 now = bpf_jiffies64();

	return *(volatile __u32 *)&k->owner != owner &&
	       (*(volatile __u64 *)&k->admitted > now || *(volatile __u64 *)&k->untagged > now);
}

/* Writes down that a talk goes on. The first datagram to another place only notes the
 * place: who talks with many at once should not pay for what he does not use. Returns 0
 * where another socket's talk stands. */
GLOBAL int note_talk(struct demarc_talk *k, const struct demarc_talk *fresh)
{
	__u32 version;
	int noted = 1;

	if (!k || !fresh || talk_taken(k, fresh->owner))
		return 0;
	version = version_of(k);
	if (version & 1 || __sync_val_compare_and_swap(&k->version, version, version + 1) != version)
		return 1; /* somebody else does */
	if (talk_taken(k, fresh->owner)) {
		noted = 0;
	} else if (same_talk(k, fresh)) {
		if (fresh->admitted)
			k->admitted = fresh->admitted;
		if (fresh->untagged)
			k->untagged = fresh->untagged;
	} else {
		k->admitted = 0;
		k->untagged = 0;
		k->owner = fresh->owner;
		k->epoch = fresh->epoch;
		k->sport = fresh->sport;
		k->dport = fresh->dport;
		__builtin_memcpy(k->saddr, fresh->saddr, sizeof(k->saddr));
		__builtin_memcpy(k->daddr, fresh->daddr, sizeof(k->daddr));
	}
	__sync_fetch_and_add(&k->version, 1);
	return noted;
}

/* The time to give carry_on(), from before what is carried on is looked up. */
static __always_inline __u64 talk_begins(void)
{
	__u64 now = bpf_jiffies64();

	fence();
	return now;
}

/* Notes that the socket's talk goes on without a look for a while, by what was found
 * `since`. */
GLOBAL int carry_on(struct __sk_buff *skb, const struct demarc_tuple *t, __u32 epoch, __u64 since, bool admitted)
{
	__u64 cookie = bpf_get_socket_cookie(skb), owner = talk_owner(cookie), until = since + TALK_TIME;
	struct demarc_talk fresh = {}, *place;
	struct bpf_sock *sk = skb->sk;
	struct demarc_endpoint *e;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk || !t || !cookie || owner >> 32)
		return 0;
	fresh.owner = owner;
	fresh.epoch = epoch;
	fresh.sport = bpf_htons(t->sport);
	fresh.dport = bpf_htons(t->dport);
	fresh.admitted = admitted ? until : 0;
	fresh.untagged = admitted ? 0 : until;
	__builtin_memcpy(fresh.saddr, t->saddr, sizeof(fresh.saddr));
	__builtin_memcpy(fresh.daddr, t->daddr, sizeof(fresh.daddr));
	place = talk_place(cookie);
	if (place && note_talk(place, &fresh))
		return 0;
	e = bpf_sk_storage_get(&endpoints, sk, 0, 0);
	if (e)
		note_talk(&e->talk, &fresh);
	return 0;
}

#endif
