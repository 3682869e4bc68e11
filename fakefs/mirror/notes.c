/*
 * Receives the notifications of seccomp(2) in a thread of its own, and passes them on through a socket of packets.
 *
 * A call that only looks at a file is let go on right here, as soon as what would be gone later is read: the path, and
 * what a relative one starts from. It is hot: a program opens files by the dozen when it starts, and each waits for
 * this. All other calls wait until Python, which takes the packets in their order, lets them go on; so nothing
 * that a mirrored process changes can come before what was looked at earlier is noted.
 *
 * What is read of a process was put there by that process: all of it has bounds. Python's part is notes.py; numbers
 * and rules are those of <linux/seccomp.h> and seccomp_unotify(2).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PAGE = 4096, TEXT_MAX = 1024, LOOKS_MAX = 32, TIDS = 1 << 22 }; /* the kernel's PID_MAX_LIMIT */

/* Words of the memory that is shared with other processes: `Progress` of notes.py. */
enum { RECEIVED = 1, NOTED = 2 };

/* A call that may only look at a file; numbers of arguments, -1: it has none such. Alike in notes.py. */
struct look {
	int32_t number;
	int32_t path; /* -1: there is nothing to note */
	int32_t directory;
	int32_t flags;
	uint64_t changing; /* flags with which it does more */
};

struct notes {
	int32_t listener, out;
	uint64_t *progress;
	int64_t count;
	struct look looks[LOOKS_MAX];
};

enum state { WAITS, GOES_ON, GONE };

/* A packet. Read by notes.py with struct format "=QiiIHH6Q": keep the two alike. */
struct note {
	uint64_t id;
	int32_t tid, number;
	uint32_t state;
	uint16_t path_size, start_size; /* of the texts behind it, in bytes; 0: not read */
	uint64_t arguments[6];
	char text[2 * TEXT_MAX];
};

/* Threads of which everything is known that has to be known before one of their calls goes on. */
static uint8_t trusted[TIDS / 8];
static int held;

void notes_trust(int32_t tid, int trust)
{
	if (tid < 0 || tid >= TIDS)
		return;
	if (trust)
		__atomic_fetch_or(&trusted[tid / 8], 1 << tid % 8, __ATOMIC_RELAXED);
	else
		__atomic_fetch_and(&trusted[tid / 8], ~(1 << tid % 8), __ATOMIC_RELAXED);
}

/* Let no call go on here any more, or do so again. */
void notes_hold(int hold)
{
	__atomic_store_n(&held, hold, __ATOMIC_RELAXED);
}

static int is_trusted(int32_t tid)
{
	return tid > 0 && tid < TIDS && __atomic_load_n(&trusted[tid / 8], __ATOMIC_RELAXED) >> tid % 8 & 1;
}

/* Copy a string of a process's; return its size, 0 if there is none or a longer one. The page behind may be missing. */
static size_t read_string(int32_t tid, uint64_t address, char *text)
{
	size_t first = PAGE - address % PAGE;

	if (first > TEXT_MAX)
		first = TEXT_MAX;
	if (!address || address >= 1ull << 47)
		return 0;
	struct iovec local = { text, TEXT_MAX };
	struct iovec remote[2] = { { (void *)(uintptr_t)address, first },
				   { (void *)(uintptr_t)(address + first), TEXT_MAX - first } };
	ssize_t got = process_vm_readv(tid, &local, 1, remote, first < TEXT_MAX ? 2 : 1, 0);
	const char *end = got > 0 ? memchr(text, 0, got) : NULL;

	return end ? end - text : 0;
}

/* Read where a relative path starts; return the size, 0 if that cannot be said. */
static size_t read_start(int32_t tid, int directory, char *text)
{
	char link[64];

	if (directory == AT_FDCWD)
		snprintf(link, sizeof(link), "/proc/%d/cwd", tid);
	else
		snprintf(link, sizeof(link), "/proc/%d/fd/%d", tid, directory);
	ssize_t size = readlink(link, text, TEXT_MAX);

	return size > 0 && size < TEXT_MAX ? size : 0;
}

/* Return what kind of look a call is, NULL if it has to wait. */
static const struct look *look_of(const struct notes *notes, const struct note *note)
{
	if (!is_trusted(note->tid) || __atomic_load_n(&held, __ATOMIC_RELAXED))
		return NULL;
	for (const struct look *look = notes->looks; look < notes->looks + notes->count; look++)
		if (look->number == note->number) {
			int changes = look->flags >= 0 && note->arguments[look->flags] & look->changing;
			return changes ? NULL : look;
		}
	return NULL;
}

/* Read what is needed of a look; 0 if it has to wait. */
static int read_look(const struct look *look, struct note *note)
{
	size_t path = read_string(note->tid, note->arguments[look->path], note->text), start = 0;

	if (path && note->text[0] != '/') {
		int directory = look->directory < 0 ? AT_FDCWD : (int)note->arguments[look->directory];

		start = read_start(note->tid, directory, note->text + path);
		if (!start)
			return 0;
	}
	note->path_size = path;
	note->start_size = start;
	return path > 0;
}

static int go_on(const struct notes *notes, uint64_t id)
{
	struct seccomp_notif_resp response = { .id = id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE };

	return ioctl(notes->listener, SECCOMP_IOCTL_NOTIF_SEND, &response) == 0;
}

static void pass_on(const struct notes *notes, const struct note *note)
{
	size_t size = offsetof(struct note, text) + note->path_size + note->start_size;

	while (send(notes->out, note, size, MSG_NOSIGNAL) < 0 && errno == EINTR)
		;
}

/* Handle one notification. `progress` tells of it before it goes on. */
static void handle(const struct notes *notes, const struct seccomp_notif *notification)
{
	struct note note = { .id = notification->id, .tid = notification->pid, .number = notification->data.nr };

	memcpy(note.arguments, notification->data.args, sizeof(note.arguments));
	const struct look *look = look_of(notes, &note);

	__atomic_store_n(&notes->progress[RECEIVED], note.id, __ATOMIC_RELEASE);
	if (look && look->path < 0) {
		go_on(notes, note.id);
	} else {
		int goes_on = look && read_look(look, &note);

		__atomic_fetch_add(&notes->progress[NOTED], 1, __ATOMIC_SEQ_CST);
		if (goes_on)
			note.state = go_on(notes, note.id) ? GOES_ON : GONE;
		pass_on(notes, &note);
	}
	__atomic_store_n(&notes->progress[RECEIVED], 0, __ATOMIC_RELEASE);
}

/* Receive until the listener ends: with its last process, or for another reason. */
static void receive_all(const struct notes *notes)
{
	struct pollfd ready = { .fd = notes->listener, .events = POLLIN };

	for (;;) {
		struct seccomp_notif notification;

		if (poll(&ready, 1, -1) < 0) {
			if (errno == EINTR)
				continue;
			return;
		}
		memset(&notification, 0, sizeof(notification)); /* the kernel insists */
		if (ready.revents & POLLIN && ioctl(notes->listener, SECCOMP_IOCTL_NOTIF_RECV, &notification) == 0)
			handle(notes, &notification);
		else if (ready.revents & POLLIN ? errno != EINTR && errno != ENOENT : 1) /* ENOENT: it has gone */
			return;
	}
}

static void *thread(void *argument)
{
	const struct notes *notes = argument;

	receive_all(notes);
	shutdown(notes->out, SHUT_WR);
	return NULL;
}

/* Start the thread; `notes` has to stay. Return 0, or an error number. */
int notes_start(struct notes *notes)
{
	sigset_t all, before;
	pthread_t id;

	if (notes->count < 0 || notes->count > LOOKS_MAX)
		return EINVAL;
	for (int64_t index = 0; index < notes->count; index++) {
		const struct look *look = &notes->looks[index];

		if (look->path > 5 || look->directory > 5 || look->flags > 5)
			return EINVAL;
	}
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before); /* they are for the thread that is Python's */
	int error = pthread_create(&id, NULL, thread, notes);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!error)
		pthread_detach(id);
	return error;
}
