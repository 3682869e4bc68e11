/*
 * See smc.h. A page is "code" from its first translation on. Its writable mappings in the TLB then take the slow path,
 * where QEMU drops what the write hits. It would take them off the slow path afterwards although translations may be
 * left in the page; so these are dropped too, and the page is code no more until it is executed again.
 */
#include "smc.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "paging.h"
#include "plt.h"

#define PAGE_SIZE 4096u

static struct core *owner;
static uint8_t *code_pages; /* a bit for each page of the owner's RAM */
/* Unicorn's own, once ours are in their place. */
static void (*qemu_protect_code)(void *uc, uint64_t ram_address);
static void (*qemu_set_dirty)(void *cpu, uint64_t virtual_address);

static bool is_code(uint64_t page)
{
	return code_pages[page / 8] >> page % 8 & 1;
}

static void protect_code(void *uc, uint64_t ram_address)
{
	struct core *c = owner;
	uint64_t physical;

	qemu_protect_code(uc, ram_address);
	if (!c || c->uc != uc)
		return;
	physical = ram_address - c->smc.ram_base;
	if (physical >= c->watch.ram_size)
		return;
	code_pages[physical / PAGE_SIZE / 8] |= (uint8_t)(1u << physical / PAGE_SIZE % 8);
	c->smc.reset_dirty(c->cpu, (uintptr_t)c->watch.ram + (physical & ~(uint64_t)(PAGE_SIZE - 1)), PAGE_SIZE);
}

static void set_dirty(void *cpu, uint64_t virtual_address)
{
	struct core *c = owner;

	if (c && c->cpu == cpu) {
		uint8_t *host = paging_host(c, virtual_address & ~(uint64_t)(PAGE_SIZE - 1), 1);
		uint64_t page = host ? (uint64_t)(host - c->watch.ram) / PAGE_SIZE : 0;

		if (host && is_code(page)) {
			uint64_t start = c->smc.ram_base + page * PAGE_SIZE;

			code_pages[page / 8] &= (uint8_t)~(1u << page % 8);
			c->smc.rewritten++;
			c->smc.invalidate(c->uc, start, start + PAGE_SIZE);
		}
	}
	qemu_set_dirty(cpu, virtual_address);
}

int smc_install(struct core *c)
{
	void *pages = calloc(1, c->watch.ram_size / PAGE_SIZE / 8 + 1);

	if (!pages)
		return ENOMEM;
	free(code_pages);
	code_pages = pages;
	c->smc.ram_base = c->smc.code_address(c->env, 0);
	if (c->smc.ram_base == UINT64_MAX) {
		owner = NULL;
		return EFAULT;
	}
	owner = c;
	if (!qemu_protect_code) {
		const void *old = (const void *)(uintptr_t)c->smc.protect_code;

		qemu_protect_code = c->smc.protect_code;
		if (plt_redirect(old, (const void *)(uintptr_t)protect_code)) {
			qemu_protect_code = NULL;
			return ENOENT;
		}
	}
	if (!qemu_set_dirty) {
		const void *old = (const void *)(uintptr_t)c->smc.set_dirty;

		qemu_set_dirty = c->smc.set_dirty;
		if (plt_redirect(old, (const void *)(uintptr_t)set_dirty)) {
			qemu_set_dirty = NULL;
			return ENOENT;
		}
	}
	return 0;
}

void smc_detach(struct core *c)
{
	if (c == owner)
		owner = NULL;
}
