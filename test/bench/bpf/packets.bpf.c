// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * demarc's packet paths as BPF_PROG_TEST_RUN can reach them. Never attached.
 *
 * A test run's socket is a dummy: a full one, in the caller's cgroup, but of no
 * protocol and in no state. These programs call the function that the attached ones
 * call, and tell it what a real socket would have told it. Left out are therefore
 * the two loads and compares of protocol and type, and nothing else of the program;
 * the hook around it, the clone of a listener's socket and all of sockops are not
 * in a test run at all.
 */
#include "../../../bpf/demarc.bpf.c"

SEC("cgroup_skb/ingress")
int empty(struct __sk_buff *skb)
{
	return 1;
}

static __always_inline int datagram(struct __sk_buff *skb, bool outgoing)
{
	struct bpf_sock *sk = skb->sk;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	return sk && judge_packet(skb, sk, 0, false, 0, outgoing);
}

SEC("cgroup_skb/egress")
int packet_datagram_out(struct __sk_buff *skb)
{
	return datagram(skb, true);
}

SEC("cgroup_skb/ingress")
int packet_datagram_in(struct __sk_buff *skb)
{
	return datagram(skb, false);
}

/* A packet of an established connection. The first one of a run finds no verdict on
 * its new socket, is refused, and leaves there what a handshake would have left. */
SEC("cgroup_skb/ingress")
int packet_established(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct demarc_socket kept = { .verdict = DEMARC_ALLOW };

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk)
		return 0;
	if (judge_packet(skb, sk, cookie_of(skb), true, TCP_ESTABLISHED, false))
		return 1;
	kept.epoch = DEMARC_ACTIVE_EPOCH(active_word());
	bpf_sk_storage_get(&sockets, sk, &kept, BPF_SK_STORAGE_GET_F_CREATE);
	return 0;
}

/* What each end pays once a connection, besides its packets: a verdict on a socket,
 * made and taken away. */
SEC("cgroup_skb/ingress")
int packet_storage(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct demarc_socket fresh = { .verdict = DEMARC_ALLOW };

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk || !bpf_sk_storage_get(&sockets, sk, &fresh, BPF_SK_STORAGE_GET_F_CREATE))
		return 0;
	return bpf_sk_storage_delete(&sockets, sk) == 0;
}

/* Makes the same bytes a new handshake, neither sent again nor replayed: the verdict's
 * epoch moves on, and the memory of tags forgets the one at the packet's end. */
static __always_inline bool renew(struct __sk_buff *skb)
{
	struct demarc_state *s;
	__u32 zero = 0;
	__u64 mac;

	s = bpf_map_lookup_elem(&state, &zero);
	if (!s || bpf_skb_load_bytes(skb, skb->len - sizeof(mac), &mac, sizeof(mac)))
		return false;
	s->active += 1ULL << 32;
	unspend(mac);
	return true;
}

/* What that costs, which is no part of a SYN. */
SEC("cgroup_skb/ingress")
int packet_renewed(struct __sk_buff *skb)
{
	return renew(skb);
}

/* A SYN at a listener. */
SEC("cgroup_skb/ingress")
int packet_syn(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	return sk && renew(skb) && judge_packet(skb, sk, cookie_of(skb), true, TCP_LISTEN, false);
}

/* Another packet of a handshake: at the listener, and at a connection that another
 * processor is just accepting. */
SEC("cgroup_skb/ingress")
int packet_listener(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	return sk && judge_packet(skb, sk, cookie_of(skb), true, TCP_LISTEN, false);
}

SEC("cgroup_skb/ingress")
int packet_accepting(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	return sk && judge_packet(skb, sk, cookie_of(skb), true, TCP_SYN_RECV, false);
}
