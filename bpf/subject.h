/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* From a cgroup to the identity that acts. */
#ifndef DEMARC_SUBJECT_H
#define DEMARC_SUBJECT_H

const volatile __u64 managed_root;	  /* cgroup id of the managed root */
const volatile __u32 root_path_length; /* bytes of its path below the hierarchy's root; 0 for that root itself */

/* Read once for each verdict, so that one verdict sees one generation. A change
 * that nobody confirmed ends here, whoever else is dead by then. The deadline is
 * read first: the core writes it last. */
static __always_inline __u64 active_word(void)
{
	__u32 zero = 0;
	struct demarc_state *s = bpf_map_lookup_elem(&state, &zero);
	__u64 deadline;

	if (!s)
		return 0;
	deadline = *(volatile __u64 *)&s->deadline;
	if (deadline && bpf_ktime_get_boot_ns() >= deadline)
		return *(volatile __u64 *)&s->fallback;
	return *(volatile __u64 *)&s->active;
}

/* The time, late by a jiffy at most. Reading the clock waits for all that the processor
 * has begun, which costs a handshake as much as a look for a rule; so what needs no
 * better time shares one reading. Two writers that meet leave what does not match. */
static __always_inline __u64 recently(void)
{
	__u64 tick = bpf_jiffies64(), now, check;
	__u32 zero = 0;
	struct demarc_clock *c = bpf_map_lookup_elem(&clock, &zero);

	if (!c)
		return bpf_ktime_get_boot_ns();
	now = *(volatile __u64 *)&c->now;
	check = *(volatile __u64 *)&c->check;
	if ((now ^ check) == tick)
		return now;
	now = bpf_ktime_get_boot_ns();
	*(volatile __u64 *)&c->now = now;
	*(volatile __u64 *)&c->check = now ^ tick;
	return now;
}

static __always_inline struct demarc_binding *binding_of(__u64 cgroup)
{
	struct demarc_binding *binding = bpf_map_lookup_elem(&bindings, &cgroup);

	return binding ? binding : bpf_map_lookup_elem(&graveyard, &cgroup);
}

static __always_inline __u32 identity_of(__u32 slot, __u64 cgroup)
{
	struct demarc_binding *binding = binding_of(cgroup);

	return binding ? binding->identity[slot & (DEMARC_SLOTS - 1)] : DEMARC_ID_NONE;
}

/* Processes of no workload that the policy lets do as they please among
 * themselves: only bad proofs are looked for. */
static __always_inline bool carefree(__u32 slot, __u32 identity)
{
	struct demarc_subject *subject;

	if (identity != DEMARC_ID_UNMANAGED)
		return false;
	subject = table_subject(slot, identity);
	return subject && (subject->flags & DEMARC_SUBJECT_OUTBOUND) && (subject->flags & DEMARC_SUBJECT_INBOUND);
}

static __always_inline __u64 cgroup_of_tcp(struct tcp_sock *tcp)
{
	struct cgroup *cgroup = tcp->inet_conn.icsk_inet.sk.sk_cgrp_data.cgroup;
	struct kernfs_node *node = cgroup ? cgroup->kn : 0;
	__u64 id;

	if (!node)
		return 0;
	id = node->id;
	barrier_var(id); /* the verifier refuses this load if it is merged with one of a map's value */
	return id;
}

#endif
