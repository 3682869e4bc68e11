"""Calls with paths in them, made in the guest: open(2), unlink(2), rename(2) and the like.

Files that a call opens are closed again at once, unless what a program does with its descriptors is mirrored too: then
they wait for their first use.
"""

from __future__ import annotations

import os
import stat
import struct

from emulator.agent import CALL_AFTER, Call
from fakefs.mirror.calls import BY_NUMBER, NUMBER
from fakefs.mirror.guestpaths import GuestPaths, Wish, batches, place
from fakefs.mirror.inodes import Inode
from fakefs.mirror.mirrored import Mirrored, kind_of_file
from fakefs.mirror.processes import Processes
from fakefs.mirror.queue import Looks
from fakefs.mirror.records import Entry, Files
from fakefs.shadow import Shadows
from fakefs.syscalls import AT_FDCWD, Sys

_RENAME_EXCHANGE = 2
_WITH_PATH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_HOW = struct.Struct("<QQQ")
ANSWER, ANSWER_SIZE = 0x4000, 0x4000
"""Room in a data area for what a call answers, offset and size in bytes."""
_OPENS = frozenset(NUMBER[name] for name in ("open", "openat", "openat2", "creat"))
_KEPT = frozenset((0, stat.S_IFREG, stat.S_IFDIR))
_PIPES = frozenset(NUMBER[name] for name in ("pipe", "pipe2"))
_LEAVES_CONTENT = frozenset(
    NUMBER[name]
    for name in (
        *("unlink", "unlinkat", "rename", "renameat", "renameat2", "rmdir", "chdir", "fchdir", "link", "linkat"),
        *("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat"),
        *("utime", "utimes", "futimesat", "utimensat", "setxattr", "lsetxattr", "fsetxattr", "removexattr"),
        *("lremovexattr", "fremovexattr", "statfs", "getxattr", "lgetxattr", "listxattr", "llistxattr", "getcwd"),
    )
)


class FileCalls:
    """Makes them. `keeps`: files stay open."""

    def __init__(self, shadows: Shadows, processes: Processes, paths: GuestPaths, *, keeps: bool) -> None:
        self._pump = shadows.pump
        self._processes = processes
        self._paths = paths
        self._keeps = keeps

    async def make(self, record: Files) -> None:
        """Make a call by its thread's shadow, after making what it looks at equal to the host's."""
        shadow = self._processes.find(record.tid)
        if shadow is None:
            return
        await self._processes.settle(shadow)
        writes = record.number not in _LEAVES_CONTENT and self._flags(record) & os.O_ACCMODE != os.O_RDONLY
        before = [path.entry for path in record.paths if path.entries]
        for path in record.paths:
            await self._paths.make(path.entries, writes=writes)
        async with shadow.lock:
            calls, main = self._calls(shadow, record)  # here: a file of the mount may be closed until now
            with self._paths.inodes.made_by(shadow.task) as made:
                results = await self._pump.call(shadow.task, place(self._pump.agent, shadow.task, calls))
            await self._keep(shadow, [record], [results[main]])
        if record.cwd:
            shadow.cwd = record.cwd
        if results[main] >= 0:
            self._effects(shadow, record, before, made)

    async def look(self, looks: Looks) -> None:
        """Make several calls of a thread that change nothing, in one go."""
        shadow = self._processes.find(looks.tid)
        if shadow is None:
            return
        await self._processes.settle(shadow)
        await self._paths.make([*looks.above, *looks.seen.values()], writes=False)
        looks.above.clear()
        async with shadow.lock:
            calls: list[Wish] = []
            mains: list[int] = []
            for record in looks.records:
                own, main = self._calls(shadow, record)
                mains.append(len(calls) + main)
                calls += own
                shadow.cwd = record.cwd or shadow.cwd
            results: list[int] = []
            for part in batches(calls):
                results += await self._pump.call(shadow.task, place(self._pump.agent, shadow.task, part))
            await self._keep(shadow, looks.records, [results[main] for main in mains])

    async def _keep(self, shadow: Mirrored, records: list[Files], fds: list[int]) -> None:
        """What calls have opened waits for its use on the host, or is closed. The caller holds the shadow's lock."""
        closing: list[Call] = []
        for record, fd in zip(records, fds, strict=True):
            if self._keeps and record.number in _OPENS and fd >= 0:
                entry, flags = record.paths[0].entry, self._flags(record)
                if stat.S_IFMT(entry.mode) in _KEPT and not flags & (os.O_PATH | os.O_TMPFILE & ~os.O_DIRECTORY):
                    closing += shadow.opened(kind_of_file(entry.path, flags), fd)
                else:
                    closing.append((Sys.CLOSE, fd))
        if closing:
            await self._pump.call(shadow.task, closing)

    def _calls(self, shadow: Mirrored, record: Files) -> tuple[list[Wish], int]:
        """Return the calls, and which of them is the one."""
        texts = iter(os.fsencode(path.text) for path in record.paths)
        words: list[int | bytes] = [next(texts) if word is None else word for word in record.arguments]
        call = BY_NUMBER[record.number]
        for at, letter in enumerate(call.arguments):
            if letter == "b":
                words[at] = shadow.task.virtual(ANSWER)
            elif letter == "s" and "b" in call.arguments:
                words[at] = min(record.arguments[at] or 0, ANSWER_SIZE)
        before: list[Wish] = []
        if record.cwd and record.cwd != shadow.cwd:
            before.append((Sys.CHDIR, os.fsencode(record.cwd)))
        fd, second = shadow.next_descriptors
        if record.number in _OPENS:
            if record.number != NUMBER["creat"]:
                at = 1 if record.number == NUMBER["open"] else 2
                flags = words[at]
                assert isinstance(flags, int)
                if stat.S_ISFIFO(record.paths[0].entry.mode):
                    flags |= os.O_NONBLOCK  # nobody else may ever open it here
                words[at] = flags
                if record.number == NUMBER["openat2"]:
                    if flags & os.O_PATH:
                        flags &= _WITH_PATH
                    words[at:] = [_OPEN_HOW.pack(flags, words[at + 1], 0), _OPEN_HOW.size]
            closing = [] if self._keeps else [(CALL_AFTER | Sys.CLOSE, fd)]
            return [*before, (record.number, *words), *closing], len(before)
        if record.number in _PIPES:
            return [(record.number, *words), (Sys.CLOSE, fd), (Sys.CLOSE, second)], 0
        if BY_NUMBER[record.number].arguments.startswith("F"):
            access = os.O_RDWR if record.number == Sys.FTRUNCATE else os.O_RDONLY
            opening = (Sys.OPENAT, AT_FDCWD, words[0], access | os.O_NONBLOCK, 0)
            return [*before, opening, (record.number, fd, *words[1:]), (Sys.CLOSE, fd)], len(before) + 1
        return [*before, (record.number, *words)], len(before)

    @staticmethod
    def _flags(record: Files) -> int:
        """The flags of open(2); for other calls, those of one that writes."""
        if record.number not in _OPENS or record.number == NUMBER["creat"]:
            return os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        return record.arguments[1 if record.number == NUMBER["open"] else 2] or 0

    def _effects(self, shadow: Mirrored, record: Files, before: list[Entry], made: list[Inode]) -> None:
        """Note what a call that succeeded has done to the guest's files."""
        paths, name = self._paths, BY_NUMBER[record.number].name
        numbers = [word or 0 for word in record.arguments]
        there = before[-1] if before else Entry("", 0)
        permissions = ~shadow.umask & 0o7777
        match name:
            case "open" | "openat" | "openat2" | "creat" if not there.mode:
                paths.created(there._replace(mode=stat.S_IFREG | numbers[-1] & permissions), made)
            case "open" | "openat" | "openat2" | "creat" if self._flags(record) & os.O_TRUNC:
                paths.changed(there.path, size=0)
            case "truncate" | "ftruncate":
                paths.changed(there.path, size=numbers[-1])
            case "mkdir" | "mkdirat":
                paths.created(there._replace(mode=stat.S_IFDIR | numbers[-1] & permissions))
            case "mknod" | "mknodat":
                kind = stat.S_IFMT(numbers[-2]) or stat.S_IFREG
                paths.created(there._replace(mode=kind | numbers[-2] & permissions), made)
            case "symlink" | "symlinkat":
                paths.created(there._replace(mode=stat.S_IFLNK | 0o777, target=record.paths[0].text))
            case "unlink" | "unlinkat" | "rmdir":
                paths.removed(there.path)
            case "rename" | "renameat" | "renameat2":
                exchanged = name == "renameat2" and bool(numbers[-1] & _RENAME_EXCHANGE)
                paths.renamed(before[0].path, there.path, exchanged=exchanged)
            case "link" | "linkat":
                paths.linked(before[0].path, there.path)
            case "chmod" | "fchmod" | "fchmodat" | "fchmodat2":
                paths.changed(there.path, permissions=numbers[-2 if name == "fchmodat2" else -1])
            case "chown" | "lchown" | "fchown" | "fchownat":
                uid, gid = numbers[-3:-1] if name == "fchownat" else numbers[-2:]
                paths.owned(there.path, uid, gid)
            case "chdir":
                shadow.cwd = there.path
            case "fchdir":
                shadow.cwd = there.path
            case "umask":
                shadow.umask = numbers[0] & 0o777
