/* See paging.h: 4 levels, Intel SDM vol. 3, 4.5. */
#include "paging.h"

#include <string.h>

#include "core.h"

#define PAGE_SIZE 4096u
#define FRAME 0x000ffffffffff000u
enum { PRESENT = 1, LARGE = 0x80 };

uint8_t *paging_host(const struct core *c, uint64_t address, uint64_t size)
{
	uint64_t entry, mask = PAGE_SIZE - 1;

	if ((address & mask) + size > PAGE_SIZE)
		return NULL;
	memcpy(&entry, c->env + c->watch.at.env_cr + 3 * 8, 8);
	for (int shift = 39; shift >= 12; shift -= 9) {
		uint64_t at = (entry & FRAME) + (address >> shift & 511) * 8;

		if (at + 8 > c->watch.ram_size)
			return NULL;
		memcpy(&entry, c->watch.ram + at, 8);
		if (!(entry & PRESENT))
			return NULL;
		if ((shift == 30 || shift == 21) && entry & LARGE) {
			mask = ((uint64_t)1 << shift) - 1;
			break;
		}
	}
	address = (entry & FRAME & ~mask) | (address & mask);
	return address + size <= c->watch.ram_size ? c->watch.ram + address : NULL;
}

bool paging_read(const struct core *c, uint64_t address, void *to, size_t size)
{
	uint8_t *out = to;
	bool all = true;

	while (size) {
		size_t room = PAGE_SIZE - address % PAGE_SIZE, piece = size < room ? size : room;
		const uint8_t *host = paging_host(c, address, piece);

		if (host)
			memcpy(out, host, piece);
		else
			memset(out, 0, piece);
		all = all && host;
		address += piece;
		out += piece;
		size -= piece;
	}
	return all;
}
