/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * What the kernel programs and Go agree on: every number, layout, byte order and
 * unit that both sides read. abi.go says the same in Go; a test compares the two
 * field by field through BTF.
 *
 * Byte order: addresses are 16 bytes in network order, IPv4 as v4-mapped IPv6
 * (::ffff:a.b.c.d). Ports are host order unless a comment says otherwise. Times
 * are nanoseconds of CLOCK_BOOTTIME, which no clock step moves; 0 = no bound.
 */
#ifndef DEMARC_ABI_H
#define DEMARC_ABI_H

#ifndef __VMLINUX_H__
#include <linux/types.h>
#endif

#define DEMARC_ABI_VERSION 4

/* Generations that can be loaded at once: active, fallback, one in shadow and a
 * candidate. A generation lives in one slot of every outer map. */
#define DEMARC_SLOTS 4

/* Identities (24 bits). Below DEMARC_ID_FIRST are reserved. */
#define DEMARC_ID_NONE 0
#define DEMARC_ID_UNMANAGED 1
#define DEMARC_ID_KERNEL 2
#define DEMARC_ID_PENDING 3
#define DEMARC_ID_CANARY 4 /* may do nothing, too */
#define DEMARC_ID_FIRST 16
#define DEMARC_ID_MAX 0xffffff

/* Zero denies. */
enum demarc_verdict {
	DEMARC_DENY = 0,
	DEMARC_ALLOW = 1,
	DEMARC_PROVISIONAL = 2, /* may open; decided when the peer's proof is known */
	DEMARC_AUDIT = 3,	/* events and counters only: would be denied, mode observe */
	DEMARC_WOULD_DENY = 4,	/* the same: passes, and the generation in shadow denies it */
	DEMARC_WOULD_ALLOW = 5, /* the same: denied, and the generation in shadow lets it pass */
};

/* Why. Travels with every verdict. */
enum demarc_reason {
	DEMARC_UNDECIDED = 0,	      /* nothing was decided; denied */
	DEMARC_BY_CROSSING = 1,	      /* allowed: a crossing declares it */
	DEMARC_BY_UNMANAGED = 2,      /* allowed: between unmanaged peers */
	DEMARC_BY_REPLY = 3,	      /* allowed: answers an admitted flow */
	DEMARC_BY_KERNEL = 4,	      /* allowed: the kernel's own control packet */
	DEMARC_UNPROVEN = 5,	      /* provisional: waits for the peer's proof */
	DEMARC_NO_CROSSING = 6,	      /* nobody declared it */
	DEMARC_NOT_IN_WINDOW = 7,     /* declared, but not for now */
	DEMARC_OVER_LIMIT = 8,	      /* the crossing's rate is used up */
	DEMARC_TAG_MISSING = 9,	      /* the peer had to prove itself and did not */
	DEMARC_TAG_MALFORMED = 10,
	DEMARC_TAG_BAD_MAC = 11,
	DEMARC_TAG_WRONG_EPOCH = 12,
	DEMARC_TAG_BAD_IDENTITY = 13, /* proven key, but no identity of this policy, or not the sender's own */
	DEMARC_TAG_NO_ROOM = 14,      /* our own tag did not fit or was not written */
	DEMARC_PENDING = 15,	      /* the subject's identity is not known yet */
	DEMARC_UNBOUND = 16,	      /* the socket's cgroup has no binding */
	DEMARC_TASK_MISMATCH = 17,    /* the task is not of the socket's identity */
	DEMARC_RAW_SOCKET = 18,
	DEMARC_PROTOCOL = 19,	      /* socket type or protocol that managed workloads may not use */
	DEMARC_MALFORMED = 20,	      /* packet cannot be parsed */
	DEMARC_FRAGMENT = 21,
	DEMARC_IP_OPTIONS = 22,	      /* IPv4 options, routing headers, too many extension headers */
	DEMARC_NO_STATE = 23,	      /* mid-stream packet of no admitted handshake */
	DEMARC_REVOKED = 24,	      /* established, and lost its crossing */
	DEMARC_UNPROVEN_LIMIT = 25,   /* too many datagrams without a proven reply */
	DEMARC_PORT_OWNED = 26,	      /* the port is bound by another identity */
	DEMARC_SPOOF = 27,	      /* asked to send from an address that is not its own */
	DEMARC_QUARANTINED = 28,
	DEMARC_NO_POLICY = 29,	      /* no generation is active */
	DEMARC_MAP_FULL = 30,
	DEMARC_TAG_STALE = 31,	      /* a datagram's tag from another time */
	DEMARC_TAG_UNBOUND = 32,      /* leaves an address out that the crossing's `nat` does not */
	DEMARC_TAG_REPLAYED = 33,     /* was admitted before */
	DEMARC_NO_SOCKET = 34,	      /* left a workload's device without being what a socket of it sent */
	DEMARC_ICMP_TYPE = 35,	      /* a type that nobody has to send us */
	DEMARC_DECOY_TOUCHED = 36,    /* a crossing that nobody should touch */
	DEMARC_REASONS = 37,
};

enum demarc_direction {
	DEMARC_EGRESS = 0,  /* the subject opens */
	DEMARC_INGRESS = 1, /* the subject accepts */
};

/* What is known of the peer. */
enum demarc_proof {
	DEMARC_PROOF_NONE = 0,	  /* it proved nothing */
	DEMARC_PROOF_IDENTITY = 1, /* it is .peer */
	DEMARC_PROOF_BAD = 2,	  /* it tried and failed */
	DEMARC_PROOF_UNKNOWN = 3, /* it was not asked yet: the flow is being opened */
};

/* Peer kinds of a rule key; policy/image says what they mean. */
enum demarc_peer {
	DEMARC_PEER_IDENTITY = 1,
	DEMARC_PEER_ZONE = 2,
	DEMARC_PEER_ADDRESS = 3,
	DEMARC_PEER_ANY = 4,
	DEMARC_PEER_PROVEN = 5,
};

enum demarc_need {
	DEMARC_NEED_BOTH = 0,
	DEMARC_NEED_SENDER = 1,
	DEMARC_NEED_NONE = 2,
};

/* Which end of a crossing is translated on the way. */
enum demarc_nat {
	DEMARC_NAT_NONE = 0,
	DEMARC_NAT_SOURCE = 1,
	DEMARC_NAT_DESTINATION = 2,
};

#define DEMARC_ALTERNATIVES 4
#define DEMARC_NO_CROSSING_INDEX 0xffffffff
#define DEMARC_TABLES_ALONE 0xfffffffe /* of a question: what the tables say, quarantined or not */

/* Key of the rules map: who, with whom, on what class of ports. */
struct demarc_rule_key {
	__u32 subject; /* identity */
	__u32 peer;    /* enum demarc_peer << 24 | value */
	__u16 class;   /* port class */
	__u8 direction;
	__u8 zero;
};

/* Crossings that admit it, ascending; unused entries are
 * DEMARC_NO_CROSSING_INDEX. */
struct demarc_rule {
	__u32 crossing[DEMARC_ALTERNATIVES];
};

/* One crossing as the kernel needs it, by its index in the image. */
struct demarc_crossing {
	__u32 number; /* stable number of the name */
	__u8 need;    /* enum demarc_need */
	__u8 nat;
	__u8 log;     /* 0 denied, 1 all, 2 none */
	__u8 flags;   /* enum demarc_crossing_flags */
	__u64 since;
	__u64 until;
	__u64 interval; /* ns between two new flows at the limit; 0 = unlimited */
	__u64 slack;	/* ns a burst may run ahead: (burst - 1) * interval */
};

enum demarc_crossing_flags {
	DEMARC_CROSSING_DECOY = 1,    /* nobody should touch it */
	DEMARC_CROSSING_DROP = 2,     /* refuse by dropping */
	DEMARC_CROSSING_FORENSIC = 4, /* what a quarantined subject keeps */
};

/* What an image knows of an identity. */
struct demarc_subject {
	__u16 zone;
	__u16 flags; /* enum demarc_subject_flags */
};

enum demarc_subject_flags {
	DEMARC_SUBJECT_OUTBOUND = 1, /* may open flows that nothing declares (unmanaged) */
	DEMARC_SUBJECT_INBOUND = 2,  /* may accept them (unmanaged) */
};
/* Flag: the subject has rules in a direction for peers of a kind. Without it nobody
 * looks for one. */
#define DEMARC_SUBJECT_MEETS(direction, kind) (1 << (3 + (direction)*5 + (kind)))

/* Port classes: one row of 65536 a protocol, and one shared by ICMP types at 0,
 * ICMPv6 types at 256 and everything else at 512. */
enum demarc_port_row {
	DEMARC_ROW_TCP = 0,
	DEMARC_ROW_UDP = 1,
	DEMARC_ROW_SCTP = 2,
	DEMARC_ROW_OTHER = 3,
	DEMARC_ROWS = 4,
};

struct demarc_port_classes {
	__u16 class[65536];
};

/* Key of the network trie. The family comes first, so that ::/0 does not contain
 * IPv4 addresses. Length in bits: 8 + that of the prefix, IPv4 96 more. */
struct demarc_prefix_key {
	__u32 length;
	__u8 family; /* 4 or 6 */
	__u8 address[16];
	__u8 zero[3];
};
#define DEMARC_PREFIX_BITS (8 + 128)

/* Key of the selector tries: a path or a name, zero-padded. */
#define DEMARC_PATH_MAX 252
struct demarc_path_key {
	__u32 length; /* bits */
	char path[DEMARC_PATH_MAX];
};

/* What a systemd unit name's prefix leads to: the longest prefix before the '*'
 * is the key, each suffix after it is tried in turn. An exact name is the key
 * with its terminating NUL and one entry with an empty suffix. */
#define DEMARC_UNIT_SUFFIX 28
#define DEMARC_UNIT_ALTERNATIVES 4
struct demarc_unit_match {
	__u32 identity; /* 0 = end of the list */
	__u16 length;	/* bytes of suffix */
	__u16 least;	/* bytes of the shortest name that matches */
	char suffix[DEMARC_UNIT_SUFFIX];
};
struct demarc_unit {
	struct demarc_unit_match match[DEMARC_UNIT_ALTERNATIVES];
};

/* A cgroup and who lives in it, one identity a generation slot. Key: cgroup id
 * (inode number of its directory). */
struct demarc_binding {
	__u32 identity[DEMARC_SLOTS];
	__u32 flags; /* enum demarc_binding_flags */
	__u32 zero;
	__u64 since; /* when it was bound */
};

enum demarc_binding_flags {
	DEMARC_BINDING_SLICES = 1, /* only slices above: units may be its children */
	DEMARC_BINDING_ROOT = 2,   /* the managed root itself */
};

/* The one word that says what is in force, and its neighbours. The core writes
 * it; programs read `active` once for each verdict. */
struct demarc_state {
	__u64 active; /* DEMARC_ACTIVE(): slot, flags, epoch */
	__u64 filling; /* bit per slot: cgroup_mkdir binds for these slots too */
	__u64 tag_epoch; /* epoch whose key tags what we send */
	__u64 wall;	 /* Unix time minus CLOCK_BOOTTIME, ns: tags are bound to the time; 0 = not known */
	__u64 fallback;	 /* DEMARC_ACTIVE(): takes the place of `active` at `deadline`; its epoch is the later one */
	__u64 deadline;	 /* CLOCK_BOOTTIME, ns; 0 = `active` is confirmed */
	__u64 quarantines; /* entries of the map of that name: without any, nobody looks */
	__u64 shadow;	/* DEMARC_ACTIVE() of the generation in shadow; 0 = none */
	__u64 shadowed; /* until when it is asked, CLOCK_BOOTTIME, ns */
	__u64 spared;	/* until when the last change kept what it would have cut, the same */
};

/* The highest version that was ever in force, and the SHA-256 of that image. */
struct demarc_floor {
	__u64 version;
	__u8 digest[32];
};

/* Layout of demarc_state.active. The epoch grows with every change of meaning
 * (a flip, a changed binding), never repeats, and is what cached verdicts are
 * kept under. */
#define DEMARC_ACTIVE_SLOT(w) ((__u32)((w)&0xff))
#define DEMARC_ACTIVE_FLAGS(w) ((__u32)(((w) >> 8) & 0xff))
#define DEMARC_ACTIVE_EPOCH(w) ((__u32)((w) >> 32))
enum demarc_active_flags {
	DEMARC_ACTIVE_ON = 1,	   /* a generation is active; otherwise managed sockets do nothing */
	DEMARC_ACTIVE_OBSERVE = 2, /* report what would be denied, and let it pass */
	DEMARC_ACTIVE_DECOY = 8, /* some crossing is a decoy */
	DEMARC_ACTIVE_UNMANAGED = 4, /* some crossing names `unmanaged`: record its flows */
	DEMARC_ACTIVE_SHADOW = 16, /* another generation is asked beside this one */
};

/* A tag key. key[0], key[1]: SipHash key as two little-endian words. */
struct demarc_key {
	__u64 key[2];
	__u64 since;
	__u64 until;
	__u32 valid; /* 0 = no key in this epoch */
	__u32 zero;
};
#define DEMARC_EPOCHS 16

/* Keys by pair of nodes and epoch: the fleet's own keys are those of pair 0. */
#define DEMARC_PAIRS 1
#define DEMARC_KEY_INDEX(pair, epoch) ((pair)*DEMARC_EPOCHS + (epoch))

/*
 * The TCP tag (option kind 253, RFC 6994 shared experiment), 16 bytes:
 *
 *	kind=253, length=16, ExID=0xD3AC, claim, mac
 *
 * claim, big endian: identity:24 | epoch:4 | flags:4.
 * mac: SipHash-2-4 over demarc_tag_input, its 64-bit result in little-endian
 * byte order as the reference implementation writes it.
 */
#define DEMARC_TAG_KIND 253
#define DEMARC_TAG_LENGTH 16
#define DEMARC_TAG_EXID 0xD3AC
enum demarc_tag_flags {
	DEMARC_TAG_ANSWER = 1,	       /* a SYN-ACK, or a datagram that answers */
	DEMARC_TAG_NO_SOURCE = 2,      /* source address and port are left out (as zero) */
	DEMARC_TAG_NO_DESTINATION = 4, /* the destination's are */
	DEMARC_TAG_DATAGRAM = 8,       /* in UDP */
};

/*
 * The UDP tag: one option in the surplus area of RFC 9868, behind the datagram's
 * own data, at an even offset from the UDP header (one zero byte of padding where
 * needed):
 *
 *	OCS (2 bytes), kind=127, length=24, ExID=0xD3AC, claim, time, nonce, mac
 *
 * time: Unix seconds, big endian. nonce: a number of chance that the opener gives a
 * flow; an answer repeats it, and so belongs to that flow alone. mac: as for TCP, with
 * time in the place of the sequence number and nonce in that of what is acknowledged.
 */
#define DEMARC_UDP_TAG_KIND 127
#define DEMARC_UDP_TAG_LENGTH 24
#define DEMARC_UDP_TAG_SURPLUS 26 /* with the OCS, without padding */
#define DEMARC_UDP_TAG_WINDOW 30  /* seconds that clocks may differ */
#define DEMARC_UDP_TAG_REFRESH (60ULL * 1000000000ULL)

/* What the MAC covers, 48 bytes, all fields in network order. */
struct demarc_tag_input {
	__u32 claim;
	__u32 seq;	/* sender's initial sequence number; datagram: time */
	__u32 acked;	/* SYN-ACK: the acknowledgement number; SYN: the time slot; datagram: the nonce */
	__u16 sport;
	__u16 dport;
	__u8 saddr[16];
	__u8 daddr[16];
};

/*
 * A SYN has nothing of the receiver's to be bound to, so it is bound to the time:
 * slots of 2^36 ns (68.7 s) since the Unix epoch. The receiver takes its own slot
 * and the neighbour that it is nearer to, so that clocks may differ by 34 s, and a
 * tag holds for at most 2^37 ns.
 */
#define DEMARC_TAG_SLOT_SHIFT 36

/*
 * The memory of tags that were admitted: 2^18 buckets, of which a MAC has two among
 * 64 neighbours. An entry is the upper 40 bits of the MAC and when it was admitted, in steps of 2^32
 * ns of CLOCK_BOOTTIME; 0 = empty. Entries are kept for longer than any tag holds,
 * also while a clock that went back is slewed, and then give way.
 */
#define DEMARC_REPLAY_BUCKETS (1 << 18)
#define DEMARC_REPLAY_ENTRIES 8
#define DEMARC_REPLAY_STEP_SHIFT 32
#define DEMARC_REPLAY_STEPS 37 /* 159 s */
struct demarc_replay_bucket {
	__u64 entry[DEMARC_REPLAY_ENTRIES];
};

/* A flow, opener first. ICMP echo: sport = identifier, dport = 0. */
struct demarc_tuple {
	__u8 saddr[16];
	__u8 daddr[16];
	__u16 sport;
	__u16 dport;
	__u8 proto;
	__u8 zero[3];
};

/* What a TCP socket proved and was allowed, in its socket storage. */
struct demarc_socket {
	__u32 peer;
	__u32 epoch;   /* the verdict holds while this is the active one */
	__u32 crossing;
	__u16 port;    /* the port that was judged */
	__u8 verdict;
	__u8 reason;
	__u8 proof;
	__u8 direction;
	__u8 zero[6];
	__u64 until;
	__u64 spared; /* it passes until then although a change cut it; 0 = it does not */
};

/* A conversation without handshake (everything but TCP), and local proof: what
 * the sending hooks of this host saw. Key: demarc_tuple. */
struct demarc_flow {
	__u32 opener;	/* identity that sent the first packet here; 0 = it came from elsewhere */
	__u32 acceptor; /* identity that answered here; 0 = nobody yet */
	__u32 epoch_out;
	__u32 epoch_in;
	__u8 verdict_out; /* opener's side */
	__u8 verdict_in;  /* acceptor's side */
	__u8 sender_only; /* the crossing asks no proof of the acceptor */
	__u8 provable;	  /* the opener's datagrams carry its tag to other hosts */
	__u32 unproven; /* packets sent before the acceptor proved itself */
	__u64 last;
	__u64 until_out;
	__u64 until_in;
	__u64 tagged; /* when a tag of ours last left in it */
	__u8 owed;    /* the opener proved itself from another host: the next answer carries our tag */
	__u8 omits;   /* what the opener's tags leave out: DEMARC_TAG_NO_SOURCE, ..._NO_DESTINATION */
	__u8 zero[2];
	__u32 nonce;  /* of the tags in this flow; 0 = none has left yet, or come */
};
#define DEMARC_UNPROVEN_MAX 16
#define DEMARC_FLOW_IDLE (180ULL * 1000000000ULL)

enum demarc_lodger {
	DEMARC_LODGER_UNKNOWN = 0,
	DEMARC_LODGER_CAREFREE = 1, /* only unmanaged processes were seen to send from there */
	DEMARC_LODGER_WORKLOAD = 2, /* a workload was; it stays that */
	DEMARC_LODGER_BRIDGE = 3,   /* it is no door itself: a bridge of several */
};

/* A workload's door: the host's end of its veth. */
struct demarc_door {
	__u32 via;    /* index of the device that routes to it name: itself, or its bridge */
	__u32 lodger; /* enum demarc_lodger */
	__u64 cgroup; /* of the workload that sent last; 0 = none did yet */
};

/* A caller that is to learn that it was refused. */
struct demarc_refusal {
	struct demarc_tuple tuple; /* opener first */
	__u32 ack; /* TCP: what the reset acknowledges, host order */
	__u32 zero;
};
#define DEMARC_REFUSAL_INTERVAL 1000000ULL /* ns between two, in the long run */
#define DEMARC_REFUSAL_SLACK (100 * DEMARC_REFUSAL_INTERVAL)

/* Who bound a port first. */
struct demarc_port_key {
	__u64 netns; /* cookie */
	__u16 port;
	__u8 proto;
	__u8 zero[5];
};
struct demarc_port_owner {
	__u32 identity;
	__u32 sockets;
};

/* What the events rings carry. */
enum demarc_event_kind {
	DEMARC_EVENT_VERDICT = 1,
};

enum demarc_hook {
	DEMARC_HOOK_SOCK_CREATE = 1,
	DEMARC_HOOK_CONNECT = 2,
	DEMARC_HOOK_SENDMSG = 3,
	DEMARC_HOOK_BIND = 4,
	DEMARC_HOOK_SOCKOPT = 5,
	DEMARC_HOOK_EGRESS = 6,
	DEMARC_HOOK_INGRESS = 7,
	DEMARC_HOOK_ESTABLISHED = 8,
	DEMARC_HOOK_DEVICE = 9,
};

struct demarc_event {
	__u64 time;
	__u64 seq;    /* per ring and CPU, from 1, without gaps but for losses */
	__u64 cgroup; /* of the socket */
	__u32 cpu;
	__u32 pid; /* of the task where there is one, else 0 */
	__u32 subject;
	__u32 peer; /* proven or claimed identity; 0 = none */
	__u32 crossing; /* its stable number; 0 = none */
	__u32 epoch;
	__u8 kind;
	__u8 hook;
	__u8 verdict;
	__u8 reason;
	__u8 direction;
	__u8 proof;
	__u8 slot;
	__u8 zero;
	struct demarc_tuple tuple; /* opener first */
	char comm[16];
	__u32 zero2;
};

/* Exact counts of verdicts. One count a decision (a flow opened, accepted or
 * proven) and one a dropped packet or refused call. */
struct demarc_count_key {
	__u32 subject;
	__u32 peer;	/* only a proven one */
	__u32 crossing; /* stable number; 0 = none */
	__u8 direction;
	__u8 verdict;
	__u8 reason;
	__u8 zero;
};

/* Rings, and what each lost. */
enum demarc_ring {
	DEMARC_RING_DENIED = 0,
	DEMARC_RING_ALLOWED = 1,
	DEMARC_RING_SIGNALS = 2,
	DEMARC_RINGS = 3,
};

struct demarc_ring_state {
	__u64 seq;  /* events made, lost ones too */
	__u64 lost; /* events that found no room */
};

/* Things that went wrong inside, by name; per CPU. */
enum demarc_fault {
	DEMARC_FAULT_BIND_FULL = 0,   /* cgroup without room for its binding: it may do nothing */
	DEMARC_FAULT_COUNT_FULL = 1,  /* verdict without room for its counter */
	DEMARC_FAULT_STORAGE = 2,     /* socket storage could not be made: the flow is denied */
	DEMARC_FAULT_FLOW = 3,	      /* flow entry could not be made: the flow is denied */
	DEMARC_FAULT_PENDING = 4,     /* handshake entry could not be made: denied */
	DEMARC_FAULT_LIMIT_RACE = 5,  /* token bucket contended beyond its tries: denied */
	DEMARC_FAULT_PORT_FULL = 6,   /* port owner could not be recorded: bind refused */
	DEMARC_FAULT_REPLAY_FULL = 7, /* no room to remember an admitted tag: denied */
	DEMARC_FAULTS = 8,
};

/*
 * Signals: what may be the trace of somebody who moves on. They are observations:
 * no verdict depends on them. Kinds are those of agent/detect.
 */
enum demarc_signal_kind {
	DEMARC_SIGNAL_CONTACT = 1,
	DEMARC_SIGNAL_FAILED = 2,
	DEMARC_SIGNAL_PORTS = 3,
	DEMARC_SIGNAL_PEERS = 4,
	DEMARC_SIGNAL_EDGE = 5,
	DEMARC_SIGNAL_CHAIN = 6,
	DEMARC_SIGNAL_RELAY = 7,
	DEMARC_SIGNAL_RAW = 8,
	DEMARC_SIGNAL_TUN = 9,
	DEMARC_SIGNAL_SETNS = 10,
	DEMARC_SIGNAL_MIGRATE = 11,
	DEMARC_SIGNAL_SHELL = 12,
	DEMARC_SIGNAL_METADATA = 13,
	DEMARC_SIGNAL_LISTEN = 14,
	DEMARC_SIGNAL_PROOF = 15,
	DEMARC_SIGNAL_TRANSFER = 16,
	DEMARC_SIGNAL_DNS = 17,
	DEMARC_SIGNAL_ICMP = 18,
	DEMARC_SIGNAL_BANNER = 19,
	DEMARC_SIGNAL_DECOY = 20,
};

/* How a contact failed. Above these: 64 + enum demarc_reason. */
enum demarc_cause {
	DEMARC_CAUSE_NONE = 0,
	DEMARC_CAUSE_REFUSED = 1,   /* reset, or a socket that was not made */
	DEMARC_CAUSE_TIMEOUT = 2,
	DEMARC_CAUSE_RESET = 3,     /* after it was established */
	DEMARC_CAUSE_ABANDONED = 4, /* the caller gave up */
	DEMARC_CAUSE_UNREACHABLE = 5,
	DEMARC_CAUSE_MANAGER = 6,   /* migrate: moved by a process of no workload */
	DEMARC_CAUSE_DENIED = 64,
};

struct demarc_signal {
	__u64 time;
	__u64 seq;    /* of the ring and CPU, as in demarc_event */
	__u64 cgroup; /* of the socket, or of the task */
	__u64 start;  /* of the process */
	__u64 count;  /* of the same since it was last told; 0 = 1 */
	__u64 bytes;
	__u64 back;
	__u64 received; /* relay: bytes from who is relayed */
	__u64 answered; /* and to him */
	__u32 cpu;
	__u32 pid;    /* of the process; 0 = not known */
	__u32 uid;
	__u32 subject;
	__u32 peer;   /* proven or claimed identity; 0 = none */
	__u32 origin; /* identity behind the accepted connection that it goes back to */
	__u32 crossing; /* stable number; 0 = none */
	__u32 epoch;
	__u32 missed; /* signals of the subject that its quota cost it before this one */
	__u32 parts[4]; /* relay: segments with data, by enum demarc_way */
	__u16 distinct; /* bits of 256 that are set */
	__u16 length;
	__u16 labels;
	__u8 kind;
	__u8 cause;
	__u8 direction;
	__u8 proof;
	__u8 hops;
	__u8 pairing; /* relay: enum demarc_pairing */
	__u8 ssh;     /* relay: one of its connections is SSH */
	__u8 zero[3];
	struct demarc_tuple tuple; /* opener first */
	char comm[16];
	char exe[48]; /* what was executed, from its start; "" = not known. DNS: the end of the name */
};

/*
 * What was told of an identity in one epoch of signals, as the one that does or the one
 * that it is done to. Nobody else's signals touch it: who fills it hides nothing but its
 * own repetitions. Of each address and port one contact is told an epoch, by a Bloom
 * filter of two bits.
 */
#define DEMARC_SIGNAL_EPOCH (300ULL * 1000000000ULL)
#define DEMARC_SEEN_MAX 16384 /* identities */
struct demarc_told {
	__u64 began;
	__u64 due[2];     /* when the next signal of a lane may be told */
	__u32 missed;
	__u32 zero;
	__u32 contacts[16];
	__u32 deeds[8];
};

/* What an identity did, in one epoch: of the distinct ports at a peer, and peers on a
 * port, steps are told, by bitmaps of 256 bits. */
#define DEMARC_SEEN_SLOTS 2
struct demarc_distinct {
	__u32 of; /* hash of the peer, or of the port; 0 = free */
	__u16 set; /* bits that are set */
	__u16 told; /* at the last step */
	__u32 bits[8];
};
struct demarc_seen {
	__u64 began;
	struct demarc_distinct ports[DEMARC_SEEN_SLOTS];
	struct demarc_distinct peers[DEMARC_SEEN_SLOTS];
	__u32 names[4]; /* bitmap of distinct long DNS names */
	__u16 names_set;
	__u16 echoes; /* pings with much in them */
	__u32 zero;
};

/* Lanes: a flood of contacts does not cost a deed its place. */
enum demarc_lane {
	DEMARC_LANE_CONTACTS = 0,
	DEMARC_LANE_DEEDS = 1,
};
#define DEMARC_LANE_INTERVAL (50ULL * 1000000ULL) /* ns between two signals in the long run */
#define DEMARC_LANE_SLACK (128 * DEMARC_LANE_INTERVAL)

/* What passed over a connection: bytes, and segments that carried them. */
struct demarc_passed {
	__u64 bytes; /* from this end */
	__u64 back;  /* and to it */
	__u32 parts;
	__u32 parts_back;
};

/* A connection that came in or is opened. */
struct demarc_mark {
	__u64 seen; /* when it was made, or looked at in a round */
	struct demarc_passed upto;  /* when it was last looked at */
	struct demarc_passed fresh; /* of that, what was new in the round below */
	__u64 told;		    /* of that, what was told as transfers */
	__u64 told_back;
	__u32 round;
	__u32 subject;
	__u32 origin; /* identity that opened it, or what it goes back to */
	__u32 pid;    /* of who holds it; 0 = not known yet */
	__u8 inbound;
	__u8 hops;
	__u8 ssh; /* this end began as SSH does */
	__u8 zero[5];
	char comm[16];
};

/* Marks by their sockets' cookies, a few in each bucket. Where one is full, whoever has
 * most marks in it gives one up to the next, so that no identity can take the last one of
 * another. */
#define DEMARC_MARK_WAYS 8
#define DEMARC_MARK_BUCKETS 2048
#define DEMARC_MARK_CLOSED (1ULL << 63) /* key: it has ended, and what was new by then is put down to nobody yet */
struct demarc_marks {
	__u64 keys[DEMARC_MARK_WAYS]; /* cookies; 0 = free */
	struct demarc_mark marks[DEMARC_MARK_WAYS];
};

/* The same by its tuple, for the other end on this host. */
struct demarc_hop {
	__u64 tuple; /* hash */
	__u32 origin;
	__u8 hops;
	__u8 zero[3];
};
#define DEMARC_HOPS 4096

/* What is known of a process. */
struct demarc_lineage {
	__u32 subject; /* identity that it had when it was last looked at */
	__u32 origin;  /* identity behind the connection that it goes back to */
	__u32 netns;   /* inode of its network namespace then; 0 = not looked at yet */
	__u8 hops;     /* 0 = it goes back to no connection */
	__u8 tun;      /* that it holds a tun device was told */
	__u8 spanned;  /* of the two below that ended last, which were in a round: 1 accepted, 2 opened */
	__u8 zero;
	__u64 looked;  /* when its files were last looked at */
	__u64 cgroup;  /* that it was in then */
	__u64 relayed; /* when it was last told as a relay */
	__u64 ending[2]; /* cookies of what it ended last: accepted, opened */
	__u64 ended[4]; /* bytes of connections that ended since the last round: enum demarc_way */
	__u64 whole[4]; /* bytes of the last one accepted and the last one opened that ended, from their beginning */
	struct demarc_tuple on; /* the last of them that it had opened */
};

/* What passes through a process. */
enum demarc_way {
	DEMARC_CAME_IN = 0,   /* on connections that it accepted */
	DEMARC_WENT_BACK = 1,
	DEMARC_WENT_ON = 2,   /* on connections that it opened */
	DEMARC_CAME_BACK = 3,
	DEMARC_WAYS = 4,
};

/* Between what a process, or a family of them, hands on. Of two connections of one kind the
 * larger one counts as accepted. */
enum demarc_pairing {
	DEMARC_PAIR_CALLERS = 0, /* what it accepted, and what it opened */
	DEMARC_PAIR_OPENED = 1,
	DEMARC_PAIR_ACCEPTED = 2,
};

/* A connection of a round, and who holds it. */
struct demarc_strand {
	struct demarc_passed passed;
	struct demarc_tuple ends; /* this one first */
	__u64 start;
	__u32 pid;
	__u32 uid;
	__u8 inbound;
	__u8 ssh;
	__u8 zero[6];
	char comm[16];
};

/* What passed through a process in a round. */
struct demarc_passing {
	__u64 ways[4]; /* bytes, by enum demarc_way */
	__u32 parts[4];
	struct demarc_strand trunk; /* the connection over which most passed */
	struct demarc_strand next;  /* and of the others; one that it opened first */
	__u32 origin;
	__u32 zero;
};

/* The same through a process and those that it started. */
struct demarc_family {
	struct demarc_passing passing;
	__u32 round;
	__u8 holds; /* it has connections itself over which something passed */
	__u8 zero[3];
};

/* One question to the verdict function, and its answer: the self-test and the
 * differential test run these through the `judge` program. */
struct demarc_query {
	__u32 slot;
	__u32 subject;
	__u32 peer;
	__u16 port;
	__u8 proto;
	__u8 direction;
	__u8 proof;
	__u8 bad; /* enum demarc_reason for a bad proof */
	__u8 verdict; /* out */
	__u8 reason;  /* out */
	__u32 crossing; /* out: index; in: DEMARC_TABLES_ALONE or anything */
	__u64 now;
	__u8 address[16];
};
#define DEMARC_QUESTIONS 4096 /* asked at once */

/* Identities that may be quarantined at once. */
#define DEMARC_QUARANTINES 256

/* How many of them are. */
struct demarc_count {
	__u32 count;
};

/* A live connection that a change would cut. */
struct demarc_cut {
	struct demarc_tuple tuple; /* this end first */
	__u64 cookie;		   /* of the socket */
	__u32 subject;
	__u32 peer;
	__u32 pid;	/* of a process that holds it */
	__u8 direction;
	__u8 reason;
	__u8 zero[2];
	char comm[16];
};

/* What the self-test wants a tag for. */
struct demarc_seal {
	struct demarc_tuple sender;
	__u32 identity;
	__u32 seq;
	__u32 acked;
	__u32 claim; /* in: flags; out: the claim, 0 = there is no key or no clock */
	__u64 mac;   /* out */
};

#endif
