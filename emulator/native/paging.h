/* The guest's memory by virtual address, as its page tables stand now. */
#ifndef EMULATOR_PAGING_H
#define EMULATOR_PAGING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct core;

/* Host address of `size` bytes within one page of RAM, or NULL. */
uint8_t *paging_host(const struct core *c, uint64_t virtual_address, uint64_t size);
/* Copy out what is there, across pages; what is not RAM reads as zeros, and the answer is false. */
bool paging_read(const struct core *c, uint64_t virtual_address, void *to, size_t size);

#endif
