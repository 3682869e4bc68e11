"""The guest's files below the root directory of mirrored processes, made equal to the host's where a call looks.

All that is there was put there by us or by calls that were mirrored, so what is there is known: `known` needs no
question to the guest. What differs is changed by the guest's init, before the call.

They take a part of the guest's memory and no more: where that is full, files are removed that were made first, and made
again when they are looked at; what was written to files is forgotten, and reads as zeros.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator

from emulator.agent import DATA_SIZE, OTHER_ROOT, Agent, Call, Task, slot_batches
from fakefs.mirror.records import Entry
from fakefs.shadow import Shadows
from fakefs.syscalls import AT_FDCWD, AT_REMOVEDIR, AT_SYMLINK_NOFOLLOW, Sys

_STUB = b"/stub"
_PERMISSIONS = 0o7777
_INIT_UMASK = 0o022
_ROOM = DATA_SIZE - 0x1000
_GUESTS_OWN = ("/dev/", "/proc", "/sys")
"""What begins with this is the guest's own, below the root directory of mirrored processes too."""


_RAM_PER_FILE = 16384
"""Bytes of the guest's RAM for each file that may be there; the kernel's limit for such a root is 8192."""
_PAGE = 4096

Wish = tuple[int | bytes, ...]
"""A system call; strings stand where the call has their address."""


def _inside(path: str) -> bytes:
    return OTHER_ROOT + os.fsencode(path)


class GuestPaths:
    """What there is in the guest, by path on the host. With `sized`, files have the host's sizes."""

    def __init__(self, shadows: Shadows, *, sized: bool) -> None:
        self._shadows = shadows
        self._sized = sized
        self.known: dict[str, Entry] = {}
        self._stubs: set[str] = set()
        self._ends: dict[str, int] = {}  # of what was written to files, bytes
        self._calls: list[Wish] = []
        ram = shadows.pump.machine.ram_size
        self._files_most = self._files_full = ram // _RAM_PER_FILE
        self._content_most, self._content = ram // 8, 0  # bytes

    # ---- what mirrored calls do

    def created(self, entry: Entry) -> None:
        """A call has made what `entry` says."""
        self.known[entry.path] = entry

    def removed(self, path: str) -> None:
        """A call has removed what was at a path."""
        for each in self._below(path):
            del self.known[each]
            self._stubs.discard(each)
            self._ends.pop(each, None)

    def renamed(self, old: str, new: str, *, exchanged: bool) -> None:
        """A call has renamed a file or a directory, or exchanged two."""
        moving = [(old, new)] + ([(new, old)] if exchanged else [])
        taken = [self._take(path) for path, _ in moving]
        if not exchanged:
            self.removed(new)
        for (old_path, new_path), (entries, stubs, ends) in zip(moving, taken, strict=True):
            for path, entry in entries.items():
                moved = new_path + path[len(old_path) :]
                self.known[moved] = entry._replace(path=moved)
                if path in stubs:
                    self._stubs.add(moved)
                if path in ends:
                    self._ends[moved] = ends[path]

    def _take(self, path: str) -> tuple[dict[str, Entry], set[str], dict[str, int]]:
        entries = {each: self.known[each] for each in self._below(path)}
        stubs, ends = self._stubs & entries.keys(), {each: self._ends[each] for each in self._ends.keys() & entries}
        self.removed(path)
        return entries, stubs, ends

    def linked(self, old: str, new: str) -> None:
        """A call has given a file a second name."""
        if old in self.known:
            self.known[new] = self.known[old]._replace(path=new)
            if old in self._stubs:
                self._stubs.add(new)

    def resized(self, path: str, size: int) -> None:
        """A call has given a file another size, bytes."""
        if path in self.known:
            self.known[path] = self.known[path]._replace(size=size)

    def written(self, path: str, start: int, size: int) -> None:
        """A call has written bytes to a file, which take memory of the guest until they are too many."""
        if path in self.known:
            self.resized(path, max(self.known[path].size, start + size))
        self._ends[path] = max(self._ends.get(path, 0), start + size)
        self._content += size + 2 * _PAGE
        if self._content > self._content_most:
            for each, end in self._ends.items():
                self._call(Sys.TRUNCATE, _inside(each), 0)
                size = max(end, self.known[each].size if each in self.known else 0)
                self._call(Sys.TRUNCATE, _inside(each), size)
            self._content = 0
            self._ends.clear()

    # ---- making equal

    async def make(self, entries: Iterable[Entry], *, writes: bool) -> None:
        """Have the guest have what the host has. `writes`: the last one may be written to, so it is no stub then."""
        self._make_room()
        entry = None
        for entry in entries:
            self._equal(entry)
        if entry is not None and writes and entry.path in self._stubs:
            self._remove(entry.path)
            self._create(entry)
        await self._flush()

    async def make_program(self, entries: Iterable[Entry]) -> None:
        """The same for a file that will be executed: there, the stub stands for it."""
        *above, entry = entries
        for each in above:
            self._equal(each)
        if entry.path not in self._stubs:
            self._remove(entry.path)
            self._call(Sys.LINKAT, AT_FDCWD, _STUB, AT_FDCWD, _inside(entry.path), 0)
            self._stubs.add(entry.path)
            self.known[entry.path] = entry
        await self._flush()

    def _equal(self, entry: Entry) -> None:
        """Queue the calls that make the guest's file what the host's is."""
        known = self.known.get(entry.path)
        if known is not None and (
            stat.S_IFMT(known.mode) != stat.S_IFMT(entry.mode) or known.target != entry.target or not entry.mode
        ):
            self._remove(entry.path)
            known = None
        if known is None:
            has_room = len(self.known) < self._files_most * 3 // 2
            if entry.mode and entry.path != "/" and not entry.path.startswith(_GUESTS_OWN) and has_room:
                self._create(entry)
        elif entry.path not in self._stubs and not stat.S_ISLNK(entry.mode):
            if known.mode != entry.mode:
                self._call(Sys.FCHMODAT, AT_FDCWD, _inside(entry.path), entry.mode & _PERMISSIONS)
            if known.size != entry.size and self._sized:
                self._call(Sys.TRUNCATE, _inside(entry.path), entry.size)
            self.known[entry.path] = known._replace(mode=entry.mode, size=entry.size)

    def _make_room(self) -> None:
        """Queue the removal of files, when there are many; links and directories are told of only once."""
        if len(self.known) < self._files_full:
            return
        files = [path for path, entry in self.known.items() if stat.S_ISREG(entry.mode) and path not in self._stubs]
        for path in files[: self._files_most // 4]:
            self._remove(path)
        self._files_full = max(self._files_most, len(self.known) + self._files_most // 16)

    def _create(self, entry: Entry) -> None:
        mode, permissions = entry.mode, entry.mode & _PERMISSIONS
        path = _inside(entry.path)
        if stat.S_ISLNK(mode):
            self._call(Sys.SYMLINKAT, os.fsencode(entry.target), AT_FDCWD, path)
        else:
            if stat.S_ISDIR(mode):
                self._call(Sys.MKDIRAT, AT_FDCWD, path, permissions)
            else:
                self._call(Sys.MKNODAT, AT_FDCWD, path, mode, 0)
                if self._sized and entry.size:
                    self._call(Sys.TRUNCATE, path, entry.size)
            if permissions & (_INIT_UMASK | 0o7000):
                self._call(Sys.FCHMODAT, AT_FDCWD, path, permissions)
        if entry.uid or entry.gid:
            self._call(Sys.FCHOWNAT, AT_FDCWD, path, entry.uid, entry.gid, AT_SYMLINK_NOFOLLOW)
        self.known[entry.path] = entry

    def _remove(self, path: str) -> None:
        """Queue the removal of what is known to be at a path, and below."""
        for each in sorted(self._below(path), reverse=True):
            entry = self.known.pop(each)
            self._stubs.discard(each)
            self._ends.pop(each, None)
            flags = AT_REMOVEDIR if stat.S_ISDIR(entry.mode) else 0
            self._call(Sys.UNLINKAT, AT_FDCWD, _inside(each), flags)

    def _below(self, path: str) -> list[str]:
        entry = self.known.get(path)
        if entry is None:
            return []
        if not stat.S_ISDIR(entry.mode):
            return [path]
        prefix = path + "/"
        return [each for each in self.known if each == path or each.startswith(prefix)]

    # ---- calls of init's

    def _call(self, number: Sys, *arguments: int | bytes) -> None:
        """Queue a call; an argument of bytes is a string whose address is meant."""
        self._calls.append((number, *arguments))

    async def _flush(self) -> None:
        calls, self._calls = self._calls, []
        if not calls:
            return
        init, pump = self._shadows.init, self._shadows.pump
        async with init.lock:
            for batch in batches(calls):
                await pump.call(init.task, place(pump.agent, init.task, batch))


def batches(calls: Iterable[Wish]) -> Iterator[list[Wish]]:
    """Divide calls into parts that fit a slot."""
    return slot_batches(calls, lambda call: sum(len(each) + 1 for each in call if isinstance(each, bytes)), _ROOM)


def place(agent: Agent, task: Task, calls: Iterable[Wish]) -> list[Call]:
    """Put the strings of calls into a task's data area, and return the calls with their addresses.

    Raises ValueError when they are too long.
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
        placed.append(words)
    if len(data) > _ROOM:
        raise ValueError("too long")
    agent.put(task, 0, bytes(data))
    return placed
