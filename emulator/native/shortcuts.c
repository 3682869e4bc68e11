/* See shortcuts.h. The guest's values are bounds-checked as any: a bad one means that the guest does its own work. */
#include "shortcuts.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "paging.h"
#include "watch_table.h"

#define PAGE_SIZE 4096u
#define MOST_RECORDS (1u << 22)
#define MOST_PAGES (1u << 16)
#define BIG_NAME 0x80u /* the length goes on in the next byte */
enum { RAX = 0 };

static uint64_t *reg(struct core *c, uint32_t offset)
{
	return (uint64_t *)(void *)(c->env + offset);
}

static bool load(const struct core *c, uint64_t at, void *to, size_t size)
{
	const uint8_t *host = paging_host(c, at, size);

	if (host)
		memcpy(to, host, size);
	return host != NULL;
}

static bool store(const struct core *c, uint64_t at, const void *from, size_t size)
{
	uint8_t *host = paging_host(c, at, size);

	if (host)
		memcpy(host, from, size);
	return host != NULL;
}

static bool anything_watched(void)
{
	for (int i = 0; i < watch_table_size; i++)
		if (watch_table[i]->used)
			return true;
	return false;
}

static bool as_at_first(const struct shortcut *s)
{
	for (uint64_t i = 0; i < s->bodies; i++)
		if (memcmp(s->body[i].now, s->body[i].first, s->body[i].size))
			return false;
	return true;
}

/* ---- SHORTCUT_RECORDS */

/* The first record from `index` on that matters; `used` when there is none. */
static bool find_busy(const struct core *c, uint64_t records, uint32_t index, uint32_t used, uint32_t *found)
{
	const struct shortcuts *s = &c->shortcuts;
	const uint8_t *page = NULL;
	uint64_t at = records + (uint64_t)index * s->record_size + s->record_flags;

	for (; index < used; index++, at += s->record_size) {
		uint32_t flags;

		if (!page || at % PAGE_SIZE < s->record_size) {
			page = paging_host(c, at & ~(uint64_t)(PAGE_SIZE - 1), PAGE_SIZE);
			if (!page)
				return false;
		}
		memcpy(&flags, page + at % PAGE_SIZE, sizeof(flags));
		if (flags & s->busy)
			break;
	}
	*found = index;
	return true;
}

/*
 * ftrace_replace_code() looks at each of 40,000 records, twice, and does nothing about one that is not traced (no
 * reference, not enabled): ftrace_check_record() says FTRACE_UPDATE_IGNORE. The iterator is put in front of the next
 * one that it has to look at; the function itself then makes the step.
 */
static bool skip_records(struct core *c)
{
	const struct shortcuts *s = &c->shortcuts;
	uint64_t iter = *reg(c, CORE_RDI), page, caller, before;
	int32_t index;
	uint32_t next, pages = 0;

	if (!load(c, *reg(c, CORE_RSP), &caller, 8) || caller < s->caller_low || caller >= s->caller_high ||
	    !load(c, iter + s->iter_page, &page, 8) || !load(c, iter + s->iter_index, &index, 4) || index < 0)
		return false;
	before = page;
	next = (uint32_t)index + 1;
	for (;;) {
		uint64_t records, following;
		int32_t used;

		if (!load(c, page + s->page_records, &records, 8) || !load(c, page + s->page_used, &used, 4) ||
		    !load(c, page + s->page_next, &following, 8) || used < 0 || used > (int32_t)MOST_RECORDS ||
		    !find_busy(c, records, next, (uint32_t)used, &next))
			return false;
		if (next < (uint32_t)used || !following)
			break;
		if (++pages > MOST_PAGES) /* a ring */
			return false;
		page = following;
		next = 0;
	}
	index = (int32_t)next - 1;
	return (page == before || store(c, iter + s->iter_page, &page, 8)) && store(c, iter + s->iter_index, &index, 4);
}

/* ---- SHORTCUT_SYMBOL */

/* Names are of a length and that many bytes; the place of each 256th is in a table. The argument is a name's number. */
static bool find_symbol_offset(struct core *c)
{
	const struct shortcuts *s = &c->shortcuts;
	uint64_t number = *reg(c, CORE_RDI), size = s->names_end - s->names, back;
	uint32_t offset;

	if (number > UINT32_MAX || !load(c, s->markers + (number >> 8) * sizeof(offset), &offset, sizeof(offset)) ||
	    !load(c, *reg(c, CORE_RSP), &back, 8))
		return false;
	for (number &= 255; number; number--) {
		uint32_t length;

		if (offset + 1 >= size)
			return false;
		length = s->names_at[offset];
		if (length & BIG_NAME)
			length = ((length & ~BIG_NAME) | (uint32_t)s->names_at[offset + 1] << 7) + 1;
		offset += length + 1;
	}
	*reg(c, RAX) = offset;
	*reg(c, CORE_RSP) += 8;
	*reg(c, c->at.eip) = back;
	return true;
}

/* ---- all */

bool shortcuts_at(const struct core *c, uint64_t address)
{
	for (int kind = 0; kind < SHORTCUT_KINDS; kind++)
		if (address && c->shortcuts.list[kind].address == address)
			return true;
	return false;
}

void shortcuts_take(struct core *c, uint64_t address)
{
	struct shortcuts *all = &c->shortcuts;
	int kind = address == all->list[SHORTCUT_SYMBOL].address ? SHORTCUT_SYMBOL : SHORTCUT_RECORDS;
	struct shortcut *s = &all->list[kind];
	bool taken = false;

	all->returned = 0;
	if (!all->blocked && !anything_watched() && as_at_first(s)) {
		taken = kind == SHORTCUT_SYMBOL ? find_symbol_offset(c) : skip_records(c);
		all->returned = taken && kind == SHORTCUT_SYMBOL;
	}
	if (taken)
		s->taken++;
	else
		s->declined++;
}

/* The kernel's image lies in one piece in physical memory; what does not is not its code. */
static const uint8_t *in_one_piece(const struct core *c, uint64_t start, uint64_t size)
{
	const uint8_t *host = paging_host(c, start, 1);

	for (uint64_t at = start; host && at < start + size; at = (at | (PAGE_SIZE - 1)) + 1)
		if (paging_host(c, at, 1) != host + (at - start))
			return NULL;
	return host;
}

int shortcuts_install(struct core *c, int kind, uint64_t address, const uint64_t *ranges, int count)
{
	struct shortcuts *all = &c->shortcuts;
	struct shortcut *s;

	if (kind < 0 || kind >= SHORTCUT_KINDS || count < 1 || count > SHORTCUT_BODIES || all->list[kind].address)
		return EINVAL;
	s = &all->list[kind];
	if (kind == SHORTCUT_SYMBOL) {
		all->names_at = all->names_end > all->names ? in_one_piece(c, all->names, all->names_end - all->names) : NULL;
		if (!all->names_at)
			return EFAULT;
	} else if (all->record_size < sizeof(uint64_t) || PAGE_SIZE % all->record_size) {
		return EINVAL;
	}
	for (int i = 0; i < count; i++) {
		struct shortcut_body *body = &s->body[s->bodies];

		body->size = ranges[2 * i + 1];
		body->now = body->size <= PAGE_SIZE ? in_one_piece(c, ranges[2 * i], body->size) : NULL;
		if (!body->now)
			return EFAULT;
		body->first = malloc(body->size);
		if (!body->first)
			return ENOMEM;
		memcpy(body->first, body->now, body->size);
		s->bodies++;
	}
	s->address = address;
	return 0;
}

void shortcuts_detach(struct core *c)
{
	for (int kind = 0; kind < SHORTCUT_KINDS; kind++) {
		struct shortcut *s = &c->shortcuts.list[kind];

		for (uint64_t i = 0; i < s->bodies; i++)
			free(s->body[i].first);
		memset(s, 0, sizeof(*s));
	}
}
