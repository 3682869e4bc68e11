/* From the accesses of one instruction to the hits it made: what was there before, and whether it is different now. */
#ifndef EMULATOR_WATCH_HITS_H
#define EMULATOR_WATCH_HITS_H

#include <stdint.h>

struct core;

/* The instruction is about to access a range: note it with every watchpoint that is hit. */
void hits_note(struct core *c, uint64_t address, uint64_t length, uint32_t flags);
void hits_forget(void);
/* Behind the instruction at `ip`: fill in watch.hits from what was noted; return the bits of DR6. */
uint64_t hits_collect(struct core *c, uint64_t ip);

#endif
