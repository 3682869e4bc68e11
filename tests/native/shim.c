/*
 * fakefs/fuse/shim.c between a libfuse and a pyfuse3 that are functions of this file. Built with AddressSanitizer and
 * UBSan by tests/unit/test_native.py.
 *
 * Not here: that the dynamic linker finds the shim first; the tests with a mount show that.
 */
#define dlsym fake_dlsym
#define dlvsym fake_dlvsym
static void *fake_dlsym(void *handle, const char *name);
static void *fake_dlvsym(void *handle, const char *name, const char *version);

#include "../../fakefs/fuse/shim.c"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include "check.h"

static struct fuse_ctx caller = { .uid = 1001, .gid = 1002, .pid = 1003 };
static struct fuse_lowlevel_ops given; /* to the library, by the shim */
static int calls, received;
static fuse_req_t request = (fuse_req_t)0x1234567890;

const struct fuse_ctx *fuse_req_ctx(fuse_req_t req)
{
	CHECK(req == request);
	return &caller;
}

int fuse_session_fd(struct fuse_session *se)
{
	(void)se;
	return open("/dev/null", O_RDWR);
}

static struct fuse_session *next_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t size, void *data)
{
	(void)args, (void)data;
	CHECK(size == sizeof(given));
	given = *op;
	return (struct fuse_session *)&given;
}

static int next_receive(struct fuse_session *se, struct fuse_buf *buf)
{
	(void)se, (void)buf;
	return received;
}

static void *fake_dlsym(void *handle, const char *name)
{
	CHECK(handle == RTLD_NEXT && !strcmp(name, "fuse_session_receive_buf"));
	return (void *)next_receive;
}

static void *fake_dlvsym(void *handle, const char *name, const char *version)
{
	CHECK(handle == RTLD_NEXT && !strcmp(name, "fuse_session_new") && !strcmp(version, "FUSE_3.0"));
	return (void *)next_new;
}

/* ---- what programs have put into pages */

static size_t asked, told;
static char found[RETRIEVE_MAX];

int fuse_lowlevel_notify_retrieve(struct fuse_session *se, fuse_ino_t ino, size_t size, off_t offset, void *cookie)
{
	CHECK(se == (struct fuse_session *)&given && ino == 12 && offset == 1032 && cookie == &asked);
	asked = size;
	return 0;
}

ssize_t fuse_buf_copy(struct fuse_bufvec *to, struct fuse_bufvec *from, enum fuse_buf_copy_flags flags)
{
	size_t size = from->buf[0].size < to->buf[0].size ? from->buf[0].size : to->buf[0].size;

	CHECK(!flags);
	memcpy(to->buf[0].mem, from->buf[0].mem, size);
	return from->buf[0].mem ? (ssize_t)size : -EIO;
}

void fuse_reply_none(fuse_req_t req)
{
	CHECK(req == request);
	calls++;
}

static void retrieved(void *cookie, const void *data, size_t size)
{
	CHECK(cookie == &asked);
	memcpy(found, data, size);
	told = size;
}

static void check_retrieving(void)
{
	static char page[RETRIEVE_MAX + 8] = "tail";
	static const size_t sizes[][2] = { { 8, 8 }, { 0, 0 }, { RETRIEVE_MAX, RETRIEVE_MAX }, { sizeof(page), RETRIEVE_MAX } };
	struct fuse_bufvec buffer = FUSE_BUFVEC_INIT(0);

	CHECK(shim_retrieve(12, 1032, 8, &asked) == 0 && asked == 8);
	CHECK(shim_retrieve(12, 1032, RETRIEVE_MAX + 1, &asked) == -EINVAL && asked == 8);
	buffer.buf[0].mem = page;
	calls = 0;
	given.retrieve_reply(request, &asked, 12, 1032, &buffer); /* nobody wants to know */
	shim_retrieved = retrieved;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		buffer.buf[0].size = sizes[i][0];
		given.retrieve_reply(request, &asked, 12, 1032, &buffer);
		CHECK(told == sizes[i][1] && !memcmp(found, page, told));
	}
	CHECK(calls == 5);
}

/* ---- pyfuse3's handlers */

static void check_note(fuse_req_t req, const struct fuse_file_info *file)
{
	CHECK(req == request && shim_request.req == (uintptr_t)request);
	CHECK(shim_request.tid == 1003 && shim_request.uid == 1001 && shim_request.gid == 1002);
	CHECK(shim_request.flags == (file ? file->flags : 0));
	CHECK(shim_request.poll_events == (file ? file->poll_events : 0));
	calls++;
}

static void their_init(void *data, struct fuse_conn_info *conn)
{
	CHECK(data == &calls && conn);
	calls++;
}

static void their_lookup(fuse_req_t req, fuse_ino_t ino, const char *name)
{
	CHECK(ino == 7 && !strcmp(name, "name"));
	check_note(req, NULL);
}

static void their_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *file)
{
	CHECK(ino == 8 && size == 9 && off == 10);
	check_note(req, file);
}

static void their_poll(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file, struct fuse_pollhandle *handle)
{
	CHECK(ino == 11 && !handle);
	check_note(req, file);
}

static void session_with(size_t size)
{
	struct fuse_lowlevel_ops *ops = calloc(1, size); /* as large as it says, so that what is read behind it is seen */
	struct fuse_lowlevel_ops full = { .init = their_init, .lookup = their_lookup, .read = their_read, .poll = their_poll };

	memcpy(ops, &full, size < sizeof(full) ? size : sizeof(full));
	int before = shim_sessions;
	CHECK(fuse_session_new(NULL, ops, size, NULL) == (struct fuse_session *)&given);
	CHECK(shim_sessions == before + 1);
	free(ops);
}

int main(void)
{
	struct fuse_file_info file = { .flags = O_RDONLY | O_NONBLOCK, .poll_events = 0x41 };
	struct fuse_conn_info conn = { .want = FUSE_CAP_SPLICE_READ, .max_write = 1 };

	session_with(sizeof(struct fuse_lowlevel_ops));
	CHECK(given.lookup && given.read && given.poll && !given.write && !given.mkdir && !given.release);
	given.init(&calls, &conn);
	CHECK(conn.max_write == MAX_WRITE && conn.max_background == MAX_BACKGROUND && !(conn.want & FUSE_CAP_SPLICE_READ));
	given.lookup(request, 7, "name");
	given.read(request, 8, 9, 10, &file);
	file.flags = O_RDWR;
	given.read(request, 8, 9, 10, &file);
	given.poll(request, 11, &file, NULL);
	CHECK(calls == 5);

	check_retrieving();

	/* Of an older library, or of a newer one with more handlers than we know. */
	session_with(offsetof(struct fuse_lowlevel_ops, read));
	CHECK(given.lookup && !given.read && !given.poll);
	session_with(sizeof(struct fuse_lowlevel_ops) + 64);
	CHECK(given.poll);
	session_with(0);
	CHECK(!given.init && !given.lookup);

	static const int results[][2] = { { 100, 100 }, { 0, 0 }, { -EAGAIN, -EINTR }, { -EINTR, -EINTR }, { -ENODEV, -ENODEV } };
	for (size_t i = 0; i < sizeof(results) / sizeof(*results); i++) {
		struct fuse_buf buffer = { 0 };
		received = results[i][0];
		CHECK(fuse_session_receive_buf((struct fuse_session *)&given, &buffer) == results[i][1]);
	}
	puts("the shim: handlers, notes, pages, sizes of the table, results of receiving");
	return 0;
}
