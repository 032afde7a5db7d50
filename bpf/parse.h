/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Headers to values. Every function returns 0, or the reason why the packet is
 * refused: what cannot be parsed is not let through.
 */
#ifndef DEMARC_PARSE_H
#define DEMARC_PARSE_H

#define ETHERNET_HEADER 14
#define IPV6_EXTENSIONS 6
#define FLAG_FIN 0x01
#define FLAG_SYN 0x02
#define FLAG_RST 0x04
#define FLAG_ACK 0x10

struct packet {
	struct demarc_tuple tuple; /* as the packet has it, sender first; ports in host order */
	__u32 network;		   /* offset of the IP header: 0 at sockets, that of a frame at devices */
	__u32 transport;	   /* offset of the transport header */
	__u32 end;		   /* offset behind the IP packet, 0 if it is a super-packet */
	__u16 length;		   /* of a UDP datagram; of a fragment: where it begins, in 8 bytes */
	__u32 seq;
	__u32 ack;
	__u8 flags;   /* TCP */
	__u8 options; /* bytes of TCP options */
	__u8 icmp;    /* ICMP type */
	__u8 tag;     /* offset of the tag in the TCP options + 1; 0 = none was found */
};

static __always_inline void map_ipv4(__u8 *out, __u32 address)
{
	__builtin_memset(out, 0, 10);
	out[10] = out[11] = 0xff;
	__builtin_memcpy(out + 12, &address, 4);
}

/* Copies bytes of a packet; those that lie together without a call. Returns true if
 * the packet is too short. */
static __always_inline bool cut(struct __sk_buff *skb, __u32 offset, void *to, __u32 size)
{
	void *from = (void *)(long)skb->data + offset;

	if (offset <= sizeof(struct ipv6hdr) && from + size <= (void *)(long)skb->data_end) {
		__builtin_memcpy(to, from, size);
		return false;
	}
	return bpf_skb_load_bytes(skb, offset, to, size);
}

static __always_inline int parse_ipv4(struct __sk_buff *skb, struct packet *p)
{
	struct iphdr ip;
	__u16 total;

	if (cut(skb, p->network, &ip, sizeof(ip)))
		return DEMARC_MALFORMED;
	if (ip.version != 4 || ip.ihl < 5)
		return DEMARC_MALFORMED;
	map_ipv4(p->tuple.saddr, ip.saddr);
	map_ipv4(p->tuple.daddr, ip.daddr);
	p->tuple.proto = ip.protocol;
	if (ip.ihl > 5)
		return DEMARC_IP_OPTIONS;
	total = bpf_ntohs(ip.tot_len);
	/* 0 is a super-packet beyond 64 KiB, made by the stack itself. */
	if (total ? total < sizeof(ip) : skb->len <= 0xffff)
		return DEMARC_MALFORMED;
	p->transport = p->network + sizeof(ip);
	p->end = total ? p->network + total : 0;
	if (ip.frag_off & bpf_htons(0x3fff)) {
		p->length = bpf_ntohs(ip.frag_off) & 0x1fff;
		return DEMARC_FRAGMENT;
	}
	return 0;
}

static __always_inline int parse_ipv6(struct __sk_buff *skb, struct packet *p)
{
	struct ipv6hdr ip;
	__u32 offset = p->network + sizeof(ip);
	struct {
		__u8 next;
		__u8 zero;
		__u16 offset;
		__u32 id;
	} fragment;
	__u8 next, header[2];

	if (cut(skb, p->network, &ip, sizeof(ip)))
		return DEMARC_MALFORMED;
	if (ip.version != 6)
		return DEMARC_MALFORMED;
	p->end = ip.payload_len ? offset + bpf_ntohs(ip.payload_len) : 0;
	__builtin_memcpy(p->tuple.saddr, &ip.saddr, 16);
	__builtin_memcpy(p->tuple.daddr, &ip.daddr, 16);
	next = ip.nexthdr;
	for (int i = 0; i < IPV6_EXTENSIONS; i++) {
		switch (next) {
		case 0: /* hop-by-hop options */
		case 60: /* destination options */
			if (bpf_skb_load_bytes(skb, offset, header, sizeof(header)))
				return DEMARC_MALFORMED;
			next = header[0];
			offset += (header[1] + 1) * 8;
			continue;
		case 43: /* routing: the packet would go elsewhere than it says */
			return DEMARC_IP_OPTIONS;
		case 44:
			if (bpf_skb_load_bytes(skb, offset, &fragment, sizeof(fragment)))
				return DEMARC_MALFORMED;
			p->tuple.proto = fragment.next;
			p->transport = offset + sizeof(fragment);
			p->length = bpf_ntohs(fragment.offset) >> 3;
			return DEMARC_FRAGMENT;
		}
		p->tuple.proto = next;
		p->transport = offset;
		return 0;
	}
	return DEMARC_IP_OPTIONS; /* too many headers to be honest */
}

static __always_inline int parse_tcp(struct __sk_buff *skb, struct packet *p)
{
	struct tcphdr tcp;

	if (cut(skb, p->transport, &tcp, sizeof(tcp)) || tcp.doff < 5)
		return DEMARC_MALFORMED;
	p->tuple.sport = bpf_ntohs(tcp.source);
	p->tuple.dport = bpf_ntohs(tcp.dest);
	p->seq = bpf_ntohl(tcp.seq);
	p->ack = bpf_ntohl(tcp.ack_seq);
	p->flags = ((__u8 *)&tcp)[13];
	p->options = (tcp.doff - 5) * 4;
	return 0;
}

static __always_inline int parse_udp(struct __sk_buff *skb, struct packet *p)
{
	struct udphdr udp;
	__u16 length;

	if (cut(skb, p->transport, &udp, sizeof(udp)))
		return DEMARC_MALFORMED;
	length = bpf_ntohs(udp.len);
	if (length ? length < sizeof(udp) || p->transport + length > skb->len : skb->len <= 0xffff)
		return DEMARC_MALFORMED;
	/* Before sockets see it, the stack cuts a datagram to its own length: what
	 * was behind it (RFC 9868) is still in the IP header's. */
	if (p->end > skb->len && p->transport + length != skb->len)
		return DEMARC_MALFORMED;
	p->tuple.sport = bpf_ntohs(udp.source);
	p->tuple.dport = bpf_ntohs(udp.dest);
	p->length = length;
	return 0;
}

/* ICMP: the echo identifier stands for the source port, so that an answer finds
 * its question. */
static __always_inline int parse_icmp(struct __sk_buff *skb, struct packet *p)
{
	__u8 header[8];
	__u16 identifier;

	if (bpf_skb_load_bytes(skb, p->transport, header, sizeof(header)))
		return DEMARC_MALFORMED;
	p->icmp = header[0];
	__builtin_memcpy(&identifier, header + 4, 2);
	p->tuple.sport = bpf_ntohs(identifier);
	return 0;
}

/* The ports that UDP, UDP-Lite and SCTP begin with. */
static __always_inline int parse_ports(struct __sk_buff *skb, struct packet *p)
{
	__u16 ports[2];

	if (bpf_skb_load_bytes(skb, p->transport, ports, sizeof(ports)))
		return DEMARC_MALFORMED;
	p->tuple.sport = bpf_ntohs(ports[0]);
	p->tuple.dport = bpf_ntohs(ports[1]);
	return 0;
}

GLOBAL int parse(struct __sk_buff *skb, __u32 network, struct packet *p)
{
	int refused;

	if (!p)
		return DEMARC_MALFORMED;
	__builtin_memset(p, 0, sizeof(*p));
	p->network = network;
	refused = skb->protocol == bpf_htons(ETH_P_IP)	  ? parse_ipv4(skb, p) :
		  skb->protocol == bpf_htons(ETH_P_IPV6) ? parse_ipv6(skb, p) :
							    DEMARC_MALFORMED;
	if (refused)
		return refused;
	if (p->end > skb->len && p->tuple.proto != PROTO_UDP)
		return DEMARC_MALFORMED;
	switch (p->tuple.proto) {
	case PROTO_TCP:
		return parse_tcp(skb, p);
	case PROTO_UDP:
		return parse_udp(skb, p);
	case PROTO_ICMP:
	case PROTO_ICMP6:
		return parse_icmp(skb, p);
	case PROTO_SCTP:
		return parse_ports(skb, p);
	}
	return 0;
}

/* The same flow as its other end sends it. */
static __always_inline void reverse(struct demarc_tuple *out, const struct demarc_tuple *in)
{
	__builtin_memcpy(out->saddr, in->daddr, 16);
	__builtin_memcpy(out->daddr, in->saddr, 16);
	out->sport = in->dport;
	out->dport = in->sport;
	out->proto = in->proto;
	__builtin_memset(out->zero, 0, sizeof(out->zero));
	if (in->proto == PROTO_ICMP || in->proto == PROTO_ICMP6) { /* the identifier stays in place */
		out->sport = in->sport;
		out->dport = in->dport;
	}
}

#endif
