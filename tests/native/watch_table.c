/*
 * emulator/native/watch_table.c against a list that is gone through from end to end: watchpoints are added, moved and
 * removed at random around a few page boundaries, and asked for after each step. Built with AddressSanitizer and UBSan
 * by tests/unit/test_native.py.
 */
#include "watch_table.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "watch.h"

enum { MOST = 60, STEPS = 20000, SPAN = 3 * 4096 };
#define BASE 0xffff888000001000u

static struct {
	uint64_t address, length;
	uint32_t access;
	int number; /* -1: none */
} model[MOST];
static int seen[MOST];
static uint64_t state = 1;

static uint64_t random_below(uint64_t limit)
{
	state = state * 6364136223846793005u + 1442695040888963407u;
	return (state >> 33) % limit;
}

static void fail(const char *what, int step)
{
	fprintf(stderr, "watch_table: step %d: %s\n", step, what);
	exit(1);
}

static void see(struct watchpoint *w, void *data)
{
	(void)data;
	seen[w->token]++;
}

static uint64_t some_address(void)
{
	return BASE + random_below(SPAN);
}

static void change(int step)
{
	int i = (int)random_below(MOST);
	struct watchpoint *w = table_get(model[i].number);

	if (model[i].number < 0) {
		model[i].address = some_address();
		model[i].length = random_below(4) ? 1 + random_below(8) : 1 + random_below(5000);
		model[i].access = 1 + (uint32_t)random_below(3);
		if (model[i].access & WATCH_WRITE && !random_below(3))
			model[i].access |= WATCH_CHANGE;
		model[i].number =
			table_add(model[i].address, model[i].length, model[i].access, WATCH_DEBUG, (uint64_t)i);
		if (model[i].number < 0 || model[i].number >= MOST)
			fail("numbers of removed ones are not given anew", step);
	} else if (!w || w->token != (uint64_t)i) {
		fail("a number is another one's", step);
	} else if (random_below(2)) {
		model[i].address = some_address();
		table_move(w, model[i].address);
	} else {
		table_remove(w);
		if (table_get(model[i].number))
			fail("a removed one is still there", step);
		model[i].number = -1;
	}
}

static void ask(int step)
{
	uint64_t address = some_address(), length = 1 + random_below(random_below(8) ? 8 : 600), last = address + length - 1;
	uint32_t flags = 1 + (uint32_t)random_below(3);
	bool any = false;

	for (int i = 0; i < MOST; i++)
		seen[i] = 0;
	table_each(address, length, flags, see, NULL);
	for (int i = 0; i < MOST; i++) {
		bool hit = model[i].number >= 0 && model[i].address <= last &&
			   model[i].address + model[i].length - 1 >= address && model[i].access & flags;

		if (hit != (seen[i] > 0))
			fail(hit ? "a watchpoint is not found" : "a watchpoint is found that is not hit", step);
		any |= hit;
	}
	if (any != table_watched(address, length, flags))
		fail("the bitmaps say something else", step);
}

int main(void)
{
	for (int i = 0; i < MOST; i++)
		model[i].number = -1;
	for (int step = 0; step < STEPS; step++) {
		change(step);
		ask(step);
	}
	for (int i = 0; i < MOST; i++)
		if (model[i].number >= 0)
			table_remove(table_get(model[i].number));
	for (uint64_t page = BASE / 4096; page < BASE / 4096 + 5; page++)
		if (table_page_watched(page))
			fail("a page is left", STEPS);
	if (table_get(-1) || table_get(1 << 20))
		fail("numbers that were never given", STEPS);
	printf("watch_table: %d steps\n", STEPS);
	return 0;
}
