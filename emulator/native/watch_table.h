/*
 * The watchpoints of a process, found by what an access touches: each watched page has a bitmap of the bytes watched for
 * reads, one for writes, and a list of its watchpoints. An access that hits nothing costs the same with one watchpoint
 * on its page or a thousand.
 */
#ifndef EMULATOR_WATCH_TABLE_H
#define EMULATOR_WATCH_TABLE_H

#include <stdbool.h>
#include <stdint.h>

struct qemu_watchpoint { /* CPUWatchpoint: handed out for the guest's registers, compared by address only */
	uint64_t address, length, hit_address;
	uint32_t attributes;
	int32_t flags;
	void *links[2];
};

struct watchpoint {
	uint64_t address, length, token;
	uint32_t access, kind;
	int number;
	bool used;
	uint32_t hit; /* accesses by the instruction being looked at */
	uint64_t hit_address, hit_end, old;
	uint8_t *before; /* with WATCH_CHANGE: the range before that instruction */
	struct qemu_watchpoint qemu;
};

/* All there are, by number; those not `used` are free. */
extern struct watchpoint **watch_table;
extern int watch_table_size;

/* A watchpoint's number, or -ENOSPC or -ENOMEM. */
int table_add(uint64_t address, uint64_t length, uint32_t access, uint32_t kind, uint64_t token);
void table_remove(struct watchpoint *w);
void table_move(struct watchpoint *w, uint64_t address);
/* The watchpoint of that number; NULL when there is none. */
struct watchpoint *table_get(int number);
bool table_page_watched(uint64_t page_number);
/* Is any byte of a range watched for one of the accesses in `flags`? */
bool table_watched(uint64_t address, uint64_t length, uint32_t flags);
/* Call `hit` for each watchpoint that has a byte of the range and one of the accesses: once, or once for each page. */
void table_each(uint64_t address, uint64_t length, uint32_t flags, void (*hit)(struct watchpoint *, void *), void *data);

#endif
