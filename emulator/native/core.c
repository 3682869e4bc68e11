/*
 * Exceptions, interrupts, SYSCALL, RDTSC, the block clock and stopping: see core.h.
 *
 * Unicorn 2.1.4 delivers nothing to its guest by itself. It calls hooks; the wheel exports QEMU's own delivery
 * routines, which are called from those hooks here. Every delivery happens inside cpu_exec(), where the routines may
 * longjmp out when a stack or a descriptor the guest set up is bad: the guest gets a double fault, not the host.
 */
#include "core.h"

#include <stddef.h>
#include <string.h>

/* uc_hook_type (unicorn.h). */
enum { HOOK_INTR = 1, HOOK_INSN = 2, HOOK_BLOCK = 8, HOOK_INSN_INVALID = 1 << 14 };
/* x86 instruction numbers of uc_x86_insn (x86.h). */
enum { INS_CPUID = 113, INS_RDTSC = 608, INS_RDTSCP = 609, INS_SYSCALL = 699 };
/* Indices into env->regs, QEMU's order. */
enum { RAX = 0, RCX = 1, RDX = 2, RBX = 3, R11 = 11 };
/* CPUID leaves (Intel SDM vol. 2A). */
enum { LEAF_XSAVE = 0x0d, LEAF_FREQUENCY = 0x15, LEAF_PROCESSOR_MHZ = 0x16 };

#define RFLAGS_IF 0x200u
#define RFLAGS_RF 0x10000u
#define HF_CPL_MASK 3u
#define HF_INHIBIT_IRQ 8u
#define CPU_INTERRUPT_HARD 2u
/* Descriptor flags (the second word of a descriptor) of flat 64-bit code and flat data, DPL 0, as SYSCALL sets them. */
#define FLAT_CODE64 0x00af9b00u
#define FLAT_DATA 0x00cf9300u
#define SYSCALL_LENGTH 2

struct segment { /* QEMU's SegmentCache */
	uint32_t selector;
	uint64_t base;
	uint32_t limit;
	uint32_t flags;
};
enum { SEG_CS = 1, SEG_SS = 2 };

static uint32_t *u32(uint8_t *base, uint32_t offset)
{
	return (uint32_t *)(void *)(base + offset);
}

static uint64_t *u64(uint8_t *base, uint32_t offset)
{
	return (uint64_t *)(void *)(base + offset);
}

static uint64_t *reg(struct core *c, int index)
{
	return u64(c->env, (uint32_t)index * 8);
}

uint64_t core_size(void)
{
	return sizeof(struct core);
}

int64_t core_now(const struct core *c)
{
	return c->base_ns + (c->granted - c->budget) * CORE_NS_PER_BLOCK;
}

void core_stop(struct core *c, int reason)
{
	c->reason = reason;
	c->emu_stop(c->uc);
}

/* Take the time used so far into base_ns and hand out the next piece of the budget. */
static void grant(struct core *c)
{
	int64_t left;

	c->base_ns = core_now(c);
	left = (c->deadline_ns - c->base_ns + CORE_NS_PER_BLOCK - 1) / CORE_NS_PER_BLOCK;
	if (left > CORE_BLOCKS_PER_POLL)
		left = CORE_BLOCKS_PER_POLL;
	c->granted = c->budget = left > 0 ? left : 0;
}

/* Called from a device callback, inside a run and on its thread. */
void core_shorten(struct core *c, int64_t deadline_ns)
{
	if (deadline_ns < c->deadline_ns)
		c->deadline_ns = deadline_ns;
	grant(c);
}

static void budget_used(struct core *c)
{
	c->budget++; /* the block that found it empty has not run yet */
	if (watch_break_block(c))
		return;
	grant(c);
	if (c->reason)
		return;
	if (c->budget == 0)
		core_stop(c, CORE_DEADLINE);
	else if (__atomic_load_n(&c->stop_word, __ATOMIC_RELAXED))
		core_stop(c, CORE_STOPPED);
	else if (c->nfds > 0 && poll(c->fds, (nfds_t)c->nfds, 0) > 0)
		core_stop(c, CORE_READY);
	else
		c->budget--; /* it runs now */
}

static const int32_t never; /* a stop is wanted */

static void on_block(void *uc, uint64_t address, uint32_t size, void *data)
{
	struct core *c = data;

	(void)uc;
	/* Calls without a size are those of translate.c, which has counted the block: for a shortcut, or to stop. */
	c->budget -= size != 0;
	if (!size && address) {
		shortcuts_take(c, address);
		return;
	}
	if (__builtin_expect(c->budget < 0, 0))
		budget_used(c);
	if (__builtin_expect(*c->translate.exit_request < 0, 0))
		c->translate.check(c->uc, 0); /* does not come back */
}

static void on_exception(void *uc, uint32_t vector, void *data)
{
	struct core *c = data;

	(void)uc, (void)vector;
	c->exceptions++;
	c->do_interrupt(c->cpu);
}

/* #UD goes its own way in Unicorn; exception_index is 6 already. */
static int on_invalid_instruction(void *uc, void *data)
{
	on_exception(uc, 6, data);
	return 1;
}

/* SYSCALL in 64-bit mode (Intel SDM vol. 2B). Unicorn steps over the instruction itself afterwards. */
static void on_syscall(void *uc, void *data)
{
	struct core *c = data;
	struct segment *seg = (struct segment *)(void *)(c->env + c->at.segs);
	uint64_t rflags = c->read_eflags(c->env);
	uint32_t cs = (uint32_t)(*u64(c->env, c->at.star) >> 32) & 0xfffc;

	(void)uc;
	c->syscalls++;
	*reg(c, RCX) = *u64(c->env, c->at.eip) + SYSCALL_LENGTH;
	*reg(c, R11) = rflags;
	seg[SEG_CS] = (struct segment){ cs, 0, UINT32_MAX, FLAT_CODE64 };
	seg[SEG_SS] = (struct segment){ cs + 8, 0, UINT32_MAX, FLAT_DATA };
	*u32(c->env, c->at.hflags) &= ~HF_CPL_MASK;
	c->write_eflags(c->env, rflags & ~*u64(c->env, c->at.fmask), ~RFLAGS_RF);
	*u64(c->env, c->at.eip) = *u64(c->env, c->at.lstar) - SYSCALL_LENGTH;
}

static int on_rdtsc(void *uc, void *data)
{
	struct core *c = data;
	uint64_t tsc = (uint64_t)core_now(c);

	(void)uc;
	*reg(c, RAX) = (uint32_t)tsc;
	*reg(c, RDX) = tsc >> 32;
	return 1;
}

static int on_rdtscp(void *uc, void *data)
{
	struct core *c = data;

	*reg(c, RCX) = *u32(c->env, c->at.tsc_aux);
	return on_rdtsc(uc, data);
}

static int answer_cpuid(struct core *c, uint32_t eax, uint32_t ebx, uint32_t ecx, uint32_t edx)
{
	*reg(c, RAX) = eax;
	*reg(c, RBX) = ebx;
	*reg(c, RCX) = ecx;
	*reg(c, RDX) = edx;
	return 1;
}

/*
 * Leaves 15h and 16h tell the frequencies of TSC, APIC timer (a crystal of 1 GHz, ratio 1/1) and processor, which
 * spares the guest measuring them for 0.2 s; leaf 0 says that they are there. Nothing is in the leaves before them.
 */
static int on_cpuid(void *uc, void *data)
{
	struct core *c = data;
	uint32_t leaf = (uint32_t)*reg(c, RAX);

	(void)uc;
	if (leaf == 0)
		return answer_cpuid(c, LEAF_PROCESSOR_MHZ, 0x756e6547, 0x6c65746e, 0x49656e69); /* "GenuineIntel" */
	if (leaf == LEAF_FREQUENCY)
		return answer_cpuid(c, 1, 1, CORE_TSC_HZ, 0);
	if (leaf == LEAF_PROCESSOR_MHZ)
		return answer_cpuid(c, CORE_TSC_HZ / 1000000, CORE_TSC_HZ / 1000000, 100, 0);
	if (leaf > LEAF_XSAVE && leaf < LEAF_FREQUENCY)
		return answer_cpuid(c, 0, 0, 0, 0);
	if (leaf != c->hypercall_leaf || !c->hypercall_leaf || c->reason)
		return 0;
	c->hypercalls++;
	core_stop(c, CORE_HYPERCALL);
	return 1;
}

static int interruptible(struct core *c)
{
	return (*u32(c->env, c->at.eflags) & RFLAGS_IF) && !(*u32(c->env, c->at.hflags) & HF_INHIBIT_IRQ);
}

static _Thread_local struct core *running; /* cpu_exec_interrupt() gets no user data, but runs on core_run()'s thread */

/* Takes the place of x86_cpu_exec_interrupt(): called by cpu_exec() while interrupt_request is not zero. */
static _Bool on_interrupt_request(void *cpu, int request)
{
	struct core *c = running;
	uint32_t *pending = u32(cpu, c->at.cpu_interrupt_request);

	if ((request & CORE_INTERRUPT_WATCH) && watch_deliver(c))
		return 1; /* #DB comes before any interrupt */
	if (c->reason || !interruptible(c))
		return 0;
	*pending &= ~CPU_INTERRUPT_HARD;
	if (c->vector >= 0) {
		int vector = c->vector;

		c->vector = -1;
		c->interrupts++;
		c->hardirq(c->env, vector, 1);
		if (c->window)
			*pending |= CPU_INTERRUPT_HARD;
		return 1;
	}
	if (c->window && !c->reason) {
		c->window = 0;
		core_stop(c, CORE_WINDOW);
	}
	return 0;
}

void *core_interrupt_callback(void);
void *core_interrupt_callback(void)
{
	_Bool (*callback)(void *, int) = on_interrupt_request;
	void *address;

	memcpy(&address, &callback, sizeof(address));
	return address;
}

#define CALLBACK(function) ((void *)(uintptr_t)(function))

int core_attach(struct core *c)
{
	uint64_t handle;
	int err;

	running = c;
	c->vector = -1;
	c->translate.exit_request = &never;
	err = c->hook_add(c->uc, &handle, HOOK_BLOCK, CALLBACK(on_block), c, 1, 0);
	if (!err)
		err = c->hook_add(c->uc, &handle, HOOK_INTR, CALLBACK(on_exception), c, 1, 0);
	if (!err)
		err = c->hook_add(c->uc, &handle, HOOK_INSN_INVALID, CALLBACK(on_invalid_instruction), c, 1, 0);
	if (!err)
		err = c->hook_add(c->uc, &handle, HOOK_INSN, CALLBACK(on_syscall), c, 1, 0, INS_SYSCALL);
	if (!err)
		err = c->hook_add(c->uc, &handle, HOOK_INSN, CALLBACK(on_rdtsc), c, 1, 0, INS_RDTSC);
	if (!err)
		err = c->hook_add(c->uc, &handle, HOOK_INSN, CALLBACK(on_rdtscp), c, 1, 0, INS_RDTSCP);
	if (!err)
		err = c->hook_add(c->uc, &handle, HOOK_INSN, CALLBACK(on_cpuid), c, 1, 0, INS_CPUID);
	return err;
}

int core_translate(struct core *c, const int32_t *exit_request)
{
	return translate_install(c, CALLBACK(on_block), exit_request);
}

/*
 * Run until one of enum core_reason. Before: deadline_ns, vector (or -1), window, fds. The CPU may stop at any block,
 * with interrupts on or off; running again goes on exactly there.
 */
int core_run(struct core *c)
{
	uint32_t *halted = u32(c->cpu, c->at.cpu_halted);

	running = c;
	c->runs++;
	c->reason = 0;
	if (c->vector >= 0 || c->window)
		*u32(c->cpu, c->at.cpu_interrupt_request) |= CPU_INTERRUPT_HARD;
	else
		*u32(c->cpu, c->at.cpu_interrupt_request) &= ~CPU_INTERRUPT_HARD;
	watch_begin_run(c);
	translate_begin_run(c);
	grant(c);
	*halted = 0;
	c->error = c->emu_start(c->uc, *u64(c->env, c->at.eip), 0, 0, 0);
	c->base_ns = core_now(c);
	c->granted = c->budget = 0;
	if (c->error)
		c->reason = CORE_DEAD;
	else if (!c->reason)
		c->reason = *halted ? CORE_HALTED : CORE_DEAD;
	if (c->reason == CORE_STOPPED)
		__atomic_store_n(&c->stop_word, 0, __ATOMIC_RELAXED);
	return c->reason;
}
