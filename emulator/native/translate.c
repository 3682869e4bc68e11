/*
 * See translate.h. Unicorn emits the look for a stop through check_exit_request() behind an access to memory and behind
 * a hook on an instruction, and directly at the start of a block. Only that behind a hook is needed: such a hook stops
 * the CPU in front of its instruction. All calls of functions come by tcg_gen_callN(), that of the block hook too.
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
enum { TYPE_I64 = 1, COND_GE = 3 };
#define LABEL_PRESENT 1u /* the first bit of a TCGLabel */
#define HOOK_ARGUMENTS 4

static struct core *running; /* if its code is translated in our way */
static void *runners_tcg; /* its TCGContext, seen at the start of each block */
static uintptr_t unicorn_low, unicorn_high;
/* Unicorn's own, once ours are in their place. */
static void (*qemu_emit_check)(void *tcg);
static void (*qemu_emit_call)(void *tcg, void *function, void *result, int count, void **arguments);
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
	variable one = t->constant(tcg, -1), left = new_variable(tcg), stop = new_variable(tcg), size, data;
	void *label = t->new_label(tcg);

	t->op3(tcg, OP_LD_I64, temp(tcg, left), temp(tcg, budget_at), 0);
	t->op3(tcg, OP_ADD_I64, temp(tcg, left), temp(tcg, left), temp(tcg, one));
	t->op3(tcg, OP_ST_I64, temp(tcg, left), temp(tcg, budget_at), 0);
	t->op3(tcg, OP_LD32S_I64, temp(tcg, stop), temp(tcg, stop_at), 0);
	t->op3(tcg, OP_OR_I64, temp(tcg, left), temp(tcg, left), temp(tcg, stop));
	t->branch(tcg, COND_GE, left, 0, label);
	/* Nothing of before the branch is still there. */
	size = t->constant(tcg, 0);
	data = t->constant(tcg, (int64_t)(uintptr_t)running);
	qemu_emit_call(tcg, running->translate.block_hook, NULL, HOOK_ARGUMENTS,
		       (void *[]){ (void *)temp(tcg, size), (void *)temp(tcg, size), (void *)temp(tcg, size),
				   (void *)temp(tcg, data) });
	*(uint32_t *)label |= LABEL_PRESENT;
	t->op1(tcg, OP_SET_LABEL, (uintptr_t)label);
	for (size_t i = 0; i < 7; i++)
		t->free_temp(tcg, (void *)temp(tcg, (variable[]){ budget_at, stop_at, one, left, stop, size, data }[i]));
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
	int error;

	if (!dl_iterate_phdr(find_extent, (void *)(uintptr_t)t->emit_call))
		return ENOENT;
	qemu_emit_call = t->emit_call;
	qemu_emit_check = t->emit_check;
	error = plt_redirect(call, (const void *)(uintptr_t)emit_call);
	if (!error)
		error = plt_redirect(look, (const void *)(uintptr_t)emit_check);
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
