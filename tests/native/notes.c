/*
 * fakefs/mirror/notes.c with a kernel that is functions of this file: it hands out notifications, has the memory of
 * one process, and keeps what is answered. Built with AddressSanitizer and UBSan by tests/unit/test_native.py.
 *
 * Not here: a real listener; tests/unit/test_mirror_notes.py has one.
 */
#define ioctl fake_ioctl
#define poll fake_poll
#define readlink fake_readlink
#define process_vm_readv fake_process_vm_readv

#include "../../fakefs/mirror/notes.c"

#include <stdarg.h>

#include "check.h"

enum { TID = 77, OPENAT = 257, OPEN = 2, STAT = 4, ARCH_PRCTL = 158, UNLINK = 87 };

static uint64_t progress[8];
static int ends[2];
static struct seccomp_notif coming;
static int revents, receive_error, send_error, answered;
static uint64_t noted_when_answered;
static char memory[2 * PAGE];      /* of process TID, from address PAGE on: the page behind is not there */
static const uint64_t base = PAGE;
static char asked_for[64];         /* the link read last */
static ssize_t link_size;

int fake_poll(struct pollfd *fds, nfds_t count, int timeout)
{
	CHECK(count == 1 && timeout == -1);
	fds->revents = revents;
	return 1;
}

int fake_ioctl(int fd, unsigned long request, ...)
{
	va_list list;

	va_start(list, request);
	void *argument = va_arg(list, void *);
	va_end(list);
	CHECK(fd == 5);
	if (request == SECCOMP_IOCTL_NOTIF_RECV) {
		struct seccomp_notif *notification = argument;

		CHECK(!notification->id && !notification->pid);
		revents = POLLHUP; /* the next time */
		errno = receive_error;
		*notification = coming;
		return receive_error ? -1 : 0;
	}
	CHECK(request == SECCOMP_IOCTL_NOTIF_SEND);
	struct seccomp_notif_resp *response = argument;
	CHECK(response->id == coming.id && response->flags == SECCOMP_USER_NOTIF_FLAG_CONTINUE);
	CHECK(!response->val && !response->error);
	answered++;
	noted_when_answered = progress[NOTED];
	CHECK(progress[RECEIVED] == coming.id);
	errno = send_error;
	return send_error ? -1 : 0;
}

ssize_t fake_readlink(const char *path, char *text, size_t size)
{
	CHECK(strlen(path) < sizeof(asked_for));
	strcpy(asked_for, path);
	if (link_size < 0)
		return -1;
	size = (size_t)link_size < size ? (size_t)link_size : size;
	memset(text, 'd', size);
	text[0] = '/';
	return size;
}

ssize_t fake_process_vm_readv(pid_t tid, const struct iovec *local, unsigned long locals, const struct iovec *remote,
			      unsigned long remotes, unsigned long flags)
{
	size_t got = 0;

	CHECK(tid == TID && locals == 1 && remotes >= 1 && remotes <= 2 && !flags);
	for (unsigned long index = 0; index < remotes; index++) {
		uint64_t at = (uintptr_t)remote[index].iov_base;

		CHECK(at / PAGE == (at + remote[index].iov_len - 1) / PAGE);
		if (at < base || at + remote[index].iov_len > base + sizeof(memory))
			break;
		CHECK(got + remote[index].iov_len <= local->iov_len);
		memcpy((char *)local->iov_base + got, memory + (at - base), remote[index].iov_len);
		got += remote[index].iov_len;
	}
	return got ? (ssize_t)got : -1;
}

static struct notes notes = {
	.listener = 5,
	.progress = progress,
	.count = 4,
	.looks = { { OPENAT, 1, 0, 2, O_ACCMODE | O_CREAT },
		   { OPEN, 0, -1, 1, O_ACCMODE | O_CREAT },
		   { STAT, 0, -1, -1, 0 },
		   { ARCH_PRCTL, -1, -1, -1, 0 } },
};
static struct note note;

/* Have a call notified; return whether it was passed on, as `note`. */
static int notify(int number, uint64_t first, uint64_t second, uint64_t third)
{
	static uint64_t id;
	struct seccomp_notif next = { .id = ++id, .pid = TID, .data = { .nr = number, .args = { first, second, third } } };
	uint64_t before = progress[NOTED];

	coming = next;
	answered = 0;
	revents = POLLIN;
	receive_all(&notes); /* until POLLHUP */
	CHECK(progress[RECEIVED] == 0);
	memset(&note, 0xAA, sizeof(note));
	ssize_t size = recv(ends[1], &note, sizeof(note), MSG_DONTWAIT);
	if (size < 0) {
		CHECK(progress[NOTED] == before);
		return 0;
	}
	CHECK(progress[NOTED] == before + 1);
	CHECK(!answered || noted_when_answered == before + 1);
	CHECK(size == (ssize_t)offsetof(struct note, text) + note.path_size + note.start_size);
	CHECK(note.id == id && note.tid == TID && note.number == number && note.arguments[1] == second);
	return 1;
}

static int waits(void)
{
	return note.state == WAITS && !answered && !note.path_size && !note.start_size;
}

static void test_what_goes_on(void)
{
	uint64_t cwd = (uint32_t)AT_FDCWD;

	strcpy(memory, "/etc/passwd");
	CHECK(notify(OPENAT, cwd, base, O_RDONLY) && waits()); /* an unknown thread */
	notes_trust(TID, 1);
	CHECK(notify(OPENAT, cwd, base, O_RDONLY) && note.state == GOES_ON && answered == 1);
	CHECK(note.path_size == 11 && !memcmp(note.text, "/etc/passwd", 11) && !note.start_size);
	CHECK(notify(OPENAT, cwd, base, O_RDONLY | O_CREAT) && waits());
	CHECK(notify(OPENAT, cwd, base, O_WRONLY) && waits());
	CHECK(notify(OPEN, base, O_RDONLY, 0) && note.state == GOES_ON);
	CHECK(notify(STAT, base, 0, 0) && note.state == GOES_ON);
	CHECK(notify(UNLINK, base, 0, 0) && waits());
	CHECK(!notify(ARCH_PRCTL, 0, 0, 0) && answered == 1);
	notes_hold(1);
	CHECK(notify(STAT, base, 0, 0) && waits());
	CHECK(notify(ARCH_PRCTL, 0, 0, 0) && waits());
	notes_hold(0);
	send_error = ENOENT;
	CHECK(notify(STAT, base, 0, 0) && note.state == GONE);
	send_error = 0;
	notes_trust(TID, 0);
	CHECK(notify(STAT, base, 0, 0) && waits());
	notes_trust(TID, 1);
}

static void test_relative_paths(void)
{
	strcpy(memory, "name");
	link_size = 9;
	CHECK(notify(OPENAT, (uint32_t)AT_FDCWD, base, O_RDONLY) && note.state == GOES_ON);
	CHECK(!strcmp(asked_for, "/proc/77/cwd"));
	CHECK(note.path_size == 4 && note.start_size == 9 && !memcmp(note.text, "name/dddddddd", 13));
	CHECK(notify(STAT, base, 0, 0) && note.state == GOES_ON && !strcmp(asked_for, "/proc/77/cwd"));
	CHECK(notify(OPENAT, 12, base, O_RDONLY) && note.state == GOES_ON && !strcmp(asked_for, "/proc/77/fd/12"));
	link_size = TEXT_MAX - 1;
	CHECK(notify(OPENAT, 12, base, O_RDONLY) && note.start_size == TEXT_MAX - 1);
	for (link_size = -1; link_size <= TEXT_MAX; link_size += link_size < 0 ? 1 : TEXT_MAX)
		CHECK(notify(OPENAT, 12, base, O_RDONLY) && waits()); /* none, empty, too long */
}

static void test_strings(void)
{
	memset(memory, '/', sizeof(memory));
	CHECK(notify(STAT, base, 0, 0) && waits()); /* no end */
	memory[TEXT_MAX] = 0;
	CHECK(notify(STAT, base, 0, 0) && waits());
	memory[TEXT_MAX - 1] = 0;
	CHECK(notify(STAT, base, 0, 0) && note.state == GOES_ON && note.path_size == TEXT_MAX - 1);
	memory[PAGE + 2] = 0;
	CHECK(notify(STAT, base + PAGE - 3, 0, 0) && note.path_size == 5);
	CHECK(notify(STAT, base + 2 * PAGE - 3, 0, 0) && waits());
	memory[2 * PAGE - 1] = 0;
	CHECK(notify(STAT, base + 2 * PAGE - 3, 0, 0) && note.path_size == 2);
	CHECK(notify(STAT, base + 2 * PAGE - 1, 0, 0) && waits()); /* empty */
	const uint64_t wild[] = { 0, 1, base + 2 * PAGE, (1ull << 47) - 1, 1ull << 47, UINT64_MAX };
	for (size_t index = 0; index < sizeof(wild) / sizeof(*wild); index++)
		CHECK(notify(STAT, wild[index], 0, 0) && waits());
}

static void test_bad_threads_and_tables(void)
{
	const int32_t tids[] = { INT32_MIN, -1, TIDS, INT32_MAX };

	for (size_t index = 0; index < sizeof(tids) / sizeof(*tids); index++) {
		notes_trust(tids[index], 1);
		CHECK(!is_trusted(tids[index]));
	}
	notes_trust(TIDS - 1, 1);
	CHECK(is_trusted(TIDS - 1) && !is_trusted(TIDS - 2) && !is_trusted(0));
	struct notes wrong = notes;
	wrong.count = LOOKS_MAX + 1;
	CHECK(notes_start(&wrong) == EINVAL);
	wrong = notes;
	wrong.looks[1].flags = 6;
	CHECK(notes_start(&wrong) == EINVAL);
}

static void test_the_end(void)
{
	receive_error = ENOENT; /* its thread was killed */
	CHECK(!notify(STAT, base, 0, 0) && !answered);
	receive_error = EBADF;
	revents = POLLIN;
	receive_all(&notes);
	revents = POLLHUP;
	CHECK(notes_start(&notes) == 0);
	CHECK(recv(ends[1], &note, sizeof(note), 0) == 0);
}

int main(void)
{
	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) == 0);
	notes.out = ends[0];
	test_what_goes_on();
	test_relative_paths();
	test_strings();
	test_bad_threads_and_tables();
	test_the_end();
	puts("notes: ok");
	return 0;
}
