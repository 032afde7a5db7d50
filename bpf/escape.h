/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* Who leaves the place that it was given: into another network namespace, into another
 * workload's cgroup, through a network device of its own. */
#ifndef DEMARC_ESCAPE_H
#define DEMARC_ESCAPE_H

#define TUN_DEVICE (10 << 20 | 200) /* dev_t of /dev/net/tun, as the kernel has it */
#define SETTLED (5ULL * 1000000000ULL) /* ns; what starts a container is done with its namespaces by then */

/* A process of a workload is in another network namespace than it was. What starts
 * containers moves, too, before it runs the workload's program: so it counts from then
 * on (`executed`), and for processes that are older than the observers once they have
 * settled. */
static __noinline int tell_netns(const struct outcome *from, struct task_struct *task, struct demarc_lineage *l, __u32 netns)
{
	struct outcome here, *o = &here;
	struct demarc_signal *e;

	if (!from || !task || !l || !netns || !l->netns || l->netns == netns)
		return 0;
	l->netns = netns;
	here = *from;
	__builtin_memset(&o->opener, 0, sizeof(o->opener));
	e = begin_signal(o, told_of(o->query.subject, DEMARC_EGRESS, o->query.now), DEMARC_SIGNAL_SETNS, 0, (__u64)netns << 32 | task->tgid);
	if (!e)
		return 0;
	name_task(e, task);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* A process came into a cgroup. It is told if the one that it left was a workload's, and
 * this is another's. Where it was before is known of its lineage alone: the kernel tells
 * afterwards. `by` is who moved it. */
static __noinline int tell_move(struct task_struct *task, struct demarc_lineage *l, __u64 to, struct task_struct *by)
{
	struct demarc_signal *e;
	struct outcome o, there;
	__u64 from;

	if (!task || !l || !by || l->cgroup == to)
		return 0;
	from = l->cgroup;
	l->cgroup = to;
	if (!about(&o, from))
		return 0;
	o.query.peer = identity_of(o.query.slot, to);
	if (o.query.peer == o.query.subject || o.query.peer == DEMARC_ID_PENDING)
		return 0;
	e = begin_signal(&o, told_of(o.query.subject, DEMARC_EGRESS, o.query.now), DEMARC_SIGNAL_MIGRATE,
			 by->tgid == task->tgid || about(&there, cgroup_of_task(by)) ? 0 : DEMARC_CAUSE_MANAGER, (__u64)o.query.peer << 32 | task->tgid);
	if (!e)
		return 0;
	name_task(e, task);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

static __noinline int tell_tun(struct outcome *o, struct task_struct *task)
{
	struct demarc_signal *e;

	if (!o || !task)
		return 0;
	e = begin_signal(o, told_of(o->query.subject, DEMARC_EGRESS, o->query.now), DEMARC_SIGNAL_TUN, 0, task->tgid);
	if (!e)
		return 0;
	name_task(e, task);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

#endif
