/*
 * The hot part of the CPU: what Unicorn leaves to its user and a kernel does thousands of times a second.
 *
 * Shared with emulator/cpu/native.py, which mirrors `struct core` in ctypes and checks its size. All addresses of
 * Unicorn's own routines and all offsets into its private structures come from there, verified; nothing is linked.
 */
#ifndef EMULATOR_CORE_H
#define EMULATOR_CORE_H

#include <poll.h>
#include <stdint.h>

#include "redirect.h"
#include "shortcuts.h"
#include "smc.h"
#include "translate.h"
#include "watch.h"

/* Virtual time: one translation block is this many ns, and the TSC runs at 1 GHz on the same counter. */
#define CORE_NS_PER_BLOCK 4
#define CORE_TSC_HZ 1000000000
/* How often a run looks at its stop word and its file descriptors: every 25,000 blocks, about 100 us of host time. */
#define CORE_BLOCKS_PER_POLL 25000
#define CORE_MAX_FDS 8
#define CORE_UC_RIP 41 /* UC_X86_REG_RIP */

/* Why core_run() came back. */
enum core_reason {
	CORE_DEADLINE = 1, /* virtual time reached deadline_ns */
	CORE_STOPPED,	   /* somebody set stop_word */
	CORE_READY,	   /* one of the file descriptors is readable */
	CORE_HALTED,	   /* HLT */
	CORE_HYPERCALL,	   /* CPUID with the magic leaf; RIP is behind it */
	CORE_WINDOW,	   /* interrupts have just become deliverable, and a window was asked for */
	CORE_DEAD,	   /* triple fault, or Unicorn gave up: see error */
	CORE_WATCH = 9,	   /* watchpoints of kind WATCH_STOP were hit: see watch.hits */
};

/* Byte offsets in Unicorn's private structures, from `env` unless said otherwise. */
struct core_layout {
	uint32_t eip, eflags, hflags, segs, star, lstar, fmask, tsc_aux;
	uint32_t cpu_halted;		/* from cpu */
	uint32_t cpu_interrupt_request; /* from cpu */
};

struct core {
	/* Unicorn's handle and objects. */
	void *uc;
	uint8_t *cpu;
	uint8_t *env;
	/* Unicorn's routines. */
	int (*emu_start)(void *uc, uint64_t begin, uint64_t until, uint64_t timeout, uint64_t count);
	int (*emu_stop)(void *uc);
	int (*set_rip)(void *uc, int reg, const void *value); /* uc_reg_write(): leaves the present block */
	int (*hook_add)(void *uc, uint64_t *handle, int type, void *callback, void *data, uint64_t begin, uint64_t end, ...);
	void (*do_interrupt)(void *cpu);
	void (*hardirq)(void *env, int vector, int is_hardware);
	uint64_t (*read_eflags)(void *env);
	void (*write_eflags)(void *env, uint64_t value, uint32_t mask);
	struct core_layout at;
	uint32_t hypercall_leaf;
	uint32_t pad;
	/* Clock: now = base_ns + (granted - budget) * CORE_NS_PER_BLOCK. Owned by the running thread. */
	int64_t base_ns;
	int64_t granted;
	int64_t budget;
	int64_t deadline_ns;
	/* Interrupt to deliver as soon as the CPU takes one; -1 = none. */
	int32_t vector;
	/* Nonzero: come back with CORE_WINDOW once the CPU would take an interrupt. */
	int32_t window;
	/* Set by any thread; cleared by core_run() when it comes back with CORE_STOPPED. */
	int32_t stop_word;
	int32_t reason;
	int32_t error; /* uc_err of the last run */
	int32_t nfds;
	struct pollfd fds[CORE_MAX_FDS];
	/* Counters for the curious and for tests. */
	uint64_t exceptions, syscalls, interrupts, hypercalls, runs;
	struct watch watch;
	struct redirect redirect;
	struct smc smc;
	struct translate translate;
	struct shortcuts shortcuts;
};

/* Our bit in QEMU's interrupt_request (CPU_INTERRUPT_TGT_INT_2, which its x86 does not use). */
#define CORE_INTERRUPT_WATCH 0x2000u
/* Byte offsets of general registers in env: QEMU's order. */
enum { CORE_RDX = 16, CORE_RSP = 32, CORE_RSI = 48, CORE_RDI = 56 };

uint64_t core_size(void);
int core_attach(struct core *c);
/* Have blocks counted in the translated code (see translate.h); after core_attach(). 0, or an errno. */
int core_translate(struct core *c, const int32_t *exit_request);
int core_run(struct core *c);
void core_shorten(struct core *c, int64_t deadline_ns);
int64_t core_now(const struct core *c);
/* End the present run with a reason; from hooks. */
void core_stop(struct core *c, int reason);

#endif
