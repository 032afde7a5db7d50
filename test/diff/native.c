// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * verdict.h outside the kernel: the same decision over plain arrays. Reads one
 * policy's tables and then its questions from standard input, in the layouts of
 * abi.h and host byte order, and writes the questions back with their answers,
 * until standard input ends.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/types.h>

#define GLOBAL static
#define PROTO_ICMP 1
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_ICMP6 58
#define PROTO_SCTP 132

#include "abi/abi.h"

struct range {
	__u32 row, low, high, class;
};

struct head {
	__u32 subjects, rules, crossings, prefixes, ranges, quarantines, queries;
};

struct subject_entry {
	__u32 identity;
	struct demarc_subject subject;
};

struct rule_entry {
	struct demarc_rule_key key;
	struct demarc_rule rule;
};

struct prefix_entry {
	struct demarc_prefix_key key;
	__u32 class;
};

struct quarantine {
	__u64 until;
	__u32 identity, zero;
};

static struct head head;
static struct subject_entry *subjects;
static struct rule_entry *rules;
static struct demarc_crossing *crossings;
static struct prefix_entry *prefixes;
static struct range *ranges;
static struct quarantine *quarantines;

static struct demarc_subject *table_subject(__u32 slot, __u32 identity)
{
	for (__u32 i = 0; i < head.subjects; i++)
		if (subjects[i].identity == identity)
			return &subjects[i].subject;
	return NULL;
}

static __u64 table_quarantine(__u32 subject)
{
	for (__u32 i = 0; i < head.quarantines; i++)
		if (quarantines[i].identity == subject)
			return quarantines[i].until;
	return 0;
}

static struct demarc_rule *table_rule(__u32 slot, struct demarc_rule_key *key)
{
	for (__u32 i = 0; i < head.rules; i++)
		if (!memcmp(&rules[i].key, key, sizeof(*key)))
			return &rules[i].rule;
	return NULL;
}

static struct demarc_crossing *table_crossing(__u32 slot, __u32 index)
{
	return index < head.crossings ? &crossings[index] : NULL;
}

static __u32 table_address(__u32 slot, const __u8 *address)
{
	__u32 best = 0, class = 0;
	bool found = false;

	static const __u8 mapped[12] = { [10] = 0xff, [11] = 0xff };
	__u8 family = memcmp(address, mapped, sizeof(mapped)) ? 6 : 4;

	for (__u32 i = 0; i < head.prefixes; i++) {
		const struct prefix_entry *p = &prefixes[i];
		__u32 bits = p->key.length - 8, n = 0;

		if (p->key.family != family)
			continue;
		while (n < bits && !((p->key.address[n / 8] ^ address[n / 8]) & (0x80 >> (n % 8))))
			n++;
		if (n == bits && (!found || bits > best)) {
			found = true;
			best = bits;
			class = p->class;
		}
	}
	return class;
}

static __u16 table_port(__u32 slot, __u32 row, __u16 port)
{
	for (__u32 i = 0; i < head.ranges; i++)
		if (ranges[i].row == row && port >= ranges[i].low && port <= ranges[i].high)
			return ranges[i].class;
	return 0;
}

#include "verdict.h"

static void *take(__u32 n, size_t size)
{
	void *p = malloc(n * size + 1);

	if (!p || fread(p, size, n, stdin) != n) {
		fprintf(stderr, "native: input ends within a policy\n");
		exit(1);
	}
	return p;
}

int main(void)
{
	while (fread(&head, sizeof(head), 1, stdin) == 1) {
		struct demarc_query *queries;

		subjects = take(head.subjects, sizeof(*subjects));
		rules = take(head.rules, sizeof(*rules));
		crossings = take(head.crossings, sizeof(*crossings));
		prefixes = take(head.prefixes, sizeof(*prefixes));
		ranges = take(head.ranges, sizeof(*ranges));
		quarantines = take(head.quarantines, sizeof(*quarantines));
		queries = take(head.queries, sizeof(*queries));
		for (__u32 i = 0; i < head.queries; i++)
			decide(&queries[i]);
		fwrite(queries, sizeof(*queries), head.queries, stdout);
		fflush(stdout);
		free(subjects);
		free(rules);
		free(crossings);
		free(prefixes);
		free(ranges);
		free(quarantines);
		free(queries);
	}
	return 0;
}
