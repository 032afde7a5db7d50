/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Handshakes whose SYN was admitted. A tuple has one place in front, in a part so small
 * that the processor keeps it, and a bucket behind, with any place in it. In front nobody
 * gives way before no handshake lasts that long; who finds his place taken goes behind. There
 * the oldest of a full bucket gives way: as a bucket's tuples cannot be guessed, that takes
 * as many admitted SYNs as there are places in all, give or take.
 *
 *   free (mark 0) -- SYN admitted, CAS --> being written (PENDING_GIVEN) -- published --> mark
 *   mark -- accepted() --> free;  mark -- the tuple's next SYN, or a newcomer --> being written
 *
 * Invariant: what a reader believes of a place was written for its tuple, and whole: it
 * compares mark and tuple before, and the mark after. Who writes has changed the mark
 * from what it decided by to PENDING_GIVEN in one step, so no two write, and who was late
 * looks again. Look-ups go to the front first, as a tuple that has entries at both has its newer
 * one there: an older one behind is of a SYN that was admitted, too, and its number matches
 * nothing any more. An accepted connection has its verdict before its entry ends, so that a
 * packet that another processor takes in meanwhile finds one of the two.
 *
 * An acknowledgement that comes to a listener after its connection is gone has neither,
 * and is refused as DEMARC_NO_STATE: a segment that was sent again while the host stood
 * still is one. Nothing is lost by it, as nobody waits for it.
 */
#ifndef DEMARC_PENDING_H
#define DEMARC_PENDING_H

#define PENDING_GIVEN 1 /* mark of a place that is being given away; marks of tuples are even */
#define PENDING_TRIES 4
#define PENDING_OLD (1 << 18) /* jiffies, 260 s at least: no handshake lasts as long */

static __always_inline bool same_tuple(const struct demarc_tuple *a, const struct demarc_tuple *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3] && x[4] == y[4];
}

/* A number that stays the same for as long as the maps do, and that nobody knows. */
static __always_inline __u64 seed_of_pending(void)
{
	__u32 zero = 0;
	__u64 *seed = bpf_map_lookup_elem(&pending_seed, &zero), fresh;

	if (!seed)
		return 0;
	if (!*(volatile __u64 *)seed) {
		fresh = (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32() | 1;
		__sync_val_compare_and_swap(seed, 0, fresh);
	}
	return *(volatile __u64 *)seed;
}

/* Never 0, nor PENDING_GIVEN. */
static __noinline __u64 pending_mark(const struct demarc_tuple *opener)
{
	const __u64 *word = (const __u64 *)opener;
	__u64 seed = seed_of_pending(), mark = seed;

#pragma unroll
	for (int i = 0; i < sizeof(*opener) / 8; i++) {
		mark = (mark ^ word[i]) * seed;
		mark ^= mark >> 29;
	}
	return mark & ~1ULL ? mark & ~1ULL : 2;
}

static __always_inline struct demarc_pending_bucket *pending_bucket(__u64 mark)
{
	__u32 index = (mark >> 32) & (DEMARC_PENDING_BUCKETS - 1);

	return bpf_map_lookup_elem(&pending_syns, &index);
}

static __always_inline bool pending_is(const struct demarc_pending_syn *syn, __u64 mark)
{
	return *(volatile __u64 *)&syn->mark == mark;
}

/* The one place that a tuple has in front. */
static __always_inline struct demarc_pending_syn *pending_front(__u64 mark)
{
	__u32 index = DEMARC_PENDING_BUCKETS + ((mark >> 48) & (DEMARC_PENDING_FRONT - 1));
	struct demarc_pending_bucket *bucket = bpf_map_lookup_elem(&pending_syns, &index);

	if (!bucket)
		return 0;
	barrier_var(mark); /* keeps the place from being looked for before the bucket is there */
	return &bucket->syn[(mark >> 54) & (DEMARC_PENDING_PLACES - 1)];
}

/* The handshake of a tuple; 0 = there is none. */
static __noinline struct demarc_pending_syn *pending_at(const struct demarc_tuple *opener, __u64 mark)
{
	struct demarc_pending_syn *front = pending_front(mark);
	struct demarc_pending_bucket *bucket;

	if (front && pending_is(front, mark) && same_tuple(&front->tuple, opener))
		return front;
	bucket = pending_bucket(mark);
	if (!bucket)
		return 0;
	for (int i = 0; i < DEMARC_PENDING_PLACES; i++) {
		struct demarc_pending_syn *syn = &bucket->syn[i];

		if (pending_is(syn, mark) && same_tuple(&syn->tuple, opener))
			return syn;
	}
	return 0;
}

/* Why a tuple gets a place. */
enum pending_reason {
	PENDING_FREE = 0x00,
	PENDING_OWN = 0x10,
	PENDING_OLDEST = 0x20,
};

/* Which place of its bucket a tuple gets, and why: the one it has, else a free one,
 * else the oldest. */
GLOBAL int pending_place(__u64 mark)
{
	struct demarc_pending_bucket *bucket = pending_bucket(mark);
	__u32 now = bpf_jiffies64(), oldest = 0, age = 0;

	if (!bucket)
		return 0;
	for (__u32 i = 0; i < DEMARC_PENDING_PLACES; i++) {
		struct demarc_pending_syn *syn = &bucket->syn[i];

		if (pending_is(syn, mark))
			return i | PENDING_OWN;
		if (pending_is(syn, 0))
			return i | PENDING_FREE;
		if (now - syn->born >= age) {
			age = now - syn->born;
			oldest = i;
		}
	}
	return oldest | PENDING_OLDEST;
}

static __always_inline void pending_fill(struct demarc_pending_syn *syn, const struct demarc_tuple *opener)
{
	syn->tuple = *opener;
	syn->born = bpf_jiffies64();
}

/* Gives a tuple a place, to be filled and then published. Another processor may have
 * taken the same one in between: then it is not what it was chosen for, and its new
 * owner keeps it. Returns 0 where others are always faster. */
static __noinline struct demarc_pending_syn *pending_take(const struct demarc_tuple *opener, __u64 mark)
{
	struct demarc_pending_bucket *bucket = pending_bucket(mark);
	struct demarc_pending_syn *syn = pending_front(mark);
	__u64 old;
	int found;

	if (!bucket || !syn)
		return 0;
	old = *(volatile __u64 *)&syn->mark;
	if ((!old || old == mark || (old != PENDING_GIVEN && (__u32)bpf_jiffies64() - syn->born > PENDING_OLD)) &&
	    __sync_val_compare_and_swap(&syn->mark, old, PENDING_GIVEN) == old) {
		pending_fill(syn, opener);
		return syn;
	}
	for (int i = 0; i < PENDING_TRIES; i++) {
		found = pending_place(mark);
		syn = &bucket->syn[found & (DEMARC_PENDING_PLACES - 1)];
		old = (found & PENDING_OWN) ? mark : 0;
		if (found & PENDING_OLDEST) {
			old = *(volatile __u64 *)&syn->mark;
			if (old == PENDING_GIVEN || (__u32)bpf_jiffies64() == syn->born)
				continue;
		}
		if (__sync_val_compare_and_swap(&syn->mark, old, PENDING_GIVEN) != old)
			continue;
		pending_fill(syn, opener);
		return syn;
	}
	return 0;
}

static __always_inline void pending_publish(struct demarc_pending_syn *syn, __u64 mark)
{
	__sync_lock_test_and_set(&syn->mark, mark);
}

/* Ends a handshake. Returns true if it was still the one that `mark` says. */
static __always_inline bool pending_end(struct demarc_pending_syn *syn, __u64 mark)
{
	return __sync_val_compare_and_swap(&syn->mark, mark, 0) == mark;
}

#endif
