// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * Keeps what enforces from everybody but demarc-core, where the kernel loads BPF LSM
 * programs: other agents, clean-up scripts, containers with CAP_BPF, a hand that
 * slipped. An object of its own, for many kernels refuse it.
 *
 * It decides about no packet, and does not keep out root who means it: whoever names a
 * program of root's as the core's is taken for the core, since an upgrade must be able
 * to take over.
 */
#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/errno.h>
#include <linux/in6.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>

#include "include/kernel.h"

#define PTRACE_ATTACH 2 /* PTRACE_MODE_ATTACH */
#define MAY_WRITE 2	/* FMODE_WRITE */
#define WRITABLE_BY_OTHERS 022

/* Ids of our maps and of our links. Writer: core. Miss: somebody else's. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u8);
} guarded_maps SEC(".maps"), guarded_links SEC(".maps");

/* The directory of pins: its device as the kernel writes it, and its inode number. */
struct directory {
	__u64 inode;
	__u64 device;
};

/* Writer: core, before anything is attached. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct directory);
} pins SEC(".maps");

/* Whether guard_pins was ever asked: kernels load these programs and never ask them where
 * bpf is not among the security modules. */
bool asked;

/* What the core's program file is called, with zeros at its end. */
const volatile char core_name[16];

char LICENSE[] SEC("license") = "GPL";

/* A program file of root's that has the core's name. */
static __always_inline bool is_core(struct task_struct *task)
{
	struct file *exe = BPF_CORE_READ(task, mm, exe_file);
	char name[sizeof(core_name)] = {};

	if (!exe || BPF_CORE_READ(exe, f_inode, i_uid.val) || BPF_CORE_READ(exe, f_inode, i_mode) & WRITABLE_BY_OTHERS)
		return false;
	bpf_probe_read_kernel_str(name, sizeof(name), BPF_CORE_READ(exe, f_path.dentry, d_name.name));
	for (int i = 0; i < sizeof(name); i++)
		if (name[i] != core_name[i])
			return false;
	return true;
}

static __always_inline int core_only(void)
{
	return is_core((struct task_struct *)bpf_get_current_task()) ? 0 : -EPERM;
}

static __always_inline bool holds_pins(struct inode *inode)
{
	__u32 zero = 0;
	struct directory *d = bpf_map_lookup_elem(&pins, &zero);

	return d && inode && BPF_CORE_READ(inode, i_ino) == d->inode && BPF_CORE_READ(inode, i_sb, s_dev) == d->device;
}

/* A link can be detached and changed by whoever has it open. */
SEC("lsm/bpf")
int BPF_PROG(guard_links, int cmd, union bpf_attr *attr)
{
	__u32 id;

	if (cmd != BPF_LINK_GET_FD_BY_ID)
		return 0;
	id = attr->link_id;
	return bpf_map_lookup_elem(&guarded_links, &id) ? core_only() : 0;
}

SEC("lsm/bpf_map")
int BPF_PROG(guard_maps, struct bpf_map *map, unsigned int mode)
{
	__u32 id = map->id;

	if (!(mode & MAY_WRITE))
		return 0;
	return bpf_map_lookup_elem(&guarded_maps, &id) ? core_only() : 0;
}

/* Who may not enter the directory can open, remove and replace nothing in it. */
SEC("lsm/inode_permission")
int BPF_PROG(guard_pins, struct inode *inode)
{
	if (!asked)
		asked = true;
	return holds_pins(inode) ? core_only() : 0;
}

SEC("lsm/inode_rename")
int BPF_PROG(guard_place, struct inode *from, struct dentry *what)
{
	return holds_pins(what->d_inode) ? core_only() : 0;
}

SEC("lsm/sb_umount")
int BPF_PROG(guard_mount, struct vfsmount *mount)
{
	__u32 zero = 0;
	struct directory *d = bpf_map_lookup_elem(&pins, &zero);

	if (!d || mount->mnt_sb->s_dev != d->device)
		return 0;
	return core_only();
}

/* Tag keys pass through the core's memory, and its descriptors write the tables. */
SEC("lsm/ptrace_access_check")
int BPF_PROG(guard_memory, struct task_struct *child, unsigned int mode)
{
	if (!(mode & PTRACE_ATTACH) || !is_core(child))
		return 0;
	return core_only();
}
