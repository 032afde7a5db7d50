/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The identity tag in the TCP handshake. Format: abi.h. MAC: SipHash-2-4
 * (Aumasson, Bernstein: "SipHash: a fast short-input PRF", 2012).
 */
#ifndef DEMARC_TAG_H
#define DEMARC_TAG_H

struct demarc_tag {
	__u8 kind;
	__u8 length;
	__u16 exid;
	__u32 claim;
	__u64 mac;
} __attribute__((packed));

#define ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define SIPROUND                              \
	do {                                  \
		v0 += v1;                     \
		v1 = ROTL(v1, 13) ^ v0;       \
		v0 = ROTL(v0, 32);            \
		v2 += v3;                     \
		v3 = ROTL(v3, 16) ^ v2;       \
		v0 += v3;                     \
		v3 = ROTL(v3, 21) ^ v0;       \
		v2 += v1;                     \
		v1 = ROTL(v1, 17) ^ v2;       \
		v2 = ROTL(v2, 32);            \
	} while (0)

static __always_inline __u64 siphash(const __u64 *key, const struct demarc_tag_input *input)
{
	__u64 v0 = key[0] ^ 0x736f6d6570736575ULL;
	__u64 v1 = key[1] ^ 0x646f72616e646f6dULL;
	__u64 v2 = key[0] ^ 0x6c7967656e657261ULL;
	__u64 v3 = key[1] ^ 0x7465646279746573ULL;
	const __u64 *word = (const __u64 *)input;
	__u64 last = (__u64)sizeof(*input) << 56;

#pragma unroll
	for (int i = 0; i < sizeof(*input) / 8; i++) {
		v3 ^= word[i];
		SIPROUND;
		SIPROUND;
		v0 ^= word[i];
	}
	v3 ^= last;
	SIPROUND;
	SIPROUND;
	v0 ^= last;
	v2 ^= 0xff;
	SIPROUND;
	SIPROUND;
	SIPROUND;
	SIPROUND;
	return v0 ^ v1 ^ v2 ^ v3;
}

/* The pair of nodes that this one and an address are: nobody has a key of its own
 * yet, so that the fleet's is everybody's. */
static __always_inline __u32 pair_of(const __u8 *peer)
{
	return 0;
}

static __always_inline struct demarc_key *key_of(__u32 pair, __u32 epoch, __u64 now)
{
	__u32 index = DEMARC_KEY_INDEX(pair, epoch & (DEMARC_EPOCHS - 1));
	struct demarc_key *key = bpf_map_lookup_elem(&keys, &index);

	if (!key || !key->valid || now < key->since || (key->until && now >= key->until))
		return 0;
	return key;
}

/* Unix time in ns; 0 if the core never said. */
static __always_inline __u64 wall_clock(const struct demarc_state *s, __u64 now)
{
	return s->wall ? now + s->wall : 0;
}

static __always_inline __u32 time_slot(__u64 wall)
{
	return wall >> DEMARC_TAG_SLOT_SHIFT;
}

/* The slot that a clock which differs from ours by less than half of one may show. */
static __always_inline __u32 neighbour_slot(__u64 wall)
{
	return time_slot(wall) + (wall & (1ULL << (DEMARC_TAG_SLOT_SHIFT - 1)) ? 1 : -1);
}

/* A claim that the receiver has said nothing about: that of a SYN. */
static __always_inline bool bound_to_time(__u32 claim)
{
	return !(claim & (DEMARC_TAG_ANSWER | DEMARC_TAG_DATAGRAM));
}

#define TAG_OMISSIONS (DEMARC_TAG_NO_SOURCE | DEMARC_TAG_NO_DESTINATION)

/* What a crossing's `nat` lets a tag leave out: the end that is translated on the
 * way, which in an answer is the other one. */
static __always_inline __u8 omission(__u8 nat, bool answer)
{
	switch (nat) {
	case DEMARC_NAT_SOURCE:
		return answer ? DEMARC_TAG_NO_DESTINATION : DEMARC_TAG_NO_SOURCE;
	case DEMARC_NAT_DESTINATION:
		return answer ? DEMARC_TAG_NO_SOURCE : DEMARC_TAG_NO_DESTINATION;
	}
	return 0;
}

/* What the answer to a tag leaves out: the same end, which is the other one there. */
static __always_inline __u8 turned_omission(__u8 omitted)
{
	return omitted ? TAG_OMISSIONS & ~omitted : 0;
}

static __always_inline void tag_input(struct demarc_tag_input *input, __u32 claim, const struct demarc_tuple *sender,
				      __u32 seq, __u32 acked)
{
	input->claim = bpf_htonl(claim);
	input->seq = bpf_htonl(seq);
	input->acked = bpf_htonl(acked);
	input->sport = bpf_htons(sender->sport);
	input->dport = bpf_htons(sender->dport);
	__builtin_memcpy(input->saddr, sender->saddr, 16);
	__builtin_memcpy(input->daddr, sender->daddr, 16);
	if (claim & DEMARC_TAG_NO_SOURCE) {
		input->sport = 0;
		__builtin_memset(input->saddr, 0, 16);
	}
	if (claim & DEMARC_TAG_NO_DESTINATION) {
		input->dport = 0;
		__builtin_memset(input->daddr, 0, 16);
	}
}

/* Signs a claim of `identity` with the key that is in use for sending. Returns the
 * claim, or 0 where there is no key, or no clock. */
static __always_inline __u32 sign(__u64 *mac, __u32 identity, __u8 flags, const struct demarc_tuple *sender, __u32 seq,
				  __u32 acked)
{
	struct demarc_tag_input input;
	struct demarc_state *s;
	__u64 now = recently();
	struct demarc_key *key;
	__u32 zero = 0, epoch, claim;

	s = bpf_map_lookup_elem(&state, &zero);
	if (!s || !s->wall)
		return 0;
	epoch = s->tag_epoch & (DEMARC_EPOCHS - 1);
	key = key_of(pair_of(sender->daddr), epoch, now);
	if (!key)
		return 0;
	claim = identity << 8 | epoch << 4 | flags;
	if (bound_to_time(claim))
		acked = time_slot(wall_clock(s, now));
	tag_input(&input, claim, sender, seq, acked);
	*mac = siphash(key->key, &input);
	return claim;
}

/* Makes the tag that `identity` puts on a SYN, or on a SYN-ACK that acknowledges
 * `acked`. Returns 0, or -1 where there is no key to sign with. */
static __always_inline int make_tag(struct demarc_tag *tag, __u32 identity, __u8 flags,
				    const struct demarc_tuple *sender, __u32 seq, __u32 acked)
{
	__u64 mac = 0;
	__u32 claim = sign(&mac, identity, flags, sender, seq, acked);

	if (!claim)
		return -1;
	tag->kind = DEMARC_TAG_KIND;
	tag->length = DEMARC_TAG_LENGTH;
	tag->exid = bpf_htons(DEMARC_TAG_EXID);
	tag->claim = bpf_htonl(claim);
	tag->mac = mac;
	return 0;
}

/* What a claim is bound to besides addresses, in one word: functions take five. */
#define BINDING(seq, acked) ((__u64)(seq) << 32 | (acked))

/* Checks a claim and its MAC, and writes the proof or what is wrong with it. */
GLOBAL int check_claim(struct demarc_query *q, __u32 claim, __u64 mac, const struct demarc_tuple *sender,
		       __u64 binding)
{
	struct demarc_tag_input input;
	struct demarc_key *key;
	struct demarc_state *s;
	__u32 zero = 0, slot;

	if (!q || !sender)
		return 0;
	s = bpf_map_lookup_elem(&state, &zero);
	if (!s)
		return 0;
	q->bad = DEMARC_TAG_WRONG_EPOCH;
	key = key_of(pair_of(sender->saddr), claim >> 4, q->now);
	if (!key)
		return 0;
	q->bad = DEMARC_TAG_BAD_MAC;
	slot = time_slot(wall_clock(s, q->now));
	tag_input(&input, claim, sender, binding >> 32, bound_to_time(claim) ? slot : (__u32)binding);
	if (siphash(key->key, &input) != mac) {
		if (!bound_to_time(claim))
			return 0;
		slot = neighbour_slot(wall_clock(s, q->now));
		input.acked = bpf_htonl(slot);
		if (siphash(key->key, &input) != mac)
			return 0;
	}
	/* What was admitted before the machine booted is forgotten. */
	q->bad = DEMARC_TAG_STALE;
	if (bound_to_time(claim) && slot <= time_slot(s->wall))
		return 0;
	q->bad = DEMARC_TAG_BAD_IDENTITY;
	if (q->peer < DEMARC_ID_FIRST || !table_subject(q->slot, q->peer))
		return 0;
	q->proof = DEMARC_PROOF_IDENTITY;
	return 0;
}

#define TCP_OPTIONS_MAX 40

/* Where a walk over TCP options stands. */
struct option_walk {
	__u8 options[64] __attribute__((aligned(8))); /* zero beyond length */
	__u32 length;
	__u32 at;
	__u32 tag; /* offset of the tag + 1; 0 = none yet */
	bool cookie; /* of TCP Fast Open */
	bool broken;
};

/* One option. Returns 1 to end the walk. */
static long next_option(__u32 n, struct option_walk *walk)
{
	__u32 at = walk->at;
	__u8 kind, size;

	if (at >= walk->length)
		return 1;
	kind = walk->options[at & 63];
	if (kind == 0) /* end of options */
		return 1;
	if (kind == 1) { /* padding */
		walk->at = at + 1;
		return 0;
	}
	size = walk->options[(at + 1) & 63];
	if (size < 2 || at + size > walk->length) {
		walk->broken = true;
		return 1;
	}
	if (kind == DEMARC_TAG_KIND && size >= 4 && walk->options[(at + 2) & 63] == (DEMARC_TAG_EXID >> 8) &&
	    walk->options[(at + 3) & 63] == (DEMARC_TAG_EXID & 0xff)) {
		if (walk->tag || size != DEMARC_TAG_LENGTH) {
			walk->broken = true;
			return 1;
		}
		walk->tag = at + 1;
	}
	if (kind == 34 && size > 2)
		walk->cookie = true;
	walk->at = at + size;
	return 0;
}

/* The options that Linux puts on a SYN and a SYN-ACK by default, and the tag behind
 * them: maximum segment size, SACK permitted and timestamps, padding and window
 * scale. Anything else is walked through. */
#define USUAL_OPTIONS 20

static __always_inline bool usual_options(const __u8 *options)
{
	const __u32 *word = (const __u32 *)options;

	return (word[0] & bpf_htonl(0xffff0000)) == bpf_htonl(0x02040000) && word[1] == bpf_htonl(0x0402080a) &&
	       (word[4] & bpf_htonl(0xffffff00)) == bpf_htonl(0x01030300) &&
	       word[5] == bpf_htonl(DEMARC_TAG_KIND << 24 | DEMARC_TAG_LENGTH << 16 | DEMARC_TAG_EXID);
}

/* TCP Fast Open (RFC 7413): data, or a connection, before the other side has proved
 * itself. Stacks do without at the next attempt. */
static __always_inline bool opens_fast(const struct packet *p, bool cookie)
{
	return !(p->flags & FLAG_ACK) &&
	       (cookie || p->end != p->transport + sizeof(struct tcphdr) + p->options);
}

/*
 * Finds the one tag among a segment's options and copies it. Returns 1 if there
 * is one, 0 if there is none, -1 for anything that a demarc kernel would not have
 * written: two tags, another length, options that do not add up, a tag beside
 * TCP Fast Open.
 */
GLOBAL int find_tag(struct __sk_buff *skb, struct packet *p, struct demarc_tag *tag)
{
	struct option_walk walk = {};
	__u32 at, beyond;

	if (!p || !tag)
		return -1;
	walk.length = p->options;
	if (walk.length == 0)
		return 0;
	/* Linux 6.1 does not learn from a comparison with 0 that there is something
	 * to read; from this one it does. */
	beyond = walk.length - 1;
	barrier_var(beyond);
	if (beyond >= TCP_OPTIONS_MAX)
		return -1;
	if (walk.length == USUAL_OPTIONS + DEMARC_TAG_LENGTH) {
		if (cut(skb, p->transport + 20, walk.options, USUAL_OPTIONS + DEMARC_TAG_LENGTH))
			return -1;
		if (usual_options(walk.options)) {
			__builtin_memcpy(tag, &walk.options[USUAL_OPTIONS], sizeof(*tag));
			p->tag = USUAL_OPTIONS + 1;
			return opens_fast(p, false) ? -1 : 1;
		}
	} else if (bpf_skb_load_bytes(skb, p->transport + 20, walk.options, beyond + 1)) {
		return -1;
	}
	bpf_loop(TCP_OPTIONS_MAX, next_option, &walk, 0);
	if (walk.broken)
		return -1;
	if (!walk.tag)
		return 0;
	at = walk.tag - 1;
	if (at > TCP_OPTIONS_MAX - DEMARC_TAG_LENGTH || opens_fast(p, walk.cookie))
		return -1;
	__builtin_memcpy(tag, &walk.options[at], sizeof(*tag));
	p->tag = at + 1;
	return 1;
}

/* Which buckets of the memory of tags (replay.h) a tag may be in. */
static __always_inline __u32 replay_index(__u64 mac, bool second)
{
	__u32 index = mac & (DEMARC_REPLAY_BUCKETS - 1);

	/* Both lie in a page or two: what a look costs is to find the memory. */
	return second ? index ^ (mac >> 17 & 62) ^ 1 : index;
}

/* Reads the two places of a tag, so that they are there when they are needed. For the
 * stack's sake not a part of who calls it. */
GLOBAL int replay_touch(__u64 mac)
{
	__u32 first = replay_index(mac, false), second = replay_index(mac, true);
	struct demarc_replay_bucket *bucket = bpf_map_lookup_elem(&replays, &first);

	if (bucket)
		(void)*(volatile __u64 *)&bucket->entry[0];
	bucket = bpf_map_lookup_elem(&replays, &second);
	if (bucket)
		(void)*(volatile __u64 *)&bucket->entry[0];
	return 0;
}

/* The MAC of the tag that was found. */
static __always_inline __u64 mac_of(struct __sk_buff *skb, const struct packet *p)
{
	__u64 mac = 0;

	bpf_skb_load_bytes(skb, p->transport + 20 + p->tag - 1 + offsetof(struct demarc_tag, mac), &mac, sizeof(mac));
	return mac;
}

/*
 * Reads the proof that a SYN (`flags` 0) or a SYN-ACK (DEMARC_TAG_ANSWER) brings
 * into a query: nothing, an identity, or a bad proof and its kind; with it, what
 * the tag leaves out. `acked` is what a SYN-ACK acknowledges.
 */
GLOBAL int read_proof(struct __sk_buff *skb, struct packet *p, __u8 flags, __u32 acked, struct outcome *o)
{
	struct demarc_query *q = &o->query;
	struct demarc_tag tag = {};
	__u32 claim;
	int found;

	if (!p || !o)
		return 0;
	o->omitted = 0;
	found = find_tag(skb, p, &tag);
	q->proof = DEMARC_PROOF_NONE;
	q->peer = DEMARC_ID_NONE;
	if (!found)
		return 0;
	q->proof = DEMARC_PROOF_BAD;
	claim = bpf_ntohl(tag.claim);
	q->peer = claim >> 8; /* claimed, not proven */
	q->bad = DEMARC_TAG_MALFORMED;
	if (!flags)
		replay_touch(tag.mac);
	if (found < 0 || (claim & 0xf & ~TAG_OMISSIONS) != flags || (claim & TAG_OMISSIONS) == TAG_OMISSIONS)
		return 0;
	check_claim(q, claim, tag.mac, &p->tuple, BINDING(p->seq, acked));
	o->omitted = claim & TAG_OMISSIONS;
	return 0;
}

#endif
