/*
 * From a #DB to a probe of the guest's: makes the guest's kernel call one of its own probe handlers for each hit of a
 * WATCH_DEBUG watchpoint, inside its #DB handling and with its pt_regs, as its own hardware breakpoints would.
 */
#ifndef EMULATOR_REDIRECT_H
#define EMULATOR_REDIRECT_H

#include <stdint.h>

struct core;

struct redirect {
	/* Guest virtual addresses; 0 = not in use. */
	uint64_t notifier;   /* hw_breakpoint_exceptions_notify(nb, val, struct die_args *) */
	uint64_t dispatcher; /* kprobe_dispatcher(struct kprobe *, struct pt_regs *) */
	/* Byte offsets in the kernel's structures. */
	uint32_t die_args_regs, pt_regs_orig_ax, kprobe_addr;
	/* 1 while hits are being handed over: `next` of them so far. */
	uint32_t active, next;
	uint32_t pad;
	uint64_t rdi, rsi, rdx, regs, orig_ax;
	uint64_t probe, probe_addr; /* the kprobe lent to the present hit, and its own address */
	uint64_t calls, lost;
};

int redirect_install(struct core *c);

#endif
