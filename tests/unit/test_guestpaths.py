"""What is asked of the guest's init to have the guest's files be the host's, without a guest."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

import trio

from fakefs.mirror.guestpaths import GuestPaths
from fakefs.mirror.inodes import Inode, Inodes
from fakefs.mirror.records import Entry
from fakefs.shadow import Shadows
from fakefs.syscalls import Sys

_DIR, _FILE = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644


class Init:
    """Stands for the guest's init and inodes: `calls` are those it was asked for, by name, with paths as strings.

    Sizes that are set are among them. Inodes are numbered from 1 on.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self._data = b""
        task = SimpleNamespace(virtual=lambda at: 1 << 32 | at)
        pump = SimpleNamespace(agent=self, call=self._call, machine=SimpleNamespace(ram_size=256 << 20))
        shadows = SimpleNamespace(pump=pump, init=SimpleNamespace(lock=trio.Lock(), task=task))
        self.paths = GuestPaths(cast(Shadows, shadows), cast(Inodes, self))
        self._made: list[Inode] = []
        self.inodes = 0

    def put(self, task: object, offset: int, data: bytes) -> None:
        """As `Agent.put()`."""
        self._data = data

    async def _call(self, task: object, calls: list[list[int]]) -> list[int]:
        await trio.lowlevel.checkpoint()
        for number, *words in calls:
            values = [self._string(word) if word >> 32 == 1 else word for word in words if word >= 0]
            self.calls.append((Sys(number).name.lower(), *values))
            if number in (Sys.MKNODAT, Sys.LINKAT):
                self.inodes += 1
                self._made.append(Inode(0, self.inodes))
        return [0] * len(calls)

    def _string(self, address: int) -> str:
        return self._data[address & 0xFFFFFFFF :].split(b"\0")[0].decode()

    @contextmanager
    def made_by(self, task: object) -> Iterator[list[Inode]]:
        """As `Inodes.made_by()`."""
        self._made = []
        yield self._made

    def set_size(self, inode: Inode | None, size: int) -> bool:
        """As `Inodes.set_size()`."""
        if inode is not None:
            self.calls.append(("size", inode.number, size))
        return inode is not None

    def size(self, inode: Inode) -> int:
        """As `Inodes.size()`."""
        return 1000

    def make(self, *entries: Entry, writes: bool = False) -> list[tuple[object, ...]]:
        """Have the guest have these; return the calls that were made for it."""
        self.calls.clear()
        trio.run(lambda: self.paths.make(entries, writes=writes))
        return list(self.calls)

    def make_program(self, entry: Entry) -> list[tuple[object, ...]]:
        """The same for a program."""
        self.calls.clear()
        trio.run(self.paths.make_program, [entry])
        return list(self.calls)


def test_what_is_there_is_not_asked_for_again() -> None:
    init = Init()
    entries = Entry("/d", _DIR), Entry("/d/f", _FILE, size=5)
    assert init.make(*entries) == [("mkdirat", "/host/d", 0o755), ("mknodat", "/host/d/f", _FILE, 0), ("size", 1, 5)]
    assert init.make(*entries) == []
    assert init.make(Entry("/d/f", _FILE, size=3)) == [("size", 1, 3)]
    assert init.make(Entry("/d/f", 0)) == [("unlinkat", "/host/d/f", 0)]
    init.make(*entries)
    assert init.make(Entry("/d", _FILE))[:2] == [("unlinkat", "/host/d/f", 0), ("unlinkat", "/host/d", 0x200)]


def test_files_that_calls_make() -> None:
    """Their sizes are set as well, and if nobody knows which inode is theirs, by a call."""
    init = Init()
    init.paths.created(Entry("/f", _FILE), [Inode(0, 7)])
    init.paths.created(Entry("/g", _FILE), [])
    assert init.make(Entry("/f", _FILE, size=5), Entry("/g", _FILE, size=6)) == [
        ("size", 7, 5),
        ("truncate", "/host/g", 6),
    ]


def test_names_of_one_file() -> None:
    init = Init()
    init.make(Entry("/one", _FILE, size=5))
    init.paths.linked("/one", "/two")
    init.paths.changed("/one", size=0)
    assert init.make(Entry("/two", _FILE, size=5)) == [("size", 1, 5)]
    assert init.make(Entry("/one", _FILE, size=5)) == []
    init.paths.removed("/one")
    assert init.make(Entry("/two", _FILE, size=6)) == [("size", 1, 6)]


def test_bits_that_a_change_of_owners_takes_away() -> None:
    init, entry = Init(), Entry("/f", stat.S_IFREG | 0o4755, 7, 8)
    chown, chmod = ("fchownat", "/host/f", 7, 8, 0x100), ("fchmodat", "/host/f", 0o4755)
    assert init.make(entry) == [("mknodat", "/host/f", entry.mode, 0), chown, chmod]
    init.paths.owned("/f", 1, -1)
    assert init.make(entry) == [chown, chmod]
    init.paths.owned("/f", -1, -1)
    assert init.make(entry) == []


def test_what_the_guest_has_of_its_own() -> None:
    init = Init()
    for path in ("/", "/proc", "/proc/1", "/sys", "/sys/x", "/dev", "/dev/null"):
        assert init.make(Entry(path, _DIR)) == []
    for path in ("/process", "/system", "/device", "/dev/shm", "/dev/shm/x"):
        assert init.make(Entry(path, _DIR)) == [("mkdirat", f"/host{path}", 0o755)]


def test_a_program_is_a_stub_until_it_is_written_to() -> None:
    init, entry = Init(), Entry("/p", stat.S_IFREG | 0o755, size=9)
    link, there = ("linkat", "/stub", "/host/p", 0), [("mknodat", "/host/p", entry.mode, 0), ("size", 2, 9)]
    assert init.make_program(entry) == [link, ("size", 1, 1000)]
    assert init.make(entry) == [("size", 1, 9)]
    assert init.make(entry._replace(size=0)) == []
    assert init.make_program(entry) == [("size", 1, 1000)]
    assert init.make_program(entry._replace(size=2000)) == [("size", 1, 2000)]
    assert init.make(entry, writes=True) == [("unlinkat", "/host/p", 0), *there]
    init.paths.renamed("/p", "/q", exchanged=False)
    assert init.make(entry._replace(path="/q")) == []
    assert init.make_program(entry)[0] == link


def test_what_is_written_is_forgotten_when_it_is_much() -> None:
    init, most = Init(), (256 << 20) // 8
    init.make(Entry("/f", _FILE), Entry("/g", _FILE))
    init.paths.written("/f", 10, 20)
    assert init.make(Entry("/f", _FILE, size=30)) == []
    init.paths.written("/g", 0, most)
    forgotten = [("truncate", "/host/f", 0), ("truncate", "/host/g", 0)]
    assert init.make() == [*forgotten, ("size", 1, 30), ("size", 2, most)]
    init.paths.written("/f", 0, 1)
    assert init.make() == []
