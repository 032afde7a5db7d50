/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * What a few packets carry: the first bytes of a connection, the names of DNS queries,
 * the size of pings. Looked at where a workload sends them and the verdict lets them pass
 * (glance.h), in a program that returns 1.
 */
#ifndef DEMARC_PAYLOAD_H
#define DEMARC_PAYLOAD_H

#define DNS_NAME_MAX 255
#define DNS_LONG 30 /* bytes of a name up to which it is not counted */
#define ECHO_LARGE 56 /* bytes that ping sends unless told otherwise */
#define NAME_BITS 128
#define NAME_STEP 8

/* The process that sends is the current one, if that is of the same workload. */
static __always_inline void name_sender(struct demarc_signal *e, const struct outcome *o)
{
	struct task_struct *task = bpf_get_current_task_btf();

	if (identity_of(o->query.slot, cgroup_of_task(task)) == o->query.subject)
		name_task(e, task);
}

/* The first data of a connection begin as SSH does. */
static __noinline int carries_banner(struct __sk_buff *skb)
{
	struct demarc_mark *m = mark_of(bpf_get_socket_cookie(skb));
	struct demarc_signal *e;
	struct packet p = {};
	struct outcome o;
	__u8 first[BANNER] = {};
	__u32 offset;

	if (parse(skb, 0, &p) || p.tuple.proto != PROTO_TCP)
		return 0;
	offset = p.transport + 20 + p.options;
	if (bpf_skb_load_bytes(skb, offset, first, sizeof(first)) || first[0] != 'S' || first[1] != 'S' || first[2] != 'H' || first[3] != '-' ||
	    (first[4] != '1' && first[4] != '2'))
		return 0;
	if (!about(&o, bpf_skb_cgroup_id(skb)))
		return 0;
	if (m)
		m->ssh = 1;
	/* Of a connection that came in it is this end that is told: somebody serves there. */
	__builtin_memcpy(&o.opener, &p.tuple, sizeof(o.opener));
	if (m && m->inbound) {
		__builtin_memcpy(o.opener.daddr, o.opener.saddr, 16);
		o.opener.dport = o.opener.sport;
		o.opener.sport = 0;
	}
	e = begin_signal(&o, told_of(o.query.subject, DEMARC_EGRESS, o.query.now), DEMARC_SIGNAL_BANNER, 0,
			 address_hash(o.opener.daddr) ^ o.opener.dport);
	if (!e)
		return 0;
	name_sender(e, &o);
	e->origin = m && m->inbound ? m->origin : 0;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* A name of a DNS query. */
struct dns_name {
	__u8 text[256]; /* dots stand in the places of lengths */
	__u32 length;   /* of the text, with its first dot */
	__u32 labels;
	__u32 longest;
	__u32 left; /* of the label that is read */
	__u32 hash;
	__u32 size; /* of the message */
};

/* Where names are taken apart; they do not fit the stack. Who is interrupted by another
 * query on the same CPU may tell a name that is mixed with that one's. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct dns_name);
} taken_apart SEC(".maps");

static long next_byte(__u32 i, void *unused)
{
	__u32 zero = 0;
	struct dns_name *n = bpf_map_lookup_elem(&taken_apart, &zero);
	__u8 c;

	if (!n)
		return 1;
	n->length = i;
	c = n->text[i & 255];
	if (n->left) {
		n->left--;
		n->hash = (n->hash ^ (c | 0x20)) * 16777619; /* FNV-1a, of small letters */
		return 0;
	}
	if (!c || c > 63)
		return 1;
	n->labels++;
	n->left = c;
	if (c > n->longest)
		n->longest = c;
	n->text[i & 255] = '.';
	return 0;
}

/* Counts distinct long names, and tells whenever NAME_STEP more bits of theirs are set. */
static __noinline int tell_name(struct packet *p, __u64 cgroup, struct dns_name *n)
{
	struct demarc_signal *e;
	struct demarc_seen *s;
	struct outcome o;
	__u32 from;

	if (!p || !n || !about(&o, cgroup))
		return 0;
	s = seen_doing(o.query.subject, o.query.now);
	if (!s || test_and_set(s->names, NAME_BITS / 32 - 1, mix(n->hash)) || ++s->names_set % NAME_STEP)
		return 0;
	__builtin_memcpy(&o.opener, &p->tuple, sizeof(o.opener));
	e = begin_signal(&o, told_of(o.query.subject, DEMARC_EGRESS, o.query.now), DEMARC_SIGNAL_DNS, 0, 0);
	if (!e)
		return 0;
	name_sender(e, &o);
	e->distinct = s->names_set;
	e->length = n->length - 1;
	e->labels = n->labels;
	e->bytes = n->size;
	from = n->length > sizeof(e->exe) - 1 ? n->length - (sizeof(e->exe) - 1) : 1;
	from &= 255;
	if (from <= sizeof(n->text) - sizeof(e->exe))
		bpf_probe_read_kernel(e->exe, sizeof(e->exe) - 1, n->text + from);
	for (int i = 0; i < sizeof(e->exe); i++) /* what a former name left behind */
		if (from + i >= n->length)
			e->exe[i] = 0;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* A query for a long name; over TCP each message has its length before it. Of its
 * questions the first counts, there is no second in practice, and of a segment's messages
 * too. */
static __noinline int carries_name(struct __sk_buff *skb)
{
	struct packet p = {};
	struct dns_name *n;
	__u32 zero = 0, room, offset;
	__u8 header[12];

	n = bpf_map_lookup_elem(&taken_apart, &zero);
	if (!n || parse(skb, 0, &p) || p.tuple.dport != DNS_PORT)
		return 0;
	if (p.tuple.proto == PROTO_UDP)
		offset = p.transport + 8;
	else if (p.tuple.proto == PROTO_TCP)
		offset = p.transport + 20 + p.options + 2;
	else
		return 0;
	if (bpf_skb_load_bytes(skb, offset, header, sizeof(header)) || header[2] & 0x80 || !header[5])
		return 0;
	n->size = skb->len - offset;
	offset += sizeof(header);
	if (offset >= skb->len)
		return 0;
	room = skb->len - offset;
	if (room > DNS_NAME_MAX)
		room = DNS_NAME_MAX;
	room--; /* Linux 6.1 keeps one bound of a number, so the other one is added after it */
	barrier_var(room);
	if (room >= DNS_NAME_MAX || bpf_skb_load_bytes(skb, offset, n->text, room + 1))
		return 0;
	n->length = n->labels = n->longest = n->left = 0;
	n->hash = 2166136261;
	bpf_loop(room + 1, next_byte, 0, 0);
	if (n->length > DNS_LONG)
		tell_name(&p, bpf_skb_cgroup_id(skb), n);
	return 0;
}

/* A ping with more in it than ping has. */
static __noinline int carries_echo(struct __sk_buff *skb)
{
	struct demarc_signal *e;
	struct demarc_seen *s;
	struct packet p = {};
	struct outcome o;
	__u32 carried;

	if (parse(skb, 0, &p) || !p.end || p.end <= p.transport + 8)
		return 0;
	if (!(p.tuple.proto == PROTO_ICMP && (p.icmp == 8 || p.icmp == 0)) && !(p.tuple.proto == PROTO_ICMP6 && (p.icmp == 128 || p.icmp == 129)))
		return 0;
	carried = p.end - p.transport - 8;
	if (carried <= ECHO_LARGE || !about(&o, bpf_skb_cgroup_id(skb)))
		return 0;
	s = seen_doing(o.query.subject, o.query.now);
	if (!s || s->echoes == 0xffff)
		return 0;
	s->echoes++;
	if (s->echoes > 16 && (s->echoes & (s->echoes - 1)))
		return 0;
	__builtin_memcpy(&o.opener, &p.tuple, sizeof(o.opener));
	e = begin_signal(&o, told_of(o.query.subject, DEMARC_EGRESS, o.query.now), DEMARC_SIGNAL_ICMP, 0, 0);
	if (!e)
		return 0;
	name_sender(e, &o);
	e->count = s->echoes > 16 ? s->echoes / 2 : 1;
	e->bytes = carried;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

static __always_inline void look_at_payload(struct __sk_buff *skb)
{
	switch (protocol_of(skb)) {
	case PROTO_TCP:
		if (asks_for_name(skb))
			carries_name(skb);
		else
			carries_banner(skb);
		break;
	case PROTO_UDP:
		carries_name(skb);
		break;
	case PROTO_ICMP:
	case PROTO_ICMP6:
		carries_echo(skb);
	}
}

#endif
