/*
 * Watchpoints: any number of address ranges whose reads or writes are noticed, exactly and by virtual address.
 *
 * Unicorn still has QEMU's slow path for pages with watchpoints, but the five functions behind it were emptied. The ones
 * here take their place (their PLT slots are pointed at them), which also brings the guest's own debug registers to
 * life. As on hardware a data watchpoint is a trap: it is reported after the instruction, with the next one's address.
 */
#ifndef EMULATOR_WATCH_H
#define EMULATOR_WATCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct core;

/* WATCH_CHANGE: only instructions that leave other bytes behind than they found. */
enum { WATCH_READ = 1, WATCH_WRITE = 2, WATCH_CHANGE = 4 };

/* Who is told of a hit. */
enum watch_kind {
	WATCH_REGISTER, /* one of the guest's DR0-DR3: #DB with its bit in DR6 */
	WATCH_STOP,	/* the host: the run ends with CORE_WATCH */
	WATCH_DEBUG,	/* the guest, by a #DB with DR6 bit 12, which its kernel knows nothing of: see redirect.c */
};

struct watch_hit {
	uint64_t token;
	uint64_t address; /* what was accessed, not what is watched */
	uint64_t length;
	uint64_t ip, next_ip; /* of the instruction, and of the one after it */
	uint64_t watched;     /* start of the watched range when it was hit */
	/* 8 bytes before the instruction: at `watched`; at the first watched byte accessed if the range has more than 8. */
	uint64_t old;
	uint32_t access;
	uint32_t kind;
};

struct watch_offsets {
	uint32_t cpu_cflags_next_tb, cpu_icount; /* from cpu */
	uint32_t env_dr, env_watchpoint, env_cr; /* from env */
	uint32_t pad;
};

struct watch {
	/* Unicorn's routines and offsets. */
	bool (*restore_state)(void *cpu, uintptr_t ra, bool will_exit);
	void (*loop_exit)(void *cpu);
	void (*flush_tlb)(void *cpu);
	struct watch_offsets at;
	/* RAM, for reading memory before an instruction. */
	uint8_t *ram;
	uint64_t ram_size;
	/* Stack of the guest's #DB handler: its accesses do not count, or handling a hit would make hits. */
	uint64_t handler_low, handler_high;
	/* Hits of the last instruction that made any; Python empties it at CORE_WATCH, redirect.c otherwise. */
	struct watch_hit *hits;
	uint32_t nhits, nstops;
	uint64_t checks, matches, delivered, dropped;
};

/* Point the PLT slots at the functions here; 0, or an errno when the library is not as expected. */
int watch_install(struct core *c, const void *const stubs[5]);
/* Add a watchpoint; its number, or -errno. Range and kind are the caller's to check. While the CPU is stopped. */
int watch_add(struct core *c, uint64_t address, uint64_t length, uint32_t access, uint32_t kind, uint64_t token);
int watch_move(struct core *c, int number, uint64_t address);
int watch_remove(struct core *c, int number);
/* Forget a machine that is gone, with its watchpoints. */
void watch_detach(struct core *c);
/* Is the instruction at RIP, which hits a watchpoint, about to be executed for the second time? From hooks. */
bool watch_again(const struct core *c, uint64_t ip);

/* For core.c. */
void watch_begin_run(struct core *c);
bool watch_pending(const struct core *c);
bool watch_deliver(struct core *c);
bool watch_break_block(struct core *c);

#endif
