/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The policy tables of one generation, as the verdict function reads them. The
 * native build of verdict.h brings its own implementation of these functions.
 */
#ifndef DEMARC_TABLES_H
#define DEMARC_TABLES_H

#include "maps.h"

static __always_inline struct demarc_subject *table_subject(__u32 slot, __u32 identity)
{
	void *inner = bpf_map_lookup_elem(&subjects, &slot);

	return inner ? bpf_map_lookup_elem(inner, &identity) : 0;
}

static __always_inline struct demarc_rule *table_rule(__u32 slot, struct demarc_rule_key *key)
{
	void *inner = bpf_map_lookup_elem(&rules, &slot);

	return inner ? bpf_map_lookup_elem(inner, key) : 0;
}

static __always_inline struct demarc_crossing *table_crossing(__u32 slot, __u32 index)
{
	void *inner = bpf_map_lookup_elem(&crossings, &slot);

	return inner ? bpf_map_lookup_elem(inner, &index) : 0;
}

/* Until when a subject is quarantined; 0 = it is not. */
static __always_inline __u64 table_quarantine(__u32 subject)
{
	__u32 zero = 0;
	struct demarc_state *s = bpf_map_lookup_elem(&state, &zero);
	__u64 *until;

	if (!s || !s->quarantines)
		return 0;
	until = bpf_map_lookup_elem(&quarantines, &subject);
	return until ? *until : 0;
}

static __always_inline bool is_ipv4(const __u8 *address)
{
	const __u32 *word = (const __u32 *)address;

	return !word[0] && !word[1] && word[2] == bpf_htonl(0xffff);
}

/* Class of the networks that contain the address; 0 = none. */
static __always_inline __u32 table_address(__u32 slot, const __u8 *address)
{
	void *inner = bpf_map_lookup_elem(&prefixes, &slot);
	struct demarc_prefix_key key = { .length = DEMARC_PREFIX_BITS };
	__u32 *class;

	if (!inner)
		return 0;
	key.family = is_ipv4(address) ? 4 : 6;
	__builtin_memcpy(key.address, address, 16);
	class = bpf_map_lookup_elem(inner, &key);
	return class ? *class : 0;
}

/* Class of a port. Without a table everything is class 0, which no rule of a
 * loaded generation uses alone: the rules map of that slot is missing too. */
static __always_inline __u16 table_port(__u32 slot, __u32 row, __u16 port)
{
	void *inner = bpf_map_lookup_elem(&ports, &slot);
	struct demarc_port_classes *classes;
	__u32 index = port;

	if (!inner)
		return 0;
	classes = bpf_map_lookup_elem(inner, &row);
	barrier_var(index); /* not every verifier follows a port out of the words that it was copied by */
	return classes ? classes->class[index & 0xffff] : 0;
}

#endif
