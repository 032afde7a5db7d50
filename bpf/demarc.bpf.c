// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* Every program of demarc. Each is three lines; the rooms they lead to have their
 * own files. */
#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <stddef.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#include "include/kernel.h"
#include "abi/abi.h"
#include "maps.h"
#include "tables.h"
#include "verdict.h"
#include "subject.h"
#include "parse.h"
#include "outcome.h"
#include "signal.h"
#include "event.h"
#include "limit.h"
#include "tag.h"
#include "replay.h"
#include "shadow.h"
#include "judge.h"
#include "refusal.h"
#include "pending.h"
#include "talk.h"
#include "young.h"
#include "stream.h"
#include "datagram.h"
#include "glance.h"
#include "skb.h"
#include "socket.h"
#include "handshake.h"
#include "cgroup.h"
#include "device.h"
#include "door.h"
#include "listener.h"
#include "cut.h"

char LICENSE[] SEC("license") = "GPL";

/* Kept in the object's type information: the layouts of the inner maps, and what
 * Go's layouts are compared with. */
#define EMIT(type) const struct type *emit_##type __attribute__((unused))
EMIT(demarc_rule_key);
EMIT(demarc_rule);
EMIT(demarc_subject);
EMIT(demarc_crossing);
EMIT(demarc_prefix_key);
EMIT(demarc_port_classes);
EMIT(demarc_path_key);
EMIT(demarc_unit);
EMIT(demarc_event);
EMIT(demarc_signal);
EMIT(demarc_query);
EMIT(demarc_refusal);

SEC("cgroup/sock_create")
int sock_create(struct bpf_sock *ctx)
{
	return socket_made(ctx);
}

SEC("cgroup/sock_release")
int sock_release(struct bpf_sock *ctx)
{
	return socket_released(ctx);
}

SEC("cgroup/post_bind4")
int post_bind4(struct bpf_sock *ctx)
{
	return port_bound(ctx);
}

SEC("cgroup/post_bind6")
int post_bind6(struct bpf_sock *ctx)
{
	return port_bound(ctx);
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return addressed(ctx, DEMARC_HOOK_CONNECT, false);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return addressed(ctx, DEMARC_HOOK_CONNECT, true);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return addressed(ctx, DEMARC_HOOK_SENDMSG, false);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return addressed(ctx, DEMARC_HOOK_SENDMSG, true);
}

SEC("cgroup/setsockopt")
int setsockopt(struct bpf_sockopt *ctx)
{
	return option_set(ctx);
}

SEC("sockops")
int sock_ops(struct bpf_sock_ops *ctx)
{
	return handshake(ctx);
}

SEC("cgroup_skb/egress")
int egress(struct __sk_buff *skb)
{
	__u8 protocol = protocol_of(skb);

	if (!skb_hook(skb, protocol, true))
		return 0;
	if (worth_a_look(skb, protocol))
		bpf_tail_call(skb, &observers, 0); /* which returns 1, too */
	return 1;
}

SEC("cgroup_skb/ingress")
int ingress(struct __sk_buff *skb)
{
	return skb_hook(skb, protocol_of(skb), false);
}

SEC("tp_btf/cgroup_mkdir")
int BPF_PROG(cgroup_mkdir, struct cgroup *cgroup, const char *path)
{
	return cgroup_born(cgroup, path);
}

SEC("tp_btf/cgroup_rmdir")
int BPF_PROG(cgroup_rmdir, struct cgroup *cgroup, const char *path)
{
	return cgroup_gone(cgroup);
}

SEC("tcx/egress")
int tc_egress(struct __sk_buff *skb)
{
	return ordinary(skb, true) ? TCX_NEXT : frame_leaves(skb);
}

SEC("tcx/ingress")
int tc_ingress(struct __sk_buff *skb)
{
	return ordinary(skb, false) ? TCX_NEXT : frame_arrives(skb, false);
}

SEC("tcx/ingress")
int tc_door(struct __sk_buff *skb)
{
	int verdict = frame_from_workload(skb);

	return verdict == TCX_NEXT ? frame_arrives(skb, true) : verdict;
}

SEC("iter/tcp")
int old_listeners(struct bpf_iter__tcp *ctx)
{
	return ask_for_tags(ctx);
}

SEC("iter/task_file")
int cuts(struct bpf_iter__task_file *ctx)
{
	return would_cut(ctx);
}

/* Never attached: the core's self-test and the differential test run these. */
SEC("cgroup_skb/egress")
int selftest_egress(struct __sk_buff *skb)
{
	return selftest_hook(skb, true);
}

SEC("cgroup_skb/ingress")
int selftest_ingress(struct __sk_buff *skb)
{
	return selftest_hook(skb, false);
}

static long answer_question(__u32 i, void *unused)
{
	struct demarc_query *slot = bpf_map_lookup_elem(&questions, &i), q;

	if (!slot)
		return 1;
	q = *slot;
	decide(&q);
	*slot = q;
	return 0;
}

SEC("syscall")
int judge(struct demarc_count *ctx)
{
	bpf_loop(ctx->count, answer_question, 0, 0);
	return 0;
}

SEC("syscall")
int seal(struct demarc_seal *ctx)
{
	struct demarc_tuple sender = ctx->sender;
	__u64 mac = 0;

	ctx->claim = sign(&mac, ctx->identity, ctx->claim, &sender, ctx->seq, ctx->acked);
	ctx->mac = mac;
	return 0;
}
