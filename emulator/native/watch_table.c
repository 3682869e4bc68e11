/* See watch_table.h. */
#include "watch_table.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "watch.h"

#define PAGE_SIZE 4096u
#define BUCKETS 1024u
#define MAX_WATCHPOINTS 65536

struct page {
	struct page *next;
	uint64_t number;
	struct watchpoint **list; /* those that touch it, oldest first */
	size_t count, room;
	uint8_t watched[2][PAGE_SIZE / 8];
};

struct watchpoint **watch_table;
int watch_table_size;
static int first_free; /* no number below it is free */
static struct page *buckets[BUCKETS];

/* Nothing can be done without the few bytes asked for here, and nobody above expects to be told. */
static void *must(void *memory)
{
	if (!memory)
		abort();
	return memory;
}

static struct page **find_page(uint64_t number)
{
	struct page **at = &buckets[(number ^ number >> 10) % BUCKETS];

	while (*at && (*at)->number != number)
		at = &(*at)->next;
	return at;
}

static uint64_t last_page(const struct watchpoint *w)
{
	return (w->address + w->length - 1) / PAGE_SIZE;
}

/* Mark the part of a range that lies in a page, in the bitmaps of its accesses. */
static void mark(struct page *page, const struct watchpoint *w)
{
	uint64_t start = page->number * PAGE_SIZE;
	uint64_t first = w->address > start ? w->address - start : 0;
	uint64_t last = w->address + w->length - 1 - start;

	if (last >= PAGE_SIZE)
		last = PAGE_SIZE - 1;
	for (uint64_t i = first; i <= last; i++) {
		if (w->access & WATCH_READ)
			page->watched[0][i / 8] |= (uint8_t)(1u << i % 8);
		if (w->access & WATCH_WRITE)
			page->watched[1][i / 8] |= (uint8_t)(1u << i % 8);
	}
}

static void add_to_pages(struct watchpoint *w)
{
	for (uint64_t number = w->address / PAGE_SIZE; number <= last_page(w); number++) {
		struct page **at = find_page(number), *page = *at;

		if (!page) {
			page = *at = must(calloc(1, sizeof(*page)));
			page->number = number;
		}
		if (page->count == page->room) {
			page->room = page->room ? 2 * page->room : 4;
			page->list = must(realloc(page->list, page->room * sizeof(struct watchpoint *)));
		}
		page->list[page->count++] = w;
		mark(page, w);
	}
}

static void remove_from_page(struct page **at, const struct watchpoint *w)
{
	struct page *page = *at;
	size_t kept = 0;

	for (size_t i = 0; i < page->count; i++)
		if (page->list[i] != w)
			page->list[kept++] = page->list[i];
	page->count = kept;
	if (!kept) {
		*at = page->next;
		free(page->list);
		free(page);
		return;
	}
	memset(page->watched, 0, sizeof(page->watched));
	for (size_t i = 0; i < kept; i++)
		mark(page, page->list[i]);
}

static void remove_from_pages(const struct watchpoint *w)
{
	for (uint64_t number = w->address / PAGE_SIZE; number <= last_page(w); number++) {
		struct page **at = find_page(number);

		if (*at)
			remove_from_page(at, w);
	}
}

int table_add(uint64_t address, uint64_t length, uint32_t access, uint32_t kind, uint64_t token)
{
	int number = first_free;
	struct watchpoint *w;

	while (number < watch_table_size && watch_table[number]->used)
		number++;
	if (number == MAX_WATCHPOINTS)
		return -ENOSPC;
	if (number == watch_table_size) {
		struct watchpoint **bigger = realloc(watch_table, sizeof(*bigger) * ((size_t)number + 1));

		if (!bigger)
			return -ENOMEM;
		watch_table = bigger;
		watch_table[number] = calloc(1, sizeof(*w));
		if (!watch_table[number])
			return -ENOMEM;
		watch_table_size++;
	}
	w = watch_table[number];
	*w = (struct watchpoint){ .address = address, .length = length, .token = token, .access = access,
				  .kind = kind, .number = number, .used = true };
	if (access & WATCH_CHANGE && !(w->before = malloc(length))) {
		w->used = false;
		return -ENOMEM;
	}
	first_free = number + 1;
	add_to_pages(w);
	return number;
}

void table_remove(struct watchpoint *w)
{
	remove_from_pages(w);
	free(w->before);
	w->before = NULL;
	w->used = false;
	w->hit = 0;
	if (w->number < first_free)
		first_free = w->number;
}

void table_move(struct watchpoint *w, uint64_t address)
{
	remove_from_pages(w);
	w->address = address;
	w->hit = 0;
	add_to_pages(w);
}

struct watchpoint *table_get(int number)
{
	return number >= 0 && number < watch_table_size && watch_table[number]->used ? watch_table[number] : NULL;
}

bool table_page_watched(uint64_t page_number)
{
	return *find_page(page_number) != NULL;
}

bool table_watched(uint64_t address, uint64_t length, uint32_t flags)
{
	uint64_t end = address + length;

	while (address < end) {
		const struct page *page = *find_page(address / PAGE_SIZE);
		uint64_t stop = address - address % PAGE_SIZE + PAGE_SIZE;

		if (stop > end)
			stop = end;
		for (; page && address < stop; address++) {
			uint64_t i = address % PAGE_SIZE;

			if (((flags & WATCH_READ) && page->watched[0][i / 8] >> i % 8 & 1) ||
			    ((flags & WATCH_WRITE) && page->watched[1][i / 8] >> i % 8 & 1))
				return true;
		}
		address = stop;
	}
	return false;
}

void table_each(uint64_t address, uint64_t length, uint32_t flags, void (*hit)(struct watchpoint *, void *), void *data)
{
	uint64_t last = address + length - 1;

	for (uint64_t number = address / PAGE_SIZE; number <= last / PAGE_SIZE; number++) {
		const struct page *page = *find_page(number);

		for (size_t i = 0; page && i < page->count; i++) {
			struct watchpoint *w = page->list[i];

			if (w->address <= last && w->address + w->length - 1 >= address && w->access & flags)
				hit(w, data);
		}
	}
}
