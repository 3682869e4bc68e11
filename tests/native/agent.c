/*
 * emulator/guest/agent.c and serve.h as a program of the host, whose kernel and hypercall are functions of this file.
 * Built with AddressSanitizer and UBSan by tests/unit/test_native.py; the window is as large as its slots, so that
 * every step outside it is seen.
 */
#define HOSTED
#include "../../emulator/guest/protocol.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SLOTS = 4 };
static char *window;
#undef WINDOW_VIRTUAL
#define WINDOW_VIRTUAL ((unsigned long)window)

#include "../../emulator/guest/agent.c"

#include "check.h"

static struct {
	jmp_buf out;
	const char *command_line;
	long line_length; /* what read(2) gives; the text's own when it is not negative or 0 */
	int no_memory_device, window_elsewhere;
	char said[256];
	int mounts, filled, calls, sleeps, spawned, entered, handlers;
	long numbers[2 * SLOT_MAX_CALLS], first[2 * SLOT_MAX_CALLS];
	int (*host)(u64 slot); /* what the host says to a hypercall; ends the test by finish() */
} fake;

static void __attribute__((noreturn)) finish(void)
{
	longjmp(fake.out, 1);
}

static long syscall6(long number, long a, long b, long c, long d, long e, long f)
{
	(void)c, (void)d, (void)e, (void)f;
	switch (number) {
	case SYS_write:
		if (a != 1)
			return c;
		CHECK(strlen(fake.said) + (size_t)c < sizeof(fake.said));
		strncat(fake.said, (const char *)b, (size_t)c);
		return c;
	case 0: /* read */
		if (fake.line_length <= 0)
			return fake.line_length;
		CHECK(fake.line_length <= c);
		memcpy((void *)b, fake.command_line, (size_t)fake.line_length);
		return fake.line_length;
	case SYS_open:
		return fake.no_memory_device && !strcmp((const char *)a, "/dev/mem") ? -2 : 5;
	case SYS_mount:
		fake.mounts++;
		return 0;
	case SYS_dup2:
		fake.filled++;
		return b;
	case SYS_mmap:
		return fake.window_elsewhere ? 4096 : a;
	case SYS_futex:
		CHECK((char *)a >= window && (char *)a < window + SLOTS * SLOT_SIZE);
		CHECK(b == FUTEX_WAIT_PRIVATE && c == 0);
		fake.sleeps++;
		return 0;
	case SYS_rt_sigaction:
		fake.handlers++;
		return 0;
	case SYS_pause:
		finish();
	default:
		if (number < 1000)
			return 0; /* one of start()'s */
		CHECK(fake.calls < 2 * (int)SLOT_MAX_CALLS);
		fake.numbers[fake.calls] = number;
		fake.first[fake.calls++] = a;
		return -number;
	}
}

static u32 hypercall(u64 slot)
{
	return (u32)fake.host(slot);
}

static long spawn(long arguments, long size, u64 slot, u64 physical)
{
	CHECK(arguments == 11 && size == 12 && slot == 13 && physical == 14);
	fake.spawned++;
	return 77;
}

static long enter(struct slot *slot, long frame)
{
	CHECK(slot == slot_at(1) && frame == 21);
	fake.entered++;
	return SIGTRAP;
}

static void reset(int (*host)(u64))
{
	memset(&fake, 0, sizeof(fake));
	memset(window, 0, SLOTS * SLOT_SIZE);
	fake.host = host;
}

/* ---- the loop */

static void __attribute__((noinline)) serve_until_finished(u64 number)
{
	if (!setjmp(fake.out))
		serve(number, 0);
}

static u32 wanted_calls;

static int one_batch(u64 number)
{
	struct slot *slot = slot_at(number);
	static int turn;

	if (turn++ % 2)
		finish();
	slot->ncalls = wanted_calls;
	for (u32 i = 0; i < SLOT_MAX_CALLS; i++) {
		slot->calls[i].number = 1000 + i;
		slot->calls[i].argument[0] = i * 3;
	}
	return OP_CALLS;
}

static void test_batches(void)
{
	static const u32 counts[] = { 0, 1, 2, SLOT_MAX_CALLS - 1, SLOT_MAX_CALLS, SLOT_MAX_CALLS + 1, 0xffffffff };

	for (u64 number = 0; number < SLOTS; number += SLOTS - 1)
		for (size_t i = 0; i < sizeof(counts) / sizeof(*counts); i++) {
			reset(one_batch);
			wanted_calls = counts[i];
			serve_until_finished(number);
			int made = counts[i] < SLOT_MAX_CALLS ? (int)counts[i] : (int)SLOT_MAX_CALLS;
			CHECK(fake.calls == made);
			for (int at = 0; at < made; at++) {
				CHECK(fake.numbers[at] == 1000 + at && fake.first[at] == at * 3);
				CHECK(slot_at(number)->calls[at].result == -(1000 + at));
			}
		}
}

static int sleep_three_times(u64 number)
{
	CHECK(number == 2);
	if (fake.sleeps == 3)
		finish();
	return OP_SLEEP;
}

static void test_sleep(void)
{
	reset(sleep_three_times);
	serve_until_finished(2);
	CHECK(fake.sleeps == 3 && fake.calls == 0);
}

static int spawn_one(u64 number)
{
	struct slot *slot = slot_at(number);

	if (fake.spawned)
		finish();
	slot->ncalls = 1;
	slot->calls[0] = (struct call){ .number = CALL_SPAWN, .argument = { 11, 12, 13, 14 } };
	return OP_CALLS;
}

static void test_spawn(void)
{
	reset(spawn_one);
	serve_until_finished(1);
	CHECK(fake.spawned == 1 && slot_at(1)->calls[0].result == 77 && fake.calls == 0);
}

static char copied[20] = "0123456789";

static int copy_and_enter(u64 number)
{
	struct slot *slot = slot_at(number);

	if (fake.entered)
		finish();
	slot->ncalls = 9;
	slot->calls[0] = (struct call){ .number = CALL_COPY, .argument = { (long)copied + 1, (long)copied + 6, 3 } };
	slot->calls[1] = (struct call){ .number = CALL_COPY, .argument = { 0, 0, 0 }, .result = 5 };
	slot->calls[2] = (struct call){ .number = CALL_ENTER, .argument = { 21, 0 } };
	slot->calls[3] = (struct call){ .number = CALL_ENTER, .argument = { 21, 1 } };
	slot->calls[4] = (struct call){ .number = 1000 };
	slot->calls[5] = (struct call){ .number = CALL_AFTER + 1001, .argument = { 0, 0, 0, 0, 0, 3 } };
	slot->calls[6] = (struct call){ .number = CALL_AFTER + 1002, .argument = { 0, 0, 0, 0, 0, 4 } };
	slot->calls[7] = (struct call){ .number = CALL_AFTER + 1003, .argument = { 0, 0, 0, 0, 0, SLOT_MAX_CALLS } };
	slot->calls[8] = (struct call){ .number = CALL_AFTER + CALL_COPY,
					.argument = { (long)(copied + 10), (long)copied, 9, 0, 0, 3 } };
	return OP_CALLS;
}

static void test_copy_and_enter(void)
{
	reset(copy_and_enter);
	serve_until_finished(1);
	struct call *calls = slot_at(1)->calls;
	CHECK(!strcmp(copied, "0678456789067845678") && calls[0].result == 0 && calls[1].result == 0);
	CHECK(fake.entered == 2 && calls[2].result == SIGTRAP && calls[3].result == SIGTRAP && fake.handlers == 5);
	CHECK(fake.calls == 2 && calls[4].result == -1000 && calls[5].result == -1001);
	CHECK(calls[6].result == -ECANCELED && calls[7].result == -ECANCELED && calls[8].result == 0);
}

/* ---- the start */

static int served(u64 number)
{
	CHECK(number == 0);
	finish();
}

static const char *start_with(const char *line, long length)
{
	fake.command_line = line;
	fake.line_length = length;
	if (!setjmp(fake.out))
		start();
	return fake.said;
}

static void test_start(void)
{
	static const char line[] = "console=ttyS0 agent.window=268435456 agent.size=67108864\n";

	reset(served);
	CHECK(!strcmp(start_with(line, sizeof(line) - 1), "agent: ready\n"));
	CHECK(fake.mounts >= 6);
	CHECK(fake.filled == FIRST_FD - 3);
	CHECK(*(u64 *)(window + SLOT_CALLS) == (u64)page && !((u64)page % 4096));
	reset(served);
	CHECK(!strcmp(start_with(line, 0), "agent: cannot read /proc/cmdline\n"));
	reset(served);
	fake.no_memory_device = 1;
	CHECK(strstr(start_with(line, sizeof(line) - 1), "agent: cannot open /dev/mem: "));
	reset(served);
	fake.window_elsewhere = 1;
	CHECK(!strcmp(start_with(line, sizeof(line) - 1), "agent: cannot map the window\n"));
	/* The longest line there can be. */
	static char longest[4095];
	memset(longest, 'x', sizeof(longest));
	memcpy(longest + sizeof(longest) - 14, "agent.window=9", 14);
	reset(served);
	start_with(longest, sizeof(longest));
}

/* Against strstr() and strtoul(), on lines made of what may confuse it, in buffers that end with the text. */
static void test_parameters(void)
{
	static const char *const pieces[] = { "agent.", "agent.size", "agent.size=", "=", " ", "7", "184467440737095",
					      "agent.window=", "x", "a", "\n" };
	unsigned random = 1;

	for (int round = 0; round < 200000; round++) {
		char text[256] = "";
		for (unsigned n = (random = random * 1103515245 + 12345) >> 16 & 7; n; n--) {
			random = random * 1103515245 + 12345;
			strcat(text, pieces[(random >> 16) % (sizeof(pieces) / sizeof(*pieces))]);
		}
		char *line = strdup(text), *found = strstr(line, "agent.size=");
		u64 expected = 0;
		for (const char *digit = found ? found + 11 : ""; *digit >= '0' && *digit <= '9'; digit++)
			expected = expected * 10 + (u64)(*digit - '0');
		CHECK(parameter(line, "agent.size=") == expected);
		free(line);
	}
}

int main(void)
{
	window = aligned_alloc(4096, SLOTS * SLOT_SIZE);
	test_batches();
	test_sleep();
	test_spawn();
	test_copy_and_enter();
	test_start();
	test_parameters();
	free(window);
	puts("the guest's init: batches, sleep, spawn, copy, enter, start, 200,000 command lines");
	return 0;
}
