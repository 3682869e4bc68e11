"""The guest's files as the FUSE layer asks for them: every request is the same system call in the guest.

What opens, reads, writes or changes something is done by the caller's shadow, so that permissions, pid and comm are
the caller's. Looking at names and attributes is done by the guest's init. Errors are the guest's errno.
"""

from __future__ import annotations

import errno
import os
import select
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import trio

from emulator.agent import DATA_SIZE, SLOT_MAX_CALLS, Call
from fakefs.errors import UserError
from fakefs.files import Caller, Interrupt, OpenFile, Stat
from fakefs.hostfiles.bring import HostFiles
from fakefs.hostfiles.definitions import takes_uprobes
from fakefs.shadow import Handle, Shadow, Shadows
from fakefs.static import TRACEFS
from fakefs.syscalls import Sys

# A slot's data area: paths and small things first, a buffer behind them, the end is shadow.py's.
_PATH = 0
_PATH_2 = 0x1100
_BUFFER = 0x2400
_BUFFER_SIZE = DATA_SIZE - 0x400 - _BUFFER
READ_MAX = _BUFFER_SIZE

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_REMOVEDIR = 0x200
_F_SETFL = 4
_MS_REMOUNT = 32
_STATX_BASIC = 0x7FF
_STATX = struct.Struct("<IIQIIIHxxQQQQqIxxxxqIxxxxqIxxxxqIxxxx")
_STATX_SIZE = 256
_STATX_BATCH = min(SLOT_MAX_CALLS, _BUFFER_SIZE // _STATX_SIZE)
_NAMES_ROOM = _BUFFER - _PATH
_PAGE = 4096
_RAW = (b"trace_pipe", b"trace_pipe_raw", b"snapshot_raw")
_DIRENT = struct.Struct("<QqHB")
# Flags fcntl(2) can change while a file is open.
_LIVE_FLAGS = os.O_NONBLOCK | os.O_APPEND


class GuestFile:
    """An open file of the guest. Shadows have or get a descriptor of it; `position` is where the guest's is."""

    __slots__ = (
        "end",
        "flags",
        "handle",
        "is_text",
        "live_flags",
        "long",
        "path",
        "poller",
        "position",
        "seekable",
        "urgent",
    )

    def __init__(self, handle: Handle, path: bytes, flags: int, seekable: bool) -> None:
        self.handle = handle
        self.path = path
        self.flags = flags
        self.live_flags = flags & _LIVE_FLAGS
        self.seekable = seekable
        self.is_text = seekable and path.startswith(TRACEFS) and not path.endswith(_RAW)
        self.long = False  # more than the pages of one request have been there so far
        self.end: int | None = None  # where the guest has said that the text ends
        self.position = 0
        self.poller: _Poller | None = None
        self.urgent = 0  # POLLPRI, when the poller was told of it: a histogram tells of each change once


class _Poller:
    """A task of the guest that sleeps in poll(2) for a file, so that the host's poll can be told."""

    __slots__ = ("events", "notify", "shadow")

    def __init__(self, events: int, notify: Callable[[], None]) -> None:
        self.events = events
        self.notify = notify
        self.shadow: Shadow | None = None


def _check(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


class GuestFiles:
    """Implements `fakefs.files.Files`.

    Attributes of paths for which `is_static` says that they never go away are kept once seen.
    """

    def __init__(
        self, shadows: Shadows, nursery: trio.Nursery, is_static: Callable[[bytes], bool] = lambda path: False
    ) -> None:
        self._shadows = shadows
        self._pump = shadows.pump
        self._agent = shadows.pump.agent
        self._nursery = nursery
        self._is_static = is_static
        self.host_files = HostFiles(shadows)
        self._kept: dict[bytes, Stat] = {}
        self._seekable: dict[bytes, bool] = {}
        self._attributes_changed: Callable[[], None] = lambda: None

    def watch_attributes(self, changed: Callable[[], None]) -> None:
        """Have `changed` called by forget_attributes()."""
        self._attributes_changed = changed

    def forget_attributes(self) -> None:
        """Forget what is kept of attributes: something other than this mount may have changed them."""
        self._kept.clear()
        self._attributes_changed()

    def _seen(self, path: bytes, stat: Stat) -> Stat:
        """Keep the attributes of what stays, and mark them as lasting."""
        if self._is_static(path):
            stat = self._kept[path] = replace(stat, lasting=True)
        return stat

    # ---- names and attributes

    async def stat(self, path: bytes) -> Stat:
        """lstat(2)."""
        kept = self._kept.get(path)
        if kept is not None:
            return kept
        _check_path(path)
        init = self._shadows.init
        async with init.lock:
            self._agent.put(init.task, _PATH, path + b"\0")
            at = init.task.virtual
            call = (Sys.STATX, _AT_FDCWD, at(_PATH), _AT_SYMLINK_NOFOLLOW, _STATX_BASIC, at(_BUFFER))
            _check((await self._pump.call(init.task, [call]))[0])
            stat = _parse_statx(self._agent.get(init.task, _BUFFER, _STATX.size))
        return self._seen(path, stat)

    async def entries(self, caller: Caller, path: bytes) -> list[tuple[bytes, Stat]]:
        """The names in a directory, "." and ".." left out, with their attributes."""
        _check_path(path)
        init = self._shadows.init
        async with init.lock:
            names = await self._names(init, path)
            prefix = path.rstrip(b"/") + b"/"
            found = {name: kept for name in names if (kept := self._kept.get(prefix + name)) is not None}
            missing = [name for name in names if name not in found]
            for batch in _batches(missing, len(prefix)):
                for name, stat in await self._stat_batch(init, prefix, batch):
                    found[name] = self._seen(prefix + name, stat)
        return [(name, found[name]) for name in names if name in found]

    async def _names(self, init: Shadow, path: bytes) -> list[bytes]:
        at = init.task.virtual
        self._agent.put(init.task, _PATH, path + b"\0")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = _check((await self._pump.call(init.task, [(Sys.OPENAT, _AT_FDCWD, at(_PATH), flags, 0)]))[0])
        names: list[bytes] = []
        try:
            while True:
                call = (Sys.GETDENTS64, fd, at(_BUFFER), _BUFFER_SIZE)
                size = _check((await self._pump.call(init.task, [call]))[0])
                if size == 0:
                    return names
                names += parse_dirents(self._agent.get(init.task, _BUFFER, min(size, _BUFFER_SIZE)))
        finally:
            await self._pump.call(init.task, [(Sys.CLOSE, fd)])

    async def _stat_batch(self, init: Shadow, prefix: bytes, names: Sequence[bytes]) -> list[tuple[bytes, Stat]]:
        at, blob, calls = init.task.virtual, bytearray(), list[Call]()
        for index, name in enumerate(names):
            result_at = at(_BUFFER + index * _STATX_SIZE)
            name_at = at(_PATH + len(blob))
            calls.append((Sys.STATX, _AT_FDCWD, name_at, _AT_SYMLINK_NOFOLLOW, _STATX_BASIC, result_at))
            blob += prefix + name + b"\0"
        self._agent.put(init.task, _PATH, bytes(blob))
        results = await self._pump.call(init.task, calls)
        data = self._agent.get(init.task, _BUFFER, len(names) * _STATX_SIZE)
        return [
            (name, _parse_statx(data[index * _STATX_SIZE :]))
            for index, (name, result) in enumerate(zip(names, results, strict=True))
            if result == 0
        ]

    async def remount(self, directory: bytes, options: str) -> None:
        """mount(2) with MS_REMOUNT: have the filesystem on `directory` take `options`, "gid=5,mode=750".

        Raises UserError when the guest refuses.
        """
        init = self._shadows.init
        async with init.lock:
            self._agent.put(init.task, _PATH, directory + b"\0")
            self._agent.put(init.task, _PATH_2, options.encode() + b"\0")
            at = init.task.virtual
            call = (Sys.MOUNT, at(_PATH), at(_PATH), at(_PATH), _MS_REMOUNT, at(_PATH_2))
            [result] = await self._pump.call(init.task, [call])
        if result < 0:
            raise UserError(f"mount options {options}: the guest says {os.strerror(-result)}")
        self.forget_attributes()

    async def readlink(self, path: bytes) -> bytes:
        """readlink(2)."""
        _check_path(path)
        init = self._shadows.init
        async with init.lock:
            self._agent.put(init.task, _PATH, path + b"\0")
            at = init.task.virtual
            call = (Sys.READLINKAT, _AT_FDCWD, at(_PATH), at(_BUFFER), 4096)
            size = _check((await self._pump.call(init.task, [call]))[0])
            return self._agent.get(init.task, _BUFFER, min(size, 4096))

    # ---- open files

    async def open(self, caller: Caller, path: bytes, flags: int, mode: int = 0) -> GuestFile:
        """open(2) by the caller's shadow."""
        _check_path(path)
        shadow = await self._shadows.of(caller)
        async with shadow.lock:
            self._agent.put(shadow.task, _PATH, path + b"\0")
            call = (Sys.OPENAT, _AT_FDCWD, shadow.task.virtual(_PATH), flags, mode)
            fd = _check((await self._pump.call(shadow.task, [call]))[0])
            seekable = self._seekable.get(path)
            if seekable is None:
                [result] = await self._pump.call(shadow.task, [(Sys.LSEEK, fd, 0, os.SEEK_CUR)])
                seekable = result != -errno.ESPIPE
                if self._is_static(path):
                    self._seekable[path] = seekable
            handle = Handle(caller.tid)
            shadow.descriptors[handle] = fd
        return GuestFile(handle, path, flags, seekable)

    async def read(self, caller: Caller, file: OpenFile, offset: int, size: int, flags: int, intr: Interrupt) -> bytes:
        """read(2) by the caller's shadow, at `offset`; a signal to the caller ends it with EINTR.

        A text is read on to its end, or as far as `size` goes, without the guest doing anything else in between. Each
        request wakes the shadow and lets it sleep, which are events; a reader of `trace` that made one read(2) a
        request would never get to the end of a trace that has them.
        """
        assert isinstance(file, GuestFile)
        if file.end == offset and offset:
            file.end = None
            return b""
        shadow = await self._shadows.of(caller)
        size = min(size, READ_MAX)
        async with shadow.lock:
            fd = await self._shadows.descriptor(shadow, file.handle)
            before = self._before(file, fd, offset, flags)
            pieces = self._read_sizes(file, size)
            at = shadow.task.virtual(_BUFFER)
            reads = [(Sys.READ, fd, at + index * pieces[0], piece) for index, piece in enumerate(pieces)]
            results = await self._shadows.read_interruptibly(shadow, [*before, *reads], intr, holds_clock=file.is_text)
            if before:
                _check(results[len(before) - 1])
            results = results[len(before) :]
            _check(results[0])
            data = b"".join(
                self._agent.get(shadow.task, _BUFFER + index * pieces[0], min(got, piece))
                for index, (got, piece) in enumerate(zip(results, pieces, strict=True))
                if got > 0
            )
            file.position = offset + len(data)
            file.end = file.position if len(results) > 1 and results[-1] == 0 else None
            file.long = results[-1] > 0
            return data

    def _read_sizes(self, file: GuestFile, size: int) -> list[int]:
        """Divide a read: one piece for what may block, two for a text of one page, more once it proves longer."""
        if size < 2 * _PAGE or not file.is_text:
            return [size]
        return [_PAGE] * (size // _PAGE if file.long else 2)

    async def write(self, caller: Caller, file: OpenFile, offset: int, data: bytes, flags: int, intr: Interrupt) -> int:
        """write(2) by the caller's shadow; what does not fit a slot goes in pieces that end at line ends."""
        assert isinstance(file, GuestFile)
        directory = await self.host_files.bring_named(caller, data) if takes_uprobes(file.path) else None
        shadow = await self._shadows.of(caller)
        written = 0
        async with shadow.lock:
            fd = await self._shadows.descriptor(shadow, file.handle)
            enter, leave = self.host_files.visit(shadow, directory)
            for piece in _pieces(data):
                # An offset means nothing to a tracefs; O_APPEND descriptors come with the host's idea of the size.
                at = file.position if flags & os.O_APPEND else offset + written
                before = self._before(file, fd, at, flags)
                self._agent.put(shadow.task, _BUFFER, piece)
                calls = [*before, *enter, (Sys.WRITE, fd, shadow.task.virtual(_BUFFER), len(piece)), *leave]
                result = (await self._pump.call(shadow.task, calls))[len(before) + len(enter)]
                if result < 0 and written:
                    break
                file.position = at + _check(result)
                written += result
                if result < len(piece):
                    break
        return written

    def _before(self, file: GuestFile, fd: int, offset: int, flags: int) -> list[Call]:
        """What must be done before a read or write: follow the descriptor's flags and its offset."""
        calls: list[Call] = []
        live = flags & _LIVE_FLAGS
        if live != file.live_flags:
            file.live_flags = live
            calls.append((Sys.FCNTL, fd, _F_SETFL, file.flags & ~_LIVE_FLAGS & ~os.O_TRUNC | live))
        if file.seekable and offset != file.position:
            calls.append((Sys.LSEEK, fd, offset, os.SEEK_SET))
        return calls

    async def close(self, file: OpenFile) -> None:
        """close(2)."""
        assert isinstance(file, GuestFile)
        poller, file.poller = file.poller, None
        if poller is not None and poller.shadow is not None:
            await self._shadows.end(poller.shadow)
        await self._shadows.close(file.handle)

    # ---- poll

    async def poll(self, caller: Caller, file: OpenFile, events: int, notify: Callable[[], None] | None) -> int:
        """poll(2): what is ready now; otherwise `notify` is called once when something becomes so."""
        assert isinstance(file, GuestFile)
        shadow = await self._shadows.of(caller)
        async with shadow.lock:
            ready = await self._poll(shadow, file, events, 0) | file.urgent & events
            file.urgent &= ~events
        if not ready and notify is not None:
            if file.poller is None:
                file.poller = _Poller(events, notify)
                self._nursery.start_soon(self._watch, file, file.poller)
            else:
                file.poller.notify = notify
                file.poller.events |= events
        return ready

    async def _poll(self, shadow: Shadow, file: GuestFile, events: int, timeout_ms: int) -> int:
        fd = await self._shadows.descriptor(shadow, file.handle)
        self._agent.put(shadow.task, _PATH, struct.pack("<ihh", fd, _signed16(events), 0))
        call = (Sys.POLL, shadow.task.virtual(_PATH), 1, timeout_ms)
        result = (await self._pump.call(shadow.task, [call], holds_clock=False))[0]
        if result == -errno.EINTR:
            return 0
        _check(result)
        return int(struct.unpack_from("<H", self._agent.get(shadow.task, _PATH + 6, 2))[0])

    async def _watch(self, file: GuestFile, poller: _Poller) -> None:
        """Sleep in the guest's poll for a file until it is ready, tell the host, and end."""
        try:
            task = await self._shadows.spawn(self._shadows.init)
            shadow = poller.shadow = Shadow(task, 0, b"poll", self._shadows.init.descriptors)
            async with shadow.lock:
                while file.poller is poller:
                    events = poller.events
                    if ready := await self._poll(shadow, file, events, -1):
                        file.urgent |= ready & select.POLLPRI
                        poller.notify()
                        break
            if file.poller is poller:
                file.poller = None
            await self._shadows.end(shadow)  # also when the file was closed while it was being spawned
        except OSError:
            poller.notify()  # the guest is dead or full: the host asks again and gets that answer
            if file.poller is poller:
                file.poller = None

    # ---- changes

    async def _by_path(
        self, caller: Caller, path: bytes, second: bytes | None, make: Callable[[int, int], Call]
    ) -> None:
        """Make one call with the guest addresses of one or two paths."""
        _check_path(path)
        shadow = await self._shadows.of(caller)
        async with shadow.lock:
            self._agent.put(shadow.task, _PATH, path + b"\0")
            if second is not None:
                _check_path(second)
                self._agent.put(shadow.task, _PATH_2, second + b"\0")
            at = shadow.task.virtual
            result = (await self._pump.call(shadow.task, [make(at(_PATH), at(_PATH_2))]))[0]
        self._kept.pop(path, None)
        _check(result)

    async def mkdir(self, caller: Caller, path: bytes, mode: int) -> None:
        """mkdir(2)."""
        await self._by_path(caller, path, None, lambda at, _: (Sys.MKDIRAT, _AT_FDCWD, at, mode))

    async def rmdir(self, caller: Caller, path: bytes) -> None:
        """rmdir(2)."""
        await self._by_path(caller, path, None, lambda at, _: (Sys.UNLINKAT, _AT_FDCWD, at, _AT_REMOVEDIR))

    async def unlink(self, caller: Caller, path: bytes) -> None:
        """unlink(2)."""
        await self._by_path(caller, path, None, lambda at, _: (Sys.UNLINKAT, _AT_FDCWD, at, 0))

    async def rename(self, caller: Caller, old: bytes, new: bytes, flags: int) -> None:
        """renameat2(2)."""
        await self._by_path(caller, old, new, lambda at, to: (Sys.RENAMEAT2, _AT_FDCWD, at, _AT_FDCWD, to, flags))

    async def link(self, caller: Caller, old: bytes, new: bytes) -> None:
        """link(2)."""
        await self._by_path(caller, old, new, lambda at, to: (Sys.LINKAT, _AT_FDCWD, at, _AT_FDCWD, to, 0))

    async def symlink(self, caller: Caller, target: bytes, path: bytes) -> None:
        """symlink(2)."""
        await self._by_path(caller, target, path, lambda at, to: (Sys.SYMLINKAT, at, _AT_FDCWD, to))

    async def mknod(self, caller: Caller, path: bytes, mode: int, rdev: int) -> None:
        """mknod(2)."""
        await self._by_path(caller, path, None, lambda at, _: (Sys.MKNODAT, _AT_FDCWD, at, mode, rdev))

    async def truncate(self, caller: Caller, path: bytes, file: OpenFile | None, size: int) -> None:
        """truncate(2), or ftruncate(2) of an open file."""
        if isinstance(file, GuestFile):
            shadow = await self._shadows.of(caller)
            async with shadow.lock:
                fd = await self._shadows.descriptor(shadow, file.handle)
                [result] = await self._pump.call(shadow.task, [(Sys.FTRUNCATE, fd, size)])
            self._kept.pop(path, None)
            _check(result)
        else:
            await self._by_path(caller, path, None, lambda at, _: (Sys.TRUNCATE, at, size))

    async def chmod(self, caller: Caller, path: bytes, mode: int) -> None:
        """chmod(2)."""
        await self._by_path(caller, path, None, lambda at, _: (Sys.FCHMODAT, _AT_FDCWD, at, mode))

    async def chown(self, caller: Caller, path: bytes, uid: int, gid: int) -> None:
        """lchown(2); -1 leaves an id as it is."""
        await self._by_path(
            caller, path, None, lambda at, _: (Sys.FCHOWNAT, _AT_FDCWD, at, uid, gid, _AT_SYMLINK_NOFOLLOW)
        )


def _check_path(path: bytes) -> None:
    if len(path) >= 4096:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if b"\0" in path:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def _signed16(events: int) -> int:
    events &= 0xFFFF
    return events - 0x10000 if events & 0x8000 else events


def _parse_statx(data: bytes) -> Stat:
    """Parse struct statx (statx(2))."""
    (_, blksize, _, nlink, uid, gid, mode, ino, size, _, _, *times) = _STATX.unpack_from(data)
    atime, _birth, ctime, mtime = (
        seconds * 1_000_000_000 + ns for seconds, ns in zip(times[::2], times[1::2], strict=True)
    )
    return Stat(mode, nlink, uid, gid, size, ino, blksize, atime, mtime, ctime)


def parse_dirents(data: bytes) -> Iterator[bytes]:
    """Yield the names of struct linux_dirent64 entries, "." and ".." left out. Stops at an entry that is malformed."""
    at = 0
    while at + _DIRENT.size < len(data):
        _, _, length, _ = _DIRENT.unpack_from(data, at)
        if length <= _DIRENT.size or at + length > len(data):
            return
        name = data[at + _DIRENT.size : at + length].split(b"\0", 1)[0]
        if name not in (b".", b"..", b"") and b"/" not in name:
            yield name
        at += length


def _batches(names: Sequence[bytes], prefix: int) -> Iterator[list[bytes]]:
    """Divide names so that each part's paths (with a prefix of that length) and results fit the slot."""
    batch: list[bytes] = []
    room = _NAMES_ROOM
    for name in names:
        need = prefix + len(name) + 1
        if batch and (len(batch) == _STATX_BATCH or need > room):
            yield batch
            batch, room = [], _NAMES_ROOM
        batch.append(name)
        room -= need
    if batch:
        yield batch


def _pieces(data: bytes) -> Iterator[bytes]:
    """Divide what is written into pieces that fit a slot, at line ends where there are any."""
    if not data:
        yield data
    while data:
        size = len(data)
        if size > _BUFFER_SIZE:
            size = data.rfind(b"\n", 0, _BUFFER_SIZE) + 1 or _BUFFER_SIZE
        yield data[:size]
        data = data[size:]
