/* See operand.h. */
#include "operand.h"

#include <string.h>

struct decoder {
	const uint8_t *code;
	size_t size, at;
	uint8_t rex;
	bool operand16, address32, scalar, two_byte;
	uint64_t segment;
};

static bool next(struct decoder *d, uint8_t *byte)
{
	if (d->at >= d->size)
		return false;
	*byte = d->code[d->at++];
	return true;
}

/* Legacy prefixes, REX and the opcode with its escape bytes. */
static bool opcode(struct decoder *d, uint64_t fs, uint64_t gs, uint8_t *op)
{
	while (next(d, op)) {
		if (*op == 0x64 || *op == 0x65)
			d->segment = *op == 0x64 ? fs : gs;
		else if (*op == 0x66)
			d->operand16 = true;
		else if (*op == 0x67)
			d->address32 = true;
		else if ((*op & 0xf0) == 0x40)
			d->rex = *op;
		else if (*op == 0xf2 || *op == 0xf3)
			d->scalar = true;
		else if (*op != 0xf0 && *op != 0x2e && *op != 0x36 && *op != 0x3e && *op != 0x26)
			break;
	}
	if (d->at == 0 || *op != 0x0f)
		return d->at > 0;
	d->two_byte = true;
	if (!next(d, op))
		return false;
	return (*op != 0x38 && *op != 0x3a) || next(d, op);
}

static bool has_modrm(const struct decoder *d, uint8_t op)
{
	if (d->two_byte)
		return true; /* of those without one none loads from memory, but PUSH and POP of FS and GS */
	if (op < 0x40)
		return (op & 7) < 4;
	return op == 0x62 || op == 0x63 || op == 0x69 || op == 0x6b || (op >= 0x80 && op <= 0x8f) || op == 0xc0 || op == 0xc1 ||
	       op == 0xc6 || op == 0xc7 || (op >= 0xd0 && op <= 0xd3) || (op >= 0xd8 && op <= 0xdf) || op == 0xf6 ||
	       op == 0xf7 || op == 0xfe || op == 0xff;
}

/* Bytes of an immediate behind the operand, for addresses relative to the next instruction. */
static unsigned immediate(const struct decoder *d, uint8_t op, unsigned extension)
{
	const unsigned full = d->operand16 && !(d->rex & 8) ? 2 : 4;

	if (d->two_byte)
		return (op >= 0x70 && op <= 0x73) || op == 0xa4 || op == 0xac || op == 0xba || op == 0xc2 ||
		       (op >= 0xc4 && op <= 0xc6);
	switch (op) {
	case 0x69: case 0x81: case 0xc7:
		return full;
	case 0x6b: case 0x80: case 0x83: case 0xc0: case 0xc1: case 0xc6:
		return 1;
	case 0xf6:
		return extension < 2 ? 1 : 0;
	case 0xf7:
		return extension < 2 ? full : 0;
	default:
		return 0;
	}
}

/* SSE that takes 16 bytes: MOVZX, CMOV, BT and their like are none, nor are scalars, halves and MOVD. */
static bool is_vector(const struct decoder *d, uint8_t op)
{
	if (d->scalar)
		return op == 0x6f || op == 0x70 || op == 0x7f; /* MOVDQU, PSHUFHW, PSHUFLW */
	if (op >= 0xd0 || op == 0xc2 || op == 0xc6 || op == 0x10 || op == 0x11 || op == 0x14 || op == 0x15)
		return true;
	return (op >= 0x28 && op <= 0x2d) || (op >= 0x50 && op <= 0x7f && op != 0x6e && op != 0x7e);
}

static bool displacement(struct decoder *d, unsigned size, int64_t *value)
{
	int32_t four;

	if (size > d->size - d->at)
		return false;
	*value = 0;
	if (size == 1) {
		*value = (int8_t)d->code[d->at];
	} else if (size == 4) {
		memcpy(&four, d->code + d->at, 4);
		*value = four;
	}
	d->at += size;
	return true;
}

bool operand_find(const uint8_t *code, size_t size, uint64_t ip, const uint64_t regs[16], uint64_t fs, uint64_t gs,
		  struct operand *found)
{
	struct decoder d = { .code = code, .size = size };
	uint8_t op = 0, modrm, sib;
	unsigned mod, base, bytes;
	uint64_t address = 0;
	int64_t offset;

	if (!opcode(&d, fs, gs, &op) || !has_modrm(&d, op) || !next(&d, &modrm))
		return false;
	mod = modrm >> 6;
	if (mod == 3)
		return false;
	bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
	base = modrm & 7;
	if (base == 4) {
		unsigned index;

		if (!next(&d, &sib))
			return false;
		base = sib & 7;
		index = (sib >> 3 & 7) | (d.rex & 2 ? 8 : 0);
		if (index != 4)
			address = regs[index] << (sib >> 6);
		if (base == 5 && mod == 0)
			bytes = 4;
		else
			address += regs[base | (d.rex & 1 ? 8 : 0)];
	} else if (base == 5 && mod == 0) {
		bytes = 4;
		address = ip + d.at + 4 + immediate(&d, op, modrm >> 3 & 7);
	} else {
		address = regs[base | (d.rex & 1 ? 8 : 0)];
	}
	if (!displacement(&d, bytes, &offset))
		return false;
	address += (uint64_t)offset;
	if (d.address32)
		address = (uint32_t)address;
	found->address = address + d.segment;
	found->vector = d.two_byte && is_vector(&d, op);
	return true;
}
