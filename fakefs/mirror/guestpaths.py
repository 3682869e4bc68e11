"""The guest's files below the root directory of mirrored processes, made equal to the host's where a call looks.

All that is there was put there by us or by calls that were mirrored, so what is there is known without asking the
guest. What differs is changed by the guest's init, before the call.

They take a part of the guest's memory and no more: where that is full, files are removed that were made first, and made
again when they are looked at; what was written to files is forgotten, and reads as zeros.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence

from emulator.agent import CALL_AFTER, DATA_SIZE, OTHER_ROOT, Agent, Call, Task, slot_batches
from fakefs.mirror.inodes import Inode, Inodes
from fakefs.mirror.records import Entry
from fakefs.shadow import Shadows
from fakefs.syscalls import AT_FDCWD, AT_REMOVEDIR, AT_SYMLINK_NOFOLLOW, Sys

_STUB = b"/stub"
_PERMISSIONS = 0o7777
_NOT_BY_MAKING = 0o7022
"""Permissions that init's umask takes away, or that chown(2) does."""
_ROOM = DATA_SIZE - 0x1000
_RAM_PER_FILE = 16384
"""Bytes of the guest's RAM for each file that may be there; the kernel's limit for such a root is 8192."""
_PAGE = 4096

_GUESTS_OWN = ("/dev/", "/proc/", "/sys/")

Wish = tuple[int | bytes, ...]
"""A system call; strings stand where the call has their address."""


def _inside(path: str) -> bytes:
    return OTHER_ROOT + os.fsencode(path)


def _is_guests_own(path: str) -> bool:
    """Has the guest this of its own, below the root directory of mirrored processes too? `path` ends with a slash."""
    return path == "//" or (path.startswith(_GUESTS_OWN) and not path.startswith("/dev/shm/"))


class _File:
    """A file of the guest's; each of its names has the same. `written`: where what was written to it ends, bytes."""

    __slots__ = ("gid", "inode", "mode", "size", "stub", "target", "uid", "written")

    def __init__(self, entry: Entry, *, stub: bool = False) -> None:
        _, self.mode, self.uid, self.gid, self.size, self.target = entry
        self.stub = stub
        self.written = 0
        self.inode: Inode | None = None

    def is_like(self, entry: Entry) -> bool:
        """Can it become what the host has?"""
        return stat.S_IFMT(self.mode) == stat.S_IFMT(entry.mode) and self.target == entry.target


class GuestPaths:
    """What there is in the guest, by path on the host."""

    def __init__(self, shadows: Shadows, inodes: Inodes) -> None:
        self._shadows = shadows
        self.inodes = inodes
        self._known: dict[str, _File] = {}
        self._calls: list[Wish] = []
        self._names: list[_File | None] = []
        self._resized: dict[str, _File] = {}
        ram = shadows.pump.machine.ram_size
        self._files_most = self._files_full = ram // _RAM_PER_FILE
        self._content_most, self._content = ram // 8, 0  # bytes
        self._stub_size = 0  # bytes; 0: not known yet

    # ---- what mirrored calls do

    def created(self, entry: Entry, made: Sequence[Inode] = ()) -> None:
        """A call has made what `entry` says, and (`made`) these inodes."""
        file = self._known[entry.path] = _File(entry)
        if len(made) == 1:
            file.inode = made[0]

    def removed(self, path: str) -> None:
        """A call has removed what was at a path."""
        for each in self._below(path):
            del self._known[each]

    def renamed(self, old: str, new: str, *, exchanged: bool) -> None:
        """A call has renamed a file or a directory, or exchanged two."""
        moving = [(old, new)] + ([(new, old)] if exchanged else [])
        taken = [{each: self._known.pop(each) for each in self._below(path)} for path, _ in moving]
        if not exchanged:
            self.removed(new)
        for (old_path, new_path), files in zip(moving, taken, strict=True):
            for path, file in files.items():
                self._known[new_path + path[len(old_path) :]] = file

    def linked(self, old: str, new: str) -> None:
        """A call has given a file a second name."""
        if old in self._known:
            self._known[new] = self._known[old]

    def changed(self, path: str, *, permissions: int | None = None, size: int | None = None) -> None:
        """A call has given a file other permissions, or another size in bytes."""
        file = self._known.get(path)
        if file is not None and permissions is not None:
            file.mode = stat.S_IFMT(file.mode) | permissions & _PERMISSIONS
        if file is not None and size is not None:
            file.size = size

    def owned(self, path: str, uid: int, gid: int) -> None:
        """A call has given a file other owners; -1 leaves one as it is."""
        file = self._known.get(path)
        if file is not None:
            file.uid, file.gid = (new if new >= 0 else old for new, old in ((uid, file.uid), (gid, file.gid)))

    def written(self, path: str, start: int, size: int) -> None:
        """A call has written bytes to a file, which take memory of the guest until they are too many."""
        file = self._known.get(path)
        if file is None:
            return
        file.size = max(file.size, start + size)
        file.written = max(file.written, start + size)
        self._content += size + 2 * _PAGE
        if self._content > self._content_most:
            for each, file in self._known.items():
                if file.written:
                    self._call(Sys.TRUNCATE, _inside(each), 0)
                    self._resized[each] = file
                    file.written = 0
            self._content = 0

    # ---- making equal

    async def make(self, entries: Iterable[Entry], *, writes: bool) -> None:
        """Have the guest have what the host has. `writes`: the last one may be written to, so it is no stub then."""
        self._make_room()
        entry = None
        for entry in entries:
            self._equal(entry)
        if entry is not None and writes and (file := self._known.get(entry.path)) is not None and file.stub:
            self._remove(entry.path)
            self._create(entry)
        await self._flush()

    async def make_program(self, entries: Iterable[Entry]) -> None:
        """The same for a file that will be executed: there, the stub stands for it."""
        *above, entry = entries
        for each in above:
            self._equal(each)
        file = self._known.get(entry.path)
        if not _is_guests_own(f"{entry.path}/") and (file is None or not file.stub):  # that is /proc/self/exe, a stub
            self._remove(entry.path)
            file = self._known[entry.path] = _File(entry, stub=True)
            self._call(Sys.LINKAT, AT_FDCWD, _STUB, AT_FDCWD, _inside(entry.path), 0, names=file)
        await self._flush()
        if file is not None and file.inode is not None:
            self._stub_size = self._stub_size or self.inodes.size(file.inode)
            self.inodes.set_size(file.inode, max(entry.size, self._stub_size))

    def _equal(self, entry: Entry) -> None:
        """Queue the calls that make the guest's file what the host's is."""
        file = self._known.get(entry.path)
        if file is not None and not file.is_like(entry):
            self._remove(entry.path)
            file = None
        if file is None:
            has_room = len(self._known) < self._files_most * 3 // 2
            if entry.mode and has_room and not _is_guests_own(f"{entry.path}/"):
                self._create(entry)
        elif file.stub:
            file.size = entry.size  # all of them are one file, which has the size of the one that is looked at
            if entry.size:  # pages of a running program would be lost
                self._resized[entry.path] = file
        else:
            path = _inside(entry.path)
            owned = file.uid == entry.uid and file.gid == entry.gid
            if not owned:
                self._call(Sys.FCHOWNAT, AT_FDCWD, path, entry.uid, entry.gid, AT_SYMLINK_NOFOLLOW)
            if not stat.S_ISLNK(entry.mode) and (file.mode != entry.mode or not owned):
                self._call(Sys.FCHMODAT, AT_FDCWD, path, entry.mode & _PERMISSIONS)
            if file.size != entry.size:
                self._resized[entry.path] = file
            _, file.mode, file.uid, file.gid, file.size, _ = entry

    def _make_room(self) -> None:
        """Queue the removal of files, when there are many; links and directories are told of only once."""
        if len(self._known) < self._files_full:
            return
        files = [path for path, file in self._known.items() if stat.S_ISREG(file.mode) and not file.stub]
        for path in files[: self._files_most // 4]:
            self._remove(path)
        self._files_full = max(self._files_most, len(self._known) + self._files_most // 16)

    def _create(self, entry: Entry) -> None:
        mode, permissions = entry.mode, entry.mode & _PERMISSIONS
        path, file = _inside(entry.path), _File(entry)
        if stat.S_ISLNK(mode):
            self._call(Sys.SYMLINKAT, os.fsencode(entry.target), AT_FDCWD, path)
        elif stat.S_ISDIR(mode):
            self._call(Sys.MKDIRAT, AT_FDCWD, path, permissions)
        else:
            self._call(Sys.MKNODAT, AT_FDCWD, path, mode, 0, names=file if stat.S_ISREG(mode) else None)
        if entry.size:
            self._resized[entry.path] = file
        if entry.uid or entry.gid:
            self._call(Sys.FCHOWNAT, AT_FDCWD, path, entry.uid, entry.gid, AT_SYMLINK_NOFOLLOW)
        if not stat.S_ISLNK(mode) and permissions & _NOT_BY_MAKING:
            self._call(Sys.FCHMODAT, AT_FDCWD, path, permissions)
        self._known[entry.path] = file

    def _remove(self, path: str) -> None:
        """Queue the removal of what is known to be at a path, and below."""
        for each in sorted(self._below(path), reverse=True):
            flags = AT_REMOVEDIR if stat.S_ISDIR(self._known.pop(each).mode) else 0
            self._call(Sys.UNLINKAT, AT_FDCWD, _inside(each), flags)

    def _below(self, path: str) -> list[str]:
        file = self._known.get(path)
        if file is None:
            return []
        if not stat.S_ISDIR(file.mode):
            return [path]
        prefix = path + "/"
        return [each for each in self._known if each == path or each.startswith(prefix)]

    # ---- calls of init's

    def _call(self, number: Sys, *arguments: int | bytes, names: _File | None = None) -> None:
        """Queue a call; an argument of bytes is a string whose address is meant. `names`: a regular file gets one."""
        self._calls.append((number, *arguments))
        self._names.append(names)

    async def _flush(self) -> None:
        """Make the calls that are queued, then give files their sizes; a lost one by a call that shows."""
        calls, names, resized = self._calls, self._names, self._resized
        self._calls, self._names, self._resized = [], [], {}
        if calls:
            with self.inodes.made_by(self._shadows.init.task) as made:
                results = await self._init(calls)
            named = [file for file, result in zip(names, results, strict=True) if file is not None and result == 0]
            if len(named) == len(made):
                for file, inode in zip(named, made, strict=True):
                    file.inode = inode
        lost = [
            path for path, file in resized.items() if not (self.inodes.set_size(file.inode, file.size) or file.stub)
        ]
        await self._init([(Sys.TRUNCATE, _inside(path), resized[path].size) for path in lost])

    async def _init(self, calls: list[Wish]) -> list[int]:
        init, pump = self._shadows.init, self._shadows.pump
        results: list[int] = []
        async with init.lock:
            for batch in batches(calls):
                results += await pump.call(init.task, place(pump.agent, init.task, batch))
        return results


def batches(calls: Iterable[Wish]) -> Iterator[list[Wish]]:
    """Divide calls into parts that fit a slot."""
    return slot_batches(calls, lambda call: sum(len(each) + 1 for each in call if isinstance(each, bytes)), _ROOM)


def place(agent: Agent, task: Task, calls: Iterable[Wish]) -> list[Call]:
    """Put the strings of calls into a task's data area, and return the calls with their addresses.

    One with CALL_AFTER is made if the one before has not failed, or there is none before. Raises ValueError when they
    are too long.
    """
    data, placed = bytearray(), list[Call]()
    for call in calls:
        words: list[int] = []
        for each in call:
            if isinstance(each, bytes):
                words.append(task.virtual(len(data)))
                data += each + b"\0"
            else:
                words.append(each)
        if words[0] & CALL_AFTER:
            words += [*(0,) * (6 - len(words)), len(placed) - 1]
            words[0] &= -1 if placed else ~CALL_AFTER
        placed.append(words)
    if len(data) > _ROOM:
        raise ValueError("too long")
    agent.put(task, 0, bytes(data))
    return placed
