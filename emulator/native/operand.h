/*
 * Where the memory operand of an instruction begins: just enough of a decoder for the watchpoints.
 *
 * The engine makes an unaligned load from two aligned ones and tells the watchpoints of these. With the operand's
 * address the bytes that were not loaded can be told from those that were. Intel SDM vol. 2, chapter 2.
 */
#ifndef EMULATOR_OPERAND_H
#define EMULATOR_OPERAND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct operand {
	uint64_t address; /* guest virtual */
	bool vector;	  /* SSE: up to 16 bytes, loaded in pieces of 8 */
};

/*
 * Decode `size` bytes of code in 64-bit mode. `regs` are RAX to R15 in the order of their numbers, `fs` and `gs` the
 * segments' bases. False when the instruction has no memory operand of its own (string instructions, the stack) or is
 * not understood.
 */
bool operand_find(const uint8_t *code, size_t size, uint64_t ip, const uint64_t regs[16], uint64_t fs, uint64_t gs,
		  struct operand *found);

#endif
