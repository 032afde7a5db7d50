/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* Every map: who writes it, who reads it, how large it is, what a miss means. */
#ifndef DEMARC_MAPS_H
#define DEMARC_MAPS_H

#include "abi/abi.h"

/* What is in force. Writer: core. Readers: every program. Never misses. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct demarc_state);
} state SEC(".maps");

/* The time as it was last read. Writers and readers: every program. Miss, or from
 * another jiffy: it is read anew. */
struct demarc_clock {
	__u64 now;   /* CLOCK_BOOTTIME, ns */
	__u64 check; /* now, and the jiffy that it was read in: exclusive or */
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct demarc_clock);
} clock SEC(".maps");

/* Below which no image comes into force. Writer and reader: core, so that a lost
 * state directory lets nobody replay an old image. No program reads it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct demarc_floor);
} version_floor SEC(".maps");

/* cgroup id -> who lives there. Writers: cgroup_mkdir and the core's scan.
 * Readers: every hook. Miss: not below the managed root, or no room: deny. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, __u64);
	__type(value, struct demarc_binding);
} bindings SEC(".maps");

/* Bindings of removed cgroups, for sockets that outlive them. Writer:
 * cgroup_rmdir. Miss: the socket's identity is lost: deny. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct demarc_binding);
} graveyard SEC(".maps");

/*
 * The tables of each generation: an outer map by slot, an inner map as large as
 * the image needs. Writer: core, never in the active slot except to add a bound
 * path. Miss in an outer map: the slot is empty: deny.
 */
#define GENERATION(name, inner_type, inner_flags, key_type, value_type)          \
	struct name##_table {                                                    \
		__uint(type, inner_type);                                        \
		__uint(map_flags, inner_flags);                                  \
		__uint(max_entries, 1);                                          \
		__type(key, key_type);                                           \
		__type(value, value_type);                                       \
	};                                                                       \
	struct {                                                                 \
		__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);                        \
		__uint(max_entries, DEMARC_SLOTS);                               \
		__type(key, __u32);                                              \
		__array(values, struct name##_table);                            \
	} name SEC(".maps")

/* Crossings by subject, peer and port class. Miss: nothing declared. */
GENERATION(rules, BPF_MAP_TYPE_HASH, 0, struct demarc_rule_key, struct demarc_rule);
/* Identities of the image. Miss: no such identity. */
GENERATION(subjects, BPF_MAP_TYPE_HASH, 0, __u32, struct demarc_subject);
/* Crossings by index. */
GENERATION(crossings, BPF_MAP_TYPE_ARRAY, BPF_F_INNER_MAP, __u32, struct demarc_crossing);
/* Token buckets by index * 2 + direction: when the next flow is due, in ns. */
GENERATION(buckets, BPF_MAP_TYPE_ARRAY, BPF_F_INNER_MAP, __u32, __u64);
/* Networks. Miss: address of no network. */
GENERATION(prefixes, BPF_MAP_TYPE_LPM_TRIE, BPF_F_NO_PREALLOC, struct demarc_prefix_key, __u32);
/* Port classes by row. */
GENERATION(ports, BPF_MAP_TYPE_ARRAY, BPF_F_INNER_MAP, __u32, struct demarc_port_classes);
/* Identities by cgroup path and by unit name. Miss: inherit. */
GENERATION(paths, BPF_MAP_TYPE_LPM_TRIE, BPF_F_NO_PREALLOC, struct demarc_path_key, __u32);
GENERATION(units, BPF_MAP_TYPE_LPM_TRIE, BPF_F_NO_PREALLOC, struct demarc_path_key, struct demarc_unit);

/* Identities that have only their forensic crossings, and until when. Writer: core.
 * Miss: not quarantined. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, DEMARC_QUARANTINES);
	__type(key, __u32);
	__type(value, __u64);
} quarantines SEC(".maps");

/* Tag keys by pair of nodes and epoch. Writer: core; readers: sockops, ingress. Miss: no tag can be
 * made or verified. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DEMARC_PAIRS * DEMARC_EPOCHS);
	__type(key, __u32);
	__type(value, struct demarc_key);
} keys SEC(".maps");

/* Tags that were admitted. Writers: ingress, tc_ingress. No room: deny. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE); /* begins with a page: an entry is a cache line */
	__uint(max_entries, DEMARC_REPLAY_BUCKETS);
	__type(key, __u32);
	__type(value, struct demarc_replay_bucket);
} replays SEC(".maps");

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
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE); /* begins with a page: an entry is a cache line */
	__uint(max_entries, DEMARC_PENDING_BUCKETS + DEMARC_PENDING_FRONT);
	__type(key, __u32);
	__type(value, struct demarc_pending_bucket);
} pending_syns SEC(".maps");

/* What makes places among them hard to guess. Writer: the first that asks. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} pending_seed SEC(".maps");

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
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE); /* begins with a page: an entry is a cache line */
	__uint(max_entries, DEMARC_YOUNG);
	__type(key, __u32);
	__type(value, struct demarc_young);
} young SEC(".maps");

/* Verdict of an established TCP connection that lasts. Writers: ingress, egress,
 * sockops. Miss: it may be young; otherwise no admitted handshake: deny. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct demarc_socket);
} sockets SEC(".maps");

/* What is known of a socket other than TCP: the cgroup that it was made in, and its
 * last talk (talk.h). Writers: sock_create; packets. Miss: the socket is older than
 * the programs: the task's cgroup stands for it, and each datagram is looked at. */
struct demarc_endpoint {
	__u64 cgroup;
	__u32 version; /* of what follows; odd = it is being written */
	__u32 epoch;
	__u32 turns;
	__u32 zero;
	__u64 admitted; /* until when, in jiffies */
	__u64 untagged;
	struct demarc_tuple talk; /* this socket's end first */
};
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct demarc_endpoint);
} endpoints SEC(".maps");

/* How often somebody came to speak in a flow in another's place. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} turns SEC(".maps");

/* Conversations without handshake, and what the sending hooks saw. Writers:
 * egress, ingress. Miss: judged anew, or for a reply: deny. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct demarc_tuple);
	__type(value, struct demarc_flow);
} flows SEC(".maps");

/* Doors by index of their device. Writers: core, which makes and removes them, and
 * tc_door. Miss: drop. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, struct demarc_door);
} doors SEC(".maps");

/* Refused callers that are to be told. Reader: core. No room, or over the budget:
 * the caller waits in vain. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 64 << 10);
} refusals SEC(".maps");

/* When the next refusal may be told. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} refusals_due SEC(".maps");

/* Sockets that the core answers with. Writer: core. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} answering SEC(".maps");

/* Who bound a port first. Writers: post_bind, sock_release. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct demarc_port_key);
	__type(value, struct demarc_port_owner);
} port_owners SEC(".maps");

/* Port that a socket counts for in port_owners. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct demarc_port_key);
} bound_ports SEC(".maps");

/* Events. A flood of allowed flows cannot cost a denial its place. Reader: agent. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 2 << 20);
} denied_events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 << 20);
} allowed_events SEC(".maps");

/* Signals. Reader: agent. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} signals SEC(".maps");

/* What was told of each identity, by identity << 1 | direction. Writers: programs that
 * observe. No room: its signals are lost, and counted so. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2 * DEMARC_SEEN_MAX);
	__type(key, __u32);
	__type(value, struct demarc_told);
} tellings SEC(".maps");

/* What each identity was seen to do. Writers: programs that observe. No room: it is not
 * counted. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, DEMARC_SEEN_MAX);
	__type(key, __u32);
	__type(value, struct demarc_seen);
} seen SEC(".maps");

/* Connections that came in or are opened, by cookie. No room: the connection is not told
 * apart, and that is told as lost. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DEMARC_MARK_BUCKETS);
	__type(key, __u32);
	__type(value, struct demarc_marks);
} marks SEC(".maps");

/* How many came before, by tuple, from when a connection is there at its opener until it
 * is at its listener, which are microseconds. A place may be taken by another. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DEMARC_HOPS);
	__type(key, __u32);
	__type(value, struct demarc_hop);
} hops SEC(".maps");

/* What is known of a workload's task. Miss: nothing. */
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct demarc_lineage);
} lineages SEC(".maps");

/* What passed through a workload's task and those that it started; only where something
 * did. Miss: nothing. */
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct demarc_family);
} families SEC(".maps");

/* What each ring was given and what it lost. Reader: agent. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DEMARC_RINGS);
	__type(key, __u32);
	__type(value, struct demarc_ring_state);
} ring_state SEC(".maps");

/* Exact counts of verdicts. Reader: agent. No room: DEMARC_FAULT_COUNT_FULL. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct demarc_count_key);
	__type(value, __u64);
} counts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DEMARC_FAULTS);
	__type(key, __u32);
	__type(value, __u64);
} faults SEC(".maps");

/* Scratch for paths, which do not fit the stack. Only cgroup_mkdir uses it, and
 * the kernel makes one cgroup at a time. The room behind the key lets an index of
 * eight bits stay inside. */
struct demarc_scratch {
	struct demarc_path_key key;
	char room[8];
};
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct demarc_scratch);
} scratch SEC(".maps");

/* Who the self-test's packets pretend to be. Writer: core; readers: the
 * selftest programs, which are never attached. */
struct demarc_selftest {
	__u32 subject;
	__u32 slot;
	__u32 peer;
	__u32 proof; /* `cuts`: 1 = what it finds is spared */
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct demarc_selftest);
} selftest SEC(".maps");

/* Questions to the decision itself, answered in place. Writer: core; reader:
 * judge, which is never attached. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DEMARC_QUESTIONS);
	__type(key, __u32);
	__type(value, struct demarc_query);
} questions SEC(".maps");

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
