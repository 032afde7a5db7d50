/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* Who it is that is observed: tasks, their sockets, and what connections they go back to. */
#ifndef DEMARC_OBSERVE_H
#define DEMARC_OBSERVE_H

#define FILES 64 /* descriptors of a process that are looked at */
#define LOOK_AGAIN 10000000ULL /* ns; a look takes microseconds */

/* Kernel: include/net/tcp_states.h */
enum {
	ESTABLISHED = 1,
	SYN_SENT = 2,
	SYN_RECV = 3,
	FIN_WAIT1 = 4,
	CLOSE = 7,
	CLOSE_WAIT = 8,
	LAST_ACK = 9,
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
	o->query.now = recently();
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

/* The same, the other end first. */
static __always_inline void ends_turned(struct sock *sk, struct demarc_tuple *t)
{
	struct demarc_tuple own = {};

	ends(sk, &own);
	__builtin_memcpy(t->saddr, own.daddr, 16);
	__builtin_memcpy(t->daddr, own.saddr, 16);
	t->sport = own.dport;
	t->dport = own.sport;
	t->proto = own.proto;
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

/* Where a task's open files are, as of /proc/PID/fd. */
static __always_inline __u64 files_of(struct task_struct *task) { return (__u64)BPF_CORE_READ(task, files, fdt); }

/* What is at a descriptor: the address of the inet socket, or 0. A function of its own, so
 * that the verifier looks at it once and not for each descriptor: it takes an address,
 * which such a function may, and reads what is there as what may be gone. */
GLOBAL __u64 socket_at(__u64 files, __u32 fd)
{
	struct fdtable *table = (struct fdtable *)files;
	struct file **all = BPF_CORE_READ(table, fd), *file = 0;
	struct socket *socket;
	struct sock *sk;
	__u16 family;

	if (!table || fd >= BPF_CORE_READ(table, max_fds))
		return 0;
	if (bpf_probe_read_kernel(&file, sizeof(file), all + fd) || !file)
		return 0;
	if ((BPF_CORE_READ(file, f_inode, i_mode) & 0170000) != 0140000) /* S_IFSOCK */
		return 0;
	socket = BPF_CORE_READ(file, private_data);
	sk = BPF_CORE_READ(socket, sk);
	family = BPF_CORE_READ(sk, __sk_common.skc_family);
	return family == AF_INET || family == AF_INET6 ? (__u64)sk : 0;
}

/* What a descriptor's connection goes back to, if it came in: who opened it, in the upper
 * half, and over how many connections; 0 = it did not. */
GLOBAL __u64 came_by(__u64 files, __u32 fd)
{
	struct sock *sk = (struct sock *)socket_at(files, fd);
	struct demarc_mark *m = sk ? mark_of(BPF_CORE_READ(sk, __sk_common.skc_cookie.counter)) : 0;

	return m && m->inbound ? (__u64)m->origin << 32 | (__u8)(m->hops + 1) : 0;
}

/* Looks at a process's descriptors for a connection that came in, and lets its
 * lineage go back to it. */
static __noinline int look(struct task_struct *task, struct demarc_lineage *l)
{
	__u64 files, found;

	if (!task || !l)
		return 0;
	files = files_of(task);
	for (__u32 fd = 0; fd < FILES; fd++) {
		found = came_by(files, fd);
		if (!found)
			continue;
		l->origin = found >> 32;
		l->hops = found;
		return 1;
	}
	return 0;
}

/* What is known of a process is kept with its first thread. */
static __always_inline struct demarc_lineage *known_lineage(struct task_struct *task)
{
	struct task_struct *leader = task->group_leader;

	return leader ? bpf_task_storage_get(&lineages, leader, 0, 0) : 0;
}

/* The lineage of a workload's process, looked at again if it is time. */
static __always_inline struct demarc_lineage *lineage_of(struct task_struct *task, const struct outcome *o)
{
	struct task_struct *leader = task->group_leader;
	struct demarc_lineage *l;

	l = leader ? bpf_task_storage_get(&lineages, leader, 0, BPF_LOCAL_STORAGE_GET_F_CREATE) : 0;
	if (l && !l->cgroup) { /* it is new */
		l->subject = o->query.subject;
		l->cgroup = o->cgroup;
	}
	if (l && !l->hops && o->query.now - l->looked > LOOK_AGAIN) {
		l->looked = o->query.now;
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

static __always_inline __u32 netns_of(struct task_struct *task)
{
	struct nsproxy *all = task->nsproxy;
	struct net *net = all ? all->net_ns : 0;

	return net ? net->ns.inum : 0;
}

#endif
