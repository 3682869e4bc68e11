/*
 * What Unicorn makes of the guest's code, without what takes most of the time in it: behind each access to memory it
 * calls a function that looks whether a hook wants to stop, and at the start of each block two, the hook and one more
 * such look. A call also drives the guest's registers out of the host's. Here the CPU stops between blocks only, and
 * the block clock is counted in the translated code itself, which leaves it when the time is up or a stop is wanted.
 */
#ifndef EMULATOR_TRANSLATE_H
#define EMULATOR_TRANSLATE_H

#include <stdint.h>

struct core;

/* A variable of QEMU's code generator (TCGv_i64): the offset of its TCGTemp from the TCGContext. */
typedef uintptr_t variable;

struct translate {
	/* Two of Unicorn's functions that emit code, replaced; and the function whose calls they emit (see `check`). */
	void (*emit_check)(void *tcg);
	void (*emit_call)(void *tcg, void *function, void *result, int count, void **arguments);
	/* tb_gen_code(), which makes a block: replaced to know of which address. */
	void *(*make_block)(void *cpu, uint64_t pc, uint64_t cs_base, uint32_t flags, int cflags);
	/* Leaves translated code for good when a stop is wanted. */
	void (*check)(void *uc, uint32_t in_delay_slot);
	/* Calls hooks when there are several of a kind. */
	void *hook_helper;
	/* What the replacement is emitted with. */
	variable (*constant)(void *tcg, int64_t value);
	void *(*new_temp)(void *tcg, int type, int local);
	void (*free_temp)(void *tcg, void *temp);
	void *(*new_label)(void *tcg);
	void (*op1)(void *tcg, int op, uintptr_t a);
	void (*op3)(void *tcg, int op, uintptr_t a, uintptr_t b, uintptr_t c);
	void (*go_on)(void *tcg); /* to the block at RIP: tcg_gen_lookup_and_goto_ptr() */
	void (*branch)(void *tcg, int condition, variable a, int64_t b, void *label);
	/* A UC_HOOK_BLOCK callback, the only hook of its kind; NULL: translate as Unicorn does. */
	void *block_hook;
	/* Negative: a stop is wanted. Never so before translate_install(). */
	const int32_t *exit_request;
	uint64_t left_out; /* calls that were not emitted */
};

/* On a CPU that has not run yet. 0, or an errno. */
int translate_install(struct core *c, void *block_hook, const int32_t *exit_request);
void translate_begin_run(struct core *c);
/* Before the CPU goes. */
void translate_detach(struct core *c);

#endif
