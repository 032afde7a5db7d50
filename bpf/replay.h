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

/* What a bucket holds, in one number, and verified once: whoever tracks each entry
 * in the callers as well has half a million states to go through. */
#define REPLAY_FOUND 0x80000000U
#define REPLAY_NONE 0x40000000U /* no such bucket */
#define REPLAY_LIVE(look) (((look) >> 8) & 0xff)
#define REPLAY_ROOM(look) ((look) & (DEMARC_REPLAY_ENTRIES - 1)) /* of any, if it is not full */

GLOBAL int replay_look(__u32 index, __u64 fresh)
{
	struct demarc_replay_bucket *bucket = bpf_map_lookup_elem(&replays, &index);
	__u32 live = 0, room = 0;

	if (!bucket)
		return REPLAY_NONE;
#pragma unroll
	for (__u32 i = 0; i < DEMARC_REPLAY_ENTRIES; i++) {
		__u64 entry = *(volatile __u64 *)&bucket->entry[i];

		if (!replay_live(entry, fresh)) {
			room = i;
			continue;
		}
		if (!((entry ^ fresh) & ~REPLAY_STAMP))
			return REPLAY_FOUND;
		live++;
	}
	return live << 8 | room;
}

/* Takes a place that looked free. Returns true if nobody was faster. */
static __always_inline bool replay_take(__u32 index, __u32 room, __u64 fresh)
{
	struct demarc_replay_bucket *bucket = bpf_map_lookup_elem(&replays, &index);
	__u64 *place, old;

	if (!bucket)
		return false;
	place = &bucket->entry[room & (DEMARC_REPLAY_ENTRIES - 1)];
	old = *(volatile __u64 *)place;
	return !replay_live(old, fresh) && __sync_val_compare_and_swap(place, old, fresh) == old;
}

/* Uses a tag up. Returns 0, or why it cannot be: it was before, or nothing could
 * remember that it was. */
GLOBAL int spend(__u64 mac, __u64 now)
{
	__u32 first = replay_index(mac, false), second = replay_index(mac, true);
	__u64 fresh = replay_entry(mac, now);

	for (int i = 0; i < REPLAY_TRIES; i++) {
		__u32 look = replay_look(first, fresh), look2 = replay_look(second, fresh);

		if ((look | look2) & REPLAY_FOUND)
			return DEMARC_TAG_REPLAYED;
		if ((look | look2) & REPLAY_NONE || REPLAY_LIVE(look) + REPLAY_LIVE(look2) == 2 * DEMARC_REPLAY_ENTRIES)
			break;
		if (REPLAY_LIVE(look) <= REPLAY_LIVE(look2) ? replay_take(first, REPLAY_ROOM(look), fresh) :
							      replay_take(second, REPLAY_ROOM(look2), fresh))
			return 0;
	}
	fault(DEMARC_FAULT_REPLAY_FULL);
	return DEMARC_MAP_FULL;
}

/* Forgets a tag that was used up in vain. */
GLOBAL int unspend(__u64 mac)
{
	for (int second = 0; second < 2; second++) {
		__u32 index = replay_index(mac, second);
		struct demarc_replay_bucket *bucket = bpf_map_lookup_elem(&replays, &index);

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
