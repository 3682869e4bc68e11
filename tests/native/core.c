/*
 * emulator/native/core.c against an engine that is not there: each test plays the guest that runs between
 * uc_emu_start() and its return. Built with AddressSanitizer and UBSan by tests/unit/test_native.py.
 *
 * Not here: whether Unicorn does what the fake does; the tests with a guest show that.
 */
#include "engine.h"

#include <unistd.h>

/* ---- tests: attaching */

static void test_hooks(void)
{
	EQUAL(core_size(), sizeof(struct core));
	EQUAL(fake.nhooks, HOOKS);
	EQUAL(fake.core->vector, -1);
	callback(HOOK_INTR, 0);
	callback(HOOK_INSN_INVALID, 0);
	callback(HOOK_INSN, INS_SYSCALL);
}

static void test_refused_hooks(void)
{
	for (int which = 0; which < HOOKS; which++) {
		reset();
		fake.failing_hook = which;
		EQUAL(core_attach(fake.core), UC_ERR_WRITE_UNMAPPED);
		EQUAL(fake.nhooks, which);
	}
}

/* ---- tests: the clock, and why a run ends */

static void test_deadline(void)
{
	fake.env->eip = 0xffffffff81000000;
	EQUAL(run(endless, 1000 * NS), CORE_DEADLINE);
	CHECK(fake.began_at == 0xffffffff81000000);
	EQUAL(fake.blocks, 1000);
	EQUAL(core_now(fake.core), 1000 * NS);
	EQUAL(fake.core->base_ns, 1000 * NS);
	EQUAL(fake.stops, 1);
	EQUAL(run(endless, 1001 * NS), CORE_DEADLINE);
	EQUAL(fake.blocks, 1001);
	EQUAL(fake.core->runs, 2);
}

static void test_deadline_within_a_block(void)
{
	EQUAL(run(endless, 10 * NS + 1), CORE_DEADLINE);
	EQUAL(fake.blocks, 11);
}

static void test_deadline_behind_many_polls(void)
{
	EQUAL(run(endless, (3LL * POLL + 7) * NS), CORE_DEADLINE);
	EQUAL(fake.blocks, 3 * POLL + 7);
	EQUAL(run(endless, 4LL * POLL * NS), CORE_DEADLINE);
	EQUAL(fake.blocks, 4 * POLL);
}

static void test_deadline_passed(void)
{
	fake.core->base_ns = 1000000;
	EQUAL(run(endless, 1000000), CORE_DEADLINE);
	EQUAL(run(endless, 999999), CORE_DEADLINE);
	EQUAL(run(endless, INT64_MIN / 2), CORE_DEADLINE);
	EQUAL(fake.blocks, 0);
	EQUAL(core_now(fake.core), 1000000);
}

static void test_deadlines_at_random(void)
{
	uint32_t random = 1;

	for (int i = 0; i < 2000; i++) {
		random = random * 1664525 + 1013904223;
		EQUAL(run(endless, core_now(fake.core) + (random >> 24)), CORE_DEADLINE);
		CHECK(core_now(fake.core) >= fake.core->deadline_ns);
		CHECK(core_now(fake.core) < fake.core->deadline_ns + NS);
	}
	EQUAL(core_now(fake.core), fake.blocks * NS);
}

static void test_stop_word(void)
{
	fake.core->stop_word = 1;
	EQUAL(run(endless, INT64_MAX / 2), CORE_STOPPED);
	EQUAL(fake.blocks, POLL);
	EQUAL(fake.core->stop_word, 0);
	EQUAL(core_now(fake.core), (int64_t)POLL * NS);
}

static void test_stop_word_waits_for_the_next_run(void)
{
	fake.core->stop_word = 1;
	EQUAL(run(endless, 10 * NS), CORE_DEADLINE);
	EQUAL(fake.core->stop_word, 1);
	EQUAL(run(endless, INT64_MAX / 2), CORE_STOPPED);
	EQUAL(fake.core->stop_word, 0);
}

static void test_readable_descriptor(void)
{
	int pipes[CORE_MAX_FDS][2];

	for (int i = 0; i < CORE_MAX_FDS; i++) {
		if (pipe(pipes[i]))
			abort();
		fake.core->fds[i] = (struct pollfd){ pipes[i][0], POLLIN, 0 };
	}
	fake.core->nfds = CORE_MAX_FDS;
	EQUAL(run(endless, 2LL * POLL * NS), CORE_DEADLINE);
	EQUAL(write(pipes[CORE_MAX_FDS - 1][1], "x", 1), 1);
	EQUAL(run(endless, INT64_MAX / 2), CORE_READY);
	EQUAL(fake.blocks, 3 * POLL);
	CHECK(fake.core->fds[CORE_MAX_FDS - 1].revents & POLLIN);
	EQUAL(fake.core->fds[0].revents, 0);

	fake.core->stop_word = 1; /* told first, as it is cheaper to look at */
	EQUAL(run(endless, INT64_MAX / 2), CORE_STOPPED);
	fake.core->nfds = 0;
	EQUAL(run(endless, core_now(fake.core) + 2LL * POLL * NS), CORE_DEADLINE);
	for (int i = 0; i < CORE_MAX_FDS; i++) {
		close(pipes[i][0]);
		close(pipes[i][1]);
	}
}

static int shortens(void)
{
	for (int i = 0; i < 10; i++)
		block();
	core_shorten(fake.core, core_now(fake.core) + 5 * NS);
	core_shorten(fake.core, core_now(fake.core) + 50 * NS); /* a later one changes nothing */
	return endless();
}

static int shortens_to_the_past(void)
{
	block();
	core_shorten(fake.core, 0);
	return endless();
}

static void test_shorten(void)
{
	EQUAL(run(shortens, 1000 * NS), CORE_DEADLINE);
	EQUAL(fake.blocks, 15);
	EQUAL(core_now(fake.core), 15 * NS);
	EQUAL(run(shortens_to_the_past, 1000 * NS), CORE_DEADLINE);
	EQUAL(fake.blocks, 16);
}

static int halts(void)
{
	EQUAL(fake.cpu->halted, 0);
	block();
	fake.cpu->halted = 1;
	return 0;
}

static int gives_up(void)
{
	block();
	return UC_ERR_WRITE_UNMAPPED;
}

static int shuts_down(void)
{
	return 0;
}

static void test_halted(void)
{
	EQUAL(run(halts, 1000), CORE_HALTED);
	EQUAL(core_now(fake.core), NS);
	EQUAL(run(halts, 1000), CORE_HALTED); /* it goes on behind the HLT */
	EQUAL(core_now(fake.core), 2 * NS);
}

static void test_dead(void)
{
	EQUAL(run(gives_up, 1000), CORE_DEAD);
	EQUAL(fake.core->error, UC_ERR_WRITE_UNMAPPED);
	EQUAL(core_now(fake.core), NS);
	EQUAL(run(shuts_down, 1000), CORE_DEAD);
	EQUAL(fake.core->error, 0);
}

/* ---- tests: instructions */

static int hypercalls(void)
{
	EQUAL(cpuid(0xffffffff00000000 | LEAF), 1); /* CPUID looks at EAX alone */
	EQUAL(fake.stops, 1);
	EQUAL(cpuid(LEAF), 0); /* not a second time in the same run */
	return 0;
}

static void test_hypercall(void)
{
	EQUAL(run(hypercalls, 1000), CORE_HYPERCALL);
	EQUAL(fake.core->hypercalls, 1);
	EQUAL(fake.env->regs[RBX], 0x5555);
	EQUAL(run(hypercalls, 1000), CORE_HYPERCALL);
	EQUAL(fake.core->hypercalls, 2);
}

static void test_hypercall_after_a_stop(void)
{
	fake.core->reason = CORE_DEADLINE;
	EQUAL(cpuid(LEAF), 0);
	EQUAL(fake.core->reason, CORE_DEADLINE);
	EQUAL(fake.core->hypercalls, 0);
}

static void test_cpuid(void)
{
	const uint64_t *regs = fake.env->regs;
	char vendor[13] = "";

	EQUAL(cpuid(0), 1);
	EQUAL(regs[RAX], 0x16);
	memcpy(vendor, &regs[RBX], 4);
	memcpy(vendor + 4, &regs[RDX], 4);
	memcpy(vendor + 8, &regs[RCX], 4);
	CHECK(!strcmp(vendor, "GenuineIntel"));

	EQUAL(cpuid(0x15), 1);
	EQUAL(regs[RCX] * regs[RBX] / regs[RAX], CORE_TSC_HZ);
	EQUAL(cpuid(0x16), 1);
	EQUAL(regs[RAX], CORE_TSC_HZ / 1000000);
	for (uint64_t leaf = 0x0e; leaf < 0x15; leaf++) {
		EQUAL(cpuid(leaf), 1);
		EQUAL(regs[RAX] | regs[RBX] | regs[RCX] | regs[RDX], 0);
	}
	for (uint64_t leaf = 1; leaf < 0x0e; leaf++)
		EQUAL(cpuid(leaf), 0); /* the engine's own answer */
	EQUAL(cpuid(0x17), 0);
	EQUAL(cpuid(0x80000000), 0);
	fake.core->hypercall_leaf = 0;
	EQUAL(cpuid(LEAF), 0);
	EQUAL(fake.stops, 0);
}

static int reads_tsc(void)
{
	uint64_t *regs = fake.env->regs;

	block();
	EQUAL(instruction(INS_RDTSC), 1);
	EQUAL(regs[RDX] << 32 | regs[RAX], 0x123456789a + NS);
	block();
	fake.env->tsc_aux = 3;
	EQUAL(instruction(INS_RDTSCP), 1);
	EQUAL(regs[RDX] << 32 | regs[RAX], 0x123456789a + 2 * NS);
	EQUAL(regs[RCX], 3);
	return endless();
}

static void test_tsc(void)
{
	fake.core->base_ns = 0x123456789a;
	EQUAL(run(reads_tsc, 0x123456789a + 100 * NS), CORE_DEADLINE);
}

static void test_syscall(void)
{
	struct env *env = fake.env;

	env->eip = 0x401000;
	env->eflags = 0x10246; /* RF, IF, ZF, PF */
	env->star = 0x0023001300000000; /* kernel CS 0x13: the RPL is not looked at */
	env->lstar = 0xffffffff81a00040;
	env->fmask = 0x47700;
	env->hflags = 0x40 | HF_CPL;
	memset(env->segs, 0xee, sizeof(env->segs));
	instruction(INS_SYSCALL);

	EQUAL(env->regs[RCX], 0x401002);
	EQUAL(env->regs[R11], 0x10246);
	EQUAL(env->eip, 0xffffffff81a0003e); /* the engine adds the instruction's length */
	EQUAL(env->hflags, 0x40);
	EQUAL(env->segs[1].selector, 0x10);
	EQUAL(env->segs[2].selector, 0x18);
	for (int i = 1; i <= 2; i++) {
		EQUAL(env->segs[i].base, 0);
		EQUAL(env->segs[i].limit, 0xffffffff);
	}
	EQUAL(env->segs[1].flags >> 21 & 1, 1); /* L: 64-bit code */
	EQUAL(env->segs[0].selector, 0xeeeeeeee);
	EQUAL(env->segs[3].selector, 0xeeeeeeee);
	EQUAL(fake.written_flags, 0x10046 & ~0x47700);
	CHECK(!(fake.written_mask & 0x10000) && (fake.written_mask & IF));
	EQUAL(fake.core->syscalls, 1);
}

static void test_exceptions(void)
{
	void (*on_exception)(void *, uint32_t, void *);
	int (*on_invalid)(void *, void *);
	void *address = callback(HOOK_INTR, 0);

	memcpy(&on_exception, &address, sizeof(address));
	on_exception(&fake, 14, fake.core);
	EQUAL(fake.delivered, 1);
	address = callback(HOOK_INSN_INVALID, 0);
	memcpy(&on_invalid, &address, sizeof(address));
	EQUAL(on_invalid(&fake, fake.core), 1);
	EQUAL(fake.delivered, 2);
	EQUAL(fake.core->exceptions, 2);
}

/* ---- tests: interrupts */

static int takes_interrupt(void)
{
	EQUAL(fake.cpu->interrupt_request, INTERRUPT_HARD);
	fake.env->eflags = 0; /* off: it waits */
	EQUAL(interrupt_request(), 0);
	fake.env->eflags = IF; /* STI, and the instruction in its shadow */
	fake.env->hflags = HF_INHIBIT_IRQ;
	EQUAL(interrupt_request(), 0);
	EQUAL(fake.delivered, 0);
	EQUAL(fake.cpu->interrupt_request, INTERRUPT_HARD);
	fake.env->hflags = 0;
	EQUAL(interrupt_request(), 1);
	EQUAL(fake.delivered, 1);
	EQUAL(fake.vector, 0xec);
	EQUAL(fake.core->vector, -1);
	return endless();
}

static void test_interrupt(void)
{
	fake.core->vector = 0xec;
	EQUAL(run(takes_interrupt, 10 * NS), CORE_DEADLINE);
	EQUAL(fake.cpu->interrupt_request, 0);
	EQUAL(fake.core->interrupts, 1);
}

static void test_interrupt_vector_zero(void)
{
	fake.env->eflags = IF;
	fake.core->vector = 0;
	EQUAL(interrupt_request(), 1);
	EQUAL(fake.delivered, 1);
	EQUAL(fake.vector, 0);
}

static int opens_window(void)
{
	EQUAL(fake.cpu->interrupt_request, INTERRUPT_HARD);
	EQUAL(interrupt_request(), 0);
	EQUAL(fake.stops, 0);
	fake.env->eflags = IF;
	EQUAL(interrupt_request(), 0);
	EQUAL(fake.stops, 1);
	EQUAL(interrupt_request(), 0); /* told once */
	EQUAL(fake.stops, 1);
	return 0;
}

static void test_window(void)
{
	fake.core->window = 1;
	EQUAL(run(opens_window, 1000), CORE_WINDOW);
	EQUAL(fake.core->window, 0);
	EQUAL(fake.delivered, 0);
	EQUAL(fake.cpu->interrupt_request, 0);
}

static int interrupt_then_window(void)
{
	fake.env->eflags = IF;
	EQUAL(interrupt_request(), 1);
	EQUAL(fake.cpu->interrupt_request, INTERRUPT_HARD); /* for the window */
	fake.env->eflags = 0; /* in the handler */
	EQUAL(interrupt_request(), 0);
	EQUAL(fake.stops, 0);
	fake.env->eflags = IF; /* IRET */
	EQUAL(interrupt_request(), 0);
	EQUAL(fake.stops, 1);
	return 0;
}

static void test_window_behind_an_interrupt(void)
{
	fake.core->vector = 0x20;
	fake.core->window = 1;
	EQUAL(run(interrupt_then_window, 1000), CORE_WINDOW);
	EQUAL(fake.core->interrupts, 1);
}

static int window_when_stopped(void)
{
	endless();
	fake.env->eflags = IF;
	EQUAL(interrupt_request(), 0);
	return 0;
}

static void test_window_of_a_stopped_run(void)
{
	fake.core->window = 1;
	EQUAL(run(window_when_stopped, 10 * NS), CORE_DEADLINE);
	EQUAL(fake.core->window, 1);
	EQUAL(fake.stops, 1);
}

static void test_stale_request(void)
{
	fake.env->eflags = IF;
	fake.cpu->interrupt_request = 0x100 | INTERRUPT_HARD;
	EQUAL(run(halts, 1000), CORE_HALTED);
	EQUAL(fake.cpu->interrupt_request, 0x100); /* the other requests are not ours */
	EQUAL(interrupt_request(), 0);
	EQUAL(fake.delivered, 0);
}

#define TEST(name) { #name, test_##name }
static const struct {
	const char *name;
	void (*test)(void);
} tests[] = {
	TEST(hooks), TEST(refused_hooks),
	TEST(deadline), TEST(deadline_within_a_block), TEST(deadline_behind_many_polls), TEST(deadline_passed),
	TEST(deadlines_at_random), TEST(stop_word), TEST(stop_word_waits_for_the_next_run), TEST(readable_descriptor),
	TEST(shorten), TEST(halted), TEST(dead),
	TEST(hypercall), TEST(hypercall_after_a_stop), TEST(cpuid), TEST(tsc), TEST(syscall), TEST(exceptions),
	TEST(interrupt), TEST(interrupt_vector_zero), TEST(window), TEST(window_behind_an_interrupt),
	TEST(window_of_a_stopped_run), TEST(stale_request),
};

int main(void)
{
	size_t count = sizeof(tests) / sizeof(tests[0]);

	for (size_t i = 0; i < count; i++) {
		test_name = tests[i].name;
		attach();
		tests[i].test();
	}
	reset();
	free(fake.core);
	free(fake.cpu);
	free(fake.env);
	printf("%zu tests, %d failures\n", count, failures);
	return failures != 0;
}
