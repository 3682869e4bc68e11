/*
 * The engine that is not there: the routines of Unicorn that core.c calls are functions of this file, and its callbacks
 * are caught as they are registered. A test sets `fake` with reset() or attach(), and has run() call its guest.
 */
#ifndef ENGINE_H
#define ENGINE_H

#include "core.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *core_interrupt_callback(void);

/* uc_hook_type and uc_x86_insn as unicorn.h and x86.h have them, written down a second time on purpose. */
enum { HOOK_INTR = 1, HOOK_INSN = 2, HOOK_BLOCK = 8, HOOK_INSN_INVALID = 1 << 14 };
enum { INS_CPUID = 113, INS_RDTSC = 608, INS_RDTSCP = 609, INS_SYSCALL = 699 };
enum { RAX, RCX, RDX, RBX, R11 = 11, REGISTERS = 16 };
enum { IF = 0x200, HF_CPL = 3, HF_INHIBIT_IRQ = 8, INTERRUPT_HARD = 2 };
enum { LEAF = 0x46414b45, UC_ERR_WRITE_UNMAPPED = 7, HOOKS = 7 };
enum { NS = CORE_NS_PER_BLOCK, POLL = CORE_BLOCKS_PER_POLL };

struct env {
	uint64_t regs[REGISTERS];
	uint64_t eip, star, lstar, fmask;
	uint32_t eflags, hflags, tsc_aux;
	struct {
		uint32_t selector;
		uint64_t base;
		uint32_t limit, flags;
	} segs[6];
};

struct cpu {
	uint32_t halted, interrupt_request;
};

struct hook {
	int type, instruction;
	void *callback;
};

static struct {
	struct core *core; /* on the heap, so that every step outside it is seen */
	struct cpu *cpu;
	struct env *env;
	struct hook hooks[HOOKS];
	int nhooks, failing_hook;
	int (*guest)(void); /* what runs inside emu_start(); returns a uc_err */
	uint64_t began_at;
	int stops; /* calls of emu_stop() in this run */
	int delivered, vector; /* do_interrupt() and hardirq() */
	uint64_t written_flags;
	uint32_t written_mask;
	int64_t blocks; /* executed in this test */
} fake;

static const char *test_name;
static int failures;

#define CHECK(condition) check((condition), #condition, __LINE__)
#define EQUAL(got, wanted) equal((int64_t)(got), (int64_t)(wanted), #got, __LINE__)

static void check(int holds, const char *text, int line)
{
	if (!holds) {
		fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, line, test_name, text);
		failures++;
	}
}

static void equal(int64_t got, int64_t wanted, const char *text, int line)
{
	if (got != wanted) {
		fprintf(stderr, "%s:%d: %s: %s is %" PRId64 " (%#" PRIx64 "), not %" PRId64 " (%#" PRIx64 ")\n", __FILE__,
			line, test_name, text, got, (uint64_t)got, wanted, (uint64_t)wanted);
		failures++;
	}
}

/* ---- the engine */

static int emu_start(void *uc, uint64_t begin, uint64_t until, uint64_t timeout, uint64_t count)
{
	CHECK(uc == &fake);
	CHECK(until == 0 && timeout == 0 && count == 0);
	fake.began_at = begin;
	fake.stops = 0;
	return fake.guest();
}

static int emu_stop(void *uc)
{
	CHECK(uc == &fake);
	fake.stops++;
	return 0;
}

static int hook_add(void *uc, uint64_t *handle, int type, void *callback, void *data, uint64_t begin, uint64_t end, ...)
{
	struct hook *hook = &fake.hooks[fake.nhooks];
	va_list rest;

	CHECK(uc == &fake && data == fake.core);
	CHECK(begin > end); /* everywhere */
	if (fake.nhooks == fake.failing_hook)
		return UC_ERR_WRITE_UNMAPPED;
	va_start(rest, end);
	*hook = (struct hook){ type, type == HOOK_INSN ? va_arg(rest, int) : 0, callback };
	va_end(rest);
	*handle = (uint64_t)++fake.nhooks;
	return 0;
}

static void do_interrupt(void *cpu)
{
	CHECK(cpu == fake.cpu);
	fake.delivered++;
}

static void hardirq(void *env, int vector, int is_hardware)
{
	CHECK(env == fake.env && is_hardware == 1);
	fake.delivered++;
	fake.vector = vector;
}

static uint64_t read_eflags(void *env)
{
	return ((struct env *)env)->eflags;
}

static void write_eflags(void *env, uint64_t value, uint32_t mask)
{
	CHECK(env == fake.env);
	fake.written_flags = value;
	fake.written_mask = mask;
}

/* ---- its callbacks */

static void *callback(int type, int instruction)
{
	for (int i = 0; i < fake.nhooks; i++)
		if (fake.hooks[i].type == type && fake.hooks[i].instruction == instruction)
			return fake.hooks[i].callback;
	fprintf(stderr, "%s: no hook of type %d for instruction %d\n", test_name, type, instruction);
	exit(1);
}

/* The CPU comes to a block: returns whether it is executed, which takes 4 ns; a stopped CPU leaves it for later. */
static int block(void)
{
	void (*on_block)(void *, uint64_t, uint32_t, void *);
	void *address = callback(HOOK_BLOCK, 0);
	int64_t before = core_now(fake.core);

	memcpy(&on_block, &address, sizeof(address));
	on_block(&fake, 0, 1, fake.core);
	EQUAL(core_now(fake.core) - before, fake.stops ? 0 : NS);
	if (!fake.stops)
		fake.blocks++;
	return !fake.stops;
}

static int instruction(int number)
{
	int (*on_instruction)(void *, void *);
	void *address = callback(HOOK_INSN, number);

	memcpy(&on_instruction, &address, sizeof(address));
	return on_instruction(&fake, fake.core);
}

static int cpuid(uint64_t leaf)
{
	fake.env->regs[RAX] = leaf;
	fake.env->regs[RBX] = fake.env->regs[RCX] = fake.env->regs[RDX] = 0x5555;
	return instruction(INS_CPUID);
}

static int interrupt_request(void)
{
	_Bool (*on_request)(void *, int);
	void *address = core_interrupt_callback();

	memcpy(&on_request, &address, sizeof(address));
	return on_request(fake.cpu, (int)fake.cpu->interrupt_request);
}

/* ---- guests */

static int endless(void)
{
	while (block())
		;
	return 0;
}

static int run(int (*guest)(void), int64_t deadline_ns)
{
	fake.guest = guest;
	fake.core->deadline_ns = deadline_ns;
	return core_run(fake.core);
}

static void reset(void)
{
	free(fake.core);
	free(fake.cpu);
	free(fake.env);
	memset(&fake, 0, sizeof(fake));
	fake.failing_hook = -1;
	fake.core = calloc(1, sizeof(*fake.core));
	fake.cpu = calloc(1, sizeof(*fake.cpu));
	fake.env = calloc(1, sizeof(*fake.env));
	if (!fake.core || !fake.cpu || !fake.env)
		abort();
	*fake.core = (struct core){
		.uc = &fake,
		.cpu = (uint8_t *)fake.cpu,
		.env = (uint8_t *)fake.env,
		.emu_start = emu_start,
		.emu_stop = emu_stop,
		.hook_add = hook_add,
		.do_interrupt = do_interrupt,
		.hardirq = hardirq,
		.read_eflags = read_eflags,
		.write_eflags = write_eflags,
		.hypercall_leaf = LEAF,
	};
#define ENV(member) .member = offsetof(struct env, member)
	fake.core->at = (struct core_layout){
		ENV(eip), ENV(eflags), ENV(hflags), ENV(segs), ENV(star), ENV(lstar), ENV(fmask), ENV(tsc_aux),
		.cpu_halted = offsetof(struct cpu, halted),
		.cpu_interrupt_request = offsetof(struct cpu, interrupt_request),
	};
}

static void attach(void)
{
	reset();
	EQUAL(core_attach(fake.core), 0);
}

#endif
