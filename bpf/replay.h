/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The memory of tags that were admitted: a tag opens one connection. It is bounded
 * and needs no sweeping: an entry that is older than a tag can be gives way. Only
 * tags that verified and were admitted get in, so junk cannot fill it; where it is
 * full of what may still be replayed, the answer is to deny.
 */
#ifndef DEMARC_REPLAY_H
#define DEMARC_REPLAY_H

#define REPLAY_STAMP 0xffffffULL /* bits of an entry that say when; those of the MAC are above */
#define REPLAY_TRIES 4

/* The entry that a tag admitted now gets. Never 0. */
static __always_inline __u64 replay_entry(__u64 mac, __u64 now)
{
	__u64 stamp = (now >> DEMARC_REPLAY_STEP_SHIFT) & REPLAY_STAMP;

	return (mac & ~REPLAY_STAMP) | (stamp ? stamp : 1);
}

static __always_inline bool replay_live(__u64 entry, __u64 fresh)
{
	return entry && ((fresh - entry) & REPLAY_STAMP) <= DEMARC_REPLAY_STEPS;
}

static __always_inline struct demarc_replay_bucket *replay_bucket(__u64 mac, bool second)
{
	__u32 index = (second ? mac >> 18 : mac) & (DEMARC_REPLAY_BUCKETS - 1);

	return bpf_map_lookup_elem(&replays, &index);
}

/* Looks through a bucket. Returns true if the tag is there; says where there is
 * room, and how many entries are. */
static __always_inline bool replay_found(struct demarc_replay_bucket *bucket, __u64 fresh, __u32 *room, __u32 *live)
{
	*live = 0;
#pragma unroll
	for (__u32 i = 0; i < DEMARC_REPLAY_ENTRIES; i++) {
		__u64 entry = *(volatile __u64 *)&bucket->entry[i];

		if (!replay_live(entry, fresh)) {
			*room = i;
			continue;
		}
		if (!((entry ^ fresh) & ~REPLAY_STAMP))
			return true;
		*live += 1;
	}
	return false;
}

/* Takes a place that looked free. Returns true if nobody was faster. */
static __always_inline bool replay_take(struct demarc_replay_bucket *bucket, __u32 room, __u64 fresh)
{
	__u64 *place = &bucket->entry[room & (DEMARC_REPLAY_ENTRIES - 1)], old = *(volatile __u64 *)place;

	return !replay_live(old, fresh) && __sync_val_compare_and_swap(place, old, fresh) == old;
}

/* Uses a tag up. Returns 0, or why it cannot be: it was before, or nothing could
 * remember that it was. */
GLOBAL int spend(__u64 mac, __u64 now)
{
	struct demarc_replay_bucket *first = replay_bucket(mac, false), *second = replay_bucket(mac, true);
	__u64 fresh = replay_entry(mac, now);

	if (!first || !second)
		return DEMARC_MAP_FULL;
	for (int i = 0; i < REPLAY_TRIES; i++) {
		__u32 room = 0, room2 = 0, live, live2;

		if (replay_found(first, fresh, &room, &live) || replay_found(second, fresh, &room2, &live2))
			return DEMARC_TAG_REPLAYED;
		if (live == DEMARC_REPLAY_ENTRIES && live2 == DEMARC_REPLAY_ENTRIES)
			break;
		if (live <= live2 ? replay_take(first, room, fresh) : replay_take(second, room2, fresh))
			return 0;
	}
	fault(DEMARC_FAULT_REPLAY_FULL);
	return DEMARC_MAP_FULL;
}

/* Forgets a tag that was used up in vain. */
GLOBAL int unspend(__u64 mac)
{
	for (int second = 0; second < 2; second++) {
		struct demarc_replay_bucket *bucket = replay_bucket(mac, second);

		if (!bucket)
			return 0;
		for (int i = 0; i < DEMARC_REPLAY_ENTRIES; i++) {
			if (!((bucket->entry[i] ^ mac) & ~REPLAY_STAMP))
				bucket->entry[i] = 0;
		}
	}
	return 0;
}

#endif
