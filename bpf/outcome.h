/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* What is known of one verdict. */
#ifndef DEMARC_OUTCOME_H
#define DEMARC_OUTCOME_H

/* Everything known about one verdict. `opener` is the tuple with the side first
 * that opened the flow. */
struct outcome {
	struct demarc_query query;
	struct demarc_tuple opener;
	__u64 active; /* word the verdict was given under */
	__u64 cgroup;
	__u8 hook;
	__u8 omitted; /* what the peer's tag leaves out */
	bool task; /* the current task is the one that acts */
	bool reported;
	__u8 asked; /* enum asked */
};

/* What was decided that the generation in shadow is to be asked about. */
enum asked {
	ASKED_NOTHING = 0,
	ASKED_DENIED = 1,
	ASKED_PASSES = 2,
};

static __always_inline __u32 crossing_number(__u32 slot, __u32 index, __u8 *log)
{
	struct demarc_crossing *crossing;

	if (index == DEMARC_NO_CROSSING_INDEX)
		return 0;
	crossing = table_crossing(slot, index);
	if (!crossing)
		return 0;
	*log = crossing->log;
	return crossing->number;
}

#endif
