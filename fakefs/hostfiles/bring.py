"""Bringing files of the host into the guest, at the same paths and with the same links.

It goes one way: the guest is given a copy, made by its init, and nothing of it is ever looked for on the host. A path
that the guest has a file of its own at is left alone. A copy is replaced, by rename(2), once the host's file is found
changed; uprobes that were defined on the old one keep it, as on a machine where a program is installed anew.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import trio

from emulator.agent import DATA_SIZE, Call, strings
from fakefs.files import Caller
from fakefs.hostfiles.definitions import named_files
from fakefs.hostfiles.look import Found, Identity, Step, directory_of, find
from fakefs.shadow import Shadow, Shadows
from fakefs.syscalls import AT_FDCWD, Sys, check

_PATH_MAX = 4096
_PATH, _PATH_2, _RESULT = 0, _PATH_MAX, 2 * _PATH_MAX
# In one write(2): whole pages, and the end of the slot is shadow.py's.
_PIECE = (DATA_SIZE - 0x400) & ~4095
_STATX_INO = 0x100
_STATX = struct.Struct("<32xQ96xII")  # inode, device; struct statx of <linux/stat.h>
_SYSINFO = struct.Struct("<40xQ56xI")  # freeram, mem_unit; struct sysinfo of <linux/sysinfo.h>
_REAL_ROOT = b"/proc/1/root"
_COMING = b".fakefs-coming"

_File = tuple[int, int, int]
"""An inode's number and its device's, in the guest."""


class Copy(NamedTuple):
    """A copy in the guest, and the host's file that it is of."""

    path: bytes
    identity: Identity


class HostFiles:
    """The copies in one guest. One is made at a time."""

    def __init__(self, shadows: Shadows) -> None:
        self._shadows = shadows
        self._pump = shadows.pump
        self._agent = shadows.pump.agent
        self._lock = trio.Lock()
        self._copies: dict[bytes, tuple[Identity, _File]] = {}
        self._links: dict[bytes, bytes] = {}
        self.named: dict[bytes, Copy] = {}
        """What uprobe definitions have named last, by the name in them."""

    async def bring_named(self, caller: Caller, definitions: bytes) -> bytes | None:
        """Bring the files that uprobe definitions name; return the directory where relative paths in them start.

        That is None when they name no file, and "/" when no path is relative. Raises OSError: EACCES for a file that
        the caller may not read, EFBIG for one that is too big for the guest's memory. Whatever else is wrong with a
        file, the guest says when it is asked to use it.
        """
        names = named_files(definitions)
        if not names:
            return None
        base = b"/" if all(name.startswith(b"/") for name in names) else directory_of(caller)
        async with self._lock:
            await self._make_directories(base)
            for name in names:
                copy = await self._bring(caller, os.path.join(base, name))
                if copy is not None:
                    self.named[name] = copy
        return base

    def visit(self, shadow: Shadow, directory: bytes | None) -> tuple[list[Call], list[Call]]:
        """Return calls that take a shadow to the files it names, and back, as `bring_named()` has returned `directory`.

        Shadows have init's root and working directory, which no call depends on, or those of a mirrored process.
        Strings are put at the beginning of its data area. Hold its lock.
        """
        enter, leave = list[Call](), list[Call]()
        if directory is None:
            return enter, leave
        back = shadow.root.rstrip(b"/") + os.fsencode(shadow.cwd)
        blob, places = strings([_REAL_ROOT, shadow.root, directory, back])
        self._agent.put(shadow.task, 0, blob)
        root, own_root, there, own = (shadow.task.virtual(place) for place in places)
        if directory != b"/":
            enter, leave = [(Sys.CHDIR, there)], [(Sys.CHDIR, own)]
        if shadow.root != b"/":
            enter, leave = [(Sys.CHROOT, root), *enter], [*leave, (Sys.CHROOT, own_root)]
        return enter, leave

    async def bring(self, caller: Caller, paths: Iterable[bytes], directory: bytes = b"/") -> None:
        """Bring files at absolute paths, all or none, and have a directory there.

        Raises OSError with the path as its file name, as `bring_named()` does.
        """
        async with self._lock:
            before = set(self._copies)
            await self._make_directories(directory)
            for path in paths:
                try:
                    await self._bring(caller, path)
                except OSError as error:
                    for copy in set(self._copies) - before:
                        await self._remove(copy)
                    raise OSError(error.errno, error.strerror, os.fsdecode(path)) from None

    async def _bring(self, caller: Caller, path: bytes) -> Copy | None:
        """Bring a file, unless there is none or the guest has one of its own."""
        if len(path) >= _PATH_MAX:
            return None
        there = await self._file_at(path)
        copies = {file: path for path, (_, file) in self._copies.items()}
        if there is not None and there not in copies:
            return None
        found = await trio.to_thread.run_sync(find, caller, path, abandon_on_cancel=True)
        try:
            if found.fd < 0 and there is not None:
                await self._remove(copies[there])
            for step in found.steps:
                await self._make(step)
            if found.fd >= 0:
                await self._store(found)
                if await self._file_at(path) is None:  # a link of the host's is a directory of the guest's: /bin
                    await self._make_directories(os.path.dirname(path))
                    await self._link(found.steps[-1].path, path)
                return Copy(found.steps[-1].path, found.identity)
            return None
        finally:
            found.close()

    # ---- the way to a file

    async def _make(self, step: Step) -> None:
        """Make what is no regular file, unless the guest has something there: then that is the guest's way."""
        if stat.S_ISLNK(step.mode):
            if self._links.get(step.path) != step.target:
                await self._link(step.target, step.path)
        elif stat.S_ISDIR(step.mode):
            await self._call(lambda at, _: (Sys.MKDIRAT, AT_FDCWD, at, 0o755), step.path)
        elif not stat.S_ISREG(step.mode):
            kind = stat.S_IFMT(step.mode)
            await self._call(lambda at, _: (Sys.MKNODAT, AT_FDCWD, at, kind | 0o600, 0), step.path)

    async def _link(self, target: bytes, path: bytes) -> None:
        if self._links.pop(path, None) is not None:
            await self._call(lambda at, _: (Sys.UNLINKAT, AT_FDCWD, at, 0), path)
        result = await self._call(lambda at, to: (Sys.SYMLINKAT, to, AT_FDCWD, at), path, target)
        if result == 0:
            self._links[path] = target

    async def _make_directories(self, path: bytes) -> None:
        parts = path.split(b"/")
        for depth in range(2, len(parts) + 1):
            await self._make(Step(b"/".join(parts[:depth]), stat.S_IFDIR))

    # ---- a file

    async def _store(self, found: Found) -> None:
        path, mode = found.steps[-1].path, found.steps[-1].mode
        there = await self._file_at(path)
        known = self._copies.get(path)
        if there is not None and (known is None or known == (found.identity, there)):
            return
        await self._check_room(found.identity.size)
        data = await trio.to_thread.run_sync(found.read, abandon_on_cancel=True)
        coming = os.path.join(os.path.dirname(path), _COMING)
        try:
            await self._write(coming, data, stat.S_IMODE(mode))
            check(await self._call(lambda at, to: (Sys.RENAMEAT2, AT_FDCWD, at, AT_FDCWD, to, 0), coming, path))
        except OSError as error:
            await self._call(lambda at, _: (Sys.UNLINKAT, AT_FDCWD, at, 0), coming)
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EROFS, errno.EPERM, errno.EACCES):
                return  # no place for files, such as the guest's /proc: it has none there
            raise
        copy = await self._file_at(path)
        if copy is not None:
            self._copies[path] = (found.identity, copy)

    async def _write(self, path: bytes, data: bytes, mode: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = check(await self._call(lambda at, _: (Sys.OPENAT, AT_FDCWD, at, flags, 0o600), path))
        init = self._shadows.init
        try:
            written = 0
            while written < len(data):
                piece = data[written : written + _PIECE]
                async with init.lock:
                    self._agent.put(init.task, 0, piece)
                    [result] = await self._pump.call(init.task, [(Sys.WRITE, fd, init.task.virtual(0), len(piece))])
                if check(result) == 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))  # not from a kernel that is well
                written += result
            check(await self._call(lambda at, _: (Sys.FCHMODAT, AT_FDCWD, at, mode), path))
        finally:
            await self._call(lambda _at, _: (Sys.CLOSE, fd))

    async def _check_room(self, size: int) -> None:
        """Raise EFBIG for what would take more than half of the memory that the guest has left, as it says itself."""
        result, data = await self._ask(lambda at, _: (Sys.SYSINFO, at + _RESULT), size=_SYSINFO.size)
        check(result)
        free, unit = _SYSINFO.unpack(data)
        if size > min(free * unit, self._pump.machine.ram_size) // 2:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    async def _remove(self, path: bytes) -> None:
        """Remove the copy of a file that the host has no more."""
        await self._call(lambda at, _: (Sys.UNLINKAT, AT_FDCWD, at, 0), path)
        self._copies.pop(path, None)

    # ---- calls

    async def _file_at(self, path: bytes) -> _File | None:
        """Return what a path leads to in the guest, if anything."""
        result, data = await self._ask(
            lambda at, _: (Sys.STATX, AT_FDCWD, at, 0, _STATX_INO, at + _RESULT), path, size=_STATX.size
        )
        return None if result < 0 else _STATX.unpack(data)

    async def _call(self, make: Callable[[int, int], Call], path: bytes = b"", second: bytes = b"") -> int:
        """Have init make a call with the guest addresses of one or two paths; return its result."""
        return (await self._ask(make, path, second))[0]

    async def _ask(
        self, make: Callable[[int, int], Call], path: bytes = b"", second: bytes = b"", size: int = 0
    ) -> tuple[int, bytes]:
        """Do the same, and return `size` bytes of what it has answered. Raises OSError when the guest is dead."""
        if max(len(path), len(second)) >= _PATH_MAX:
            return -errno.ENAMETOOLONG, b""
        init = self._shadows.init
        async with init.lock:
            self._agent.put(init.task, _PATH, path + b"\0")
            self._agent.put(init.task, _PATH_2, second + b"\0")
            at = init.task.virtual
            [result] = await self._pump.call(init.task, [make(at(_PATH), at(_PATH_2))])
            return result, self._agent.get(init.task, _RESULT, size)
