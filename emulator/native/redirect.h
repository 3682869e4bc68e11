/*
 * From a #DB to a probe of the guest's: makes the guest's kernel call one of its own probe handlers for each hit of a
 * WATCH_DEBUG watchpoint, inside its #DB handling and with its pt_regs, as its own hardware breakpoints would.
 */
#ifndef EMULATOR_REDIRECT_H
#define EMULATOR_REDIRECT_H

#include <stdint.h>

struct core;

/* What is known of a hit. The probe's arguments find it in members of pt_regs that are lent for that. */
enum redirect_value {
	REDIRECT_WATCHED, /* start of the watched range */
	REDIRECT_AT,	  /* first byte of it that was accessed */
	REDIRECT_OLD,	  /* struct watch_hit's */
	REDIRECT_SIZE,	  /* bytes accessed */
	REDIRECT_ACCESS,  /* address of "r", "w" or "rw" */
	REDIRECT_VALUES
};

struct redirect {
	/* Guest virtual addresses; 0 = not in use. */
	uint64_t notifier;   /* hw_breakpoint_exceptions_notify(nb, val, struct die_args *) */
	uint64_t dispatcher; /* kprobe_dispatcher(struct kprobe *, struct pt_regs *) */
	/* Where the dispatcher returns to: behind the notifier's first instruction, or at its entry. */
	uint64_t back;
	uint64_t access_names; /* the strings "r", "w" and "rw", 8 bytes each */
	/* Byte offsets in the kernel's structures. */
	uint32_t die_args_regs, kprobe_addr;
	uint32_t lent[REDIRECT_VALUES]; /* members of pt_regs */
	/* 1 while hits are being handed over: `next` of them so far. */
	uint32_t active, next;
	uint32_t pad;
	uint64_t rdi, rsi, rdx, regs, own[REDIRECT_VALUES];
	uint64_t probe, probe_addr; /* the kprobe lent to the present hit, and its own address */
	uint64_t calls, lost;
};

int redirect_install(struct core *c);

#endif
