/*
 * See redirect.h. At the entry of the notifier that the kernel calls for each #DB:
 *
 *   hits to hand over   lend the next hit's kprobe the address of the instruction behind the access, put what is known
 *                       of the hit into the frame, and call the dispatcher, which returns to behind the notifier's
 *                       first instruction, and so here
 *   none left           put everything back as it was; the notifier runs, from its entry
 *
 * Return addresses are looked up one byte before: at the entry itself that would be another function's last, and stack
 * traces would end there.
 *
 * The members of pt_regs lent are none that a stack trace from the frame needs: orig_ax, which #DB leaves alone, and
 * registers no unwind information refers to.
 */
#include "redirect.h"

#include <string.h>

#include "core.h"
#include "paging.h"

enum { HOOK_CODE = 4 };

static uint64_t *reg(struct core *c, uint32_t offset)
{
	return (uint64_t *)(void *)(c->env + offset);
}

static int load(struct core *c, uint64_t at, uint64_t *value)
{
	const uint8_t *host = paging_host(c, at, 8);

	if (host)
		memcpy(value, host, 8);
	return host != NULL;
}

static int store(struct core *c, uint64_t at, uint64_t value)
{
	uint8_t *host = paging_host(c, at, 8);

	if (host)
		memcpy(host, &value, 8);
	return host != NULL;
}

static void return_probe(struct core *c)
{
	struct redirect *r = &c->redirect;

	if (r->probe)
		store(c, r->probe + r->kprobe_addr, r->probe_addr);
	r->probe = 0;
}

/* The notifier's own arguments and the frame as they were; its code runs from here. */
static void finish(struct core *c, uint64_t at)
{
	struct redirect *r = &c->redirect;

	for (int i = 0; i < REDIRECT_VALUES; i++)
		store(c, r->regs + r->lent[i], r->own[i]);
	*reg(c, CORE_RDI) = r->rdi;
	*reg(c, CORE_RSI) = r->rsi;
	*reg(c, CORE_RDX) = r->rdx;
	r->active = 0;
	c->watch.nhits = 0;
	if (at != r->notifier)
		c->set_rip(c->uc, CORE_UC_RIP, &r->notifier);
}

static int begin(struct core *c)
{
	struct redirect *r = &c->redirect;

	r->rdi = *reg(c, CORE_RDI);
	r->rsi = *reg(c, CORE_RSI);
	r->rdx = *reg(c, CORE_RDX);
	r->next = 0;
	r->probe = 0;
	if (!load(c, r->rdx + r->die_args_regs, &r->regs))
		return 0;
	for (int i = 0; i < REDIRECT_VALUES; i++)
		if (!load(c, r->regs + r->lent[i], &r->own[i]))
			return 0;
	return 1;
}

static void lend(struct core *c, const struct watch_hit *hit)
{
	struct redirect *r = &c->redirect;
	const uint64_t values[REDIRECT_VALUES] = {
		[REDIRECT_WATCHED] = hit->watched,
		[REDIRECT_AT] = hit->address > hit->watched ? hit->address : hit->watched,
		[REDIRECT_OLD] = hit->old,
		[REDIRECT_SIZE] = hit->length,
		[REDIRECT_ACCESS] = r->access_names + 8 * (hit->access - 1),
	};

	for (int i = 0; i < REDIRECT_VALUES; i++)
		store(c, r->regs + r->lent[i], values[i]);
}

static int call_dispatcher(struct core *c, const struct watch_hit *hit)
{
	struct redirect *r = &c->redirect;
	uint64_t stack = *reg(c, CORE_RSP) - 8, dispatcher = r->dispatcher;

	if (!load(c, hit->token + r->kprobe_addr, &r->probe_addr) || !store(c, stack, r->back))
		return 0;
	r->probe = hit->token;
	store(c, hit->token + r->kprobe_addr, hit->next_ip);
	lend(c, hit);
	*reg(c, CORE_RSP) = stack;
	*reg(c, CORE_RDI) = hit->token;
	*reg(c, CORE_RSI) = r->regs;
	r->calls++;
	c->set_rip(c->uc, CORE_UC_RIP, &dispatcher);
	return 1;
}

static void on_notifier(void *uc, uint64_t address, uint32_t size, void *data)
{
	struct core *c = data;
	struct redirect *r = &c->redirect;

	(void)uc, (void)size;
	if (!r->active) {
		if (!c->watch.nhits || address != r->notifier)
			return;
		if (!begin(c)) {
			r->lost += c->watch.nhits;
			c->watch.nhits = 0;
			return;
		}
		r->active = 1;
	}
	return_probe(c);
	while (r->next < c->watch.nhits) {
		const struct watch_hit *hit = &c->watch.hits[r->next++];

		if (hit->kind != WATCH_DEBUG)
			continue;
		if (call_dispatcher(c, hit))
			return;
		r->lost++;
	}
	finish(c, address);
}

int redirect_install(struct core *c)
{
	const uint64_t places[2] = { c->redirect.notifier, c->redirect.back };
	uint64_t handle;
	int error = 0;

	for (int i = 0; i < 2 && !error && (i == 0 || places[1] != places[0]); i++)
		error = c->hook_add(c->uc, &handle, HOOK_CODE, (void *)(uintptr_t)on_notifier, c, places[i], places[i]);
	return error;
}
