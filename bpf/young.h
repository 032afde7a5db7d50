/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The verdicts of young connections. Storage on a socket is the largest single cost
 * of a connection, and many end within a second. So a connection first gets a place
 * in a table, and storage only when it lasts, or where its place is taken. Filling the
 * table makes connections dearer, and denies nobody anything. Both ends' CPUs read a
 * place with each packet, so only a connection's first and last packets write it.
 *
 * A connection that is being opened has its place before: what connect(2) found out
 * there, the SYN's hooks need not look for again.
 *
 * Invariant: an admitted connection has, from before its handshake's entry among the
 * pending ends until its socket neither sends nor takes in anything more, a verdict here
 * or on its socket. It holds because
 *
 *   - there is one place that a socket may have, by its cookie, which no other socket
 *     has or gets; whoever writes it marks it first (YOUNG_GIVEN), and readers compare
 *     the cookie before and after;
 *   - a place goes to another socket only when it is nobody's, is of a connection that
 *     is being opened (what it loses is found again), or is over;
 *   - it is over only when the socket is closed without a packet to follow, or when this
 *     packet ends it: all that was sent is acknowledged, and all that was waited for is
 *     there (is_last). A reset from outside does not make it over: it may be a forged one;
 *   - storage is made before the place is given up, and found before a miss is believed.
 */
#ifndef DEMARC_YOUNG_H
#define DEMARC_YOUNG_H

/* In jiffies, which are 1 to 10 ms: nothing else tells the time as cheaply. */
#define YOUNG_TIME 16		  /* before storage is made */
#define YOUNG_LAST 2		  /* for the answer to a last packet */
#define YOUNG_RELEASED (1 << 18)  /* for the kernel to go on by itself; at least 260 s */
#define SHUTDOWN_BOTH 3		  /* kernel: include/net/sock.h, SHUTDOWN_MASK */
#define YOUNG_GIVEN (~0ULL)		    /* cookie of a place that is being given away */

static __always_inline struct demarc_young *young_place(__u64 cookie)
{
	__u32 index = cookie & (DEMARC_YOUNG - 1);

	return bpf_map_lookup_elem(&young, &index);
}

static __always_inline __u64 young_owner(const struct demarc_young *place)
{
	return *(volatile __u64 *)&place->cookie;
}

/* The cookie of a packet's socket, without a call where the kernel lets it be read: packets
 * of established connections are most of all, and a call costs as much as what they need.
 * 0 = it has none yet. */
static __always_inline __u64 cookie_of(struct __sk_buff *skb)
{
	struct sk_buff *kernel;
	struct sock *sk;

	if (!bpf_cast_to_kern_ctx) /* before Linux 6.2 */
		return bpf_get_socket_cookie(skb);
	kernel = bpf_cast_to_kern_ctx(skb);
	sk = kernel->sk;
	return sk ? sk->__sk_common.skc_cookie.counter : 0;
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

/* Whether a place may be given to somebody else: its connection is over, or is being
 * opened, which loses nothing but time by it. */
static __always_inline bool young_over(const struct demarc_young *place)
{
	if (place->kept.verdict == DEMARC_PROVISIONAL)
		return (__u32)bpf_jiffies64() - place->born > YOUNG_TIME;
	return place->over && bpf_jiffies64() >= place->over;
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
	if (old && old != cookie && (old == YOUNG_GIVEN || !young_over(place)))
		return 0;
	if (__sync_val_compare_and_swap(&place->cookie, old, YOUNG_GIVEN) != old)
		return 0;
	if (old && old != cookie && !young_over(place)) { /* its owner was faster, and has it again */
		__sync_lock_test_and_set(&place->cookie, old);
		return 0;
	}
	place->kept = *fresh;
	place->over = 0;
	place->born = bpf_jiffies64();
	place->self = self;
	place->omitted = omitted;
	__sync_lock_test_and_set(&place->cookie, cookie);
	return 1;
}

/* The TCP header of a packet at a socket. False: it does not lie where it mostly does. */
static __always_inline bool header_at_socket(struct __sk_buff *skb, struct tcphdr *tcp, __u32 *payload)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ipv6hdr *ip6 = data;
	struct iphdr *ip = data;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (data + sizeof(*ip) + sizeof(*tcp) > end || *(__u8 *)ip != 0x45)
			return false;
		__builtin_memcpy(tcp, data + sizeof(*ip), sizeof(*tcp));
		*payload = skb->len - sizeof(*ip) - tcp->doff * 4;
		return true;
	}
	if (data + sizeof(*ip6) + sizeof(*tcp) > end || ip6->nexthdr != PROTO_TCP)
		return false;
	__builtin_memcpy(tcp, data + sizeof(*ip6), sizeof(*tcp));
	*payload = skb->len - sizeof(*ip6) - tcp->doff * 4;
	return true;
}

/* Whether nothing can follow at a socket that is being closed, but the acknowledgement
 * of this packet: all that it sent is acknowledged, and all that it waits for is there.
 * Who says that too early loses what comes later. */
static __always_inline bool is_last(struct __sk_buff *skb, __u32 state, bool outgoing)
{
	struct bpf_sock *sk = skb->sk;
	struct tcphdr tcp = {};
	struct tcp_sock *own;
	__u32 payload = 0;

	if (!header_at_socket(skb, &tcp, &payload))
		return false;
	if (outgoing) /* the reset of a socket that is closed already */
		return state == TCP_CLOSE && tcp.rst;
	own = sk ? bpf_skc_to_tcp_sock(sk) : 0;
	if (!own || !tcp.ack || tcp.syn || bpf_ntohl(tcp.ack_seq) != own->write_seq)
		return false;
	if (state == TCP_LAST_ACK || state == TCP_CLOSING)
		return true;
	return (state == TCP_FIN_WAIT1 || state == TCP_FIN_WAIT2) && tcp.fin && bpf_ntohl(tcp.seq) == own->rcv_nxt;
}

/* A connection that is being closed. True: this was its last packet. */
static __always_inline bool young_ends(struct __sk_buff *skb, struct demarc_young *place, __u32 state, bool outgoing)
{
	struct bpf_sock *sk = skb->sk;
	struct tcp_sock *own;

	if (is_last(skb, state, outgoing)) {
		place->over = bpf_jiffies64() + YOUNG_LAST;
		return true;
	}
	if (!outgoing || place->over || (state != TCP_FIN_WAIT1 && state != TCP_LAST_ACK))
		return false;
	own = sk ? bpf_skc_to_tcp_sock(sk) : 0;
	if (own && own->inet_conn.icsk_inet.sk.sk_shutdown == SHUTDOWN_BOTH) /* nobody waits for more: the kernel ends it */
		place->over = bpf_jiffies64() + YOUNG_RELEASED;
	return false;
}

/* A connection that is no longer young, or is being closed. */
static __noinline bool young_ages(struct __sk_buff *skb, __u64 cookie, __u32 state, bool outgoing)
{
	struct demarc_young *place = young_place(cookie);
	struct bpf_sock *sk = skb->sk;
	struct demarc_socket kept;

	if (!place || !sk)
		return true;
	if (state != TCP_ESTABLISHED && young_ends(skb, place, state, outgoing))
		return true;
	if ((__u32)bpf_jiffies64() - place->born < YOUNG_TIME)
		return true;
	kept = place->kept;
	if (young_owner(place) == cookie && bpf_sk_storage_get(&sockets, sk, &kept, BPF_SK_STORAGE_GET_F_CREATE))
		__sync_val_compare_and_swap(&place->cookie, cookie, 0);
	return true;
}

/* Whether a packet goes on with a connection that is young. */
static __always_inline bool goes_on_young(struct __sk_buff *skb, __u64 cookie, __u32 state, bool outgoing, __u64 active)
{
	struct demarc_young *place = young_place(cookie);
	__u32 born;
	bool on;

	if (!place || !cookie || young_owner(place) != cookie)
		return false;
	fence();
	on = place->kept.verdict == DEMARC_ALLOW && place->kept.epoch == DEMARC_ACTIVE_EPOCH(active) &&
	     !over(place->kept.until);
	born = place->born;
	fence();
	if (!on || young_owner(place) != cookie)
		return false;
	if (state == TCP_ESTABLISHED && (__u32)bpf_jiffies64() - born < YOUNG_TIME)
		return true;
	return young_ages(skb, cookie, state, outgoing);
}

/* The process has closed a socket whose connection had ended before. One that had not
 * says so itself, by its last packets. */
static __always_inline void young_released(__u64 cookie)
{
	struct demarc_young *place = young_place(cookie);

	if (place && young_owner(place) == cookie && !place->over)
		place->over = bpf_jiffies64() + YOUNG_LAST;
}

#endif
