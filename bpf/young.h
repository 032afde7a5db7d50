/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The verdicts of young connections. Storage on a socket is the largest single cost
 * of a connection, and many end within a second. So a connection first gets a place
 * in a table, and storage only when it lasts, or where its place is taken. A place is
 * given to another connection only once its own is over: filling the table makes
 * connections dearer, and denies nobody anything. Both ends' CPUs read a place with
 * each packet, so only a connection's first and last packets write it.
 *
 * A connection that is being opened has its place before: what connect(2) found out
 * there, the SYN's hooks need not look for again.
 */
#ifndef DEMARC_YOUNG_H
#define DEMARC_YOUNG_H

/* In jiffies, which are 1 to 10 ms: nothing else tells the time as cheaply. */
#define YOUNG_TIME 16		  /* before storage is made */
#define YOUNG_LAST 2		  /* for the answer to a last packet */
#define YOUNG_ENDED (1 << 10)	  /* for last segments to be sent again */
#define YOUNG_RELEASED (1 << 18)  /* for the kernel to go on by itself; at least 260 s */
#define YOUNG_GIVEN (~0ULL)		    /* cookie of a place that is being given away */

/* Kernel: include/net/tcp_states.h */
enum {
	TCP_FIN_WAIT1 = 4,
	TCP_FIN_WAIT2 = 5,
	TCP_LAST_ACK = 9,
};

enum young_fins {
	YOUNG_FIN_OUT = 1,
	YOUNG_FIN_IN = 2,
};

static __always_inline struct demarc_young *young_place(__u64 cookie)
{
	__u32 index = cookie & (DEMARC_YOUNG - 1);

	return bpf_map_lookup_elem(&young, &index);
}

static __always_inline __u64 young_owner(const struct demarc_young *place)
{
	return *(volatile __u64 *)&place->cookie;
}

/* The verdict that a socket has there; 0 = none. */
static __always_inline struct demarc_socket *young_verdict(__u64 cookie)
{
	struct demarc_young *place = young_place(cookie);

	return place && young_owner(place) == cookie && place->kept.verdict != DEMARC_PROVISIONAL ? &place->kept : 0;
}

/* Who opens a connection to this port by this socket, with a tag; none: nobody that is
 * known under the policy that stands. */
static __always_inline __u32 young_opener(__u64 cookie, __u16 port, __u32 epoch, __u8 *omitted)
{
	struct demarc_young *place = young_place(cookie);
	__u32 self;

	if (!place || young_owner(place) != cookie || place->kept.verdict != DEMARC_PROVISIONAL ||
	    place->kept.port != port || place->kept.epoch != epoch || over(place->kept.until))
		return DEMARC_ID_NONE;
	self = place->self;
	*omitted = place->omitted;
	return young_owner(place) == cookie ? self : DEMARC_ID_NONE;
}

/* Gives a socket its place, with a verdict, or with who opens a connection by it.
 * Returns 0 where somebody else has it. */
GLOBAL int young_take(__u64 cookie, const struct demarc_socket *fresh, __u32 self, __u8 omitted)
{
	struct demarc_young *place = young_place(cookie);
	__u64 old;

	if (!place || !fresh || !cookie)
		return 0;
	old = young_owner(place);
	if (old && old != cookie && (old == YOUNG_GIVEN || !place->over || bpf_jiffies64() < place->over))
		return 0;
	if (__sync_val_compare_and_swap(&place->cookie, old, YOUNG_GIVEN) != old)
		return 0;
	place->kept = *fresh;
	place->over = 0;
	place->born = bpf_jiffies64();
	place->self = self;
	place->omitted = omitted;
	place->fins = 0;
	__sync_lock_test_and_set(&place->cookie, cookie);
	return 1;
}

/* TCP flags of a packet at a socket; 0 where they do not lie where they mostly do. */
static __always_inline __u8 flags_at_socket(struct __sk_buff *skb)
{
	__u8 *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		return data + 34 <= end && data[0] == 0x45 ? data[33] : 0;
	return data + 54 <= end && data[6] == PROTO_TCP ? data[53] : 0;
}

/* What a packet says of how long its connection lasts. */
static __always_inline void young_ages(struct bpf_sock *sk, struct demarc_young *place, __u64 cookie,
				       __u32 tcp_state, __u8 flags, bool outgoing)
{
	struct demarc_socket kept;

	if (flags & FLAG_FIN)
		place->fins |= outgoing ? YOUNG_FIN_OUT : YOUNG_FIN_IN;
	if (flags & FLAG_RST || place->fins == (YOUNG_FIN_OUT | YOUNG_FIN_IN)) {
		/* After its last packet a socket acknowledges it and is closed, or waits as
		 * another one. */
		bool last = flags & FLAG_RST || (!outgoing && (tcp_state == TCP_FIN_WAIT1 || tcp_state == TCP_FIN_WAIT2 ||
							       tcp_state == TCP_LAST_ACK));
		__u64 at = bpf_jiffies64() + (last ? YOUNG_LAST : YOUNG_ENDED);

		if (!place->over || at < place->over)
			place->over = at;
		return;
	}
	if ((__u32)bpf_jiffies64() - place->born < YOUNG_TIME)
		return;
	kept = place->kept;
	if (young_owner(place) == cookie && bpf_sk_storage_get(&sockets, sk, &kept, BPF_SK_STORAGE_GET_F_CREATE))
		__sync_val_compare_and_swap(&place->cookie, cookie, 0);
}

/* As carried() in skb.h, for a socket without storage. */
static __noinline bool carried_young(struct __sk_buff *skb, struct bpf_sock *sk, __u32 tcp_state, bool outgoing,
				     __u64 active)
{
	__u64 cookie = bpf_get_socket_cookie(skb), until;
	struct demarc_young *place = young_place(cookie);
	__u8 flags;
	bool on;

	if (!place || young_owner(place) != cookie)
		return false;
	until = place->kept.until;
	on = place->kept.verdict == DEMARC_ALLOW && place->kept.epoch == DEMARC_ACTIVE_EPOCH(active) &&
	     (!until || bpf_ktime_get_boot_ns() < until);
	flags = flags_at_socket(skb);
	if (!on || !flags || young_owner(place) != cookie)
		return false;
	young_ages(sk, place, cookie, tcp_state, flags, outgoing);
	return true;
}

/* The process has closed a socket: what is left of its connection is the kernel's. */
static __always_inline void young_released(__u64 cookie)
{
	struct demarc_young *place = young_place(cookie);

	if (place && young_owner(place) == cookie && !place->over)
		place->over = bpf_jiffies64() + (place->kept.verdict == DEMARC_PROVISIONAL ? YOUNG_LAST : YOUNG_RELEASED);
}

#endif
