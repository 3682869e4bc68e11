/*
 * The guest's init: mounts the kernel's filesystems, maps the window it shares with the host, and then makes the
 * system calls it is handed. It decides nothing; all logic is the host's. See protocol.h.
 *
 * Static, without a C library: it is the only thing in memory beside the kernel, and its calls show in the traces.
 */
#include "serve.h"

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
		SYSCALL3(SYS_pause, 0, 0, 0);
}

static void mount_at(const char *type, const char *directory)
{
	SYSCALL3(SYS_mkdir, directory, 0755, 0);
	syscall6(SYS_mount, (long)type, (long)directory, (long)type, 0, 0, 0);
}

/* Show a directory, with what is mounted in it, in OTHER_ROOT too. */
static void show_again(const char *directory)
{
	static char other[64] = OTHER_ROOT;
	u64 at = length(OTHER_ROOT);

	for (u64 i = 0; i <= length(directory); i++)
		other[at + i] = directory[i];
	SYSCALL3(SYS_mkdir, other, 0755, 0);
	syscall6(SYS_mount, (long)directory, (long)other, 0, 0x5000 /* MS_BIND | MS_REC */, 0, 0);
}

static void set(const char *file, const char *value)
{
	long fd = SYSCALL3(SYS_open, file, O_WRONLY, 0);

	SYSCALL3(SYS_write, fd, value, length(value));
	SYSCALL3(SYS_close, fd, 0, 0);
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
	SYSCALL3(SYS_mkdir, OTHER_ROOT, 0755, 0);
	show_again("/proc");
	show_again("/sys");
	show_again("/dev");
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
	SYSCALL3(SYS_dup2, fd, WINDOW_FD, 0);
	SYSCALL3(SYS_close, fd, 0, 0);
	for (fd = 3; fd < WINDOW_FD; fd++)
		SYSCALL3(SYS_dup2, 0, fd, 0);
	if (n != (long)WINDOW_VIRTUAL)
		give_up("map the window");

	on(SIGINT, on_signal);
	on(SIGSTKFLT, on_signal);
	on(SIGPIPE, (void (*)(int))SIG_IGN);
	on(SIGCHLD, (void (*)(int))SIG_IGN);
	for (u64 i = 0; i < sizeof(page); i += 4096)
		page[i] = 1;
	SYSCALL3(SYS_mlock, page, sizeof(page), 0);
	/* Slot 0 is ours; before its first call it holds the address of the page. */
	*(volatile u64 *)(WINDOW_VIRTUAL + SLOT_CALLS) = (u64)page;
	say("agent: ready\n");
	serve(0, 0);
}

#ifndef HOSTED
__asm__(".globl _start\n"
	"_start: xor %ebp, %ebp\n"
	"and $-16, %rsp\n"
	"call start\n");
#endif
