/*
 * emulator/native/shortcuts.c on RAM of its own: 2 MiB, mapped one to one by a large page. The kernel's tables and
 * structures are laid out here; what the shortcuts do with them is compared with the plain way.
 */
#include "core.h"
#include "watch_table.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RAX = 0, RSP = 4, RDI = 7 };
enum { EIP = 128, CR = 136, ENV = 256 };
enum { PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, CODE = 0x4000, STACK = 0x5000, ITER = 0x6000, PAGES = 0x7000 };
enum { RECORDS = 0x8000, MARKERS = 0x20000, NAMES = 0x10000, SIZE = 2 << 20 };
enum { BODY = 96, CALLER = CODE + 0x800, CALLER_END = CALLER + 0x100, BACK = CALLER + 0x20, SYMBOLS = 600 };
enum { PAGE_NEXT = 0, PAGE_RECORDS = 8, PAGE_USED = 16, RECORD = 16, FLAGS = 8 };

static struct core *core;
static uint8_t *ram, *env;
static int failures;

#define EQUAL(got, wanted) equal((int64_t)(got), (int64_t)(wanted), #got, __LINE__)

static void equal(int64_t got, int64_t wanted, const char *text, int line)
{
	if (got != wanted) {
		fprintf(stderr, "%s:%d: %s is %" PRId64 ", not %" PRId64 "\n", __FILE__, line, text, got, wanted);
		failures++;
	}
}

static void put64(uint64_t at, uint64_t value)
{
	memcpy(ram + at, &value, 8);
}

static void put32(uint64_t at, uint32_t value)
{
	memcpy(ram + at, &value, 4);
}

static uint64_t get64(uint64_t at)
{
	uint64_t value;

	memcpy(&value, ram + at, 8);
	return value;
}

static int32_t get32(uint64_t at)
{
	int32_t value;

	memcpy(&value, ram + at, 4);
	return value;
}

static uint64_t *reg(int number)
{
	return (uint64_t *)(void *)(env + number * 8);
}

static void set_up(void)
{
	core = calloc(1, sizeof(*core));
	ram = calloc(1, SIZE);
	env = calloc(1, ENV);
	core->env = env;
	core->at.eip = EIP;
	core->watch.at.env_cr = CR;
	core->watch.ram = ram;
	core->watch.ram_size = SIZE;
	*(uint64_t *)(void *)(env + CR + 24) = PML4;
	put64(PML4, PDPT | 1);
	put64(PDPT, PD | 1);
	put64(PD, 0x81);
	for (int i = 0; i < BODY; i++)
		ram[CODE + i] = (uint8_t)i;
}

static void enter(uint64_t argument)
{
	*reg(RDI) = argument;
	*reg(RSP) = STACK;
	*(uint64_t *)(void *)(env + EIP) = CODE;
	put64(STACK, BACK);
	shortcuts_take(core, CODE);
}

/* ---- get_symbol_offset() */

static uint32_t offsets[SYMBOLS];

static void symbols(void)
{
	const uint64_t ranges[] = { CODE, BODY };
	uint32_t at = 0;

	for (uint32_t i = 0; i < SYMBOLS; i++) {
		uint32_t length = i % 37 == 5 ? 128 + i % 50 : 1 + i * 7 % 127;

		if (i % 256 == 0)
			put32(MARKERS + i / 256 * 4, at);
		offsets[i] = at;
		if (length > 127) {
			ram[NAMES + at++] = (uint8_t)(length | 0x80);
			ram[NAMES + at++] = (uint8_t)(length >> 7);
		} else {
			ram[NAMES + at++] = (uint8_t)length;
		}
		at += length;
	}
	core->shortcuts.names = NAMES;
	core->shortcuts.names_end = MARKERS;
	core->shortcuts.markers = MARKERS;
	EQUAL(shortcuts_install(core, SHORTCUT_SYMBOL, CODE, ranges, 1), 0);
	EQUAL(shortcuts_at(core, CODE), 1);
	EQUAL(shortcuts_at(core, 0), 0);
	for (uint32_t i = 0; i < SYMBOLS; i++) {
		enter(i);
		EQUAL(core->shortcuts.returned, 1);
		EQUAL(*reg(RAX), offsets[i]);
		EQUAL(*reg(RSP), STACK + 8);
		EQUAL(*(uint64_t *)(void *)(env + EIP), BACK);
	}
	enter(UINT64_MAX); /* no such symbol, and no such place in the table of markers */
	EQUAL(core->shortcuts.returned, 0);
	put32(MARKERS, UINT32_MAX - 1); /* a table that was written over */
	enter(1);
	EQUAL(core->shortcuts.returned, 0);
	put32(MARKERS, 0);
}

static void not_taken_when_seen(void)
{
	int number = table_add(STACK, 8, WATCH_READ, WATCH_STOP, 0);

	enter(3);
	EQUAL(core->shortcuts.returned, 0);
	table_remove(table_get(number));
	core->shortcuts.blocked = 1;
	enter(3);
	EQUAL(core->shortcuts.returned, 0);
	core->shortcuts.blocked = 0;
	ram[CODE + 50] ^= 1; /* a probe in the middle */
	enter(3);
	EQUAL(core->shortcuts.returned, 0);
	EQUAL(*(uint64_t *)(void *)(env + EIP), CODE);
	ram[CODE + 50] ^= 1;
	enter(3);
	EQUAL(core->shortcuts.returned, 1);
	shortcuts_detach(core);
	EQUAL(shortcuts_at(core, CODE), 0);
}

/* ---- ftrace_rec_iter_next() */

static void page(uint64_t at, uint64_t next, uint64_t records, uint32_t used)
{
	put64(at + PAGE_NEXT, next);
	put64(at + PAGE_RECORDS, records);
	put32(at + PAGE_USED, used);
}

static void step(uint64_t from_page, uint32_t from, uint64_t to_page, int32_t to)
{
	put64(ITER, from_page);
	put32(ITER + 8, from);
	enter(ITER);
	EQUAL(core->shortcuts.returned, 0); /* the function itself goes on */
	EQUAL(get64(ITER), to_page);
	EQUAL(get32(ITER + 8), to);
}

static void records(void)
{
	const uint64_t ranges[] = { CODE, BODY, CALLER, CALLER_END - CALLER };
	struct shortcuts *s = &core->shortcuts;
	uint64_t first = PAGES, second = PAGES + 64, third = PAGES + 128;

	s->caller_low = CALLER;
	s->caller_high = CALLER_END;
	s->iter_page = 0, s->iter_index = 8;
	s->page_next = PAGE_NEXT, s->page_records = PAGE_RECORDS, s->page_used = PAGE_USED;
	s->record_size = RECORD, s->record_flags = FLAGS, s->busy = 0x800fffff;
	EQUAL(shortcuts_install(core, SHORTCUT_RECORDS, CODE, ranges, 2), 0);
	page(first, second, RECORDS, 300); /* more than a page of memory */
	page(second, third, RECORDS + 0x2000, 0);
	page(third, 0, RECORDS + 0x3000, 256);
	put32(RECORDS + 280 * RECORD + FLAGS, 1);
	put32(RECORDS + 0x3000 + 0 * RECORD + FLAGS, 0x80000000);
	put32(RECORDS + 0x3000 + 7 * RECORD + FLAGS, 0x02100000); /* nothing that matters */
	step(first, 0, first, 279);
	step(first, 279, first, 279);
	step(first, 280, third, -1); /* in front of the first one there */
	step(third, 0, third, 255); /* none follows: the function finds the end */
	step(third, 255, third, 255);
	put64(third + PAGE_RECORDS, (uint64_t)SIZE * 4); /* not in RAM: the guest is left to it */
	step(first, 280, first, 280);
	put64(third + PAGE_RECORDS, RECORDS + 0x3000);
	put32(third + PAGE_USED, UINT32_MAX);
	step(first, 280, first, 280);
	put64(first + PAGE_NEXT, first); /* a ring */
	put32(first + PAGE_USED, 0);
	step(first, 0, first, 0);
	put32(first + PAGE_USED, 300);
	s->caller_low = CALLER_END - 1; /* called by somebody else */
	step(first, 0, first, 0);
	shortcuts_detach(core);
}

int main(void)
{
	set_up();
	symbols();
	not_taken_when_seen();
	records();
	free(env);
	free(ram);
	free(core);
	if (!failures)
		printf("shortcuts: ok\n");
	return failures != 0;
}
