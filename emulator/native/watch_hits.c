/* See watch_hits.h. */
#include "watch_hits.h"

#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "paging.h"
#include "watch_table.h"

#define DR6_NONE_OF_YOURS 0x1000u

/* Watchpoints hit by the instruction being looked at, in no order, and the reports made of them. They only grow. */
static struct {
	struct watchpoint **hits;
	size_t nhits, room;
} noted;
static struct watch_hit *reports;
static uint32_t reports_room;

static uint64_t *quad(uint8_t *base, uint32_t offset)
{
	return (uint64_t *)(void *)(base + offset);
}

struct access {
	struct core *core;
	uint64_t address, end;
	uint32_t flags;
};

static uint64_t later(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* Of a variable its own bytes from its start on; of more than that, those from the first that is accessed. */
static void note_old(struct core *c, struct watchpoint *w)
{
	paging_read(c, w->length > 8 ? later(w->address, w->hit_address) : w->address, &w->old, sizeof(w->old));
}

static void note(struct watchpoint *w, void *data)
{
	const struct access *access = data;

	if (!w->hit) {
		if (noted.nhits == noted.room) {
			noted.room = noted.room ? 2 * noted.room : 16;
			noted.hits = realloc(noted.hits, noted.room * sizeof(struct watchpoint *));
			if (!noted.hits)
				abort();
		}
		noted.hits[noted.nhits++] = w;
		w->hit_address = access->address;
		w->hit_end = access->end;
		note_old(access->core, w);
		if (w->before)
			paging_read(access->core, w->address, w->before, w->length);
	} else {
		if (access->address < w->hit_address) {
			w->hit_address = access->address;
			note_old(access->core, w);
		}
		w->hit_end = later(w->hit_end, access->end);
	}
	w->hit |= access->flags & (WATCH_READ | WATCH_WRITE);
}

void hits_note(struct core *c, uint64_t address, uint64_t length, uint32_t flags)
{
	table_each(address, length, flags, note, &(struct access){ c, address, address + length, flags });
}

void hits_forget(void)
{
	for (size_t i = 0; i < noted.nhits; i++)
		noted.hits[i]->hit = 0;
	noted.nhits = 0;
}

static int by_number(const void *a, const void *b)
{
	const struct watchpoint *const *left = a, *const *right = b;

	return (*left)->number - (*right)->number;
}

/* Does a watchpoint for changes have none to report? What cannot be read is taken for changed. */
static bool unchanged(const struct core *c, const struct watchpoint *w)
{
	uint8_t after[256];

	if (!w->before)
		return false;
	for (uint64_t at = 0; at < w->length; at += sizeof(after)) {
		size_t size = w->length - at < sizeof(after) ? w->length - at : sizeof(after);

		if (!paging_read(c, w->address + at, after, size) || memcmp(after, w->before + at, size))
			return false;
	}
	return true;
}

static void report(struct watch *watch, const struct watchpoint *w, uint64_t ip, uint64_t next)
{
	if (watch->nhits == reports_room) {
		reports_room = reports_room ? 2 * reports_room : 16;
		reports = realloc(reports, reports_room * sizeof(*reports));
		if (!reports)
			abort();
		watch->hits = reports;
	}
	watch->hits[watch->nhits++] = (struct watch_hit){
		.token = w->token, .address = w->hit_address, .length = w->hit_end - w->hit_address, .ip = ip,
		.next_ip = next, .watched = w->address, .old = w->old, .access = w->hit, .kind = w->kind,
	};
}

uint64_t hits_collect(struct core *c, uint64_t ip)
{
	struct watch *watch = &c->watch;
	uint64_t dr6 = 0, next = *quad(c->env, c->at.eip);
	void **registers = (void **)(void *)(c->env + watch->at.env_watchpoint);

	watch->nhits = watch->nstops = 0;
	watch->hits = reports;
	if (noted.nhits > 1)
		qsort(noted.hits, noted.nhits, sizeof(struct watchpoint *), by_number);
	for (size_t i = 0; i < noted.nhits; i++) {
		struct watchpoint *w = noted.hits[i];

		if (!w->hit || unchanged(c, w)) /* gone since, or nothing to tell */
			continue;
		if (w->kind == WATCH_REGISTER) {
			for (int k = 0; k < 4; k++)
				if (registers[k] == &w->qemu)
					dr6 |= 1u << k;
			continue;
		}
		report(watch, w, ip, next);
		if (w->kind == WATCH_STOP)
			watch->nstops++;
		else
			dr6 |= DR6_NONE_OF_YOURS;
	}
	hits_forget();
	return dr6;
}
