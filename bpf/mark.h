/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Connections that came in or are opened, by their sockets' cookies. Most buckets have
 * room, or a connection that has ended. Where all in one live, who makes another gives up
 * one of its own, and who has none there gets one of whoever has most. So a flood costs
 * connections of who floods: those first over which least passed.
 */
#ifndef DEMARC_MARK_H
#define DEMARC_MARK_H

#define MARK_STALE (30ULL * 1000000000ULL) /* ns, in which several rounds would have seen it */

static __always_inline struct demarc_marks *marks_of(__u64 cookie)
{
	__u32 index = cookie & (DEMARC_MARK_BUCKETS - 1);

	return bpf_map_lookup_elem(&marks, &index);
}

/* Where a cookie is looked for first. Cookies that follow each other are in different
 * buckets, and each time around at another place. */
static __always_inline __u32 mark_home(__u64 cookie) { return cookie / DEMARC_MARK_BUCKETS; }

/* The place of a key; DEMARC_MARK_WAYS = none. */
GLOBAL int mark_way(__u64 key)
{
	__u64 cookie = key & ~DEMARC_MARK_CLOSED;
	struct demarc_marks *all = cookie ? marks_of(cookie) : 0;

	if (!all)
		return DEMARC_MARK_WAYS;
	for (__u32 i = 0; i < DEMARC_MARK_WAYS; i++) {
		__u32 way = (mark_home(cookie) + i) % DEMARC_MARK_WAYS;

		if (*(volatile __u64 *)&all->keys[way] == key)
			return way;
	}
	return DEMARC_MARK_WAYS;
}

/* What stands at a place of a bucket. */
static __always_inline struct demarc_mark *mark_at(__u64 cookie, __u32 way)
{
	struct demarc_marks *all = way < DEMARC_MARK_WAYS ? marks_of(cookie) : 0;

	if (!all)
		return 0;
	barrier_var(way); /* its place is not reckoned before the bucket is known to be there */
	return &all->marks[way];
}

/* The mark of a connection; 0 = it has none. */
static __always_inline struct demarc_mark *mark_of(__u64 cookie) { return mark_at(cookie, mark_way(cookie)); }

/* The key of a mark changes: its connection has ended, or nothing of it is wanted. */
static __always_inline void mark_rekey(__u64 cookie, __u64 from, __u64 to)
{
	__u32 way = mark_way(from);
	struct demarc_marks *all = way < DEMARC_MARK_WAYS ? marks_of(cookie) : 0;

	if (!all)
		return;
	barrier_var(way);
	all->keys[way] = to;
}

/* How many places of a cookie's bucket an identity has. */
GLOBAL int marks_had(__u64 cookie, __u32 subject)
{
	struct demarc_marks *all = marks_of(cookie);
	int n = 0;

	for (__u32 i = 0; all && i < DEMARC_MARK_WAYS; i++)
		n += all->marks[i].subject == subject;
	return n;
}

/* Which of the live ones is given up for one more of an identity; DEMARC_MARK_WAYS = none,
 * for nobody has two. */
GLOBAL int mark_given_up(__u64 cookie, __u32 subject, __u64 now)
{
	struct demarc_marks *all = marks_of(cookie);
	__u32 way = DEMARC_MARK_WAYS, most = 1, had;
	__u64 least = ~0ULL, passed;

	for (__u32 i = 0; all && i < DEMARC_MARK_WAYS; i++) {
		struct demarc_mark *m = &all->marks[i];

		if (now > m->seen && now - m->seen > MARK_STALE)
			return i;
		had = m->subject == subject ? DEMARC_MARK_WAYS + 1 : marks_had(cookie, m->subject);
		passed = m->upto.bytes + m->upto.back;
		if (had < 2 || had < most || (had == most && passed >= least))
			continue;
		way = i;
		most = had;
		least = passed;
	}
	return way;
}

/* The place for one more connection. */
GLOBAL int mark_place(__u64 cookie, __u32 subject, __u64 now)
{
	struct demarc_marks *all = cookie ? marks_of(cookie) : 0;
	__u32 way;
	__u64 key;

	if (!all)
		return DEMARC_MARK_WAYS;
	for (__u32 i = 0; i < DEMARC_MARK_WAYS; i++) {
		way = (mark_home(cookie) + i) % DEMARC_MARK_WAYS;
		key = all->keys[way];
		if (!key || key & DEMARC_MARK_CLOSED || key == cookie)
			return way;
	}
	return mark_given_up(cookie, subject, now);
}

/* A fresh mark; 0 = there is no room. */
static __always_inline struct demarc_mark *mark_new(__u64 cookie, __u32 subject, __u64 now)
{
	__u32 way = mark_place(cookie, subject, now);
	struct demarc_marks *all = way < DEMARC_MARK_WAYS ? marks_of(cookie) : 0;
	struct demarc_mark *m;

	if (!all)
		return 0;
	barrier_var(way);
	m = &all->marks[way];
	all->keys[way] = 0;
	__builtin_memset(m, 0, sizeof(*m));
	m->subject = subject;
	m->seen = now;
	all->keys[way] = cookie;
	return m;
}

#endif
