/*
 * What pyfuse3 keeps to itself about a request, for fakefs/fuse/request.py.
 *
 * Loaded RTLD_GLOBAL before pyfuse3, this library's fuse_session_new() and fuse_session_receive_buf() are found
 * ahead of libfuse's. The first puts a wrapper around every handler that a caller waits for: it notes whose request
 * it is in `shim_request`, then calls pyfuse3's. pyfuse3 starts its coroutine right there and libfuse runs in one
 * thread, so the note holds until the handler awaits for the first time.
 *
 * Not here: policy. Python reads the note, and registers interrupt callbacks with libfuse's own
 * fuse_req_interrupt_func(). Follows <fuse_lowlevel.h> of libfuse 3.10 and later.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 34

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <string.h>

/* Background requests are releases here; the kernel's 12 would make a thousand closing readers queue. */
enum { MAX_BACKGROUND = 1024, CONGESTION_THRESHOLD = 768 };
/* A trace buffer is a stream: nothing is read ahead of the reader, and a write arrives in one piece. */
enum { MAX_WRITE = 1 << 20, MAX_READAHEAD = 0 };

/* Read by request.py with struct format "=QiIIiI": keep the two alike. */
struct request_note {
	uint64_t req;         /* fuse_req_t */
	int32_t tid;          /* the caller's thread, in the pid namespace of the mount; 0 if it has none there */
	uint32_t uid, gid;
	int32_t flags;        /* of the open file description at this moment: fcntl(F_SETFL) shows */
	uint32_t poll_events; /* what poll(2) asks for */
};

struct request_note shim_request;
int shim_sessions; /* 0: the wrappers are not in use, the dynamic linker found libfuse's functions first */

/* What programs have put into pages of a file that they have mapped: asked for, and told to pages.py. */
void (*shim_retrieved)(void *cookie, const void *data, size_t size);
enum { RETRIEVE_MAX = 4096 };

static struct fuse_lowlevel_ops theirs;
static struct fuse_session *session;

static void note(fuse_req_t req, const struct fuse_file_info *file)
{
	const struct fuse_ctx *caller = fuse_req_ctx(req);

	shim_request.req = (uintptr_t)req;
	shim_request.tid = caller->pid;
	shim_request.uid = caller->uid;
	shim_request.gid = caller->gid;
	shim_request.flags = file ? file->flags : 0;
	shim_request.poll_events = file ? file->poll_events : 0;
}

static void on_init(void *userdata, struct fuse_conn_info *conn)
{
	/* See fuse_session_receive_buf() below. Before their init(), which tells that the mount answers. */
	int fd = fuse_session_fd(session);
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);

	theirs.init(userdata, conn);
	conn->max_background = MAX_BACKGROUND;
	conn->congestion_threshold = CONGESTION_THRESHOLD;
	conn->max_write = MAX_WRITE;
	conn->max_readahead = MAX_READAHEAD;
	/* A splice and a read from a pipe cost more than one read of a small request. */
	conn->want &= ~(unsigned)FUSE_CAP_SPLICE_READ;
	/* A splice that waits for data waits in its own request, which a signal can interrupt. */
	conn->want &= ~(unsigned)FUSE_CAP_ASYNC_READ;
}

/* Returns 0, or a negative error number. `size` bytes that do not cross a page. */
int shim_retrieve(uint64_t ino, uint64_t offset, size_t size, void *cookie)
{
	if (size > RETRIEVE_MAX)
		return -EINVAL;
	return fuse_lowlevel_notify_retrieve(session, ino, size, (off_t)offset, cookie);
}

static void on_retrieve_reply(fuse_req_t req, void *cookie, fuse_ino_t ino, off_t offset, struct fuse_bufvec *bufv)
{
	char data[RETRIEVE_MAX];
	struct fuse_bufvec to = FUSE_BUFVEC_INIT(sizeof(data));

	(void)ino, (void)offset;
	to.buf[0].mem = data;
	ssize_t got = fuse_buf_copy(&to, bufv, 0);
	fuse_reply_none(req);
	if (shim_retrieved)
		shim_retrieved(cookie, data, got < 0 ? 0 : (size_t)got);
}

#define UNPACK(...) __VA_ARGS__
#define NOTED(op, file, parameters, arguments)                        \
	static void on_##op(fuse_req_t req, UNPACK parameters)        \
	{                                                             \
		note(req, file);                                      \
		theirs.op(req, UNPACK arguments);                     \
	}

#define INO fuse_ino_t ino
#define NAME const char *name
#define FI struct fuse_file_info *fi

NOTED(lookup, NULL, (INO, NAME), (ino, name))
NOTED(getattr, fi, (INO, FI), (ino, fi))
NOTED(setattr, fi, (INO, struct stat *attr, int to_set, FI), (ino, attr, to_set, fi))
NOTED(readlink, NULL, (INO), (ino))
NOTED(mknod, NULL, (INO, NAME, mode_t mode, dev_t rdev), (ino, name, mode, rdev))
NOTED(mkdir, NULL, (INO, NAME, mode_t mode), (ino, name, mode))
NOTED(unlink, NULL, (INO, NAME), (ino, name))
NOTED(rmdir, NULL, (INO, NAME), (ino, name))
NOTED(symlink, NULL, (const char *target, INO, NAME), (target, ino, name))
NOTED(rename, NULL, (INO, NAME, fuse_ino_t dir, const char *to, unsigned flags), (ino, name, dir, to, flags))
NOTED(link, NULL, (INO, fuse_ino_t dir, NAME), (ino, dir, name))
NOTED(open, fi, (INO, FI), (ino, fi))
NOTED(create, fi, (INO, NAME, mode_t mode, FI), (ino, name, mode, fi))
NOTED(read, fi, (INO, size_t size, off_t off, FI), (ino, size, off, fi))
NOTED(write, fi, (INO, const char *buf, size_t size, off_t off, FI), (ino, buf, size, off, fi))
NOTED(write_buf, fi, (INO, struct fuse_bufvec *buf, off_t off, FI), (ino, buf, off, fi))
NOTED(fsync, fi, (INO, int datasync, FI), (ino, datasync, fi))
NOTED(release, fi, (INO, FI), (ino, fi))
NOTED(poll, fi, (INO, FI, struct fuse_pollhandle *ph), (ino, fi, ph))
NOTED(opendir, fi, (INO, FI), (ino, fi))
NOTED(readdirplus, fi, (INO, size_t size, off_t off, FI), (ino, size, off, fi))

static struct fuse_lowlevel_ops wrap(const struct fuse_lowlevel_ops *op, size_t op_size)
{
	memset(&theirs, 0, sizeof(theirs));
	memcpy(&theirs, op, op_size < sizeof(theirs) ? op_size : sizeof(theirs));

	struct fuse_lowlevel_ops ours = theirs;
#define USE(op) ours.op = theirs.op ? on_##op : NULL
	USE(init), USE(lookup), USE(getattr), USE(setattr), USE(readlink), USE(mknod), USE(mkdir), USE(unlink);
	USE(rmdir), USE(symlink), USE(rename), USE(link), USE(open), USE(create), USE(read), USE(write);
	USE(write_buf), USE(fsync), USE(release), USE(poll), USE(opendir), USE(readdirplus);
	ours.retrieve_reply = on_retrieve_reply;
	shim_sessions++;
	return ours;
}

#undef fuse_session_new
struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size,
				      void *userdata)
{
	struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
	struct fuse_lowlevel_ops ours = wrap(op, op_size);

	*(void **)&next = dlvsym(RTLD_NEXT, "fuse_session_new", "FUSE_3.0");
	return session = next ? next(args, &ours, sizeof(ours), userdata) : NULL;
}

/* The name that programs compiled against libfuse 3.17 and later call. */
struct libfuse_version;
struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
						size_t op_size, struct libfuse_version *version, void *userdata)
{
	struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
				     struct libfuse_version *, void *);
	struct fuse_lowlevel_ops ours = wrap(op, op_size);

	*(void **)&next = dlsym(RTLD_NEXT, "fuse_session_new_versioned");
	return session = next ? next(args, &ours, sizeof(ours), version, userdata) : NULL;
}

/*
 * A request can be withdrawn (its caller was killed) after epoll announced it: a blocking read would then stop the
 * only thread there is, and the guest with it. The descriptor is non-blocking, and pyfuse3, which takes EAGAIN for
 * the end of the mount, is told EINTR: look again.
 */
int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
	static int (*next)(struct fuse_session *, struct fuse_buf *);

	if (!next)
		*(void **)&next = dlsym(RTLD_NEXT, "fuse_session_receive_buf");
	int got = next(se, buf);
	return got == -EAGAIN ? -EINTR : got;
}
