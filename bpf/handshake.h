/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* sockops: writes the tag into SYN and SYN-ACK, and hands an accepted connection
 * the verdict of its SYN. Nothing is decided here that packets do not decide. */
#ifndef DEMARC_HANDSHAKE_H
#define DEMARC_HANDSHAKE_H

/* Addresses of a connection, our side first. The loads are kept apart: clang would
 * merge them into one that the verifier refuses. */
static __always_inline void connection(struct bpf_sock_ops *ctx, struct demarc_tuple *t)
{
	__u32 local[4], remote[4];

	__builtin_memset(t, 0, sizeof(*t));
	t->proto = PROTO_TCP;
	t->sport = ctx->local_port;
	barrier();
	t->dport = bpf_ntohl(ctx->remote_port);
	barrier();
	if (ctx->family == AF_INET6) {
		remote[0] = ctx->remote_ip6[0];
		barrier();
		remote[1] = ctx->remote_ip6[1];
		barrier();
		remote[2] = ctx->remote_ip6[2];
		barrier();
		remote[3] = ctx->remote_ip6[3];
		barrier();
		if (remote[0] || remote[1] || remote[2] != bpf_htonl(0xffff)) {
			local[0] = ctx->local_ip6[0];
			barrier();
			local[1] = ctx->local_ip6[1];
			barrier();
			local[2] = ctx->local_ip6[2];
			barrier();
			local[3] = ctx->local_ip6[3];
			__builtin_memcpy(t->saddr, local, 16);
			__builtin_memcpy(t->daddr, remote, 16);
			return;
		}
	}
	/* IPv4, also on an IPv6 socket. */
	local[0] = ctx->local_ip4;
	barrier();
	remote[0] = ctx->remote_ip4;
	map_ipv4(t->saddr, local[0]);
	map_ipv4(t->daddr, remote[0]);
}

/* Identity of a socket that opens a connection; none where nothing is tagged. */
static __always_inline __u32 opener_identity(struct bpf_sock_ops *ctx, __u32 slot)
{
	struct bpf_sock *sk = ctx->sk;
	struct tcp_sock *tcp = sk ? bpf_skc_to_tcp_sock(sk) : 0;

	return tcp ? identity_of(slot, cgroup_of_tcp(tcp)) : DEMARC_ID_NONE;
}

/* Whether a workload opens this connection: its SYN may need a tag. */
static __always_inline bool opens(struct bpf_sock_ops *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct demarc_young *place = young_place(cookie);

	return (place && young_owner(place) == cookie && place->self >= DEMARC_ID_FIRST) ||
	       opener_identity(ctx, DEMARC_ACTIVE_SLOT(active_word())) >= DEMARC_ID_FIRST;
}

static __always_inline void want_options(struct bpf_sock_ops *ctx, bool want)
{
	int flags = ctx->bpf_sock_ops_cb_flags;

	bpf_sock_ops_cb_flags_set(ctx, want ? flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG :
					      flags & ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
}

/* Whom a SYN speaks for: the caller itself; none: no tag. */
static __always_inline __u32 caller_speaks(struct bpf_sock_ops *ctx, __u16 port, __u8 *omitted)
{
	__u64 active = active_word();
	__u32 slot = DEMARC_ACTIVE_SLOT(active), identity, index;

	identity = young_opener(bpf_get_socket_cookie(ctx), port, DEMARC_ACTIVE_EPOCH(active), omitted);
	if (identity)
		return identity;
	identity = opener_identity(ctx, slot);
	if (identity < DEMARC_ID_FIRST)
		return DEMARC_ID_NONE;
	index = provable_crossing(slot, identity, DEMARC_EGRESS, PROTO_TCP, port, recently());
	if (index == DEMARC_NO_CROSSING_INDEX)
		return DEMARC_ID_NONE;
	*omitted = omission_of(slot, index, false);
	return identity;
}

/* Whom a SYN-ACK speaks for: the listener that admitted a proven SYN; none: no tag. */
static __always_inline __u32 listener_speaks(const struct demarc_tuple *t, __u8 *omitted)
{
	struct demarc_pending_syn *pending;
	struct demarc_tuple opener;

	reverse(&opener, t);
	pending = pending_at(&opener, pending_mark(&opener));
	if (!pending || !both_tagged(pending))
		return DEMARC_ID_NONE;
	*omitted = omission_of(pending->slot, pending->crossing, true);
	return pending->self;
}

static __noinline int write_tag(struct bpf_sock_ops *ctx, bool reserve)
{
	__u32 identity, seq, acked = 0;
	__u8 flags = ctx->skb_tcp_flags, omitted = 0;
	bool answer = flags & FLAG_ACK;
	struct demarc_tuple t;
	struct demarc_tag tag;
	struct tcphdr *tcp;

	if (!(flags & FLAG_SYN))
		return 1;
	if (answer || !reserve)
		connection(ctx, &t);
	identity = answer ? listener_speaks(&t, &omitted) : caller_speaks(ctx, bpf_ntohl(ctx->remote_port), &omitted);
	if (!identity)
		return 1;
	if (reserve) {
		bpf_reserve_hdr_opt(ctx, DEMARC_TAG_LENGTH, 0);
		return 1;
	}
	tcp = ctx->skb_data;
	if ((void *)(tcp + 1) > ctx->skb_data_end)
		return 1;
	seq = bpf_ntohl(tcp->seq);
	if (answer)
		acked = bpf_ntohl(tcp->ack_seq);
	if (make_tag(&tag, identity, omitted | (answer ? DEMARC_TAG_ANSWER : 0), &t, seq, acked))
		return 1; /* untagged, and refused by the packet hook */
	bpf_store_hdr_opt(ctx, &tag, sizeof(tag), 0);
	return 1;
}

/* An accepted connection takes over what its SYN proved. */
static __noinline int accepted(struct bpf_sock_ops *ctx)
{
	struct demarc_pending_syn *pending;
	struct demarc_socket fresh = {};
	struct bpf_sock *sk = ctx->sk;
	__u64 mark;
	struct demarc_tuple t;
	struct outcome o;

	connection(ctx, &t);
	begin(&o, 0, DEMARC_ID_NONE, 0, DEMARC_HOOK_ESTABLISHED);
	reverse(&o.opener, &t);
	mark = pending_mark(&o.opener);
	pending = pending_at(&o.opener, mark);
	if (!pending || !sk)
		return 1;
	/* The verdict is told under the generation that gave it: another one may be
	 * active by now, with another crossing at that index. */
	o.active = (__u64)pending->epoch << 32 | pending->slot;
	o.query.slot = pending->slot;
	fresh.peer = pending->peer;
	fresh.epoch = pending->epoch;
	fresh.crossing = pending->crossing;
	fresh.port = o.opener.dport;
	fresh.verdict = DEMARC_ALLOW;
	fresh.reason = pending->reason;
	fresh.proof = pending->proof;
	fresh.direction = DEMARC_INGRESS;
	fresh.until = pending->until;
	o.query.subject = pending->self;
	o.query.direction = DEMARC_INGRESS;
	o.query.peer = pending->peer;
	o.query.proof = pending->proof;
	o.query.verdict = DEMARC_ALLOW;
	o.query.reason = pending->reason;
	o.query.crossing = pending->crossing;
	/* A packet that another processor has taken in meanwhile finds the one or the other. */
	if (!pending_is(pending, mark)) /* somebody else has its place */
		return 1;
	if (!young_take(bpf_get_socket_cookie(ctx), &fresh, 0, 0) &&
	    !bpf_sk_storage_get(&sockets, sk, &fresh, BPF_SK_STORAGE_GET_F_CREATE)) {
		fault(DEMARC_FAULT_STORAGE);
		return 1;
	}
	pending_end(pending, mark);
	if (o.query.crossing != DEMARC_NO_CROSSING_INDEX)
		report(&o);
	return 1;
}

static __always_inline int handshake(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		want_options(ctx, opens(ctx));
		return 1;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		want_options(ctx, true);
		return 1;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		return write_tag(ctx, true);
	case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
		return write_tag(ctx, false);
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		want_options(ctx, false);
		return 1;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		want_options(ctx, false);
		return accepted(ctx);
	}
	return 1;
}

#endif
