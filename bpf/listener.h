/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Listeners that are older than the programs. sockops asks for a listener's tags
 * when listen(2) is called, and theirs was called before. The core walks over the
 * TCP sockets of its namespace once, when the first policy comes into force.
 */
#ifndef DEMARC_LISTENER_H
#define DEMARC_LISTENER_H

#define SOL_TCP 6
#define TCP_BPF_SOCK_OPS_CB_FLAGS 1008 /* Linux 6.12 */

/* Writes one byte for each workload's listener: 'y' it proves itself from now on,
 * 'n' this kernel cannot make it. */
static __always_inline int ask_for_tags(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct tcp_sock *tcp;
	__u32 identity;
	char done;
	int flags;

	if (!common || common->skc_state != TCP_LISTEN)
		return 0;
	tcp = bpf_skc_to_tcp_sock(common);
	if (!tcp)
		return 0;
	identity = identity_of(DEMARC_ACTIVE_SLOT(active_word()), cgroup_of_tcp(tcp));
	if (identity == DEMARC_ID_NONE) /* not below the managed root */
		return 0;
	flags = tcp->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
	done = bpf_setsockopt(tcp, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, &flags, sizeof(flags)) ? 'n' : 'y';
	if (identity >= DEMARC_ID_FIRST)
		bpf_seq_write(ctx->meta->seq, &done, sizeof(done));
	return 0;
}

#endif
