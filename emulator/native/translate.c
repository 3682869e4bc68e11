/*
 * See translate.h. Unicorn emits the look for a stop through check_exit_request() behind an access to memory and behind
 * a hook on an instruction, and directly at the start of a block. Only that behind a hook is needed: such a hook stops
 * the CPU in front of its instruction. All calls of functions come by tcg_gen_callN(), that of the block hook too.
 * Temporaries do not live on behind a branch or a label.
 */
#define _GNU_SOURCE /* dl_iterate_phdr() */
#include "translate.h"

#include <errno.h>
#include <link.h>
#include <stdbool.h>
#include <stddef.h>

#include "core.h"
#include "plt.h"

/* TCGOpcode, TCGType and TCGCond of Unicorn 2.1.4 (tcg-opc.h, tcg.h); tests/unit/test_translate.py checks the first. */
enum { OP_SET_LABEL = 1, OP_LD32S_I64 = 72, OP_LD_I64 = 73, OP_ST_I64 = 77, OP_ADD_I64 = 78, OP_OR_I64 = 88 };
enum { TYPE_I64 = 1, COND_GE = 3, COND_EQ = 8 };
#define LABEL_PRESENT 1u /* the first bit of a TCGLabel */
#define HOOK_ARGUMENTS 4

static struct core *running; /* if its code is translated in our way */
static void *runners_tcg; /* its TCGContext, seen at the start of each block */
static uintptr_t unicorn_low, unicorn_high;
/* Unicorn's own, once ours are in their place. */
static void (*qemu_emit_check)(void *tcg);
static void (*qemu_emit_call)(void *tcg, void *function, void *result, int count, void **arguments);
static void *(*qemu_make_block)(void *cpu, uint64_t pc, uint64_t cs_base, uint32_t flags, int cflags);
static uint64_t block_address; /* of the block being made */
/* The call emitted last was one of a hook; a look that is needed is being emitted. */
static bool behind_hook, needed;

static uintptr_t temp(const void *tcg, variable v)
{
	return (uintptr_t)tcg + v;
}

static variable new_variable(void *tcg)
{
	return (uintptr_t)running->translate.new_temp(tcg, TYPE_I64, false) - (uintptr_t)tcg;
}

/* Call the block hook with a size of 0, and an address. */
static void emit_hook(void *tcg, uint64_t address)
{
	const struct translate *t = &running->translate;
	variable at = t->constant(tcg, (int64_t)address), size = t->constant(tcg, 0);
	variable data = t->constant(tcg, (int64_t)(uintptr_t)running);

	qemu_emit_call(tcg, t->block_hook, NULL, HOOK_ARGUMENTS,
		       (void *[]){ (void *)temp(tcg, size), (void *)temp(tcg, at), (void *)temp(tcg, size),
				   (void *)temp(tcg, data) });
	for (size_t i = 0; i < 3; i++)
		t->free_temp(tcg, (void *)temp(tcg, (variable[]){ at, size, data }[i]));
}

static void emit_label(void *tcg, void *label)
{
	*(uint32_t *)label |= LABEL_PRESENT;
	running->translate.op1(tcg, OP_SET_LABEL, (uintptr_t)label);
}

/*
 *	block_hook(..., address, size 0, core);
 *	if (returned)
 *		go on at RIP;
 */
static void emit_shortcut(void *tcg)
{
	const struct translate *t = &running->translate;
	variable returned_at, returned = new_variable(tcg);
	void *label = t->new_label(tcg);

	emit_hook(tcg, block_address);
	returned_at = t->constant(tcg, (int64_t)(uintptr_t)&running->shortcuts.returned);
	t->op3(tcg, OP_LD32S_I64, temp(tcg, returned), temp(tcg, returned_at), 0);
	t->branch(tcg, COND_EQ, returned, 0, label);
	t->go_on(tcg);
	emit_label(tcg, label);
	t->free_temp(tcg, (void *)temp(tcg, returned_at));
	t->free_temp(tcg, (void *)temp(tcg, returned));
}

/*
 *	budget--;
 *	if (budget < 0 || *exit_request < 0)
 *		block_hook(..., size 0, core);
 */
static void emit_block_start(void *tcg)
{
	const struct translate *t = &running->translate;
	variable budget_at = t->constant(tcg, (int64_t)(uintptr_t)&running->budget);
	variable stop_at = t->constant(tcg, (int64_t)(uintptr_t)t->exit_request);
	variable one = t->constant(tcg, -1), left = new_variable(tcg), stop = new_variable(tcg);
	void *label = t->new_label(tcg);

	t->op3(tcg, OP_LD_I64, temp(tcg, left), temp(tcg, budget_at), 0);
	t->op3(tcg, OP_ADD_I64, temp(tcg, left), temp(tcg, left), temp(tcg, one));
	t->op3(tcg, OP_ST_I64, temp(tcg, left), temp(tcg, budget_at), 0);
	t->op3(tcg, OP_LD32S_I64, temp(tcg, stop), temp(tcg, stop_at), 0);
	t->op3(tcg, OP_OR_I64, temp(tcg, left), temp(tcg, left), temp(tcg, stop));
	t->branch(tcg, COND_GE, left, 0, label);
	emit_hook(tcg, 0);
	emit_label(tcg, label);
	for (size_t i = 0; i < 5; i++)
		t->free_temp(tcg, (void *)temp(tcg, (variable[]){ budget_at, stop_at, one, left, stop }[i]));
	if (shortcuts_at(running, block_address))
		emit_shortcut(tcg);
}

static bool is_hook(const void *function)
{
	uintptr_t at = (uintptr_t)function;

	return function == running->translate.hook_helper || at < unicorn_low || at >= unicorn_high;
}

static void emit_call(void *tcg, void *function, void *result, int count, void **arguments)
{
	if (running && function == running->translate.block_hook) {
		runners_tcg = tcg;
		emit_block_start(tcg);
		return;
	}
	if (running && tcg == runners_tcg) {
		if (function != (void *)(uintptr_t)running->translate.check) {
			behind_hook = is_hook(function);
		} else if (!needed) {
			running->translate.left_out++;
			return;
		}
	}
	qemu_emit_call(tcg, function, result, count, arguments);
}

static void emit_check(void *tcg)
{
	if (running && tcg == runners_tcg && !behind_hook) {
		running->translate.left_out++;
		return;
	}
	behind_hook = false;
	needed = true;
	qemu_emit_check(tcg);
	needed = false;
}

static void *make_block(void *cpu, uint64_t pc, uint64_t cs_base, uint32_t flags, int cflags)
{
	block_address = pc;
	return qemu_make_block(cpu, pc, cs_base, flags, cflags);
}

/* dl_iterate_phdr() callback: note the extent of the library that `data` points into. */
static int find_extent(struct dl_phdr_info *info, size_t size, void *data)
{
	uintptr_t inside = (uintptr_t)data, low = UINTPTR_MAX, high = 0;

	(void)size;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		uintptr_t start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;

		if (info->dlpi_phdr[i].p_type != PT_LOAD)
			continue;
		if (start < low)
			low = start;
		if (start + info->dlpi_phdr[i].p_memsz > high)
			high = start + info->dlpi_phdr[i].p_memsz;
	}
	if (inside < low || inside >= high)
		return 0;
	unicorn_low = low;
	unicorn_high = high;
	return 1;
}

static int replace_functions(const struct translate *t)
{
	const void *call = (const void *)(uintptr_t)t->emit_call, *look = (const void *)(uintptr_t)t->emit_check;
	const void *make = (const void *)(uintptr_t)t->make_block;
	int error;

	if (!dl_iterate_phdr(find_extent, (void *)(uintptr_t)t->emit_call))
		return ENOENT;
	qemu_emit_call = t->emit_call;
	qemu_emit_check = t->emit_check;
	qemu_make_block = t->make_block;
	error = plt_redirect(call, (const void *)(uintptr_t)emit_call);
	if (!error)
		error = plt_redirect(look, (const void *)(uintptr_t)emit_check);
	if (!error)
		error = plt_redirect(make, (const void *)(uintptr_t)make_block);
	if (error)
		qemu_emit_call = NULL;
	return error;
}

int translate_install(struct core *c, void *block_hook, const int32_t *exit_request)
{
	if (!qemu_emit_call) {
		int error = replace_functions(&c->translate);

		if (error)
			return error;
	}
	c->translate.block_hook = block_hook;
	c->translate.exit_request = exit_request;
	return 0;
}

void translate_begin_run(struct core *c)
{
	running = c->translate.block_hook ? c : NULL;
}

void translate_detach(struct core *c)
{
	if (c == running)
		running = NULL;
}
