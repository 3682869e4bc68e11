/*
 * Code that changes under the CPU's feet. Unicorn 2.1.4 notices a write to translated code only through the virtual page
 * the code was translated at; a kernel writes programs through its own mapping of the same memory. The two functions
 * here take the place of QEMU's and go by physical page.
 */
#ifndef EMULATOR_SMC_H
#define EMULATOR_SMC_H

#include <stdint.h>

struct core;

struct smc {
	/* Unicorn's own: the two replaced, and what they are made of. */
	void (*protect_code)(void *uc, uint64_t ram_address);
	void (*set_dirty)(void *cpu, uint64_t virtual_address);
	void (*reset_dirty)(void *cpu, uint64_t host_address, uint64_t length);
	void (*invalidate)(void *uc, uint64_t start, uint64_t end);
	uint64_t (*code_address)(void *env, uint64_t virtual_address);
	/* QEMU's number for physical address 0. */
	uint64_t ram_base;
	uint64_t rewritten; /* pages whose translations were dropped because something wrote to them */
};

/* On a CPU that has not run yet (physical addresses are its virtual ones). 0, or an errno. */
int smc_install(struct core *c);
/* Before the CPU's memory goes. */
void smc_detach(struct core *c);

#endif
