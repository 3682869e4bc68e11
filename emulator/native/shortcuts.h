/*
 * Work of the guest's kernel that is done here instead: at the entry of a function, with the same result. A shortcut is
 * taken only while the code it stands for is what it was at first, byte for byte, and nothing is watched: whoever
 * probes or traces that code, or the memory it reads, sees it run.
 */
#ifndef EMULATOR_SHORTCUTS_H
#define EMULATOR_SHORTCUTS_H

#include <stdbool.h>
#include <stdint.h>

struct core;

enum shortcut_kind {
	SHORTCUT_RECORDS, /* ftrace_rec_iter_next(): step over functions whose state neither is nor becomes "traced" */
	SHORTCUT_SYMBOL,  /* get_symbol_offset(): where a symbol's name begins in the compressed table */
	SHORTCUT_KINDS,
};

#define SHORTCUT_BODIES 5

struct shortcut_body {
	const uint8_t *now;
	uint8_t *first;
	uint64_t size;
};

struct shortcut {
	uint64_t address; /* guest virtual; 0 = not in use */
	uint64_t taken, declined;
	uint64_t bodies;
	struct shortcut_body body[SHORTCUT_BODIES];
};

struct shortcuts {
	struct shortcut list[SHORTCUT_KINDS];
	/* Guest virtual addresses: the caller whose loop is shortened, the tables of names. */
	uint64_t caller_low, caller_high, names, names_end, markers;
	/* Offsets in struct ftrace_rec_iter, ftrace_page and dyn_ftrace, bytes; flags that make a record matter. */
	uint32_t iter_page, iter_index, page_next, page_records, page_used, record_size, record_flags, busy;
	const uint8_t *names_at;
	/* Nonzero: the function was done and has returned. */
	int32_t returned;
	/* How many of the host's traps lie in code the shortcuts stand for. */
	int32_t blocked;
};

/* The values are set. `ranges` has start and size of each function it stands for. 0, or an errno. While stopped. */
int shortcuts_install(struct core *c, int kind, uint64_t address, const uint64_t *ranges, int count);
bool shortcuts_at(const struct core *c, uint64_t address);
/* At the entry of the function at `address`; sets `returned`. */
void shortcuts_take(struct core *c, uint64_t address);
void shortcuts_detach(struct core *c);

#endif
