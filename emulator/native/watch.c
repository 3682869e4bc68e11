/*
 * See watch.h. How an access becomes a trap behind its instruction:
 *
 *   check() before the access   a match: execute this instruction again, alone in a translation block
 *   check() in that block       note the hits; ask for the block's end to lead to the interrupt routine
 *   interrupt routine           memory and registers are those after the instruction: deliver #DB, or stop for the host
 *
 * Exceptions and interrupts between the two passes start anew: the instruction is executed again some time.
 *
 * Lookups are by page: a bitmap of watched bytes for reads and one for writes, so that an access that hits nothing costs
 * the same with one watchpoint on the page or a thousand.
 */
#include "watch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "operand.h"
#include "plt.h"

#define PAGE_SIZE 4096u
#define PAGE_MASK (~(uint64_t)(PAGE_SIZE - 1))
#define BUCKETS 1024u
#define MAX_WATCHPOINTS 65536
#define MAX_LENGTH (1u << 20)
/* A bit of interrupt_request QEMU's x86 leaves unused (CPU_INTERRUPT_TGT_INT_2); core.c tests it. */
#define PENDING_BIT CORE_INTERRUPT_WATCH
#define BP_CPU 0x20
#define SEGMENT_SIZE 24u /* QEMU's SegmentCache; its base is at 8 */
enum { SEGMENT_FS = 4, SEGMENT_GS = 5 };
#define DR6_NONE_OF_YOURS 0x1000u

struct qemu_watchpoint { /* CPUWatchpoint: handed out for the guest's registers, compared by address only */
	uint64_t address, length, hit_address;
	uint32_t attributes;
	int32_t flags;
	void *links[2];
};

struct watchpoint {
	uint64_t address, length, token;
	uint32_t access, kind;
	bool used;
	uint32_t hit; /* accesses by the instruction being looked at */
	uint64_t hit_address, hit_end, old;
	struct qemu_watchpoint qemu;
};

struct page {
	struct page *next;
	uint64_t number;
	uint32_t count; /* of watchpoints that touch it */
	uint8_t watched[2][PAGE_SIZE / 8];
};

/* One machine a process has watchpoints; `owner` is its core. */
static struct core *owner;
static struct watchpoint **table;
static int table_size;
static struct page *buckets[BUCKETS];
static bool installed;

/* The instruction being looked at. */
static struct {
	bool second_pass, pending, broken;
	uint64_t exceptions, interrupts, ip;
	uint64_t split_address;
	bool split;
	bool has_operand;
	struct operand operand;
	int64_t saved_budget;
} now;

uint64_t watch_size(void)
{
	return sizeof(struct watch);
}

static uint64_t segment_base(const struct core *c, uint32_t segment)
{
	uint64_t base;

	memcpy(&base, c->env + c->at.segs + segment * SEGMENT_SIZE + 8, 8);
	return base;
}

static uint32_t *word(uint8_t *base, uint32_t offset)
{
	return (uint32_t *)(void *)(base + offset);
}

static uint64_t *quad(uint8_t *base, uint32_t offset)
{
	return (uint64_t *)(void *)(base + offset);
}

/* ---- pages */

static struct page **find_page(uint64_t number)
{
	struct page **at = &buckets[(number ^ number >> 10) % BUCKETS];

	while (*at && (*at)->number != number)
		at = &(*at)->next;
	return at;
}

static bool overlaps(const struct watchpoint *w, uint64_t first, uint64_t last)
{
	return w->used && w->address <= last && w->address + w->length - 1 >= first;
}

/* Mark the part of a range that lies in a page, in the bitmaps of its accesses. */
static void mark(struct page *page, const struct watchpoint *w)
{
	uint64_t start = page->number * PAGE_SIZE;
	uint64_t first = w->address > start ? w->address - start : 0;
	uint64_t last = w->address + w->length - 1 - start;

	if (last >= PAGE_SIZE)
		last = PAGE_SIZE - 1;
	for (uint64_t i = first; i <= last; i++) {
		if (w->access & WATCH_READ)
			page->watched[0][i / 8] |= (uint8_t)(1u << i % 8);
		if (w->access & WATCH_WRITE)
			page->watched[1][i / 8] |= (uint8_t)(1u << i % 8);
	}
}

static void add_to_pages(const struct watchpoint *w)
{
	uint64_t last = (w->address + w->length - 1) / PAGE_SIZE;

	for (uint64_t number = w->address / PAGE_SIZE; number <= last; number++) {
		struct page **at = find_page(number);

		if (!*at) {
			*at = calloc(1, sizeof(**at));
			if (!*at)
				abort(); /* a few hundred bytes: the process is beyond help */
			(*at)->number = number;
		}
		(*at)->count++;
		mark(*at, w);
	}
}

static void remove_from_pages(const struct watchpoint *w)
{
	uint64_t last = (w->address + w->length - 1) / PAGE_SIZE;

	for (uint64_t number = w->address / PAGE_SIZE; number <= last; number++) {
		struct page **at = find_page(number), *page = *at;

		if (!page)
			continue;
		if (--page->count == 0) {
			*at = page->next;
			free(page);
			continue;
		}
		memset(page->watched, 0, sizeof(page->watched));
		for (int i = 0; i < table_size; i++)
			if (table[i] != w && overlaps(table[i], number * PAGE_SIZE, number * PAGE_SIZE + PAGE_SIZE - 1))
				mark(page, table[i]);
	}
}

static bool watched(uint64_t address, uint64_t length, int flags)
{
	uint64_t end = address + length;

	while (address < end) {
		struct page *page = *find_page(address / PAGE_SIZE);
		uint64_t stop = (address & PAGE_MASK) + PAGE_SIZE;

		if (stop > end)
			stop = end;
		for (; page && address < stop; address++) {
			uint64_t i = address % PAGE_SIZE;

			if (((flags & WATCH_READ) && page->watched[0][i / 8] >> i % 8 & 1) ||
			    ((flags & WATCH_WRITE) && page->watched[1][i / 8] >> i % 8 & 1))
				return true;
		}
		address = stop;
	}
	return false;
}

/* ---- the table */

static int new_watchpoint(uint64_t address, uint64_t length, uint32_t access, uint32_t kind, uint64_t token)
{
	int number = 0;
	struct watchpoint *w;

	while (number < table_size && table[number]->used)
		number++;
	if (number == table_size) {
		struct watchpoint **bigger;

		if (table_size == MAX_WATCHPOINTS)
			return -ENOSPC;
		bigger = realloc(table, sizeof(*table) * ((size_t)table_size + 1));
		if (!bigger)
			return -ENOMEM;
		table = bigger;
		table[number] = calloc(1, sizeof(*w));
		if (!table[number])
			return -ENOMEM;
		table_size++;
	}
	w = table[number];
	*w = (struct watchpoint){ .address = address, .length = length, .token = token, .access = access,
				  .kind = kind, .used = true };
	add_to_pages(w);
	return number;
}

int watch_add(struct core *c, uint64_t address, uint64_t length, uint32_t access, uint32_t kind, uint64_t token)
{
	int number;

	if (c != owner || !length || length > MAX_LENGTH || address + length - 1 < address || !(access & 3))
		return -EINVAL;
	number = new_watchpoint(address, length, access, kind, token);
	if (number >= 0)
		c->watch.flush_tlb(c->cpu);
	return number;
}

int watch_remove(struct core *c, int number)
{
	if (c != owner || number < 0 || number >= table_size || !table[number]->used)
		return -ENOENT;
	remove_from_pages(table[number]);
	table[number]->used = false;
	c->watch.flush_tlb(c->cpu);
	return 0;
}

int watch_move(struct core *c, int number, uint64_t address)
{
	struct watchpoint *w;

	if (c != owner || number < 0 || number >= table_size || !table[number]->used)
		return -ENOENT;
	w = table[number];
	if (address + w->length - 1 < address)
		return -EINVAL;
	remove_from_pages(w);
	w->address = address;
	w->hit = 0;
	add_to_pages(w);
	c->watch.flush_tlb(c->cpu);
	return 0;
}

/* ---- what QEMU calls */

static int qemu_insert(void *cpu, uint64_t address, uint64_t length, int flags, struct qemu_watchpoint **out)
{
	int number;

	if (!owner || owner->cpu != cpu || !length)
		return -EINVAL;
	number = new_watchpoint(address, length, (uint32_t)flags & 3, WATCH_REGISTER, 0);
	if (number < 0)
		return number;
	table[number]->qemu.address = address;
	table[number]->qemu.length = length;
	table[number]->qemu.flags = flags;
	if (out)
		*out = &table[number]->qemu;
	owner->watch.flush_tlb(cpu);
	return 0;
}

static void qemu_remove(void *cpu, struct qemu_watchpoint *reference)
{
	if (!owner || owner->cpu != cpu)
		return;
	for (int i = 0; i < table_size; i++)
		if (table[i]->used && &table[i]->qemu == reference)
			watch_remove(owner, i);
}

static void qemu_remove_all(void *cpu, int mask)
{
	if (!owner || owner->cpu != cpu || !(mask & BP_CPU))
		return;
	for (int i = 0; i < table_size; i++)
		if (table[i]->used && table[i]->kind == WATCH_REGISTER)
			watch_remove(owner, i);
}

/* Called for a page that enters the TLB: nonzero sends its accesses through qemu_check(). */
static int qemu_matches(void *cpu, uint64_t address, uint64_t length)
{
	int flags = 0;

	if (!owner || owner->cpu != cpu)
		return 0;
	for (uint64_t number = address / PAGE_SIZE; number <= (address + length - 1) / PAGE_SIZE; number++)
		if (*find_page(number))
			flags = WATCH_READ | WATCH_WRITE;
	return flags;
}

/* Make the block hook end the present chain of blocks without taking any time from the clock. */
static void ask_for_block_end(struct core *c)
{
	*word(c->cpu, c->at.cpu_interrupt_request) |= PENDING_BIT;
	if (!now.broken) {
		now.broken = true;
		now.saved_budget = c->budget;
		c->granted -= c->budget;
		c->budget = 0;
	}
}

static void give_back_budget(struct core *c)
{
	if (now.broken) {
		now.broken = false;
		c->granted += now.saved_budget;
		c->budget += now.saved_budget;
	}
}

static void note_hits(struct core *c, uint64_t address, uint64_t length, int flags)
{
	for (int i = 0; i < table_size; i++) {
		struct watchpoint *w = table[i];

		if (!overlaps(w, address, address + length - 1) || !(w->access & (uint32_t)flags))
			continue;
		if (!w->hit) {
			uint8_t *old = watch_host(c, w->address, 8);

			w->hit_address = address;
			w->hit_end = address + length;
			w->old = 0;
			if (old)
				memcpy(&w->old, old, 8);
		} else {
			if (address < w->hit_address)
				w->hit_address = address;
			if (address + length > w->hit_end)
				w->hit_end = address + length;
		}
		w->hit |= (uint32_t)flags & 3;
	}
}

static void forget_hits(void)
{
	for (int i = 0; i < table_size; i++)
		table[i]->hit = 0;
}

/* In the first pass, with the registers as they are before the instruction: which memory does it name? */
static void find_operand(struct core *c)
{
	uint8_t code[15];
	size_t size = 0;

	while (size < sizeof(code)) {
		const uint8_t *byte = watch_host(c, now.ip + size, 1);

		if (!byte)
			break;
		code[size++] = *byte;
	}
	now.has_operand = operand_find(code, size, now.ip, (const uint64_t *)(const void *)c->env,
				       segment_base(c, SEGMENT_FS), segment_base(c, SEGMENT_GS), &now.operand);
}

/* A load that is part of an unaligned one becomes the whole of that. */
static void join_loads(uint64_t *address, uint64_t *length)
{
	uint64_t start = now.operand.address, size = now.operand.vector && *length == 8 ? 16 : *length;

	if (now.has_operand && start % *length && *address < start + size && start < *address + *length) {
		*address = start;
		*length = size;
	}
}

static void qemu_check(void *cpu, uint64_t address, uint64_t length, uint32_t attributes, int flags, uintptr_t ra)
{
	struct core *c = owner;
	uint64_t stack;

	(void)attributes;
	if (!c || c->cpu != cpu)
		return;
	c->watch.checks++;
	/* An unaligned store comes as two calls; within one page the first has a length that makes no sense. */
	if ((int64_t)length <= 0) {
		now.split_address = address;
		now.split = true;
		return;
	}
	if (now.split) {
		now.split = false;
		if ((now.split_address & PAGE_MASK) == address) {
			length = address + length - now.split_address;
			address = now.split_address;
		}
	}
	if (!watched(address, length, flags))
		return;
	c->watch.matches++;
	if (!ra) /* the CPU's own access, while it delivers an exception: there is no instruction to trap behind */
		return;
	if (now.second_pass && (now.exceptions != c->exceptions || now.interrupts != c->interrupts)) {
		now.second_pass = false;
		forget_hits();
	}
	if (now.second_pass) {
		if (flags & WATCH_READ)
			join_loads(&address, &length);
		note_hits(c, address, length, flags); /* possibly none: a neighbour of an unaligned load */
		now.pending = true;
		ask_for_block_end(c);
		return;
	}
	stack = *quad(c->env, CORE_RSP);
	if (stack > c->watch.handler_low && stack <= c->watch.handler_high)
		return;
	now.second_pass = true;
	now.exceptions = c->exceptions;
	now.interrupts = c->interrupts;
	forget_hits();
	*word(c->cpu, c->watch.at.cpu_cflags_next_tb) = 1; /* one instruction */
	c->watch.restore_state(cpu, ra, true);
	now.ip = *quad(c->env, c->at.eip);
	find_operand(c);
	c->watch.loop_exit(cpu);
}

bool watch_again(const struct core *c, uint64_t ip)
{
	return c == owner && now.second_pass && !now.pending && now.ip == ip && now.exceptions == c->exceptions &&
	       now.interrupts == c->interrupts;
}

/* ---- between instructions */

/* A new run: the block made for the second pass is gone. */
void watch_begin_run(struct core *c)
{
	if (c != owner)
		return;
	if (!now.pending)
		now.second_pass = false;
	else
		*word(c->cpu, c->at.cpu_interrupt_request) |= PENDING_BIT;
}

bool watch_pending(const struct core *c)
{
	return c == owner && now.pending;
}

/* From the block hook when the budget is used up: was it taken away to get to the interrupt routine? */
bool watch_break_block(struct core *c)
{
	if (c != owner || !now.broken)
		return false;
	*(uint16_t *)(void *)(*(uint8_t **)(void *)(c->cpu + c->watch.at.cpu_icount) + 2) = 0xffff;
	return true;
}

/* Turn what the watchpoints noted into the list of hits; return the bits of DR6. */
static uint64_t collect(struct core *c)
{
	struct watch *watch = &c->watch;
	uint64_t dr6 = 0, next = *quad(c->env, c->at.eip);
	void **registers = (void **)(void *)(c->env + watch->at.env_watchpoint);

	watch->nhits = watch->nstops = 0;
	for (int i = 0; i < table_size; i++) {
		struct watchpoint *w = table[i];

		if (!w->used || !w->hit)
			continue;
		if (w->kind == WATCH_REGISTER) {
			for (int k = 0; k < 4; k++)
				if (registers[k] == &w->qemu)
					dr6 |= 1u << k;
		} else if (watch->nhits < WATCH_MAX_HITS) {
			watch->hits[watch->nhits++] = (struct watch_hit){
				.token = w->token, .address = w->hit_address, .length = w->hit_end - w->hit_address,
				.ip = now.ip, .next_ip = next, .watched = w->address, .old = w->old,
				.access = w->hit, .kind = w->kind,
			};
			if (w->kind == WATCH_STOP)
				watch->nstops++;
			else
				dr6 |= DR6_NONE_OF_YOURS;
		} else {
			watch->dropped++;
		}
		w->hit = 0;
	}
	return dr6;
}

/* From the interrupt routine, behind the instruction: true when #DB was delivered. */
bool watch_deliver(struct core *c)
{
	struct watch *watch = &c->watch;
	uint64_t dr6, *register6 = quad(c->env, watch->at.env_dr + 6 * 8);

	give_back_budget(c);
	*word(c->cpu, c->at.cpu_interrupt_request) &= ~PENDING_BIT;
	if (!now.pending)
		return false;
	now.pending = now.second_pass = false;
	if (now.exceptions != c->exceptions) { /* it faulted after all and will be executed again */
		forget_hits();
		watch->dropped++;
		return false;
	}
	dr6 = collect(c);
	if (dr6 || watch->nhits)
		watch->delivered++;
	if (watch->nstops)
		core_stop(c, CORE_WATCH);
	if (!dr6)
		return false;
	*register6 = (*register6 & ~(uint64_t)0xf) | dr6;
	c->hardirq(c->env, 1, 1);
	return true;
}

/* Walk the guest's page tables (4 levels, Intel SDM vol. 3, 4.5); only RAM has a host address. */
uint8_t *watch_host(struct core *c, uint64_t address, uint64_t size)
{
	const uint64_t frame = 0x000ffffffffff000;
	uint64_t entry = *quad(c->env, c->watch.at.env_cr + 3 * 8), mask = PAGE_SIZE - 1;

	if ((address & mask) + size > PAGE_SIZE)
		return NULL;
	for (int shift = 39; shift >= 12; shift -= 9) {
		uint64_t at = (entry & frame) + (address >> shift & 511) * 8;

		if (at + 8 > c->watch.ram_size)
			return NULL;
		memcpy(&entry, c->watch.ram + at, 8);
		if (!(entry & 1))
			return NULL;
		if ((shift == 30 || shift == 21) && entry & 0x80) {
			mask = ((uint64_t)1 << shift) - 1;
			break;
		}
	}
	address = (entry & frame & ~mask) | (address & mask);
	return address + size <= c->watch.ram_size ? c->watch.ram + address : NULL;
}

/* ---- getting called */

int watch_install(struct core *c, const void *const stubs[5])
{
	/* What the emptied functions of the 2.1.4 wheel look like: return, or return 0. */
	static const uint8_t empty[] = { 0xc3 }, zero[] = { 0x31, 0xc0, 0xc3 };
	const void *const functions[5] = {
		(const void *)(uintptr_t)qemu_insert,	  (const void *)(uintptr_t)qemu_remove,
		(const void *)(uintptr_t)qemu_remove_all, (const void *)(uintptr_t)qemu_matches,
		(const void *)(uintptr_t)qemu_check,
	};
	if (!installed) {
		for (int i = 0; i < 5; i++)
			if (memcmp(stubs[i], empty, sizeof(empty)) && memcmp(stubs[i], zero, sizeof(zero)))
				return ENOEXEC;
		for (int i = 0; i < 5; i++) {
			int error = plt_redirect(stubs[i], functions[i]);

			if (error)
				return error;
		}
		installed = true;
	}
	watch_detach(owner); /* a former machine's watchpoints die with it */
	owner = c;
	return 0;
}

void watch_detach(struct core *c)
{
	if (c != owner)
		return;
	for (int i = 0; i < table_size; i++)
		if (table[i]->used) {
			remove_from_pages(table[i]);
			table[i]->used = false;
		}
	memset(&now, 0, sizeof(now));
	owner = NULL;
}
