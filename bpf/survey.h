/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* The round over all files of all processes, which the core makes every few seconds. */
#ifndef DEMARC_SURVEY_H
#define DEMARC_SURVEY_H

/* The first file of a process; 0 = the round is over. */
static __noinline int begin_survey(struct task_struct *task)
{
	struct demarc_strand *s = &survey.strand;
	struct demarc_family *f;
	struct demarc_lineage *l;
	__u64 *ended;
	__u32 zero = 0;
	struct outcome o;

	__builtin_memset(&survey.passing, 0, sizeof(survey.passing));
	__builtin_memset(&survey.others, 0, sizeof(survey.others));
	survey.ours = false;
	s->pid = 0;
	if (!task) {
		survey.round = 0;
		ended = bpf_map_lookup_elem(&surveyed_at, &zero);
		if (ended)
			*ended = recently();
		return 0;
	}
	if (!survey.round)
		survey.round = recently() >> 20 | 1;
	s->pid = task->tgid;
	survey.ours = about(&o, cgroup_of_task(task));
	if (!survey.ours)
		return 0;
	survey.cgroup = o.cgroup;
	survey.subject = o.query.subject;
	s->uid = BPF_CORE_READ(task, cred, uid.val);
	s->start = BPF_CORE_READ(task, group_leader, start_boottime);
	bpf_probe_read_kernel(s->comm, sizeof(s->comm), task->comm);
	l = lineage_of(task, &o);
	if (!l)
		return 0;
	tell_netns(&o, task, l, netns_of(task));
	if (!l->netns && o.query.now - s->start > SETTLED)
		l->netns = netns_of(task);
	f = elder_of(task, false);
	if (f)
		fold(&survey.others, &f->passing);
	f = family_of(task, false);
	if (f)
		fold(&survey.others, &f->passing);
	survey_ended(l);
	return 0;
}

/* A process holds a packet socket: it reads, or makes, frames that no hook at sockets
 * sees. */
static __noinline int tell_packet_socket(struct task_struct *task)
{
	struct demarc_signal *e;
	struct outcome o;

	if (!task || !about(&o, survey.cgroup))
		return 0;
	e = begin_signal(&o, told_of(o.query.subject, DEMARC_EGRESS, o.query.now), DEMARC_SIGNAL_RAW, 0, task->tgid);
	if (!e)
		return 0;
	name_task(e, task);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

static __noinline int survey_file(struct task_struct *task, struct file *file)
{
	struct socket *socket;
	struct sock *sk;
	struct outcome o;
	__u16 mode = BPF_CORE_READ(file, f_inode, i_mode) & 0170000;

	if (mode == 0020000 && BPF_CORE_READ(file, f_inode, i_rdev) == TUN_DEVICE && about(&o, survey.cgroup)) /* S_IFCHR */
		return tell_tun(&o, task);
	if (mode != 0140000) /* S_IFSOCK */
		return 0;
	socket = bpf_sock_from_file(file);
	sk = socket ? socket->sk : 0;
	if (sk && sk->__sk_common.skc_family == AF_PACKET)
		return survey.ours ? tell_packet_socket(task) : 0;
	if (sk && sk->sk_protocol == PROTO_TCP)
		survey_connection(task, sk);
	return 0;
}

#endif
