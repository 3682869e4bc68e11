/* emulator/native/operand.c: known instructions, each also cut off at every byte, and random bytes under the sanitizers. */
#include "operand.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { IP = 0x400000, FS = 0x10000000, GS = 0x20000000, LONGEST = 15 };

static const struct {
	const char *text;
	uint8_t code[LONGEST];
	size_t size;
	uint64_t address; /* 0: none */
	bool vector;
} cases[] = {
	{ "mov (%rax), %eax", { 0x8b, 0x00 }, 2, 0x1000, false },
	{ "mov 0x10(%r9), %rax", { 0x49, 0x8b, 0x41, 0x10 }, 4, 0xa010, false },
	{ "mov -1(%rsp), %al", { 0x8a, 0x44, 0x24, 0xff }, 4, 0x4fff, false },
	{ "mov (%rbx,%rcx,8), %eax", { 0x8b, 0x04, 0xcb }, 3, 0x4000 + 0x2000 * 8, false },
	{ "mov 0x1234, %eax", { 0x8b, 0x04, 0x25, 0x34, 0x12, 0, 0 }, 7, 0x1234, false },
	{ "mov %gs:0x20, %rax", { 0x65, 0x48, 0x8b, 0x04, 0x25, 0x20, 0, 0, 0 }, 9, GS + 0x20, false },
	{ "mov %fs:(%rax), %eax", { 0x64, 0x8b, 0x00 }, 3, FS + 0x1000, false },
	{ "mov 0x100(%rip), %eax", { 0x8b, 0x05, 0, 1, 0, 0 }, 6, IP + 6 + 0x100, false },
	{ "cmpl $5, 0x100(%rip)", { 0x83, 0x3d, 0, 1, 0, 0, 5 }, 7, IP + 7 + 0x100, false },
	{ "cmpw $5, 0x100(%rip)", { 0x66, 0x81, 0x3d, 0, 1, 0, 0, 5, 0 }, 9, IP + 9 + 0x100, false },
	{ "testl $5, 0x100(%rip)", { 0xf7, 0x05, 0, 1, 0, 0, 5, 0, 0, 0 }, 10, IP + 10 + 0x100, false },
	{ "mov (%eax), %eax", { 0x67, 0x8b, 0x00 }, 3, 0x1000, false },
	{ "movzbl (%rax), %eax", { 0x0f, 0xb6, 0x00 }, 3, 0x1000, false },
	{ "movups (%rax), %xmm0", { 0x0f, 0x10, 0x00 }, 3, 0x1000, true },
	{ "movsd (%rax), %xmm0", { 0xf2, 0x0f, 0x10, 0x00 }, 4, 0x1000, false },
	{ "movdqu (%rax), %xmm0", { 0xf3, 0x0f, 0x6f, 0x00 }, 4, 0x1000, true },
	{ "mov %eax, %ebx", { 0x89, 0xc3 }, 2, 0, false },
	{ "rep movsb", { 0xf3, 0xa4 }, 2, 0, false },
	{ "pop %rax", { 0x58 }, 1, 0, false },
};

static uint64_t regs[16];

/* Decode a copy that ends where the heap block does. */
static bool decode(const uint8_t *code, size_t size, struct operand *found)
{
	uint8_t *copy = malloc(size ? size : 1);
	bool known;

	if (!copy)
		abort();
	memcpy(copy, code, size);
	known = operand_find(copy, size, IP, regs, FS, GS, found);
	free(copy);
	return known;
}

int main(void)
{
	int failures = 0;

	for (int i = 0; i < 16; i++)
		regs[i] = 0x1000 * (uint64_t)(i + 1);
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct operand found = { 0, false };

		for (size_t size = 0; size < cases[i].size; size++)
			decode(cases[i].code, size, &found);
		found = (struct operand){ 0, false };
		if (decode(cases[i].code, cases[i].size, &found) != (cases[i].address != 0) ||
		    found.address != cases[i].address || found.vector != cases[i].vector) {
			printf("FAILED %s: %#" PRIx64 "\n", cases[i].text, found.address);
			failures++;
		}
	}
	srand(1);
	for (int round = 0; round < 500000; round++) {
		uint8_t code[LONGEST];
		struct operand found;

		for (int i = 0; i < LONGEST; i++)
			code[i] = (uint8_t)(rand() >> 7);
		decode(code, (size_t)rand() % (LONGEST + 1), &found);
	}
	printf("%s\n", failures ? "operand: FAILED" : "operand: ok");
	return failures != 0;
}
