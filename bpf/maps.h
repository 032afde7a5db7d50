/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* Every map: who writes it, who reads it, how large it is, what a miss means. */
#ifndef DEMARC_MAPS_H
#define DEMARC_MAPS_H

#include "abi/abi.h"

/* What a map is, its flags, how many entries it has, and of what. Those that can be
 * mapped into memory (BPF_F_MMAPABLE) begin with a page, so that an entry of theirs is a
 * cache line. */
#define MAP_OF(kind, flags, entries, key_type, value_type) \
	__uint(type, BPF_MAP_TYPE_##kind);                \
	__uint(map_flags, flags);                         \
	__uint(max_entries, entries);                     \
	__type(key, key_type);                            \
	__type(value, value_type)
#define MAP(name, kind, flags, entries, key_type, value_type)    \
	struct {                                                 \
		MAP_OF(kind, flags, entries, key_type, value_type); \
	} name SEC(".maps")

/* One value for all, and one beside each socket. */
#define ONE(name, value_type) MAP(name, ARRAY, 0, 1, __u32, value_type)
#define PER_SOCKET(name, value_type) MAP(name, SK_STORAGE, BPF_F_NO_PREALLOC, 0, int, value_type)

/* Records on their way to the agent, or to the core. */
#define RING(name, bytes)                                \
	struct {                                         \
		__uint(type, BPF_MAP_TYPE_RINGBUF);      \
		__uint(max_entries, bytes);              \
	} name SEC(".maps")

/* What is in force. Writer: core. Readers: every program. Never misses. */
ONE(state, struct demarc_state);

/* The time as it was last read. Writers and readers: every program. Miss, or from
 * another jiffy: it is read anew. */
struct demarc_clock {
	__u64 now;   /* CLOCK_BOOTTIME, ns */
	__u64 check; /* now, and the jiffy that it was read in: exclusive or */
};
ONE(clock, struct demarc_clock);

/* Below which no image comes into force. Writer and reader: core, so that a lost
 * state directory lets nobody replay an old image. No program reads it. */
ONE(version_floor, struct demarc_floor);

/* cgroup id -> who lives there. Writers: cgroup_mkdir and the core's scan.
 * Readers: every hook. Miss: not below the managed root, or no room: deny. */
MAP(bindings, HASH, BPF_F_NO_PREALLOC, 131072, __u64, struct demarc_binding);

/* Bindings of removed cgroups, for sockets that outlive them. Writer:
 * cgroup_rmdir. Miss: the socket's identity is lost: deny. */
MAP(graveyard, LRU_HASH, 0, 16384, __u64, struct demarc_binding);

/*
 * The tables of each generation: an outer map by slot, an inner map as large as
 * the image needs. Writer: core, never in the active slot except to add a bound
 * path. Miss in an outer map: the slot is empty: deny.
 */
#define GENERATION(name, kind, flags, key_type, value_type)    \
	struct name##_table {                                  \
		MAP_OF(kind, flags, 1, key_type, value_type);  \
	};                                                     \
	struct {                                               \
		__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);      \
		__uint(max_entries, DEMARC_SLOTS);             \
		__type(key, __u32);                            \
		__array(values, struct name##_table);          \
	} name SEC(".maps")

/* Crossings by subject, peer and port class. Miss: nothing declared. */
GENERATION(rules, HASH, 0, struct demarc_rule_key, struct demarc_rule);
/* Identities of the image. Miss: no such identity. */
GENERATION(subjects, HASH, 0, __u32, struct demarc_subject);
/* Crossings by index. */
GENERATION(crossings, ARRAY, BPF_F_INNER_MAP, __u32, struct demarc_crossing);
/* Token buckets by index * 2 + direction: when the next flow is due, in ns. */
GENERATION(buckets, ARRAY, BPF_F_INNER_MAP, __u32, __u64);
/* Networks. Miss: address of no network. */
GENERATION(prefixes, LPM_TRIE, BPF_F_NO_PREALLOC, struct demarc_prefix_key, __u32);
/* Port classes by row. */
GENERATION(ports, ARRAY, BPF_F_INNER_MAP, __u32, struct demarc_port_classes);
/* Identities by cgroup path and by unit name. Miss: inherit. */
GENERATION(paths, LPM_TRIE, BPF_F_NO_PREALLOC, struct demarc_path_key, __u32);
GENERATION(units, LPM_TRIE, BPF_F_NO_PREALLOC, struct demarc_path_key, struct demarc_unit);

/* Identities that have only their forensic crossings, and until when. Writer: core.
 * Miss: not quarantined. */
MAP(quarantines, HASH, 0, DEMARC_QUARANTINES, __u32, __u64);

/* Who looks into packets that leave. Writer: core. Miss: nobody. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} observers SEC(".maps");

/* Tag keys by pair of nodes and epoch. Writer: core; readers: sockops, ingress. Miss: no tag can be
 * made or verified. */
MAP(keys, ARRAY, 0, DEMARC_PAIRS * DEMARC_EPOCHS, __u32, struct demarc_key);

/* Tags that were admitted. Writers: ingress, tc_ingress. No room: deny. */
MAP(replays, ARRAY, BPF_F_MMAPABLE, DEMARC_REPLAY_BUCKETS, __u32, struct demarc_replay_bucket);

/* A SYN that verified and was admitted, until its handshake ends. */
struct demarc_pending_syn {
	__u64 mark; /* hash of the tuple; 0 = nobody's place, PENDING_GIVEN = it is being written */
	struct demarc_tuple tuple; /* as the SYN has it */
	__u64 cgroup; /* of the listener */
	__u64 until;  /* when the crossing's window closes */
	__u32 self;   /* identity of the listener */
	__u32 peer;   /* identity the tag proved; 0 = none */
	__u32 seq;    /* the SYN's sequence number, host order */
	__u32 crossing; /* index, or DEMARC_NO_CROSSING_INDEX */
	__u32 epoch;
	__u32 born; /* in jiffies */
	__u8 proof; /* enum demarc_proof */
	__u8 reason;
	__u8 slot; /* of the generation that the crossing is of */
	__u8 zero[5];
};
#define DEMARC_PENDING_BUCKETS 8192
#define DEMARC_PENDING_PLACES 8
#define DEMARC_PENDING_FRONT 64 /* buckets behind them */
struct demarc_pending_bucket {
	struct demarc_pending_syn syn[DEMARC_PENDING_PLACES];
};

/* Handshakes whose SYN was admitted. Writers: ingress, sockops (accepted). Only admitted
 * SYNs enter, so junk cannot evict. Miss: the handshake is refused. */
MAP(pending_syns, ARRAY, BPF_F_MMAPABLE, DEMARC_PENDING_BUCKETS + DEMARC_PENDING_FRONT, __u32,
    struct demarc_pending_bucket);

/* What makes places among them hard to guess. Writer: the first that asks. */
ONE(pending_seed, __u64);

/* Connections that are being opened here, and verdicts of those that have just begun.
 * Writers: connect, ingress (SYN-ACK), sockops (accepted). Miss: a SYN is judged anew; a
 * connection may have storage. */
#define DEMARC_YOUNG 65536
struct demarc_young {
	__u64 cookie; /* of the socket; 0 = nobody's place */
	__u64 over;   /* when it may be given away, in jiffies; 0 = not yet */
	struct demarc_socket kept; /* provisional: it is being opened */
	__u32 born; /* jiffies, too */
	__u32 self : 24; /* who opens it */
	__u32 omitted : 8; /* what the opener's tag leaves out */
};
_Static_assert(sizeof(struct demarc_young) == 64, "a place is a cache line");
MAP(young, ARRAY, BPF_F_MMAPABLE, DEMARC_YOUNG, __u32, struct demarc_young);

/* Verdict of an established TCP connection that lasts. Writers: ingress, egress,
 * sockops. Miss: it may be young; otherwise no admitted handshake: deny. */
PER_SOCKET(sockets, struct demarc_socket);

/* With whom a UDP socket talked last, and until when it may go on (talk.h). */
struct demarc_talk {
	__u32 owner;   /* of a place among `talks`: the socket's cookie, but for what says the place */
	__u32 version; /* of all else; odd = it is being written */
	__u32 epoch;
	__be16 sport; /* this socket's end first */
	__be16 dport;
	__u64 admitted; /* until when, in jiffies */
	__u64 untagged;
	__be32 saddr[4]; /* IPv4 as in tuples */
	__be32 daddr[4];
};
_Static_assert(sizeof(struct demarc_talk) == 64, "a place is a cache line");

/* What sockets that talk now carry. Writers: egress, ingress, tc_egress. Miss: another
 * one's place; it may be in storage. */
#define DEMARC_TALK_BITS 14
MAP(talks, ARRAY, BPF_F_MMAPABLE, 1 << DEMARC_TALK_BITS, __u32, struct demarc_talk);

/* What is known of a socket other than TCP: the cgroup that it was made in, and its
 * talk, where another socket has its place. Writers: sock_create; packets. Miss: the
 * socket is older than the programs: the task's cgroup stands for it, and without a
 * place each datagram is looked at. */
struct demarc_endpoint {
	__u64 cgroup;
	struct demarc_talk talk;
};
PER_SOCKET(endpoints, struct demarc_endpoint);

/* When somebody last came to speak in a flow in another's place, in jiffies. Writers:
 * egress, ingress, tc_ingress. Never misses. */
ONE(turned, __u64);

/* Conversations without handshake, and what the sending hooks saw. Writers:
 * egress, ingress. Miss: judged anew, or for a reply: deny. */
MAP(flows, LRU_HASH, 0, 131072, struct demarc_tuple, struct demarc_flow);

/* Doors by index of their device. Writers: core, which makes and removes them, and
 * tc_door. Miss: drop. */
MAP(doors, HASH, BPF_F_NO_PREALLOC, 16384, __u32, struct demarc_door);

/* Refused callers that are to be told. Reader: core. No room, or over the budget:
 * the caller waits in vain. */
RING(refusals, 64 << 10);

/* When the next refusal may be told. */
ONE(refusals_due, __u64);

/* Sockets that the core answers with. Writer: core. */
PER_SOCKET(answering, __u32);

/* Who bound a port first. Writers: post_bind, sock_release. */
MAP(port_owners, HASH, BPF_F_NO_PREALLOC, 65536, struct demarc_port_key, struct demarc_port_owner);

/* Port that a socket counts for in port_owners. */
PER_SOCKET(bound_ports, struct demarc_port_key);

/* Events. A flood of allowed flows cannot cost a denial its place. Reader: agent. */
RING(denied_events, 2 << 20);

RING(allowed_events, 4 << 20);

/* Signals. Reader: agent. */
RING(signals, 1 << 20);

/* What was told of each identity, by identity << 1 | direction. Writers: programs that
 * observe. No room: its signals are lost, and counted so. */
MAP(tellings, HASH, BPF_F_NO_PREALLOC, 2 * DEMARC_SEEN_MAX, __u32, struct demarc_told);

/* What each identity was seen to do. Writers: programs that observe. No room: it is not
 * counted. */
MAP(seen, HASH, BPF_F_NO_PREALLOC, DEMARC_SEEN_MAX, __u32, struct demarc_seen);

/* Connections that came in or are opened, by cookie. No room: the connection is not told
 * apart, and that is told as lost. */
MAP(marks, ARRAY, 0, DEMARC_MARK_BUCKETS, __u32, struct demarc_marks);

/* How many came before, by tuple, from when a connection is there at its opener until it
 * is at its listener, which are microseconds. A place may be taken by another. */
MAP(hops, ARRAY, 0, DEMARC_HOPS, __u32, struct demarc_hop);

/* When the last round over all files ended, on the boot clock. Reader: core, which says for
 * how long nobody observed. */
ONE(surveyed_at, __u64);

/* What is known of a workload's task. Miss: nothing. */
MAP(lineages, TASK_STORAGE, BPF_F_NO_PREALLOC, 0, int, struct demarc_lineage);

/* What passed through a workload's task and those that it started; only where something
 * did. Miss: nothing. */
MAP(families, TASK_STORAGE, BPF_F_NO_PREALLOC, 0, int, struct demarc_family);

/* What each ring was given and what it lost. Reader: agent. */
MAP(ring_state, PERCPU_ARRAY, 0, DEMARC_RINGS, __u32, struct demarc_ring_state);

/* Exact counts of verdicts. Reader: agent. No room: DEMARC_FAULT_COUNT_FULL. */
MAP(counts, PERCPU_HASH, BPF_F_NO_PREALLOC, 65536, struct demarc_count_key, __u64);

MAP(faults, PERCPU_ARRAY, 0, DEMARC_FAULTS, __u32, __u64);

/* Scratch for paths, which do not fit the stack. Only cgroup_mkdir uses it, and
 * the kernel makes one cgroup at a time. The room behind the key lets an index of
 * eight bits stay inside. */
struct demarc_scratch {
	struct demarc_path_key key;
	char room[8];
};
MAP(scratch, PERCPU_ARRAY, 0, 1, __u32, struct demarc_scratch);

/* Who the self-test's packets pretend to be. Writer: core; readers: the
 * selftest programs, which are never attached. */
struct demarc_selftest {
	__u32 subject;
	__u32 slot;
	__u32 peer;
	__u32 proof; /* `cuts`: 1 = what it finds is spared */
};
ONE(selftest, struct demarc_selftest);

/* Questions to the decision itself, answered in place. Writer: core; reader:
 * judge, which is never attached. */
MAP(questions, ARRAY, 0, DEMARC_QUESTIONS, __u32, struct demarc_query);

static __always_inline void fault(__u32 which)
{
	__u64 *n = bpf_map_lookup_elem(&faults, &which);

	if (n)
		__sync_fetch_and_add(n, 1);
}

/* Entries by a tuple that a global function was given. Linux 6.1 takes no key for a
 * map from memory of which it knows only the size, so it is copied to the stack. */
static __noinline struct demarc_flow *flow_at(const struct demarc_tuple *opener)
{
	struct demarc_tuple key = *opener;

	return bpf_map_lookup_elem(&flows, &key);
}

static __noinline long put_flow(const struct demarc_tuple *opener, const struct demarc_flow *flow, __u64 flags)
{
	struct demarc_tuple key = *opener;

	return bpf_map_update_elem(&flows, &key, flow, flags);
}

#endif
