/*
 * The guest's init: mounts the kernel's filesystems, maps the window it shares with the host, and then makes the
 * system calls it is handed. It decides nothing; all logic is the host's. See protocol.h.
 *
 * Static, without a C library: it is the only thing in memory beside the kernel, and its calls show in the traces.
 */
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
	char pad[SLOT_CALLS - 8];
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
	SYS_mkdir = 83, SYS_mlock = 149, SYS_mount = 165, SYS_reboot = 169, SYS_futex = 202, SYS_clone3 = 435,
};
enum { O_WRONLY = 1, O_RDWR = 2, O_SYNC = 04010000 };
enum { PROT_READ = 1, PROT_WRITE = 2, MAP_SHARED = 1 };
enum { FUTEX_WAIT_PRIVATE = 128 };
enum { SIGINT = 2, SIGPIPE = 13, SIGCHLD = 17, SIG_IGN = 1, SA_RESTORER = 0x04000000 };

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

#define SYSCALL3(number, a, b, c) syscall6(number, (long)(a), (long)(b), (long)(c), 0, 0, 0)

static struct slot *slot_at(u64 number)
{
	return (struct slot *)(WINDOW_VIRTUAL + number * SLOT_SIZE);
}

/* The jump ends the translation block, so that the host finds the registers settled behind CPUID. */
static u32 hypercall(u64 slot)
{
	u64 a = HYPERCALL_LEAF, b, c = slot, d;

	__asm__ volatile("cpuid\n\tjmp 1f\n1:" : "+a"(a), "=b"(b), "+c"(c), "=d"(d) : : "memory");
	return (u32)a;
}

__attribute__((used, noreturn)) static void serve(u64 number);

/* clone3() with a stack of the child's own: it may touch nothing of its parent's, so it goes straight to serve(). */
static long spawn(long arguments, long size, u64 slot)
{
	long result;
	register u64 r12 __asm__("r12") = slot;

	__asm__ volatile("syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\t"
			 "and $-16, %%rsp\n\t"
			 "mov %%r12, %%rdi\n\t"
			 "call serve\n"
			 "1:"
			 : "=a"(result)
			 : "0"((long)SYS_clone3), "D"(arguments), "S"(size), "r"(r12)
			 : "rcx", "r11", "memory");
	return result;
}

static void serve(u64 number)
{
	struct slot *slot = slot_at(number);

	for (;;) {
		u32 operation = hypercall(number), n = slot->ncalls;

		if (operation == OP_SLEEP) {
			syscall6(SYS_futex, (long)&slot->futex, FUTEX_WAIT_PRIVATE, 0, 0, 0, 0);
			continue;
		}
		for (u32 i = 0; i < n && i < SLOT_MAX_CALLS; i++) {
			struct call *c = &slot->calls[i];
			long *a = c->argument;

			if (c->number == CALL_SPAWN)
				c->result = spawn(a[0], a[1], (u64)a[2]);
			else
				c->result = syscall6(c->number, a[0], a[1], a[2], a[3], a[4], a[5]);
		}
	}
}

static u64 length(const char *text)
{
	u64 n = 0;

	while (text[n])
		n++;
	return n;
}

static void say(const char *text)
{
	SYSCALL3(SYS_write, 1, text, length(text));
}

/* The host reads this line on the console and reports it: the guest is of no use without the part that is missing. */
static void __attribute__((noreturn)) give_up(const char *what)
{
	say("agent: cannot ");
	say(what);
	say("\n");
	for (;;)
		syscall6(SYS_futex, (long)what, FUTEX_WAIT_PRIVATE, *(const u32 *)what, 0, 0, 0);
}

static void mount_at(const char *type, const char *directory)
{
	SYSCALL3(SYS_mkdir, directory, 0755, 0);
	syscall6(SYS_mount, (long)type, (long)directory, (long)type, 0, 0, 0);
}

static void set(const char *file, const char *value)
{
	long fd = SYSCALL3(SYS_open, file, O_WRONLY, 0);

	SYSCALL3(SYS_write, fd, value, length(value));
	SYSCALL3(SYS_close, fd, 0, 0);
}

__asm__("on_signal: ret\n"
	"signal_return: mov $15, %eax\n syscall\n");
void on_signal(int);
void signal_return(void);

static void on(int signal, void (*handler)(int))
{
	struct kernel_sigaction action = { handler, SA_RESTORER, signal_return, 0 };

	syscall6(SYS_rt_sigaction, signal, (long)&action, 0, sizeof(action.mask), 0, 0);
}

/* A page of ordinary, locked RAM: the host keeps kernel structures it links into the guest's lists here. */
static char page[4096] __attribute__((aligned(4096)));

/* Parse the decimal number behind `name` in /proc/cmdline's text; 0 when it is not there. */
static u64 parameter(const char *line, const char *name)
{
	u64 n = length(name);

	for (; *line; line++) {
		u64 i = 0, value = 0;

		while (i < n && line[i] == name[i])
			i++;
		if (i < n)
			continue;
		for (line += n; *line >= '0' && *line <= '9'; line++)
			value = value * 10 + (u64)(*line - '0');
		return value;
	}
	return 0;
}

__attribute__((used, noreturn)) static void start(void)
{
	static char line[4096];
	u64 window_at, window_size;
	long fd, n;

	mount_at("proc", "/proc");
	mount_at("sysfs", "/sys");
	mount_at("devtmpfs", "/dev");
	mount_at("tmpfs", "/tmp");
	mount_at("debugfs", "/sys/kernel/debug");
	mount_at("tracefs", "/sys/kernel/tracing");
	set("/proc/sys/kernel/pid_max", "4194304");
	set("/proc/sys/kernel/printk", "1");
	/* The host writes to `page` by its physical address: it must not be moved to make room. */
	set("/proc/sys/vm/compact_unevictable_allowed", "0");

	fd = SYSCALL3(SYS_open, "/proc/cmdline", 0, 0);
	n = syscall6(0, fd, (long)line, sizeof(line) - 1, 0, 0, 0);
	SYSCALL3(SYS_close, fd, 0, 0);
	if (n <= 0)
		give_up("read /proc/cmdline");
	window_at = parameter(line, "agent.window=");
	window_size = parameter(line, "agent.size=");
	fd = SYSCALL3(SYS_open, "/dev/mem", O_RDWR | O_SYNC, 0);
	if (fd < 0)
		give_up("open /dev/mem: a kernel with CONFIG_DEVMEM is needed");
	n = syscall6(SYS_mmap, (long)WINDOW_VIRTUAL, (long)window_size, PROT_READ | PROT_WRITE,
		     MAP_SHARED | 0x100000 /* MAP_FIXED_NOREPLACE */, fd, (long)window_at);
	SYSCALL3(SYS_close, fd, 0, 0);
	if (n != (long)WINDOW_VIRTUAL)
		give_up("map the window");

	on(SIGINT, on_signal);
	on(SIGPIPE, (void (*)(int))SIG_IGN);
	on(SIGCHLD, (void (*)(int))SIG_IGN);
	for (u64 i = 0; i < sizeof(page); i += 4096)
		page[i] = 1;
	SYSCALL3(SYS_mlock, page, sizeof(page), 0);
	/* Slot 0 is ours; before its first call it holds the address of the page. */
	*(volatile u64 *)(WINDOW_VIRTUAL + SLOT_CALLS) = (u64)page;
	say("agent: ready\n");
	serve(0);
}

__asm__(".globl _start\n"
	"_start: xor %ebp, %ebp\n"
	"and $-16, %rsp\n"
	"call start\n");
