/*
 * The program image of a process of the guest that stands for one of the host's. The host puts it at the path of the
 * real program, has the process execute it, and finds the task serving its slot again.
 *
 * The first variable of its environment has three decimal numbers: which slot that is, its physical address, and whether
 * children leave no status when they end.
 */
#include "serve.h"

static u64 number(const char **text)
{
	u64 value = 0;

	for (; **text >= '0' && **text <= '9'; (*text)++)
		value = value * 10 + (u64)(**text - '0');
	return value;
}

__attribute__((used, noreturn)) static void start(long *stack)
{
	const char *variable = (const char *)stack[stack[0] + 2];
	u64 slot = number(&variable), physical;

	variable++;
	physical = number(&variable);
	variable++;
	on(SIGSTKFLT, on_signal);
	if (number(&variable))
		on_with(SIGCHLD, 0, SA_NOCLDWAIT, 0);
	serve(slot, physical);
}

__asm__(".globl _start\n"
	"_start: xor %ebp, %ebp\n"
	"mov %rsp, %rdi\n"
	"and $-16, %rsp\n"
	"call start\n");
