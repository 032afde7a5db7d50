// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * What demarc is compared with, as far as it is BPF: hooks that do nothing (those of
 * packets, and every one that demarc has), and a
 * boundary on the device in the way of today's network policy agents: an LRU
 * connection table, and for what it does not know a hash of declared peers and
 * ports, by address.
 */
#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define FLAG_SYN 0x02

char LICENSE[] SEC("license") = "GPL";

SEC("cgroup_skb/egress")
int empty_egress(struct __sk_buff *skb)
{
	return 1;
}

SEC("cgroup_skb/ingress")
int empty_ingress(struct __sk_buff *skb)
{
	return 1;
}

/* The hooks that a boundary with tags in handshakes needs beside them, doing nothing but
 * what the kernel is asked for there: an option as long as a tag. */
SEC("cgroup/sock_create")
int empty_create(struct bpf_sock *ctx)
{
	return 1;
}

SEC("cgroup/sock_release")
int empty_release(struct bpf_sock *ctx)
{
	return 1;
}

SEC("cgroup/connect4")
int empty_connect(struct bpf_sock_addr *ctx)
{
	return 1;
}

SEC("cgroup/sendmsg4")
int empty_sendmsg(struct bpf_sock_addr *ctx)
{
	return 1;
}

SEC("cgroup/setsockopt")
int empty_setsockopt(struct bpf_sockopt *ctx)
{
	ctx->optlen = 0; /* the kernel is to use the caller's own value */
	return 1;
}

SEC("sockops")
int empty_handshake(struct bpf_sock_ops *ctx)
{
	int flags = ctx->bpf_sock_ops_cb_flags;
	__u8 option[16] = { 253, sizeof(option), 0xff, 0xff }; /* an experiment that nobody registered */

	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		bpf_sock_ops_cb_flags_set(ctx, flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		if (ctx->skb_tcp_flags & FLAG_SYN)
			bpf_reserve_hdr_opt(ctx, sizeof(option), 0);
		break;
	case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
		if (ctx->skb_tcp_flags & FLAG_SYN)
			bpf_store_hdr_opt(ctx, option, sizeof(option), 0);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		bpf_sock_ops_cb_flags_set(ctx, flags & ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
		break;
	}
	return 1;
}

#define PROTO_TCP 6
#define PROTO_UDP 17
#define FLAG_FIN 0x01
#define FLAG_RST 0x04
#define FLAG_ACK 0x10

/* A flow, the same for both of its ways: the lower address and port first. All in
 * network order. */
struct flow_key {
	__u32 address[2];
	__u16 port[2];
	__u32 proto;
};

struct flow {
	__u64 last; /* ns of CLOCK_MONOTONIC */
	__u64 packets;
	__u64 bytes;
	__u64 closing;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct flow_key);
	__type(value, struct flow);
} flows SEC(".maps");

/* Declared peers: address and port in network order. */
struct declared {
	__u32 address;
	__u16 port;
	__u8 proto;
	__u8 outgoing;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct declared);
	__type(value, __u32);
} policy SEC(".maps");

static __always_inline int boundary(struct __sk_buff *skb, bool outgoing)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	struct flow_key key = {};
	struct flow *flow, fresh = {};
	struct declared declared = {};
	__u16 sport, dport;
	__u8 flags = 0;

	if ((void *)(eth + 1) > end)
		return TC_ACT_SHOT;
	if (eth->h_proto == bpf_htons(ETH_P_ARP))
		return TC_ACT_OK;
	if (eth->h_proto != bpf_htons(ETH_P_IP) || (void *)(ip + 1) > end || ip->ihl != 5 ||
	    ip->frag_off & bpf_htons(0x3fff))
		return TC_ACT_SHOT;
	if (ip->protocol == PROTO_TCP) {
		struct tcphdr *tcp = (void *)(ip + 1);

		if ((void *)(tcp + 1) > end)
			return TC_ACT_SHOT;
		sport = tcp->source;
		dport = tcp->dest;
		flags = ((__u8 *)tcp)[13];
	} else if (ip->protocol == PROTO_UDP) {
		struct udphdr *udp = (void *)(ip + 1);

		if ((void *)(udp + 1) > end)
			return TC_ACT_SHOT;
		sport = udp->source;
		dport = udp->dest;
	} else {
		return TC_ACT_SHOT;
	}
	key.proto = ip->protocol;
	if (ip->saddr < ip->daddr) {
		key.address[0] = ip->saddr;
		key.address[1] = ip->daddr;
		key.port[0] = sport;
		key.port[1] = dport;
	} else {
		key.address[0] = ip->daddr;
		key.address[1] = ip->saddr;
		key.port[0] = dport;
		key.port[1] = sport;
	}
	flow = bpf_map_lookup_elem(&flows, &key);
	if (flow && (flags & (FLAG_SYN | FLAG_ACK)) != FLAG_SYN) {
		flow->last = bpf_ktime_get_ns();
		flow->packets++;
		flow->bytes += skb->len;
		if (flags & (FLAG_FIN | FLAG_RST))
			flow->closing = 1;
		return TC_ACT_OK;
	}
	if (ip->protocol == PROTO_TCP && (flags & (FLAG_SYN | FLAG_ACK | FLAG_RST)) != FLAG_SYN)
		return TC_ACT_SHOT;
	declared.address = outgoing ? ip->daddr : ip->saddr;
	declared.port = dport;
	declared.proto = ip->protocol;
	declared.outgoing = outgoing;
	if (!bpf_map_lookup_elem(&policy, &declared))
		return TC_ACT_SHOT;
	fresh.last = bpf_ktime_get_ns();
	fresh.packets = 1;
	fresh.bytes = skb->len;
	return bpf_map_update_elem(&flows, &key, &fresh, BPF_ANY) ? TC_ACT_SHOT : TC_ACT_OK;
}

SEC("tcx/egress")
int conntrack_egress(struct __sk_buff *skb)
{
	return boundary(skb, true);
}

SEC("tcx/ingress")
int conntrack_ingress(struct __sk_buff *skb)
{
	return boundary(skb, false);
}
