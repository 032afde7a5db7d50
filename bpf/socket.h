/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * What a task asks of a socket: to make one, to bind, to connect, to send. These
 * hooks tell the task at once and by name; the packet hooks decide again, because
 * some ways around these exist.
 */
#ifndef DEMARC_SOCKET_H
#define DEMARC_SOCKET_H

#define PROTO_MPTCP 262

/* The acting task, as an outcome. Returns false if there is nothing to judge. */
static __always_inline bool begin_task(struct outcome *o, __u8 hook)
{
	__u64 active = active_word(), cgroup = bpf_get_current_cgroup_id();
	__u32 subject = identity_of(DEMARC_ACTIVE_SLOT(active), cgroup);

	begin(o, active, subject, cgroup, hook);
	o->task = true;
	return !carefree(o->query.slot, subject);
}

static __always_inline bool protocol_known(__u32 type, __u32 protocol)
{
	switch (protocol) {
	case 0:
	case PROTO_TCP:
	case PROTO_UDP:
	case PROTO_UDPLITE:
	case PROTO_ICMP:
	case PROTO_ICMP6:
	case PROTO_SCTP:
		return true;
	}
	return false;
}

static __always_inline int socket_made(struct bpf_sock *sk)
{
	struct demarc_endpoint fresh = {};
	struct outcome o;

	if (sk->type == SOCK_STREAM && sk->protocol == PROTO_TCP) /* everybody may: what it does with it is judged */
		return 1;
	fresh.cgroup = bpf_get_current_cgroup_id();
	bpf_sk_storage_get(&endpoints, sk, &fresh, BPF_SK_STORAGE_GET_F_CREATE);
	if (sk->type == SOCK_DGRAM && sk->protocol == PROTO_UDP)
		return 1;
	if (!begin_task(&o, DEMARC_HOOK_SOCK_CREATE))
		return 1;
	o.opener.proto = sk->protocol;
	if (o.query.subject == DEMARC_ID_UNMANAGED)
		return 1; /* among them the core, whose raw socket answers refused callers */
	if (sk->type == SOCK_RAW)
		return !refused_aloud(&o, DEMARC_RAW_SOCKET);
	/* Multipath TCP opens subflows that carry no tag. */
	if (sk->protocol == PROTO_MPTCP || !protocol_known(sk->type, sk->protocol))
		return !refused(&o, DEMARC_PROTOCOL);
	return 1;
}

/* The socket's own cgroup where it can be known here, else the task's. */
static __always_inline __u64 socket_cgroup(struct bpf_sock_addr *ctx, __u64 otherwise)
{
	struct tcp_sock *tcp;
	struct demarc_endpoint *e;

	if (!ctx->sk)
		return otherwise;
	if (ctx->type == SOCK_STREAM) {
		tcp = bpf_skc_to_tcp_sock(ctx->sk);
		return tcp ? cgroup_of_tcp(tcp) : otherwise;
	}
	e = bpf_sk_storage_get(&endpoints, ctx->sk, 0, 0);
	return e ? e->cgroup : otherwise;
}

/* Whether the current task is of its socket's cgroup. Each datagram without a connection
 * asks this; two pointers are told apart sooner than two cgroups' numbers are found. */
static __always_inline bool of_own_socket(struct bpf_sock_addr *ctx)
{
	struct bpf_sock_addr_kern *kernel;
	struct task_struct *task;
	struct sock *sk;

	if (!bpf_cast_to_kern_ctx) /* before Linux 6.2 */
		return socket_cgroup(ctx, 0) == bpf_get_current_cgroup_id();
	kernel = bpf_cast_to_kern_ctx(ctx);
	sk = kernel->sk;
	task = bpf_get_current_task_btf();
	return sk && sk->sk_cgrp_data.cgroup && sk->sk_cgrp_data.cgroup == task->cgroups->dfl_cgrp;
}

static __always_inline void read_user_address(struct bpf_sock_addr *ctx, __u8 *out, bool ipv6)
{
	__u32 word[4];

	if (!ipv6) {
		map_ipv4(out, ctx->user_ip4);
		return;
	}
	word[0] = ctx->user_ip6[0];
	barrier();
	word[1] = ctx->user_ip6[1];
	barrier();
	word[2] = ctx->user_ip6[2];
	barrier();
	word[3] = ctx->user_ip6[3];
	__builtin_memcpy(out, word, 16);
}

/* Whether a workload opens a connection that takes its tag: then its SYN may leave, as
 * in syn_out(), and its hooks are told who opens it. */
static __noinline bool opens_with_tag(struct bpf_sock_addr *ctx, struct outcome *o)
{
	struct demarc_query *q = &o->query;
	struct demarc_socket opening = {
		.epoch = DEMARC_ACTIVE_EPOCH(o->active),
		.port = q->port,
		.verdict = DEMARC_PROVISIONAL,
		.reason = DEMARC_UNPROVEN,
		.direction = DEMARC_EGRESS,
	};

	q->crossing = provable_crossing(q->slot, q->subject, DEMARC_EGRESS, PROTO_TCP, q->port, q->now);
	if (q->crossing == DEMARC_NO_CROSSING_INDEX || quarantined(q->slot, q->subject, q->crossing, q->now))
		return false;
	opening.crossing = q->crossing;
	opening.until = window_end(q);
	young_take(bpf_get_socket_cookie(ctx), &opening, q->subject, omission_of(q->slot, q->crossing, false));
	return true;
}

/* connect and sendmsg: could anything declared be there? */
static __always_inline int address_judged(struct bpf_sock_addr *ctx, __u8 hook, bool ipv6, struct outcome *o)
{
	bool free_task;
	__u64 cgroup;

	/* A task that sends with a socket of its own cgroup: whether the datagram opens a
	 * flow or answers one the packet hook knows, and its refusal reaches the task as
	 * the same error. */
	if (hook == DEMARC_HOOK_SENDMSG && of_own_socket(ctx))
		return 1;
	cgroup = socket_cgroup(ctx, 0);
	free_task = !begin_task(o, hook);
	if (!cgroup)
		cgroup = o->cgroup;
	o->opener.proto = ctx->protocol;
	o->opener.dport = bpf_ntohs(ctx->user_port);
	read_user_address(ctx, o->opener.daddr, ipv6);
	if (cgroup != o->cgroup && identity_of(o->query.slot, cgroup) != o->query.subject)
		return !refused(o, DEMARC_TASK_MISMATCH);
	if (free_task)
		return 1;
	if (o->query.subject == DEMARC_ID_NONE)
		return !refused(o, DEMARC_UNBOUND);
	if (o->query.subject == DEMARC_ID_PENDING || o->query.subject == DEMARC_ID_CANARY)
		return 1; /* its packets are dropped silently, so that it tries again */
	if (hook == DEMARC_HOOK_SENDMSG)
		return 1;
	o->query.port = o->opener.dport;
	o->query.proto = o->opener.proto;
	if (o->query.proto == PROTO_ICMP)
		o->query.port = 8; /* a ping socket sends nothing but echo requests */
	else if (o->query.proto == PROTO_ICMP6)
		o->query.port = 128;
	o->query.direction = DEMARC_EGRESS;
	o->query.proof = DEMARC_PROOF_UNKNOWN;
	__builtin_memcpy(o->query.address, o->opener.daddr, 16);
	if (ctx->type == SOCK_STREAM && o->query.proto == PROTO_TCP && o->query.subject >= DEMARC_ID_FIRST &&
	    !at_decoy(o) && opens_with_tag(ctx, o))
		return 1;
	decide(&o->query);
	ask_shadow_if_denied(o);
	return o->query.verdict != DEMARC_DENY || !refused(o, o->query.reason);
}

static __always_inline int addressed(struct bpf_sock_addr *ctx, __u8 hook, bool ipv6)
{
	struct outcome o;
	int pass;

	o.reported = false;
	o.asked = ASKED_NOTHING;
	pass = address_judged(ctx, hook, ipv6, &o);
	if (hook == DEMARC_HOOK_CONNECT && o.asked) /* sendmsg asks nothing */
		contrast(&o);
	if (o.reported)
		remark(&o);
	return pass;
}

/* A port belongs to the identity that bound it first, as long as it holds it. */
static __always_inline int port_bound(struct bpf_sock *sk)
{
	struct demarc_port_owner *owner, fresh = {};
	struct demarc_port_key key = {}, *kept;
	struct outcome o;

	if (sk->protocol != PROTO_TCP && sk->protocol != PROTO_UDP)
		return 1;
	begin_task(&o, DEMARC_HOOK_BIND);
	key.netns = bpf_get_netns_cookie(sk);
	key.port = sk->src_port;
	key.proto = sk->protocol;
	o.opener.proto = key.proto;
	o.opener.dport = key.port;
	o.query.direction = DEMARC_INGRESS;
	owner = bpf_map_lookup_elem(&port_owners, &key);
	if (!owner) {
		bpf_map_update_elem(&port_owners, &key, &fresh, BPF_NOEXIST);
		owner = bpf_map_lookup_elem(&port_owners, &key);
	}
	if (!owner) {
		fault(DEMARC_FAULT_PORT_FULL);
		return !refused(&o, DEMARC_MAP_FULL);
	}
	if (owner->sockets && owner->identity != o.query.subject)
		return !refused(&o, DEMARC_PORT_OWNED);
	kept = bpf_sk_storage_get(&bound_ports, sk, &key, BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept) {
		fault(DEMARC_FAULT_STORAGE);
		return !refused(&o, DEMARC_MAP_FULL);
	}
	*kept = key;
	owner->identity = o.query.subject;
	__sync_fetch_and_add(&owner->sockets, 1);
	return 1;
}

static __always_inline int socket_released(struct bpf_sock *sk)
{
	struct demarc_port_key *kept = bpf_sk_storage_get(&bound_ports, sk, 0, 0), key;
	struct demarc_port_owner *owner;

	if (sk->protocol == PROTO_TCP && sk->state == TCP_CLOSE)
		young_released(bpf_get_socket_cookie(sk));
	if (!kept || !kept->port)
		return 1;
	key = *kept;
	kept->port = 0;
	owner = bpf_map_lookup_elem(&port_owners, &key);
	/* A bind on another CPU between these two look-ups loses its ownership.
	 * It keeps its identity, which is what admits flows. */
	if (owner && __sync_fetch_and_add(&owner->sockets, -1) <= 1)
		bpf_map_delete_elem(&port_owners, &key);
	return 1;
}

/* Options that let a socket send from an address that is not its host's. */
static __always_inline int option_set(struct bpf_sockopt *ctx)
{
	struct outcome o;
	bool spoof = (ctx->level == 0 && (ctx->optname == 15 || ctx->optname == 19)) || /* IP_FREEBIND, IP_TRANSPARENT */
		     (ctx->level == 41 && (ctx->optname == 75 || ctx->optname == 78));	/* IPV6_TRANSPARENT, IPV6_FREEBIND */

	/* Whatever its length, the kernel is to use the caller's own value. */
	if (!spoof) {
		ctx->optlen = 0;
		return 1;
	}
	if (begin_task(&o, DEMARC_HOOK_SOCKOPT) && o.query.subject != DEMARC_ID_UNMANAGED && refused(&o, DEMARC_SPOOF))
		return 0;
	ctx->optlen = 0;
	return 1;
}

#endif
