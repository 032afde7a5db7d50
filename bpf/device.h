/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The boundary of devices: what no socket hook sees. Frames of packet sockets
 * stop here. Datagrams have no handshake, so their proof travels in the surplus
 * area of UDP (RFC 9868): written where a datagram leaves the host, verified where
 * it arrives, and kept for its flow.
 */
#ifndef DEMARC_DEVICE_H
#define DEMARC_DEVICE_H

#define TCX_NEXT (-1)
#define TCX_DROP 2
#define CHECKSUM_PARTIAL 3

struct demarc_udp_tag {
	__u16 ocs;
	__u8 kind;
	__u8 length;
	__u16 exid;
	__u32 claim;
	__u32 time;
	__u32 nonce;
	__u64 mac;
} __attribute__((packed));

/* Reads the tag behind a datagram. False: there is none, or somebody else's option. */
static __always_inline bool read_udp_tag(struct __sk_buff *skb, const struct packet *p, struct demarc_udp_tag *tag)
{
	__u32 at = p->transport + p->length + (p->length & 1);

	if (p->tuple.proto != PROTO_UDP || !p->end || at + sizeof(*tag) != p->end)
		return false;
	if (bpf_skb_load_bytes(skb, at, tag, sizeof(*tag)))
		return false;
	return tag->kind == DEMARC_UDP_TAG_KIND && tag->length == DEMARC_UDP_TAG_LENGTH &&
	       tag->exid == bpf_htons(DEMARC_TAG_EXID);
}

/* Whether a claim may be in UDP at all. */
static __always_inline bool claims_datagram(__u32 claim)
{
	return claim & DEMARC_TAG_DATAGRAM && (claim & TAG_OMISSIONS) != TAG_OMISSIONS;
}

/* Unix time in seconds; 0 if the core never said. */
static __always_inline __u32 wall_seconds(__u64 now)
{
	__u32 zero = 0;
	struct demarc_state *s = bpf_map_lookup_elem(&state, &zero);

	return s ? wall_clock(s, now) / 1000000000ULL : 0;
}

/* The option checksum: with it, the surplus area and its length add up to zero,
 * so that whoever sums the whole packet finds the sum of the datagram alone. */
static __always_inline __u16 option_checksum(const struct demarc_udp_tag *tag, __u32 surplus)
{
	const __u16 *word = (const __u16 *)&tag->kind;
	__u32 sum = surplus;

#pragma unroll
	for (int i = 0; i < DEMARC_UDP_TAG_LENGTH / 2; i++)
		sum += bpf_ntohs(word[i]);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = ~sum & 0xffff;
	return bpf_htons(sum ? sum : 0xffff);
}

/* Makes the IP packet `extra` bytes longer, in its header. */
static __always_inline int lengthen(struct __sk_buff *skb, const struct packet *p, __u32 extra)
{
	bool ipv6 = skb->protocol == bpf_htons(ETH_P_IPV6);
	__u32 at = p->network + (ipv6 ? offsetof(struct ipv6hdr, payload_len) : offsetof(struct iphdr, tot_len));
	__u16 old, fresh;

	if (bpf_skb_load_bytes(skb, at, &old, sizeof(old)))
		return -1;
	fresh = bpf_htons(bpf_ntohs(old) + extra);
	if (!ipv6 && bpf_l3_csum_replace(skb, p->network + offsetof(struct iphdr, check), old, fresh, sizeof(fresh)))
		return -1;
	return bpf_skb_store_bytes(skb, at, &fresh, sizeof(fresh), 0);
}

/* A checksum that the device or a later hop will finish sums the surplus area too,
 * which is minus its length: its length makes that good. */
static __always_inline int seed_checksum(struct __sk_buff *skb, const struct packet *p, __u32 extra)
{
	struct sk_buff *kernel = bpf_cast_to_kern_ctx(skb);
	__u32 at = p->transport + offsetof(struct udphdr, check), sum;
	__u16 check;

	if (BPF_CORE_READ_BITFIELD(kernel, ip_summed) != CHECKSUM_PARTIAL)
		return 0;
	if (bpf_skb_load_bytes(skb, at, &check, sizeof(check)))
		return -1;
	sum = bpf_ntohs(check) + extra;
	check = bpf_htons((sum & 0xffff) + (sum >> 16));
	return bpf_skb_store_bytes(skb, at, &check, sizeof(check), 0);
}

/* Fills a tag in, but for its OCS. Returns 0, or -1 where there is no key, or no clock. */
GLOBAL int sign_datagram(struct demarc_udp_tag *tag, const struct packet *p, __u32 identity, __u8 flags, __u32 nonce)
{
	__u32 time = wall_seconds(bpf_ktime_get_boot_ns()), claim;
	__u64 mac = 0;

	if (!tag || !p || !time)
		return -1;
	claim = sign(&mac, identity, flags | DEMARC_TAG_DATAGRAM, &p->tuple, time, nonce);
	if (!claim)
		return -1;
	tag->kind = DEMARC_UDP_TAG_KIND;
	tag->length = DEMARC_UDP_TAG_LENGTH;
	tag->exid = bpf_htons(DEMARC_TAG_EXID);
	tag->claim = bpf_htonl(claim);
	tag->time = bpf_htonl(time);
	tag->nonce = bpf_htonl(nonce);
	tag->mac = mac;
	return 0;
}

/* Appends a tag to a datagram of a flow. Returns 0, or -1 where it does not fit:
 * segmented by the device, as large as the path allows, no key, no clock. The packet is
 * unchanged then, or must not be sent. */
GLOBAL int append_tag(struct __sk_buff *skb, struct packet *p, __u32 identity, __u8 flags, __u32 nonce)
{
	struct demarc_udp_tag tag = {};
	__u32 pad, extra, mtu = 0;

	if (!p)
		return -1;
	pad = p->length & 1;
	extra = DEMARC_UDP_TAG_SURPLUS + pad;
	if (skb->gso_segs > 1 || !p->end || p->transport + p->length != p->end || p->end != skb->len)
		return -1;
	if (bpf_check_mtu(skb, 0, &mtu, extra, 0))
		return -1;
	if (sign_datagram(&tag, p, identity, flags, nonce))
		return -1;
	tag.ocs = option_checksum(&tag, extra);
	if (bpf_skb_change_tail(skb, p->end + extra, 0))
		return -1;
	if (pad) {
		__u8 zero = 0;

		if (bpf_skb_store_bytes(skb, p->end, &zero, 1, 0))
			return -1;
	}
	if (bpf_skb_store_bytes(skb, p->end + pad, &tag, sizeof(tag), 0))
		return -1;
	if (lengthen(skb, p, extra))
		return -1;
	return seed_checksum(skb, p, extra);
}

/* Most frames: nothing in them is judged at a device. Told from what lies together at
 * their beginning; what does not is looked at closely. */
static __noinline bool ordinary(struct __sk_buff *skb, bool leaves)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end, *transport;
	struct bpf_sock *sk = skb->sk;
	__u32 payload;
	__u8 proto;

	if (sk && sk->family != AF_INET && sk->family != AF_INET6)
		return false;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + ETHERNET_HEADER;

		if ((void *)(ip + 1) > end || *(__u8 *)ip != 0x45 || ip->frag_off & bpf_htons(0x3fff))
			return false;
		proto = ip->protocol;
		payload = bpf_ntohs(ip->tot_len) - sizeof(*ip);
		transport = ip + 1;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + ETHERNET_HEADER;

		if ((void *)(ip + 1) > end)
			return false;
		proto = ip->nexthdr;
		payload = bpf_ntohs(ip->payload_len);
		transport = ip + 1;
	} else {
		return false;
	}
	if (proto == PROTO_TCP) {
		__u8 *flags = transport + 13;

		return !leaves || ((void *)(flags + 1) <= end && !(*flags & FLAG_SYN));
	}
	if (proto == PROTO_UDP && !leaves) {
		struct udphdr *udp = transport;

		return (void *)(udp + 1) <= end && bpf_ntohs(udp->len) == payload;
	}
	if (proto != PROTO_UDP || !sk)
		return false;
	sk = bpf_sk_fullsock(sk);
	return sk && goes_on(skb, cookie_of(skb), true, false, active_word());
}

/* Frames of packet sockets: they never met a socket hook. */
static __always_inline bool frame_of_workload(struct __sk_buff *skb, struct outcome *o)
{
	struct bpf_sock *sk = skb->sk;

	if (!sk || sk->family == AF_INET || sk->family == AF_INET6)
		return false;
	o->cgroup = bpf_skb_cgroup_id(skb);
	o->query.subject = identity_of(o->query.slot, o->cgroup);
	return o->query.subject >= DEMARC_ID_FIRST || o->query.subject == DEMARC_ID_PENDING;
}

/* The nonce of a flow that opens here. */
static __always_inline __u32 nonce_of(struct demarc_flow *flow)
{
	__u32 fresh = bpf_get_prandom_u32();

	if (!flow->nonce)
		__sync_val_compare_and_swap(&flow->nonce, 0, fresh ? fresh : 1);
	return *(volatile __u32 *)&flow->nonce;
}

/* Whether a flow is a workload's of this host, whose datagrams carry its tag, */
static __always_inline bool opens_with_proof(const struct demarc_flow *flow)
{
	return flow && flow->epoch_out && flow->provable && flow->opener >= DEMARC_ID_FIRST;
}

/* and what becomes of one that cannot: it passes where the other end has proved itself
 * before, or was admitted without. */
static __always_inline int without_tag(const struct demarc_flow *flow, const struct packet *p, struct outcome *o)
{
	if (flow->acceptor || flow->verdict_out == DEMARC_ALLOW)
		return TCX_NEXT;
	o->query.subject = flow->opener;
	__builtin_memcpy(&o->opener, &p->tuple, sizeof(o->opener));
	return refused(o, DEMARC_TAG_NO_ROOM) ? TCX_DROP : TCX_NEXT;
}

/* A datagram leaves in fragments, without a tag. The first one decides: the stack sends
 * none after one that was dropped. */
GLOBAL int fragment_leaves(struct __sk_buff *skb, struct packet *p, struct outcome *o)
{
	struct demarc_flow *flow;

	if (!p || !o || p->tuple.proto != PROTO_UDP || p->length || parse_ports(skb, p))
		return TCX_NEXT;
	flow = flow_at(&p->tuple);
	return opens_with_proof(flow) ? without_tag(flow, p, o) : TCX_NEXT;
}

/* The identity that a datagram leaves the host with: that of the flow that a
 * socket hook of this host wrote. */
static __always_inline int datagram_leaves(struct __sk_buff *skb, struct packet *p, struct outcome *o)
{
	__u64 now = o->query.now, since = talk_begins();
	struct demarc_tuple other;
	struct demarc_flow *flow;

	flow = flow_at(&p->tuple);
	if (opens_with_proof(flow)) {
		if (flow->acceptor && now - flow->tagged < DEMARC_UDP_TAG_REFRESH) {
			carry_on(skb, &p->tuple, DEMARC_ACTIVE_EPOCH(o->active), since, false);
			return TCX_NEXT;
		}
		if (!append_tag(skb, p, flow->opener, flow->omits & TAG_OMISSIONS, nonce_of(flow))) {
			flow->tagged = now;
			return TCX_NEXT;
		}
		return without_tag(flow, p, o);
	}
	reverse(&other, &p->tuple);
	flow = bpf_map_lookup_elem(&flows, &other);
	if (!flow || !flow->owed) {
		carry_on(skb, &p->tuple, DEMARC_ACTIVE_EPOCH(o->active), since, false);
		return TCX_NEXT;
	}
	if (flow->acceptor >= DEMARC_ID_FIRST && flow->verdict_in == DEMARC_ALLOW &&
	    !append_tag(skb, p, flow->acceptor, DEMARC_TAG_ANSWER | turned_omission(flow->omits & TAG_OMISSIONS), flow->nonce)) {
		flow->owed = 0;
		flow->tagged = now;
	}
	return TCX_NEXT;
}

/* Who may have written a tag on a SYN or SYN-ACK that is made here: the socket hook
 * saw that it is the socket's own. */
static __always_inline bool tagged_by_us(struct __sk_buff *skb, const struct packet *p, __u32 slot, __u32 claimed)
{
	struct bpf_sock *sk = skb->sk, *full;
	struct demarc_pending_syn *pending;
	struct demarc_tuple opener;

	if (!sk) { /* an answer by SYN cookie has no owner */
		reverse(&opener, &p->tuple);
		pending = pending_at(&opener, pending_mark(&opener));
		return pending && pending->self == claimed;
	}
	full = bpf_sk_fullsock(sk);
	if (full && full->type != SOCK_STREAM)
		return false;
	return identity_of(slot, bpf_skb_cgroup_id(skb)) == claimed;
}

/* A tag that somebody else than the kernel put on a packet that is made here, or comes out
 * of a workload's door. */
GLOBAL int foreign_tag(struct __sk_buff *skb, struct packet *p, struct outcome *o)
{
	struct demarc_tag tag = {};
	__u16 option[2];
	int found;

	if (!p || !o)
		return 0;
	if (p->tuple.proto == PROTO_TCP) {
		found = find_tag(skb, p, &tag);
		return found && (found < 0 || !tagged_by_us(skb, p, o->query.slot, bpf_ntohl(tag.claim) >> 8));
	}
	if (p->tuple.proto != PROTO_UDP || !p->end || p->transport + p->length >= p->end)
		return 0;
	if (bpf_skb_load_bytes(skb, p->transport + p->length + (p->length & 1) + 2, option, sizeof(option)))
		return 0;
	return option[0] == bpf_htons(DEMARC_UDP_TAG_KIND << 8 | DEMARC_UDP_TAG_LENGTH) &&
	       option[1] == bpf_htons(DEMARC_TAG_EXID);
}

/* A datagram leaves through more than one device where one of them is a port of
 * another: it was tagged at the first. */
GLOBAL int tagged_before(struct __sk_buff *skb, struct packet *p, struct outcome *o)
{
	struct demarc_udp_tag tag;
	__u32 claim;
	int good;

	if (!p || !o || !read_udp_tag(skb, p, &tag))
		return 0;
	claim = bpf_ntohl(tag.claim);
	if (!claims_datagram(claim))
		return 0;
	o->query.peer = claim >> 8;
	check_claim(&o->query, claim, tag.mac, &p->tuple, BINDING(bpf_ntohl(tag.time), bpf_ntohl(tag.nonce)));
	good = o->query.proof == DEMARC_PROOF_IDENTITY;
	o->query.peer = DEMARC_ID_NONE;
	o->query.proof = DEMARC_PROOF_NONE;
	o->query.bad = DEMARC_UNDECIDED;
	return good;
}

/* Keeps what the tag of an answer proved: who answers. Returns 0, or why not. */
GLOBAL int keep_answer(const struct packet *p, const struct outcome *o, __u64 mac, __u32 nonce)
{
	struct demarc_tuple opener;
	struct demarc_flow *flow;
	int spent;

	if (!p || !o)
		return DEMARC_NO_STATE;
	reverse(&opener, &p->tuple);
	flow = bpf_map_lookup_elem(&flows, &opener);
	if (!flow || !flow->epoch_out || flow->nonce != nonce) /* nobody here asked */
		return DEMARC_NO_STATE;
	if (o->omitted != turned_omission(flow->omits & TAG_OMISSIONS))
		return DEMARC_TAG_UNBOUND;
	spent = spend(mac, o->query.now);
	if (flow->acceptor == o->query.peer)
		return 0;
	if (spent)
		return spent;
	if (flow->acceptor) /* somebody else answers now, and is to be judged */
		flow->verdict_out = DEMARC_PROVISIONAL;
	flow->acceptor = o->query.peer;
	turn();
	return 0;
}

/* Keeps what a datagram's tag proved: who opened the flow. Returns 0, or why not. A tag
 * that was used before proves nothing new: the datagrams of a flow in one second have
 * the same one. */
GLOBAL int keep_proof(const struct packet *p, const struct outcome *o, __u64 mac, __u32 nonce)
{
	struct demarc_flow fresh = {}, *flow;
	int spent;

	if (!p || !o)
		return DEMARC_NO_STATE;
	spent = spend(mac, o->query.now);
	flow = flow_at(&p->tuple);
	if (flow && flow->epoch_out) /* it is opened here: the address is not the sender's */
		return DEMARC_NO_STATE;
	if (spent)
		return flow && flow->opener == o->query.peer && fresh_flow(flow, o->query.now) ? 0 : spent;
	if (!flow) {
		fresh.last = o->query.now;
		if (put_flow(&p->tuple, &fresh, BPF_NOEXIST))
			fault(DEMARC_FAULT_FLOW);
		flow = flow_at(&p->tuple);
	}
	if (!flow)
		return DEMARC_MAP_FULL;
	if (flow->opener != o->query.peer || flow->omits != o->omitted) {
		flow->opener = o->query.peer;
		flow->omits = o->omitted;
		flow->epoch_in = 0; /* another peer, or less that is bound: judged anew */
		turn();
	}
	flow->nonce = nonce;
	flow->owed = 1;
	flow->last = o->query.now;
	return 0;
}

/* ICMP that a kernel says by itself: errors, answers, neighbours, groups. */
static __always_inline bool icmp_of_kernel(const struct packet *p)
{
	if (p->tuple.proto == PROTO_ICMP)
		return p->icmp == 0 || p->icmp == 3 || p->icmp == 11 || p->icmp == 12;
	return (p->icmp >= 1 && p->icmp <= 4) || (p->icmp >= 129 && p->icmp <= 136) || p->icmp == 143;
}

static __always_inline bool link_local_or_none(const __u8 *address)
{
	const __u32 *word = (const __u32 *)address;

	if (is_ipv4(address))
		return !word[3];
	return (word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000) || !(word[0] | word[1] | word[2] | word[3]);
}

/* Asks the host's routes. Where they lead is then in `fib`. */
static __always_inline int routes(struct __sk_buff *skb, const __u8 *from, const __u8 *to, __u8 proto, __u32 flags,
				  struct bpf_fib_lookup *fib)
{
	bool anyone = is_group(from) || link_local_or_none(from); /* no address to route from */

	fib->l4_protocol = proto;
	if (is_ipv4(to)) {
		fib->family = AF_INET;
		fib->ipv4_src = anyone ? 0 : *(const __u32 *)(from + 12);
		fib->ipv4_dst = *(const __u32 *)(to + 12);
	} else {
		fib->family = AF_INET6;
		if (!anyone)
			__builtin_memcpy(fib->ipv6_src, from, 16);
		__builtin_memcpy(fib->ipv6_dst, to, 16);
	}
	return bpf_fib_lookup(skb, fib, sizeof(*fib), flags | BPF_FIB_LOOKUP_SKIP_NEIGH);
}

/* Whether the host sends on what comes in, and does not take it itself. */
GLOBAL int forwarded(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_fib_lookup fib = { .ifindex = skb->ifindex };

	if (!p || is_group(p->tuple.daddr) || link_local_or_none(p->tuple.daddr))
		return 0;
	switch (routes(skb, p->tuple.saddr, p->tuple.daddr, p->tuple.proto, 0, &fib)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_NO_NEIGH:
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		return 1;
	}
	return 0;
}

/* ICMP for a kernel that answers on behalf of a subject: what tells of errors, answers,
 * and finds neighbours is heard. A redirect would move routes, and what else there is
 * nobody needs. Returns 0 or why not. */
static __always_inline int icmp_heard(const struct packet *p, struct outcome *o, __u32 subject)
{
	if (icmp_of_kernel(p))
		return 0;
	if (p->icmp != (p->tuple.proto == PROTO_ICMP6 ? 128 : 8))
		return DEMARC_ICMP_TYPE;
	if (carefree(o->query.slot, subject))
		return 0;
	ask_forward(o, p, DEMARC_INGRESS);
	o->query.subject = subject;
	decide(&o->query);
	return o->query.verdict == DEMARC_DENY ? o->query.reason : 0;
}

/* ICMP that comes in from outside. The host's kernel answers on behalf of no workload; what
 * it only forwards is others' business. */
GLOBAL int icmp_arrives(struct __sk_buff *skb, const struct packet *p, struct outcome *o)
{
	return p && o && !forwarded(skb, p) ? icmp_heard(p, o, DEMARC_ID_UNMANAGED) : 0;
}

/* The same that goes on through a door: the kernel behind it answers on behalf of the
 * workload that lives there, if one was seen. What comes out of another door was judged
 * where it was sent. */
GLOBAL int icmp_enters(struct __sk_buff *skb, const struct packet *p, struct outcome *o)
{
	__u32 to = skb->ifindex, from = skb->ingress_ifindex, subject;
	struct demarc_door *door = bpf_map_lookup_elem(&doors, &to);

	if (!p || !o || !door || door->lodger == DEMARC_LODGER_BRIDGE || !from || bpf_map_lookup_elem(&doors, &from))
		return 0;
	o->cgroup = door->cgroup;
	subject = o->cgroup ? identity_of(o->query.slot, o->cgroup) : DEMARC_ID_NONE;
	return icmp_heard(p, o, subject < DEMARC_ID_FIRST ? DEMARC_ID_UNMANAGED : subject);
}

static __always_inline bool is_icmp(const struct packet *p)
{
	return p->tuple.proto == PROTO_ICMP || p->tuple.proto == PROTO_ICMP6;
}

static __always_inline int icmp_passes(struct __sk_buff *skb, struct packet *p, struct outcome *o, int parsed, bool leaves)
{
	int wrong = parsed;

	if (wrong == DEMARC_FRAGMENT && !p->length) /* the type is in the first one */
		wrong = bpf_skb_load_bytes(skb, p->transport, &p->icmp, sizeof(p->icmp));
	if (wrong)
		return TCX_NEXT;
	o->query.direction = DEMARC_INGRESS;
	__builtin_memcpy(&o->opener, &p->tuple, sizeof(o->opener));
	wrong = leaves ? icmp_enters(skb, p, o) : icmp_arrives(skb, p, o);
	return wrong && refused(o, wrong) ? TCX_DROP : TCX_NEXT;
}

static __always_inline int frame_leaves(struct __sk_buff *skb)
{
	struct outcome o;
	struct packet p;
	int wrong;

	begin(&o, active_word(), DEMARC_ID_NONE, 0, DEMARC_HOOK_DEVICE);
	if (!(DEMARC_ACTIVE_FLAGS(o.active) & DEMARC_ACTIVE_ON))
		return TCX_NEXT;
	if (frame_of_workload(skb, &o) && refused_aloud(&o, DEMARC_RAW_SOCKET))
		return TCX_DROP;
	wrong = parse(skb, ETHERNET_HEADER, &p);
	if (is_icmp(&p))
		return icmp_passes(skb, &p, &o, wrong, true);
	if (wrong)
		return wrong == DEMARC_FRAGMENT ? fragment_leaves(skb, &p, &o) : TCX_NEXT;
	if (tagged_before(skb, &p, &o))
		return TCX_NEXT;
	/* What is only forwarded is its sender's business. */
	if (!skb->ingress_ifindex && foreign_tag(skb, &p, &o)) {
		__builtin_memcpy(&o.opener, &p.tuple, sizeof(o.opener));
		if (refused(&o, DEMARC_TAG_BAD_IDENTITY))
			return TCX_DROP;
	}
	return p.tuple.proto == PROTO_UDP ? datagram_leaves(skb, &p, &o) : TCX_NEXT;
}

/* What comes out of a door goes anywhere: only what comes from outside is asked of
 * this host. */
GLOBAL int frame_arrives(struct __sk_buff *skb, bool door)
{
	struct demarc_udp_tag tag;
	struct outcome o;
	struct packet p;
	__u32 claim;
	__s32 age;
	int wrong;

	begin(&o, active_word(), DEMARC_ID_NONE, 0, DEMARC_HOOK_DEVICE);
	if (!(DEMARC_ACTIVE_FLAGS(o.active) & DEMARC_ACTIVE_ON))
		return TCX_NEXT;
	if (frame_of_workload(skb, &o) && refused_aloud(&o, DEMARC_RAW_SOCKET))
		return TCX_DROP;
	wrong = parse(skb, ETHERNET_HEADER, &p);
	if (!door && is_icmp(&p))
		return icmp_passes(skb, &p, &o, wrong, false);
	if (wrong || !read_udp_tag(skb, &p, &tag))
		return TCX_NEXT;
	claim = bpf_ntohl(tag.claim);
	o.query.direction = DEMARC_INGRESS;
	o.query.proof = DEMARC_PROOF_BAD;
	o.query.peer = claim >> 8;
	o.query.bad = DEMARC_TAG_MALFORMED;
	__builtin_memcpy(&o.opener, &p.tuple, sizeof(o.opener));
	if (claims_datagram(claim)) {
		o.omitted = claim & TAG_OMISSIONS;
		check_claim(&o.query, claim, tag.mac, &p.tuple, BINDING(bpf_ntohl(tag.time), bpf_ntohl(tag.nonce)));
		age = wall_seconds(o.query.now) - bpf_ntohl(tag.time);
		if (o.query.proof == DEMARC_PROOF_IDENTITY && (age > DEMARC_UDP_TAG_WINDOW || age < -DEMARC_UDP_TAG_WINDOW)) {
			o.query.proof = DEMARC_PROOF_BAD;
			o.query.bad = DEMARC_TAG_STALE;
		}
	}
	if (o.query.proof == DEMARC_PROOF_IDENTITY) {
		o.query.bad = claim & DEMARC_TAG_ANSWER ? keep_answer(&p, &o, tag.mac, bpf_ntohl(tag.nonce)) :
							  keep_proof(&p, &o, tag.mac, bpf_ntohl(tag.nonce));
		if (o.query.bad)
			o.query.proof = DEMARC_PROOF_BAD;
	}
	if (o.query.proof == DEMARC_PROOF_BAD && refused_aloud(&o, o.query.bad))
		return TCX_DROP;
	return TCX_NEXT;
}

#endif
