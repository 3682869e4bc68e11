/*
 * See watch.h. How an access becomes a trap behind its instruction:
 *
 *   check() before the access   a match: execute this instruction again, alone in a translation block
 *   check() in that block       note the hits; ask for the block's end to lead to the interrupt routine
 *   interrupt routine           memory and registers are those after the instruction: deliver #DB, or stop for the host
 *
 * Exceptions and interrupts between the two passes start anew: the instruction is executed again some time.
 */
#include "watch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "operand.h"
#include "paging.h"
#include "plt.h"
#include "watch_hits.h"
#include "watch_table.h"

#define PAGE_SIZE 4096u
#define PAGE_MASK (~(uint64_t)(PAGE_SIZE - 1))
#define MAX_LENGTH (1u << 20)
/* A bit of interrupt_request QEMU's x86 leaves unused (CPU_INTERRUPT_TGT_INT_2); core.c tests it. */
#define PENDING_BIT CORE_INTERRUPT_WATCH
#define BP_CPU 0x20
#define SEGMENT_SIZE 24u /* QEMU's SegmentCache; its base is at 8 */
enum { SEGMENT_FS = 4, SEGMENT_GS = 5 };

/* One machine a process has watchpoints; `owner` is its core. */
static struct core *owner;
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

/* ---- adding and removing */

int watch_add(struct core *c, uint64_t address, uint64_t length, uint32_t access, uint32_t kind, uint64_t token)
{
	int number;

	if (c != owner || !length || length > MAX_LENGTH || address + length - 1 < address ||
	    !(access & (WATCH_READ | WATCH_WRITE)))
		return -EINVAL;
	number = table_add(address, length, access, kind, token);
	if (number >= 0)
		c->watch.flush_tlb(c->cpu);
	return number;
}

int watch_remove(struct core *c, int number)
{
	struct watchpoint *w = table_get(number);

	if (c != owner || !w)
		return -ENOENT;
	table_remove(w);
	c->watch.flush_tlb(c->cpu);
	return 0;
}

int watch_move(struct core *c, int number, uint64_t address)
{
	struct watchpoint *w = table_get(number);

	if (c != owner || !w)
		return -ENOENT;
	if (address + w->length - 1 < address)
		return -EINVAL;
	table_move(w, address);
	c->watch.flush_tlb(c->cpu);
	return 0;
}

/* ---- what QEMU calls */

static int qemu_insert(void *cpu, uint64_t address, uint64_t length, int flags, struct qemu_watchpoint **out)
{
	struct watchpoint *w;
	int number;

	if (!owner || owner->cpu != cpu || !length)
		return -EINVAL;
	number = table_add(address, length, (uint32_t)flags & (WATCH_READ | WATCH_WRITE), WATCH_REGISTER, 0);
	if (number < 0)
		return number;
	w = table_get(number);
	w->qemu.address = address;
	w->qemu.length = length;
	w->qemu.flags = flags;
	if (out)
		*out = &w->qemu;
	owner->watch.flush_tlb(cpu);
	return 0;
}

static void qemu_remove(void *cpu, struct qemu_watchpoint *reference)
{
	if (!owner || owner->cpu != cpu)
		return;
	for (int i = 0; i < watch_table_size; i++)
		if (watch_table[i]->used && &watch_table[i]->qemu == reference)
			watch_remove(owner, i);
}

static void qemu_remove_all(void *cpu, int mask)
{
	if (!owner || owner->cpu != cpu || !(mask & BP_CPU))
		return;
	for (int i = 0; i < watch_table_size; i++)
		if (watch_table[i]->used && watch_table[i]->kind == WATCH_REGISTER)
			watch_remove(owner, i);
}

/* Called for a page that enters the TLB: nonzero sends its accesses through qemu_check(). */
static int qemu_matches(void *cpu, uint64_t address, uint64_t length)
{
	if (!owner || owner->cpu != cpu)
		return 0;
	for (uint64_t number = address / PAGE_SIZE; number <= (address + length - 1) / PAGE_SIZE; number++)
		if (table_page_watched(number))
			return WATCH_READ | WATCH_WRITE;
	return 0;
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

/* In the first pass, with the registers as they are before the instruction: which memory does it name? */
static void find_operand(struct core *c)
{
	uint8_t code[15];
	size_t size = 0;

	while (size < sizeof(code)) {
		const uint8_t *byte = paging_host(c, now.ip + size, 1);

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
	if (!table_watched(address, length, (uint32_t)flags))
		return;
	c->watch.matches++;
	if (!ra) /* the CPU's own access, while it delivers an exception: there is no instruction to trap behind */
		return;
	if (now.second_pass && (now.exceptions != c->exceptions || now.interrupts != c->interrupts)) {
		now.second_pass = false;
		hits_forget();
	}
	if (now.second_pass) {
		if (flags & WATCH_READ)
			join_loads(&address, &length);
		/* Possibly none: a neighbour of an unaligned load. */
		hits_note(c, address, length, (uint32_t)flags);
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
	hits_forget();
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
		hits_forget();
		watch->dropped++;
		return false;
	}
	dr6 = hits_collect(c, now.ip);
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
	hits_forget();
	for (int i = 0; i < watch_table_size; i++)
		if (watch_table[i]->used)
			table_remove(watch_table[i]);
	memset(&now, 0, sizeof(now));
	owner = NULL;
}
