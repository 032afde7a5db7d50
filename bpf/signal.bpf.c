// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * What tasks and connections do, seen from tracepoints: programs of this object can
 * change no verdict, whatever they return. They run when a connection opens or fails,
 * when somebody listens, and at fork and exec; no packet of an established connection
 * meets them.
 */
#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/in6.h>
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
#include "signal.h"

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

#define FILES 64 /* descriptors of a process that are looked at */
#define LOOK_AGAIN 10000000ULL /* ns; a look takes microseconds */

/* Kernel: include/net/tcp_states.h */
enum {
	ESTABLISHED = 1,
	SYN_SENT = 2,
	SYN_RECV = 3,
	CLOSE = 7,
	LISTEN = 10,
};

/* Read as it is: a tracepoint's arguments are typed, and each helper call for a field
 * costs more than the field. */
static __always_inline __u64 cgroup_of_sock(struct sock *sk)
{
	struct cgroup *cgroup = sk->sk_cgrp_data.cgroup;
	struct kernfs_node *node = cgroup ? cgroup->kn : 0;

	return node ? node->id : 0;
}

static __always_inline __u64 cgroup_of_task(struct task_struct *task) { return BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id); }

/* An outcome that nobody gave: who. False: nothing to tell. */
static __always_inline bool concerns(struct outcome *o, __u64 cgroup)
{
	__builtin_memset(o, 0, sizeof(*o));
	o->active = active_word();
	if (!(DEMARC_ACTIVE_FLAGS(o->active) & DEMARC_ACTIVE_ON))
		return false;
	o->cgroup = cgroup;
	o->query.slot = DEMARC_ACTIVE_SLOT(o->active);
	o->query.subject = identity_of(o->query.slot, cgroup);
	o->query.crossing = DEMARC_NO_CROSSING_INDEX;
	return o->query.subject >= DEMARC_ID_FIRST;
}

/* The same with the time. */
static __always_inline bool about(struct outcome *o, __u64 cgroup)
{
	if (!concerns(o, cgroup))
		return false;
	o->query.now = bpf_ktime_get_boot_ns();
	return true;
}

static __always_inline void mapped(__u8 *out, __u32 address)
{
	__u32 *w = (__u32 *)out;

	w[0] = w[1] = 0;
	w[2] = bpf_htonl(0xffff);
	w[3] = address;
}

/* Both ends of a socket, this one first. */
static __always_inline void ends(struct sock *sk, struct demarc_tuple *t)
{
	t->proto = PROTO_TCP;
	t->sport = BPF_CORE_READ(sk, __sk_common.skc_num);
	t->dport = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	if (BPF_CORE_READ(sk, __sk_common.skc_family) == AF_INET) {
		mapped(t->saddr, BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr));
		mapped(t->daddr, BPF_CORE_READ(sk, __sk_common.skc_daddr));
		return;
	}
	BPF_CORE_READ_INTO(&t->saddr, sk, __sk_common.skc_v6_rcv_saddr);
	BPF_CORE_READ_INTO(&t->daddr, sk, __sk_common.skc_v6_daddr);
}

/* The same of a tracepoint's socket, whose fields are read as they are. */
static __always_inline void ends_of_argument(struct sock *sk, struct demarc_tuple *t)
{
	t->proto = PROTO_TCP;
	t->sport = sk->__sk_common.skc_num;
	t->dport = bpf_ntohs(sk->__sk_common.skc_dport);
	if (sk->__sk_common.skc_family == AF_INET) {
		mapped(t->saddr, sk->__sk_common.skc_rcv_saddr);
		mapped(t->daddr, sk->__sk_common.skc_daddr);
		return;
	}
	BPF_CORE_READ_INTO(&t->saddr, sk, __sk_common.skc_v6_rcv_saddr);
	BPF_CORE_READ_INTO(&t->daddr, sk, __sk_common.skc_v6_daddr);
}

static __always_inline struct demarc_mark *mark_place(__u64 cookie)
{
	__u32 index = cookie & (DEMARC_MARKS - 1);

	return bpf_map_lookup_elem(&marks, &index);
}

static __always_inline struct demarc_mark *mark_of(__u64 cookie)
{
	struct demarc_mark *m = cookie ? mark_place(cookie) : 0;

	return m && m->cookie == cookie ? m : 0;
}

static __always_inline __u64 hash_of(const struct demarc_tuple *t)
{
	return mix(address_hash(t->saddr) ^ mix(address_hash(t->daddr) ^ ((__u64)t->sport << 16 | t->dport))) | 1;
}

/* Connections that follow each other have neighbouring ports, and places. */
static __always_inline struct demarc_hop *hop_place(const struct demarc_tuple *t)
{
	__u32 index = (address_hash(t->saddr) + t->sport) & (DEMARC_HOPS - 1);

	return bpf_map_lookup_elem(&hops, &index);
}

/* What is at a descriptor of a task: the inet socket, or 0. */
static __always_inline struct sock *socket_at(struct task_struct *task, __u32 fd)
{
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file **files = BPF_CORE_READ(table, fd), *file = 0;
	struct socket *socket;
	struct sock *sk;
	__u16 family;

	if (!table || fd >= BPF_CORE_READ(table, max_fds))
		return 0;
	if (bpf_probe_read_kernel(&file, sizeof(file), files + fd) || !file)
		return 0;
	if ((BPF_CORE_READ(file, f_inode, i_mode) & 0170000) != 0140000) /* S_IFSOCK */
		return 0;
	socket = BPF_CORE_READ(file, private_data);
	sk = BPF_CORE_READ(socket, sk);
	family = BPF_CORE_READ(sk, __sk_common.skc_family);
	return family == AF_INET || family == AF_INET6 ? sk : 0;
}

/* Looks at a process's descriptors for a connection that came in, and lets its
 * lineage go back to it. */
static __noinline int look(struct task_struct *task, struct demarc_lineage *l)
{
	struct demarc_mark *m;
	struct sock *sk;

	if (!task || !l)
		return 0;
	for (__u32 fd = 0; fd < FILES; fd++) {
		sk = socket_at(task, fd);
		m = sk ? mark_of(BPF_CORE_READ(sk, __sk_common.skc_cookie.counter)) : 0;
		if (!m || !m->inbound)
			continue;
		l->origin = m->origin;
		l->hops = m->hops + 1;
		return 1;
	}
	return 0;
}

/* The lineage of a workload's process, looked at again if it is time. */
static __always_inline struct demarc_lineage *lineage_of(struct task_struct *task, __u32 subject, __u64 now)
{
	struct demarc_lineage fresh = { .subject = subject }, *l;

	l = bpf_task_storage_get(&lineages, task, &fresh, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (l && !l->hops && now - l->looked > LOOK_AGAIN) {
		l->looked = now;
		look(task, l);
	}
	return l;
}

/* A program by its name: what one does often is no reason not to tell of another. */
static __always_inline __u64 program_hash(struct task_struct *task)
{
	__u64 name[2] = {};

	bpf_probe_read_kernel(name, sizeof(name), task->comm);
	return mix(mix(name[0]) ^ name[1]);
}

/* A connection is about to be opened by the current task. */
static __noinline int opening(struct outcome *o, __u64 cookie)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct demarc_lineage *l;
	struct demarc_seen *s;
	struct demarc_signal *e;
	struct demarc_mark *m;
	__u64 what;

	if (!o)
		return 0;
	s = seen_of(o->query.subject, DEMARC_EGRESS, o->query.now);
	what = address_hash(o->query.address) ^ ((__u64)PROTO_TCP << 16 | o->query.port);
	e = begin_signal(o, s, is_metadata(o->query.address) ? DEMARC_SIGNAL_METADATA : DEMARC_SIGNAL_CONTACT, 0,
			 what ^ program_hash(task));
	if (e) {
		name_task(e, task);
		bpf_ringbuf_submit(e, 0);
	}
	l = lineage_of(task, o->query.subject, o->query.now);
	m = mark_place(cookie);
	if (m) {
		m->cookie = cookie;
		m->pid = task->tgid;
		m->subject = o->query.subject;
		m->inbound = 0;
		m->origin = l ? l->origin : 0;
		m->hops = l ? l->hops : 0;
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
	struct demarc_seen *s;
	__u8 cause = DEMARC_CAUSE_ABANDONED;

	if (!o)
		return 0;
	if (error == 111) /* ECONNREFUSED */
		cause = DEMARC_CAUSE_REFUSED;
	else if (error == 110) /* ETIMEDOUT */
		cause = DEMARC_CAUSE_TIMEOUT;
	else if (error == 113 || error == 101) /* EHOSTUNREACH, ENETUNREACH */
		cause = DEMARC_CAUSE_UNREACHABLE;
	s = seen_of(o->query.subject, DEMARC_EGRESS, o->query.now);
	e = begin_signal(o, s, DEMARC_SIGNAL_FAILED, cause, address_hash(o->query.address) ^ ((__u64)PROTO_TCP << 16 | o->query.port));
	if (e) {
		e->pid = m ? m->pid : 0;
		bpf_ringbuf_submit(e, 0);
	}
	count_failure(o);
	return 0;
}

/* A connection came in. Whose it is says the verdict on its SYN. */
static __noinline int came_in(struct outcome *o, __u64 cookie)
{
	__u32 index = cookie & (DEMARC_YOUNG - 1);
	struct demarc_young *place = bpf_map_lookup_elem(&young, &index);
	struct demarc_mark *m = mark_place(cookie);
	struct demarc_tuple t;
	struct demarc_hop *hop;
	__u64 hash;

	if (!o || !m)
		return 0;
	__builtin_memset(&t, 0, sizeof(t));
	__builtin_memcpy(t.saddr, o->opener.daddr, 16);
	__builtin_memcpy(t.daddr, o->opener.saddr, 16);
	t.sport = o->opener.dport;
	t.dport = o->opener.sport;
	hash = hash_of(&t);
	hop = hop_place(&t);
	m->cookie = cookie;
	m->inbound = 1;
	m->subject = o->query.subject;
	m->origin = place && place->cookie == cookie ? place->kept.peer : 0;
	m->hops = hop && hop->tuple == hash ? hop->hops : 0;
	m->pid = 0;
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
	e = begin_signal(o, seen_of(o->query.subject, DEMARC_INGRESS, o->query.now), DEMARC_SIGNAL_LISTEN, 0, o->opener.dport);
	if (e) {
		name_task(e, bpf_get_current_task_btf());
		bpf_ringbuf_submit(e, 0);
	}
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(sock_state, struct sock *sk, int before, int after)
{
	struct outcome o;
	__u64 cookie;

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
	o.query.now = bpf_ktime_get_boot_ns();
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

/* A process goes back to what its parent goes back to. */
SEC("tp_btf/sched_process_fork")
int BPF_PROG(forked, struct task_struct *parent, struct task_struct *child)
{
	struct demarc_lineage *l, fresh;
	struct outcome o;

	if (child->pid != child->tgid || !about(&o, cgroup_of_task(parent)))
		return 0;
	l = lineage_of(parent, o.query.subject, o.query.now);
	if (!l)
		return 0;
	fresh = *l;
	fresh.looked = 0;
	bpf_task_storage_get(&lineages, child, &fresh, BPF_LOCAL_STORAGE_GET_F_CREATE);
	return 0;
}

/* A program is started: with a connection in the place of a terminal? In another
 * network than before? */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(executed, struct task_struct *task, int old, struct linux_binprm *bprm)
{
	struct demarc_lineage *l;
	struct demarc_signal *e;
	struct demarc_seen *s;
	struct sock *sk = 0;
	struct outcome o;
	__u32 netns;

	if (!about(&o, cgroup_of_task(task)))
		return 0;
	s = seen_of(o.query.subject, DEMARC_EGRESS, o.query.now);
	l = lineage_of(task, o.query.subject, o.query.now);
	if (l && !l->hops)
		look(task, l);
	for (__u32 fd = 0; fd < 3 && !sk; fd++)
		sk = socket_at(task, fd);
	if (sk) {
		ends(sk, &o.opener);
		o.opener.proto = BPF_CORE_READ(sk, sk_protocol);
		e = begin_signal(&o, s, DEMARC_SIGNAL_SHELL, 0, address_hash(o.opener.daddr) ^ task->tgid);
		if (e) {
			name_task(e, task);
			bpf_probe_read_kernel_str(e->exe, sizeof(e->exe), BPF_CORE_READ(bprm, filename));
			e->hops = l ? l->hops : 0;
			e->origin = l ? l->origin : 0;
			bpf_ringbuf_submit(e, 0);
		}
	}
	netns = BPF_CORE_READ(task, nsproxy, net_ns, ns.inum);
	if (l && l->netns && l->netns != netns) {
		__builtin_memset(&o.opener, 0, sizeof(o.opener));
		e = begin_signal(&o, s, DEMARC_SIGNAL_SETNS, 0, (__u64)netns << 32 | task->tgid);
		if (e) {
			name_task(e, task);
			bpf_probe_read_kernel_str(e->exe, sizeof(e->exe), BPF_CORE_READ(bprm, filename));
			bpf_ringbuf_submit(e, 0);
		}
	}
	if (l)
		l->netns = netns;
	return 0;
}
