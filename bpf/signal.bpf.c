// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * What tasks and connections do. Programs of this object change no verdict: those at
 * tracepoints and iterators cannot, and the two of cgroups return 1 in every case, which
 * refuses nothing. They run when a connection opens, fails or ends, when somebody
 * listens, at fork and exec, when a device is opened or a task moved, and every few
 * seconds over all files (survey). Packets meet one of them (payload), which egress calls
 * for the few that it lets pass and that are worth it; it can be left out.
 */
#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/in6.h>
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
#include "subject.h"
#include "outcome.h"
#include "parse.h"
#include "signal.h"
#include "mark.h"
#include "observe.h"
#include "relay.h"
#include "escape.h"
#include "glance.h"
#include "payload.h"
#include "survey.h"

char LICENSE[] SEC("license") = "GPL";

/* The layouts of the maps, which are those of demarc.bpf.c. */
#define EMIT(type) const struct type *emit_##type __attribute__((unused))
EMIT(demarc_rule_key);
EMIT(demarc_rule);
EMIT(demarc_subject);
EMIT(demarc_crossing);
EMIT(demarc_prefix_key);
EMIT(demarc_port_classes);
EMIT(demarc_path_key);
EMIT(demarc_unit);
EMIT(demarc_seen);
EMIT(demarc_told);

/* A connection is about to be opened by the current task. */
static __noinline int opening(struct outcome *o, __u64 cookie)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct demarc_lineage *l;
	struct demarc_told *s;
	struct demarc_signal *e;
	struct demarc_mark *m;
	__u64 what;

	if (!o)
		return 0;
	s = told_of(o->query.subject, DEMARC_EGRESS, o->query.now);
	what = address_hash(o->query.address) ^ ((__u64)PROTO_TCP << 16 | o->query.port);
	e = begin_signal(o, s, is_metadata(o->query.address) ? DEMARC_SIGNAL_METADATA : DEMARC_SIGNAL_CONTACT, 0,
			 what ^ program_hash(task));
	if (e) {
		name_task(e, task);
		bpf_ringbuf_submit(e, 0);
	}
	l = lineage_of(task, o);
	tell_netns(o, task, l, netns_of(task));
	m = mark_new(cookie, o->query.subject, o->query.now);
	if (m) {
		m->pid = task->tgid;
		bpf_probe_read_kernel(m->comm, sizeof(m->comm), task->comm);
		m->origin = l ? l->origin : 0;
		m->hops = l ? l->hops : 0;
	} else if (s) {
		__sync_fetch_and_add(&s->missed, 1);
	}
	if (!l || !l->hops)
		return 0;
	e = begin_signal(o, s, DEMARC_SIGNAL_CHAIN, 0, what ^ (__u64)l->origin << 32 ^ l->hops);
	if (e) {
		name_task(e, task);
		e->hops = l->hops;
		e->origin = l->origin;
		bpf_ringbuf_submit(e, 0);
	}
	return 0;
}

/* An attempt ended without a connection. */
static __noinline int failed(struct outcome *o, __u64 cookie, int error)
{
	struct demarc_mark *m = mark_of(cookie);
	struct demarc_signal *e;
	struct demarc_told *s;
	__u8 cause = DEMARC_CAUSE_ABANDONED;

	if (!o)
		return 0;
	if (error == 111) /* ECONNREFUSED */
		cause = DEMARC_CAUSE_REFUSED;
	else if (error == 110) /* ETIMEDOUT */
		cause = DEMARC_CAUSE_TIMEOUT;
	else if (error == 113 || error == 101) /* EHOSTUNREACH, ENETUNREACH */
		cause = DEMARC_CAUSE_UNREACHABLE;
	s = told_of(o->query.subject, DEMARC_EGRESS, o->query.now);
	e = begin_signal(o, s, DEMARC_SIGNAL_FAILED, cause, address_hash(o->query.address) ^ ((__u64)PROTO_TCP << 16 | o->query.port));
	if (e) {
		e->pid = m ? m->pid : 0;
		bpf_ringbuf_submit(e, 0);
	}
	mark_rekey(cookie, cookie, 0);
	count_failure(o);
	return 0;
}

/* A connection came in. Whose it is says the verdict on its SYN. */
static __noinline int came_in(struct outcome *o, __u64 cookie)
{
	__u32 index = cookie & (DEMARC_YOUNG - 1);
	struct demarc_young *place = bpf_map_lookup_elem(&young, &index);
	struct demarc_mark *m;
	struct demarc_told *s;
	struct demarc_tuple t;
	struct demarc_hop *hop;
	__u64 hash;

	if (!o)
		return 0;
	o->query.now = recently();
	m = mark_new(cookie, o->query.subject, o->query.now);
	if (!m) {
		s = told_of(o->query.subject, DEMARC_INGRESS, o->query.now);
		if (s)
			__sync_fetch_and_add(&s->missed, 1);
		return 0;
	}
	__builtin_memset(&t, 0, sizeof(t));
	__builtin_memcpy(t.saddr, o->opener.daddr, 16);
	__builtin_memcpy(t.daddr, o->opener.saddr, 16);
	t.sport = o->opener.dport;
	t.dport = o->opener.sport;
	hash = hash_of(&t);
	hop = hop_place(&t);
	m->inbound = 1;
	m->origin = place && place->cookie == cookie ? place->kept.peer : 0;
	m->hops = hop && hop->tuple == hash ? hop->hops : 0;
	return 0;
}

/* A connection that goes back to another is there: its other end may be on this host. */
static __always_inline int comes_about(struct outcome *o, __u64 cookie)
{
	struct demarc_mark *m = mark_of(cookie);
	struct demarc_hop *hop = m && m->hops ? hop_place(&o->opener) : 0;

	if (!hop)
		return 0;
	hop->tuple = hash_of(&o->opener);
	hop->origin = m->origin;
	hop->hops = m->hops;
	return 0;
}

static __noinline int listens(struct outcome *o)
{
	struct demarc_signal *e;

	if (!o)
		return 0;
	e = begin_signal(o, told_of(o->query.subject, DEMARC_INGRESS, o->query.now), DEMARC_SIGNAL_LISTEN, 0, o->opener.dport);
	if (e) {
		name_task(e, bpf_get_current_task_btf());
		bpf_ringbuf_submit(e, 0);
	}
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(sock_state, struct sock *sk, int before, int after)
{
	struct demarc_mark *m;
	struct outcome o;
	__u64 cookie;

	if ((after == CLOSE && before != SYN_SENT) || after == FIN_WAIT1 || after == LAST_ACK) {
		cookie = sk->__sk_common.skc_cookie.counter;
		m = mark_of(cookie);
		return m ? ending(sk, m, cookie, after == CLOSE) : 0;
	}
	if (after != SYN_SENT && before != SYN_SENT && after != LISTEN && (before != SYN_RECV || after != ESTABLISHED))
		return 0;
	if (sk->sk_protocol != PROTO_TCP || !concerns(&o, cgroup_of_sock(sk)))
		return 0;
	ends_of_argument(sk, &o.opener);
	cookie = bpf_get_socket_cookie(sk);
	if (before == SYN_RECV)
		return came_in(&o, cookie);
	if (after == ESTABLISHED)
		return comes_about(&o, cookie);
	o.query.now = recently();
	o.query.proto = PROTO_TCP;
	o.query.proof = DEMARC_PROOF_UNKNOWN;
	if (after == LISTEN) {
		o.query.direction = DEMARC_INGRESS;
		o.opener.dport = o.opener.sport;
		o.opener.sport = 0;
		__builtin_memcpy(o.opener.daddr, o.opener.saddr, 16);
		__builtin_memset(o.opener.saddr, 0, 16);
		return listens(&o);
	}
	o.query.port = o.opener.dport;
	__builtin_memcpy(o.query.address, o.opener.daddr, 16);
	if (after == SYN_SENT)
		return opening(&o, cookie);
	return after == CLOSE ? failed(&o, cookie, sk->sk_err) : 0;
}

/* A process goes back to what its parent goes back to, and is born where it is, unless
 * its parent put it elsewhere. */
SEC("tp_btf/sched_process_fork")
int BPF_PROG(forked, struct task_struct *parent, struct task_struct *child)
{
	struct demarc_lineage *l, fresh;
	struct outcome o;

	if (child->pid != child->tgid || !about(&o, cgroup_of_task(parent)))
		return 0;
	l = lineage_of(parent, &o);
	if (!l)
		return 0;
	fresh = *l;
	fresh.looked = fresh.relayed = fresh.tun = 0;
	__builtin_memset(fresh.ended, 0, sizeof(fresh.ended));
	__builtin_memset(fresh.whole, 0, sizeof(fresh.whole));
	l = bpf_task_storage_get(&lineages, child, &fresh, BPF_LOCAL_STORAGE_GET_F_CREATE);
	tell_netns(&o, child, l, netns_of(child));
	tell_move(child, l, cgroup_of_task(child), parent);
	return 0;
}

/* A program is started: with a connection in the place of a terminal? In another
 * network than before? */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(executed, struct task_struct *task, int old, struct linux_binprm *bprm)
{
	struct demarc_lineage *l;
	struct demarc_signal *e;
	struct sock *sk = 0;
	struct outcome o;

	if (!about(&o, cgroup_of_task(task)))
		return 0;
	l = lineage_of(task, &o);
	if (l && !l->hops)
		look(task, l);
	tell_netns(&o, task, l, netns_of(task));
	if (l && !l->netns)
		l->netns = netns_of(task);
	for (__u32 fd = 0; fd < 3 && !sk; fd++)
		sk = (struct sock *)socket_at(files_of(task), fd);
	if (!sk)
		return 0;
	ends(sk, &o.opener);
	o.opener.proto = BPF_CORE_READ(sk, sk_protocol);
	e = begin_signal(&o, told_of(o.query.subject, DEMARC_EGRESS, o.query.now), DEMARC_SIGNAL_SHELL, 0, address_hash(o.opener.daddr) ^ task->tgid);
	if (!e)
		return 0;
	name_task(e, task);
	bpf_probe_read_kernel_str(e->exe, sizeof(e->exe), BPF_CORE_READ(bprm, filename));
	e->hops = l ? l->hops : 0;
	e->origin = l ? l->origin : 0;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* A process was moved into a cgroup. */
SEC("tp_btf/cgroup_attach_task")
int BPF_PROG(moved, struct cgroup *to, const char *path, struct task_struct *task, bool threadgroup)
{
	struct demarc_lineage *l = known_lineage(task);

	return l ? tell_move(task, l, BPF_CORE_READ(to, kn, id), bpf_get_current_task_btf()) : 0;
}

/* A process goes into another network namespace, at that moment. Many kernels refuse
 * this program; then it is seen at its next exec, connection or round. */
SEC("fentry/switch_task_namespaces")
int BPF_PROG(switched, struct task_struct *task, struct nsproxy *to)
{
	struct demarc_lineage *l = to ? known_lineage(task) : 0;
	struct outcome o;

	return l && about(&o, cgroup_of_task(task)) ? tell_netns(&o, task, l, BPF_CORE_READ(to, net_ns, ns.inum)) : 0;
}

/* A device is opened. */
SEC("cgroup/dev")
int opened(struct bpf_cgroup_dev_ctx *ctx)
{
	struct outcome o;

	if (ctx->major == 10 && ctx->minor == 200 && ctx->access_type >> 16 & (BPF_DEVCG_ACC_READ | BPF_DEVCG_ACC_WRITE) &&
	    about(&o, bpf_get_current_cgroup_id()))
		tell_tun(&o, bpf_get_current_task_btf());
	return 1;
}

/* A packet leaves a socket, and is worth a look. */
SEC("cgroup_skb/egress")
int payload(struct __sk_buff *skb)
{
	look_at_payload(skb);
	return 1;
}

/* One file of one process, in a round over all of them. The round also finds what no
 * other program told at its time. */
SEC("iter/task_file")
int surveyed(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;

	if (!task || task->tgid != survey.strand.pid) {
		tell_survey();
		begin_survey(task);
	}
	if (task && file && survey.ours)
		survey_file(task, file);
	return 0;
}
