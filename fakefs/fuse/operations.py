"""FUSE requests as calls of `Files`: each handler is the same system call on the guest's path.

Not here: what a file contains or allows (`Files` knows), inode numbers (`inodes`), mounting (`session`).

Errors are turned into answers by `answers`. Handlers run in the one thread that also runs the guest:
they compute little and wait only for `Files`.

Follows <fuse_lowlevel.h>, and fs/tracefs for what a tracefs has none of (xattr, fsync).
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from fakefs.files import Files, Mapped, OpenFile, Stat
from fakefs.fuse.answers import answer_errno, answering, complain
from fakefs.fuse.inodes import NAME_MAX, PATH_MAX, Inodes, error
from fakefs.fuse.pages import HostPages
from fakefs.fuse.request import caller, current
from fakefs.pump import Turn

# isort: split
# After fakefs.fuse.request, which must load the shim first.
import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo

ENTRY_TIMEOUT = 0
"""s. Names come and go in the guest at any moment: the kernel asks for each."""

LASTING_TIMEOUT = 3600
"""s, for names that stay and attributes that change through this mount alone."""

ATTR_TIMEOUT = 1e-6
"""s; the kernel rounds up to a tick. So the permission check, stat and open after one lookup need no second request."""

MAX_BLOCKED_READS = 400

SPLICED = (b"/trace_pipe_raw", b"/snapshot_raw")
"""Ends of paths of files whose readers use splice(2). That stops at st_size, which is 0 on a tracefs: not here."""

_TRIES = 2
"""How often Linux asks for a page of a splice: to read ahead, and when that failed."""

_ENDLESS = 1 << 62
_MODE_BITS = 0o7777
_PAGE_SIZE = 4096


class _Directory:
    """An open directory: one listing, read in pieces; read again after rewinddir(3)."""

    __slots__ = ("entries", "inode")

    def __init__(self, inode: int) -> None:
        self.inode = inode
        self.entries: list[tuple[bytes, Stat]] = []


class GuestOperations(pyfuse3.Operations):
    """Serves `files` from guest path `root` on; what is the guest's root's is shown as `owner`'s, a uid and a gid.

    With `turn` requests are made one after the other, and time on the host plays no part in which there are.
    When `max_blocked_reads` reads wait, further ones are made non-blocking: EAGAIN instead of data that is not there.
    """

    supports_dot_lookup = False

    def __init__(
        self,
        files: Files,
        root: bytes,
        owner: tuple[int, int] = (0, 0),
        *,
        turn: Turn | None = None,
        max_blocked_reads: int = MAX_BLOCKED_READS,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._files = files
        self._inodes = Inodes(root)
        self._owner = owner
        self.turn = turn
        # How long the host's kernel keeps attributes decides which requests come, and so must not depend on its clock.
        self._attr_timeout = ATTR_TIMEOUT if turn is None else 0
        self._ready = ready
        self._max_blocked_reads = max_blocked_reads
        self._reads = 0
        self._last_handle = 0
        self._open_files: dict[int, OpenFile] = {}
        self._after_page: dict[int, int] = {}  # of open files that are spliced: how many reads may not wait now
        self._open_directories: dict[int, _Directory] = {}
        self._serving = True
        files.watch_attributes(self._forget_attributes)

    def init(self) -> None:
        try:
            self._ready()
        except BaseException as exc:  # C is the caller
            complain("ready", exc)

    def stop(self) -> None:
        """After this no poll handle is touched: they die with the session."""
        self._serving = False

    # Attributes

    def _entry(self, number: int, path: bytes, stat: Stat) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = number
        entry.entry_timeout = LASTING_TIMEOUT if stat.lasting else ENTRY_TIMEOUT
        entry.attr_timeout = LASTING_TIMEOUT if stat.lasting else self._attr_timeout
        entry.st_mode = stat.mode
        entry.st_nlink = stat.nlink
        entry.st_uid = stat.uid or self._owner[0]
        entry.st_gid = stat.gid or self._owner[1]
        entry.st_size = _ENDLESS if path.endswith(SPLICED) else stat.size
        entry.st_blksize = stat.blksize
        entry.st_atime_ns = stat.atime_ns
        entry.st_mtime_ns = stat.mtime_ns
        entry.st_ctime_ns = stat.ctime_ns
        return entry

    def _forget_attributes(self) -> None:
        """Have the kernel ask again for what it was told will last."""
        if self._serving:
            for number in self._inodes.numbers():
                with suppress(OSError):  # it has forgotten this one
                    pyfuse3.invalidate_inode(number, attr_only=True)

    async def _look_up(self, path: bytes) -> EntryAttributes:
        try:
            stat = await self._files.stat(path)
        except OSError as exc:
            if exc.errno in (errno.ENOENT, errno.ENOTDIR):
                self._inodes.remove(path)
            raise
        return self._entry(self._inodes.hold(path, stat), path, stat)

    async def _attributes(self, number: int) -> EntryAttributes:
        path = b""
        try:
            path = self._inodes.path(number)
            stat = await self._files.stat(path)
        except FileNotFoundError:
            # The path was looked up a moment ago, or is a descriptor's: fstat(2) of a removed file works.
            stat = self._inodes.last_stat(number)
        return self._entry(number, path, stat)

    @answering
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        return await self._look_up(self._inodes.child(parent_inode, name))

    @answering
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        return await self._attributes(inode)

    @answering
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        who = caller(ctx.pid, ctx.uid, ctx.gid)
        path = self._inodes.path(inode)
        if fields.update_size:
            await self._files.truncate(who, path, None if fh is None else self._open_files[fh], attr.st_size)
        if fields.update_mode:
            await self._files.chmod(who, path, attr.st_mode & _MODE_BITS)
        if fields.update_uid or fields.update_gid:
            uid = attr.st_uid if fields.update_uid else -1
            gid = attr.st_gid if fields.update_gid else -1
            await self._files.chown(who, path, uid, gid)
        return await self._attributes(inode)  # times are the guest's: touch(1) succeeds and sets none

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, lookups in inode_list:
            self._inodes.forget(number, lookups)

    @answering
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        target = await self._files.readlink(self._inodes.path(inode))
        if not 0 < len(target) < PATH_MAX:
            raise error(errno.ENAMETOOLONG)
        return target

    # Names

    @answering
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        path = self._inodes.child(parent_inode, name)
        await self._files.mkdir(caller(ctx.pid, ctx.uid, ctx.gid), path, mode & _MODE_BITS)
        return await self._look_up(path)

    @answering
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        path = self._inodes.child(parent_inode, name)
        await self._files.mknod(caller(ctx.pid, ctx.uid, ctx.gid), path, mode, rdev)
        return await self._look_up(path)

    @answering
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        path = self._inodes.child(parent_inode, name)
        await self._files.symlink(caller(ctx.pid, ctx.uid, ctx.gid), target, path)
        return await self._look_up(path)

    @answering
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        path = self._inodes.child(new_parent_inode, new_name)
        await self._files.link(caller(ctx.pid, ctx.uid, ctx.gid), self._inodes.path(inode), path)
        return await self._look_up(path)

    @answering
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        path = self._inodes.child(parent_inode, name)
        await self._files.unlink(caller(ctx.pid, ctx.uid, ctx.gid), path)
        self._inodes.remove(path)

    @answering
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        path = self._inodes.child(parent_inode, name)
        await self._files.rmdir(caller(ctx.pid, ctx.uid, ctx.gid), path)
        self._inodes.remove(path)

    @answering
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        old = self._inodes.child(parent_inode_old, name_old)
        new = self._inodes.child(parent_inode_new, name_new)
        await self._files.rename(caller(ctx.pid, ctx.uid, ctx.gid), old, new, flags)
        if flags & pyfuse3.RENAME_EXCHANGE:
            self._inodes.remove(old)
            self._inodes.remove(new)
        else:
            self._inodes.rename(old, new)

    # Directories

    def _handle(self) -> int:
        self._last_handle += 1
        return self._last_handle

    @answering
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        self._inodes.path(inode)
        handle = self._handle()
        self._open_directories[handle] = _Directory(inode)
        return handle

    @answering
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Offsets are positions in the listing; "." and ".." come first and are not held."""
        who = current().caller
        directory = self._open_directories[fh]
        path = self._inodes.path(directory.inode)
        if start_id <= 0:
            here = await self._files.stat(path)
            listed = await self._files.entries(who, path)
            names = [(name, stat) for name, stat in listed if _is_name(name)]
            directory.entries = [(b".", here), (b"..", here), *names]
        prefix = path if path.endswith(b"/") else path + b"/"
        for offset in range(max(start_id, 0), len(directory.entries)):
            name, stat = directory.entries[offset]
            if offset < 2:
                number = directory.inode if offset == 0 else self._inodes.number(os.path.dirname(path))
                if not pyfuse3.readdir_reply(token, name, self._entry(number, path, stat), offset + 1):
                    return
                continue
            number = self._inodes.hold(prefix + name, stat)
            if not pyfuse3.readdir_reply(token, name, self._entry(number, prefix + name, stat), offset + 1):
                self._inodes.forget(number, 1)
                return

    async def releasedir(self, fh: int) -> None:
        self._open_directories.pop(fh, None)

    # Files

    @answering
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        path = self._inodes.path(inode)
        file = await self._files.open(caller(ctx.pid, ctx.uid, ctx.gid), path, flags)
        if isinstance(file, Mapped):
            file.pages = HostPages(inode)
        opened = self._opened(file)
        if path.endswith(SPLICED):
            self._after_page[opened.fh] = 0
        return opened

    @answering
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        path = self._inodes.child(parent_inode, name)
        who = caller(ctx.pid, ctx.uid, ctx.gid)
        file = await self._files.open(who, path, flags | os.O_CREAT, mode & _MODE_BITS)
        try:
            entry = await self._look_up(path)
        except BaseException:
            await self._files.close(file)
            raise
        return self._opened(file), entry

    def _opened(self, file: OpenFile) -> FileInfo:
        handle = self._handle()
        self._open_files[handle] = file
        # st_size is 0 on a tracefs: only direct I/O reads past it. It also means that a file cannot be mapped.
        kept = isinstance(file, Mapped)
        return FileInfo(fh=handle, direct_io=not kept, keep_cache=kept, nonseekable=not file.seekable)

    @answering
    async def read(self, fh: int, off: int, size: int) -> bytes:
        with current() as request:
            flags = request.flags
            # Page after page is a splice, perhaps: it has to end when there is no more, not to wait with what it has.
            after_page = self._after_page.get(fh, 0) if size == _PAGE_SIZE and not flags & os.O_NONBLOCK else 0
            if after_page:
                flags |= os.O_NONBLOCK
            if self._reads >= self._max_blocked_reads:
                if self._reads >= 2 * self._max_blocked_reads:
                    raise error(errno.EAGAIN)  # the guest ignores O_NONBLOCK on these
                flags |= os.O_NONBLOCK
            self._reads += 1
            try:
                data = await self._files.read(request.caller, self._open_files[fh], off, size, flags, request)
            except OSError as exc:
                if after_page and exc.errno == errno.EAGAIN:
                    self._after_page[fh] = after_page - 1
                    raise error(errno.EINTR) from None  # who has nothing yet tries again, and then waits
                raise
            finally:
                self._reads -= 1
            if fh in self._after_page:
                self._after_page[fh] = _TRIES if len(data) == _PAGE_SIZE else 0
            return data if len(data) <= size else data[:size]

    @answering
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        with current() as request:
            file = self._open_files[fh]
            try:
                written = await self._files.write(request.caller, file, off, buf, request.flags, request)
            except OSError as exc:
                if answer_errno(exc) == errno.EINTR:
                    raise error(errno.EAGAIN) from None  # shells and dd would repeat the write without end
                raise
            if not 0 <= written <= len(buf):
                raise error(errno.EIO)
            return written

    @answering
    async def release(self, fh: int) -> None:
        self._after_page.pop(fh, None)
        await self._files.close(self._open_files.pop(fh))

    @answering
    async def fsync(self, fh: int, datasync: bool) -> None:
        raise error(errno.EINVAL)  # files of a tracefs have no fsync

    @answering
    async def poll(
        self, inode: int, fh: int, poll_handle: pyfuse3.PollHandle | None, ctx: pyfuse3.RequestContext
    ) -> int:
        request = current()
        notify = None if poll_handle is None else functools.partial(self._notify, poll_handle)
        ready = await self._files.poll(request.caller, self._open_files[fh], request.poll_events, notify)
        return ready & 0xFFFF

    def _notify(self, poll_handle: pyfuse3.PollHandle) -> None:
        if self._serving:
            with suppress(OSError):  # the kernel may have let go of the file
                poll_handle.notify()

    # flush, access, getxattr, setxattr and removexattr stay pyfuse3's: ENOSYS, once. The kernel then answers them by
    # itself as for a tracefs: success, its own permission check, EOPNOTSUPP.

    @answering
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return []

    @answering
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _PAGE_SIZE
        data.f_namemax = NAME_MAX
        return data


def _is_name(name: bytes) -> bool:
    """Whether the kernel would take `name` from a listing; one bad name would make it refuse them all."""
    return 0 < len(name) <= NAME_MAX and b"/" not in name and b"\0" not in name and name not in (b".", b"..")
