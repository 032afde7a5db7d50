/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* A cgroup has its identity before its directory can be seen: the tracepoint runs
 * inside mkdir(2), before any task can enter. */
#ifndef DEMARC_CGROUP_H
#define DEMARC_CGROUP_H

static __always_inline struct demarc_path_key *scratch_key(void)
{
	__u32 zero = 0;
	struct demarc_scratch *s = bpf_map_lookup_elem(&scratch, &zero);

	return s ? &s->key : 0;
}

/* Path below the managed root, with a slash at its end, so that `/lab/web` is no
 * prefix of `/lab/website`. Longer paths are cut: no selector is as long. */
static __always_inline __u32 identity_by_path(__u32 slot, const char *path)
{
	struct demarc_path_key *key = scratch_key();
	void *inner = bpf_map_lookup_elem(&paths, &slot);
	__u32 *identity;
	long n;

	if (!key || !inner)
		return DEMARC_ID_NONE;
	n = bpf_probe_read_kernel_str(key->path, sizeof(key->path), path + root_path_length);
	if (n <= 1 || n > DEMARC_PATH_MAX)
		return DEMARC_ID_NONE;
	if (n < DEMARC_PATH_MAX) {
		key->path[(n - 1) & 0xff] = '/';
		n++;
	}
	key->length = (n - 1) * 8;
	identity = bpf_map_lookup_elem(inner, key);
	return identity ? *identity : DEMARC_ID_NONE;
}

/* Whether a name of so many bytes ends as one that matches. A function of its own, so that
 * the verifier looks at its loop once. */
GLOBAL int ends_with(const struct demarc_path_key *key, __u32 length, const struct demarc_unit_match *m)
{
	if (!key || !m || m->length > length || m->least > length || m->length > DEMARC_UNIT_SUFFIX)
		return false;
	for (int i = 0; i < DEMARC_UNIT_SUFFIX; i++) {
		__u32 at = length - m->length + i;

		if (i >= m->length)
			break;
		at &= 0xff;
		barrier_var(at); /* keeps the bound next to its use */
		if (at >= DEMARC_PATH_MAX || key->path[at] != m->suffix[i])
			return false;
	}
	return true;
}

/* A systemd unit, by its name alone: its parents are slices, which only the
 * system manager makes. */
static __always_inline __u32 identity_by_unit(__u32 slot, const char *name)
{
	struct demarc_path_key *key = scratch_key();
	void *inner = bpf_map_lookup_elem(&units, &slot);
	struct demarc_unit *unit;
	long n;

	if (!key || !inner)
		return DEMARC_ID_NONE;
	n = bpf_probe_read_kernel_str(key->path, sizeof(key->path), name);
	if (n <= 1 || n > DEMARC_PATH_MAX)
		return DEMARC_ID_NONE;
	key->length = n * 8;
	unit = bpf_map_lookup_elem(inner, key);
	if (!unit)
		return DEMARC_ID_NONE;
	for (int i = 0; i < DEMARC_UNIT_ALTERNATIVES; i++) {
		if (!unit->match[i].identity)
			return DEMARC_ID_NONE;
		if (ends_with(key, n - 1, &unit->match[i]))
			return unit->match[i].identity;
	}
	return DEMARC_ID_NONE;
}

static __always_inline bool is_slice(const char *name)
{
	struct demarc_unit_match slice = { .length = 6, .suffix = ".slice" };
	struct demarc_path_key *key = scratch_key();
	long n;

	if (!key)
		return false;
	n = bpf_probe_read_kernel_str(key->path, sizeof(key->path), name);
	return n > 1 && n < DEMARC_PATH_MAX && ends_with(key, n - 1, &slice);
}

static __always_inline int cgroup_born(struct cgroup *cgroup, const char *path)
{
	__u64 id = BPF_CORE_READ(cgroup, kn, id);
	__u64 above = BPF_CORE_READ(cgroup, self.parent, cgroup, kn, id);
	const char *name = BPF_CORE_READ(cgroup, kn, name);
	struct demarc_binding fresh = {}, *parent;
	struct demarc_state *s;
	__u32 zero = 0, active;

	if (BPF_CORE_READ(cgroup, root, hierarchy_id) != 0) /* cgroup v1 */
		return 0;
	parent = bpf_map_lookup_elem(&bindings, &above);
	s = bpf_map_lookup_elem(&state, &zero);
	if (!parent || !s) /* not below the managed root */
		return 0;
	active = DEMARC_ACTIVE_SLOT(s->active);
	for (__u32 slot = 0; slot < DEMARC_SLOTS; slot++) {
		__u32 identity;

		if (slot != active && !(s->filling & (1ULL << slot)))
			continue;
		identity = identity_by_path(slot, path);
		if (!identity && (parent->flags & DEMARC_BINDING_SLICES))
			identity = identity_by_unit(slot, name);
		fresh.identity[slot] = identity ? identity : parent->identity[slot];
	}
	if ((parent->flags & DEMARC_BINDING_SLICES) && is_slice(name))
		fresh.flags = DEMARC_BINDING_SLICES;
	fresh.since = bpf_ktime_get_boot_ns();
	if (bpf_map_update_elem(&bindings, &id, &fresh, BPF_ANY))
		fault(DEMARC_FAULT_BIND_FULL); /* unbound: it may do nothing */
	return 0;
}

static __always_inline int cgroup_gone(struct cgroup *cgroup)
{
	__u64 id = BPF_CORE_READ(cgroup, kn, id);
	struct demarc_binding *binding, kept;

	if (BPF_CORE_READ(cgroup, root, hierarchy_id) != 0)
		return 0;
	binding = bpf_map_lookup_elem(&bindings, &id);
	if (!binding)
		return 0;
	kept = *binding;
	bpf_map_update_elem(&graveyard, &id, &kept, BPF_ANY);
	bpf_map_delete_elem(&bindings, &id);
	return 0;
}

#endif
