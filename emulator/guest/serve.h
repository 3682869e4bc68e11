/*
 * What the guest's init and the image of a process have in common: the loop that makes the calls the host puts into
 * the task's slot. See protocol.h. No C library.
 */
#ifndef GUEST_SERVE_H
#define GUEST_SERVE_H

#include "protocol.h"

typedef unsigned int u32;
typedef unsigned long u64;

struct call {
	long number;
	long argument[6];
	long result;
};

struct slot {
	volatile u32 futex;
	u32 ncalls;
	u64 stack; /* SLOT_RETURN */
	char pad[SLOT_CALLS - 16];
	struct call calls[SLOT_MAX_CALLS];
};

struct kernel_sigaction {
	void (*handler)(int);
	u64 flags;
	void (*restorer)(void);
	u64 mask;
};

enum {
	SYS_write = 1, SYS_open = 2, SYS_close = 3, SYS_mmap = 9, SYS_rt_sigaction = 13, SYS_rt_sigreturn = 15,
	SYS_dup2 = 33, SYS_pause = 34, SYS_mkdir = 83, SYS_mlock = 149, SYS_mount = 165, SYS_reboot = 169, SYS_futex = 202,
	SYS_clone3 = 435,
};
enum { O_WRONLY = 1, O_RDWR = 2, O_SYNC = 04010000 };
enum { PROT_READ = 1, PROT_WRITE = 2, MAP_SHARED = 1, MAP_FIXED = 16 };
enum { FUTEX_WAIT_PRIVATE = 128 };
enum { ECANCELED = 125 };
enum {
	SIGINT = 2, SIGILL = 4, SIGTRAP = 5, SIGBUS = 7, SIGFPE = 8, SIGSEGV = 11, SIGPIPE = 13, SIGSTKFLT = 16,
	SIGCHLD = 17,
};
enum { SIG_IGN = 1, SA_NOCLDWAIT = 2, SA_RESTORER = 0x04000000, SA_ONSTACK = 0x08000000 };

#ifdef HOSTED /* a test on the host stands for the kernel: tests/native/agent.c */
static long syscall6(long number, long a, long b, long c, long d, long e, long f);
static u32 hypercall(u64 slot);
static long spawn(long arguments, long size, u64 slot, u64 physical);
static long enter(struct slot *slot, long frame);
#else
static long syscall6(long number, long a, long b, long c, long d, long e, long f)
{
	long result;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}
#endif

#define SYSCALL3(number, a, b, c) syscall6(number, (long)(a), (long)(b), (long)(c), 0, 0, 0)

static struct slot *slot_at(u64 number)
{
	return (struct slot *)(WINDOW_VIRTUAL + number * SLOT_SIZE);
}

#ifndef HOSTED
/* The jump ends the translation block, so that the host finds the registers settled behind CPUID. */
static u32 hypercall(u64 slot)
{
	u64 a = HYPERCALL_LEAF, b, c = slot, d;

	__asm__ volatile("cpuid\n\tjmp 1f\n1:" : "+a"(a), "=b"(b), "+c"(c), "=d"(d) : : "memory");
	return (u32)a;
}
#endif

/* Map a slot that is not in our address space yet. */
static void map_slot(u64 number, u64 physical)
{
	syscall6(SYS_mmap, (long)slot_at(number), SLOT_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, WINDOW_FD,
		 (long)physical);
}

__attribute__((used, noreturn)) static void serve(u64 number, u64 physical);

#ifndef HOSTED
/*
 * clone3(). A child in the same address space has a stack of its own, and may touch nothing of its parent's: it goes
 * straight to serve(). One with a copy of it goes there too, on its copy of the stack.
 */
static long spawn(long arguments, long size, u64 slot, u64 physical)
{
	long result;
	register u64 r12 __asm__("r12") = slot;
	register u64 r13 __asm__("r13") = physical;

	__asm__ volatile("syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\t"
			 "and $-16, %%rsp\n\t"
			 "mov %%r12, %%rdi\n\t"
			 "mov %%r13, %%rsi\n\t"
			 "call serve\n"
			 "1:"
			 : "=a"(result)
			 : "0"((long)SYS_clone3), "D"(arguments), "S"(size), "r"(r12), "r"(r13)
			 : "rcx", "r11", "memory");
	return result;
}
#endif

__asm__("on_signal: ret\n"
	"signal_return: mov $15, %eax\n syscall\n");
void on_signal(int);
void signal_return(void);

static void on_with(int signal, void (*handler)(int), u64 flags, u64 mask)
{
	struct kernel_sigaction action = { handler, SA_RESTORER | flags, signal_return, mask };

	syscall6(SYS_rt_sigaction, signal, (long)&action, 0, sizeof(action.mask), 0, 0);
}

static void on(int signal, void (*handler)(int))
{
	on_with(signal, handler, 0, 0);
}

#ifndef HOSTED
/*
 * CALL_ENTER: what is in the registers behind rt_sigreturn(2) is not ours. The handler of the signal that ends it runs
 * on the alternate stack, by which it finds the slot, and in that our stack.
 */
__asm__("enter: push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
	"mov %rsp, 8(%rdi)\n"
	"mov %rsi, %rsp\n"
	"mov $15, %eax\n"
	"syscall\n"
	"on_exception: and $-0x10000, %rsp\n"
	"mov 8(%rsp), %rsp\n"
	"mov %edi, %eax\n"
	"pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n"
	"ret\n");
long enter(struct slot *slot, long frame);
void on_exception(int);
_Static_assert(SLOT_SIZE == 0x10000 && SLOT_RETURN == 8, "as the above has it");
#else
#define on_exception on_signal
#endif

/* While a handler is about to leave for serve(), only SIGSTKFLT is not blocked: so it is there. */
static void catch_exceptions(void)
{
	static const int signals[] = { SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV };

	for (u64 i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
		on_with(signals[i], on_exception, SA_ONSTACK, ~(1ul << (SIGSTKFLT - 1)));
}

/* The host's processor is emulated: a word costs as much as a byte. */
static void copy(char *to, const char *from, u64 size)
{
	typedef u64 __attribute__((aligned(1), may_alias)) word;

	for (; size >= sizeof(word); size -= sizeof(word), to += sizeof(word), from += sizeof(word))
		*(volatile word *)to = *(const word *)from;
	while (size--)
		*(volatile char *)to++ = *from++;
}

static long make(struct slot *slot, const struct call *call)
{
	const long *a = call->argument;
	long number = call->number;

	if (number & CALL_AFTER) {
		if ((u64)a[5] >= SLOT_MAX_CALLS || slot->calls[a[5]].result < 0)
			return -ECANCELED;
		number &= ~CALL_AFTER;
	}
	switch (number) {
	case CALL_SPAWN:
		return spawn(a[0], a[1], (u64)a[2], (u64)a[3]);
	case CALL_COPY:
		copy((char *)a[0], (const char *)a[1], (u64)a[2]);
		return 0;
	case CALL_ENTER:
		if (a[1])
			catch_exceptions();
		return enter(slot, a[0]);
	default:
		return syscall6(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	}
}

static void serve(u64 number, u64 physical)
{
	struct slot *slot = slot_at(number);

	if (physical)
		map_slot(number, physical);
	for (;;) {
		u32 operation = hypercall(number), n = slot->ncalls;

		if (operation == OP_SLEEP) {
			syscall6(SYS_futex, (long)&slot->futex, FUTEX_WAIT_PRIVATE, 0, 0, 0, 0);
			continue;
		}
		for (u32 i = 0; i < n && i < SLOT_MAX_CALLS; i++)
			slot->calls[i].result = make(slot, &slot->calls[i]);
	}
}

#endif
