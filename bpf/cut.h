/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Which live connections a change would end. Asked before it is made: the new
 * generation is filled, its cgroups are bound, and no packet is judged by it yet.
 */
#ifndef DEMARC_CUT_H
#define DEMARC_CUT_H

static __always_inline bool lives(__u8 state)
{
	return state == TCP_ESTABLISHED || state == TCP_FIN_WAIT1 || state == TCP_FIN_WAIT2 || state == BPF_TCP_CLOSE_WAIT;
}

/* The connection, from this end. */
static __always_inline void ends_of(struct sock *sk, struct demarc_tuple *t)
{
	struct sock_common *c = &sk->__sk_common;

	__builtin_memset(t, 0, sizeof(*t));
	t->proto = PROTO_TCP;
	t->sport = c->skc_num;
	t->dport = bpf_ntohs(c->skc_dport);
	if (c->skc_family == AF_INET) {
		map_ipv4(t->saddr, c->skc_rcv_saddr);
		map_ipv4(t->daddr, c->skc_daddr);
		return;
	}
	BPF_CORE_READ_INTO(&t->saddr, sk, __sk_common.skc_v6_rcv_saddr);
	BPF_CORE_READ_INTO(&t->daddr, sk, __sk_common.skc_v6_daddr);
}

/* A function of its own, so that its type information is there for Go. */
static __attribute__((noinline)) long tell_cut(struct seq_file *seq, struct demarc_cut *end)
{
	return bpf_seq_write(seq, end, sizeof(*end));
}

/* Keeps a connection that is about to be cut until the time that the state says, whatever
 * the policy says then. One that nobody judged yet has nothing but this. */
static __always_inline void spare(struct tcp_sock *tcp, struct demarc_socket *kept)
{
	struct demarc_socket fresh = { .reason = DEMARC_NO_STATE };
	__u32 zero = 0;
	struct demarc_state *s = bpf_map_lookup_elem(&state, &zero);

	if (!kept)
		kept = bpf_sk_storage_get(&sockets, tcp, &fresh, BPF_SK_STORAGE_GET_F_CREATE);
	if (kept && s)
		kept->spared = s->spared;
}

/* One of a task's files. A connection is judged in the slot that the self-test has,
 * and written down if it would end. Sockets are found by who holds them, so that no
 * network namespace is left out. */
static __always_inline int would_cut(struct bpf_iter__task_file *ctx)
{
	struct demarc_query q = { .crossing = DEMARC_NO_CROSSING_INDEX };
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct demarc_cut end = {};
	struct demarc_selftest *test;
	struct demarc_socket *kept;
	struct kernfs_node *node;
	struct socket *socket;
	struct tcp_sock *tcp;
	struct sock *sk;
	__u32 zero = 0;

	test = bpf_map_lookup_elem(&selftest, &zero);
	socket = file ? bpf_sock_from_file(file) : 0;
	sk = socket ? socket->sk : 0;
	tcp = sk ? bpf_skc_to_tcp_sock(sk) : 0;
	if (!test || !task || !tcp || !lives(sk->__sk_common.skc_state) || !sk->sk_cgrp_data.cgroup)
		return 0;
	node = sk->sk_cgrp_data.cgroup->kn;
	if (!node)
		return 0;
	q.slot = test->slot;
	q.subject = identity_of(q.slot, node->id);
	if (q.subject == DEMARC_ID_NONE || carefree(q.slot, q.subject))
		return 0;
	end.cookie = bpf_get_socket_cookie(sk);
	kept = bpf_sk_storage_get(&sockets, tcp, 0, 0);
	if (!kept)
		kept = young_verdict(end.cookie);
	ends_of(sk, &end.tuple);
	end.subject = q.subject;
	end.reason = DEMARC_NO_STATE;
	q.now = bpf_ktime_get_boot_ns();
	if (kept && !test->proof && q.now < kept->spared)
		return 0;
	if (kept && !(kept->spared && kept->reason == DEMARC_NO_STATE)) {
		if (kept->verdict == DEMARC_DENY) /* it is cut already */
			return 0;
		q.proto = PROTO_TCP;
		q.port = kept->port ? kept->port : kept->direction == DEMARC_EGRESS ? end.tuple.dport : end.tuple.sport;
		q.direction = end.direction = kept->direction;
		q.proof = kept->proof;
		q.peer = end.peer = kept->peer;
		__builtin_memcpy(q.address, end.tuple.daddr, sizeof(q.address));
		decide(&q);
		if (q.verdict != DEMARC_DENY)
			return 0;
		end.reason = q.reason;
	}
	if (test->proof)
		spare(tcp, kept);
	end.pid = task->tgid;
	BPF_CORE_READ_STR_INTO(&end.comm, task, comm);
	return tell_cut(ctx->meta->seq, &end) ? 1 : 0;
}

#endif
