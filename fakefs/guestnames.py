"""Names in the guest and what is known of them, as the FUSE layer asks: every request is the same system call there.

Looking at names and attributes is done by the guest's init; what changes them by the caller's shadow, so that
permissions, pid and comm are the caller's. Errors are the guest's errno.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from emulator.agent import DATA_SIZE, SLOT_MAX_CALLS, Call, slot_batches
from fakefs.errors import UserError
from fakefs.files import Caller, Stat
from fakefs.shadow import Shadow, Shadows
from fakefs.syscalls import AT_FDCWD, AT_REMOVEDIR, AT_SYMLINK_NOFOLLOW, Sys, check

PATH = 0
"""Offset in a slot's data area of what is small, such as a path; a second one and a buffer are behind it."""
BUFFER = 0x2400
BUFFER_SIZE = DATA_SIZE - 0x400 - BUFFER
"""In bytes: the end of a slot is shadow.py's."""

_PATH_2 = 0x1100
_MS_REMOUNT = 32
_STATX_BASIC = 0x7FF
_STATX = struct.Struct("<IIQIIIHxxQQQQqIxxxxqIxxxxqIxxxxqIxxxx")
_STATX_SIZE = 256
_STATX_BATCH = min(SLOT_MAX_CALLS, BUFFER_SIZE // _STATX_SIZE)
_NAMES_ROOM = BUFFER - PATH
_DIRENT = struct.Struct("<QqHB")


class GuestNames:
    """What `fakefs.files.Files` asks about paths.

    Attributes of those for which `is_static` says that they never go away are kept once seen.
    """

    def __init__(self, shadows: Shadows, is_static: Callable[[bytes], bool]) -> None:
        self._shadows = shadows
        self._pump = shadows.pump
        self._agent = shadows.pump.agent
        self._is_static = is_static
        self._kept: dict[bytes, Stat] = {}
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
        check_path(path)
        init = self._shadows.init
        async with init.lock:
            self._agent.put(init.task, PATH, path + b"\0")
            at = init.task.virtual
            call = (Sys.STATX, AT_FDCWD, at(PATH), AT_SYMLINK_NOFOLLOW, _STATX_BASIC, at(BUFFER))
            check((await self._pump.call(init.task, [call]))[0])
            stat = _parse_statx(self._agent.get(init.task, BUFFER, _STATX.size))
        return self._seen(path, stat)

    async def entries(self, caller: Caller, path: bytes) -> list[tuple[bytes, Stat]]:
        """The names in a directory, "." and ".." left out, with their attributes."""
        check_path(path)
        init = self._shadows.init
        async with init.lock:
            names = await self._names(init, path)
            prefix = path.rstrip(b"/") + b"/"
            found = {name: kept for name in names if (kept := self._kept.get(prefix + name)) is not None}
            missing = [name for name in names if name not in found]
            # A part's paths and what is said of them are in the slot at the same time.
            for batch in slot_batches(missing, lambda name: len(prefix) + len(name) + 1, _NAMES_ROOM, _STATX_BATCH):
                for name, stat in await self._stat_batch(init, prefix, batch):
                    found[name] = self._seen(prefix + name, stat)
        return [(name, found[name]) for name in names if name in found]

    async def _names(self, init: Shadow, path: bytes) -> list[bytes]:
        at = init.task.virtual
        self._agent.put(init.task, PATH, path + b"\0")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = check((await self._pump.call(init.task, [(Sys.OPENAT, AT_FDCWD, at(PATH), flags, 0)]))[0])
        names: list[bytes] = []
        try:
            while True:
                call = (Sys.GETDENTS64, fd, at(BUFFER), BUFFER_SIZE)
                size = check((await self._pump.call(init.task, [call]))[0])
                if size == 0:
                    return names
                names += parse_dirents(self._agent.get(init.task, BUFFER, min(size, BUFFER_SIZE)))
        finally:
            await self._pump.call(init.task, [(Sys.CLOSE, fd)])

    async def _stat_batch(self, init: Shadow, prefix: bytes, names: Sequence[bytes]) -> list[tuple[bytes, Stat]]:
        at, blob, calls = init.task.virtual, bytearray(), list[Call]()
        for index, name in enumerate(names):
            result_at = at(BUFFER + index * _STATX_SIZE)
            name_at = at(PATH + len(blob))
            calls.append((Sys.STATX, AT_FDCWD, name_at, AT_SYMLINK_NOFOLLOW, _STATX_BASIC, result_at))
            blob += prefix + name + b"\0"
        self._agent.put(init.task, PATH, bytes(blob))
        results = await self._pump.call(init.task, calls)
        data = self._agent.get(init.task, BUFFER, len(names) * _STATX_SIZE)
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
            self._agent.put(init.task, PATH, directory + b"\0")
            self._agent.put(init.task, _PATH_2, options.encode() + b"\0")
            at = init.task.virtual
            call = (Sys.MOUNT, at(PATH), at(PATH), at(PATH), _MS_REMOUNT, at(_PATH_2))
            [result] = await self._pump.call(init.task, [call])
        if result < 0:
            raise UserError(f"mount options {options}: the guest says {os.strerror(-result)}")
        self.forget_attributes()

    async def readlink(self, path: bytes) -> bytes:
        """readlink(2)."""
        check_path(path)
        init = self._shadows.init
        async with init.lock:
            self._agent.put(init.task, PATH, path + b"\0")
            at = init.task.virtual
            call = (Sys.READLINKAT, AT_FDCWD, at(PATH), at(BUFFER), 4096)
            size = check((await self._pump.call(init.task, [call]))[0])
            return self._agent.get(init.task, BUFFER, min(size, 4096))

    # ---- changes

    async def _by_path(
        self, caller: Caller, path: bytes, second: bytes | None, make: Callable[[int, int], Call]
    ) -> None:
        """Make one call with the guest addresses of one or two paths."""
        check_path(path)
        shadow = await self._shadows.of(caller)
        async with shadow.lock:
            self._agent.put(shadow.task, PATH, path + b"\0")
            if second is not None:
                check_path(second)
                self._agent.put(shadow.task, _PATH_2, second + b"\0")
            at = shadow.task.virtual
            result = (await self._pump.call(shadow.task, [make(at(PATH), at(_PATH_2))]))[0]
        self._kept.pop(path, None)
        check(result)

    async def mkdir(self, caller: Caller, path: bytes, mode: int) -> None:
        """mkdir(2)."""
        await self._by_path(caller, path, None, lambda at, _: (Sys.MKDIRAT, AT_FDCWD, at, mode))

    async def rmdir(self, caller: Caller, path: bytes) -> None:
        """rmdir(2)."""
        await self._by_path(caller, path, None, lambda at, _: (Sys.UNLINKAT, AT_FDCWD, at, AT_REMOVEDIR))

    async def unlink(self, caller: Caller, path: bytes) -> None:
        """unlink(2)."""
        await self._by_path(caller, path, None, lambda at, _: (Sys.UNLINKAT, AT_FDCWD, at, 0))

    async def rename(self, caller: Caller, old: bytes, new: bytes, flags: int) -> None:
        """renameat2(2)."""
        await self._by_path(caller, old, new, lambda at, to: (Sys.RENAMEAT2, AT_FDCWD, at, AT_FDCWD, to, flags))

    async def link(self, caller: Caller, old: bytes, new: bytes) -> None:
        """link(2)."""
        await self._by_path(caller, old, new, lambda at, to: (Sys.LINKAT, AT_FDCWD, at, AT_FDCWD, to, 0))

    async def symlink(self, caller: Caller, target: bytes, path: bytes) -> None:
        """symlink(2)."""
        await self._by_path(caller, target, path, lambda at, to: (Sys.SYMLINKAT, at, AT_FDCWD, to))

    async def mknod(self, caller: Caller, path: bytes, mode: int, rdev: int) -> None:
        """mknod(2)."""
        await self._by_path(caller, path, None, lambda at, _: (Sys.MKNODAT, AT_FDCWD, at, mode, rdev))

    async def chmod(self, caller: Caller, path: bytes, mode: int) -> None:
        """chmod(2)."""
        await self._by_path(caller, path, None, lambda at, _: (Sys.FCHMODAT, AT_FDCWD, at, mode))

    async def chown(self, caller: Caller, path: bytes, uid: int, gid: int) -> None:
        """lchown(2); -1 leaves an id as it is."""
        await self._by_path(
            caller, path, None, lambda at, _: (Sys.FCHOWNAT, AT_FDCWD, at, uid, gid, AT_SYMLINK_NOFOLLOW)
        )


def check_path(path: bytes) -> None:
    if len(path) >= 4096:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if b"\0" in path:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


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
