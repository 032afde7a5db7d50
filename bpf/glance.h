/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Which packets that leave are looked into (payload.h). Being entered costs an observer
 * more than this does, and nearly all packets are not worth it.
 */
#ifndef DEMARC_GLANCE_H
#define DEMARC_GLANCE_H

#define BANNER 5 /* bytes of one: SSH-1 or SSH-2 */
#define BANNER_MOST 400 /* bytes of a packet that may carry a banner, headers and all */
#define DNS_PORT 53

/* The protocol where that mostly stands; 0 = the packet is too short for one. */
static __always_inline __u8 protocol_of(struct __sk_buff *skb)
{
	__u8 *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (data + sizeof(struct iphdr) > end)
		return 0;
	return data[skb->protocol == bpf_htons(ETH_P_IP) ? offsetof(struct iphdr, protocol) :
							    offsetof(struct ipv6hdr, nexthdr)];
}

/* Whether enough data are in a segment. Most of those of short connections have none. */
static __always_inline bool has_room_for_banner(struct __sk_buff *skb)
{
	__u8 *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		return data + 33 > end || skb->len >= 20 + (data[32] >> 4) * 4 + BANNER;
	return data + 53 > end || skb->len >= 40 + (data[52] >> 4) * 4 + BANNER;
}

static __always_inline bool begins_connection(struct __sk_buff *skb)
{
	struct bpf_tcp_sock *tcp = skb->sk ? bpf_tcp_sock(skb->sk) : 0;

	return tcp && tcp->data_segs_out == 1 && tcp->bytes_acked <= 1;
}

/* UDP and TCP have their ports at the same place. */
static __always_inline bool asks_for_name(struct __sk_buff *skb)
{
	__u8 *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 port = (skb->protocol == bpf_htons(ETH_P_IP) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)) +
		     offsetof(struct udphdr, dest);

	return data + port + sizeof(__be16) <= end && *(__be16 *)(data + port) == bpf_htons(DNS_PORT);
}

static __always_inline bool worth_a_look(struct __sk_buff *skb, __u8 protocol)
{
	switch (protocol) {
	case PROTO_TCP:
		return skb->len <= BANNER_MOST && has_room_for_banner(skb) && (asks_for_name(skb) || begins_connection(skb));
	case PROTO_UDP:
		return asks_for_name(skb);
	case PROTO_ICMP:
	case PROTO_ICMP6:
		return true;
	}
	return false;
}

#endif
