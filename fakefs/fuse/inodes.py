"""The FUSE inode numbers of guest paths, and how often the kernel holds each.

The guest's st_ino cannot serve: several guest filesystems lie under one root, and eventfs gives all its files one
number and may give a directory another after memory pressure. So an inode is a path, and its number a checksum of
the path: the same after the kernel forgot it, in every run. What was removed keeps its number until the kernel
forgets it, and a new file of that name gets another (the kernel never uses a removed directory's inode again).

Follows the lookup counts of <fuse_lowlevel.h> (`forget`).
"""

from __future__ import annotations

import errno
import os
import stat as st
from dataclasses import replace
from zlib import crc32

from fakefs.files import Stat

ROOT = 1
NAME_MAX = 255
PATH_MAX = 4096


class Inode:
    """`path` is None once removed; `stat` is the last known."""

    __slots__ = ("lookups", "number", "path", "stat")

    def __init__(self, number: int, path: bytes, stat: Stat | None) -> None:
        self.number = number
        self.path: bytes | None = path
        self.stat = stat
        self.lookups = 0


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Inodes:
    """The table; `root` is the guest path of the mount's root directory."""

    def __init__(self, root: bytes) -> None:
        self._by_number = {ROOT: Inode(ROOT, root, None)}
        self._by_path = {root: ROOT}

    def __len__(self) -> int:
        return len(self._by_number)

    def numbers(self) -> list[int]:
        """All numbers, that of the root first."""
        return list(self._by_number)

    def path(self, number: int) -> bytes:
        """The guest path of an inode. Raises OSError ENOENT when it was removed."""
        inode = self._by_number.get(number)
        if inode is None or inode.path is None:
            raise error(errno.ENOENT)
        return inode.path

    def child(self, parent: int, name: bytes) -> bytes:
        """The guest path of `name` in directory `parent`. Raises OSError ENAMETOOLONG, ENOENT."""
        if len(name) > NAME_MAX:
            raise error(errno.ENAMETOOLONG)
        directory = self.path(parent)
        path = directory + b"/" + name if directory != b"/" else b"/" + name
        if len(path) >= PATH_MAX:
            raise error(errno.ENAMETOOLONG)
        return path

    def hold(self, path: bytes, stat: Stat) -> int:
        """The number for `path`, held once more: to be answered to a lookup, which the kernel will `forget`."""
        number = self._by_path.get(path)
        if number is not None:
            inode = self._by_number[number]
            if inode.stat is not None and st.S_IFMT(inode.stat.mode) != st.S_IFMT(stat.mode):
                self.remove(path)
                number = None
        if number is None:
            number = self.number(path)
            inode = self._by_number[number] = Inode(number, path, stat)
            self._by_path[path] = number
        inode.stat = stat
        inode.lookups += 1
        return number

    def number(self, path: bytes) -> int:
        """The number that `path` has, or that it would get now."""
        known = self._by_path.get(path)
        if known is not None:
            return known
        number = crc32(path) + ROOT + 1
        while number in self._by_number:
            number += 1
        return number

    def forget(self, number: int, lookups: int) -> None:
        """The kernel drops `lookups` of its holds."""
        inode = self._by_number.get(number)
        if inode is None or number == ROOT:
            return
        inode.lookups -= lookups
        if inode.lookups <= 0:
            del self._by_number[number]
            if inode.path is not None:
                del self._by_path[inode.path]

    def remove(self, path: bytes) -> None:
        """`path` is gone from the guest, and all below it."""
        number = self._by_path.get(path)
        if number is None or number == ROOT:
            return
        for below in self._subtree(path, number):
            self._by_number[self._by_path.pop(below)].path = None

    def rename(self, old: bytes, new: bytes) -> None:
        """`old` has become `new`; what was there is gone."""
        number = self._by_path.get(old)
        if old == new:
            return
        self.remove(new)
        if number is None or number == ROOT:
            return
        for below in self._subtree(old, number):
            moved = new + below[len(old) :]
            inode = self._by_number[self._by_path.pop(below)]
            inode.path = moved
            self._by_path[moved] = inode.number

    def last_stat(self, number: int) -> Stat:
        """For a removed file that is still open: its last attributes, no links. Raises OSError ENOENT."""
        inode = self._by_number.get(number)
        if inode is None or inode.stat is None:
            raise error(errno.ENOENT)
        return replace(inode.stat, nlink=0)

    def _subtree(self, path: bytes, number: int) -> list[bytes]:
        stat = self._by_number[number].stat
        if stat is not None and not st.S_ISDIR(stat.mode):
            return [path]
        return [path, *(other for other in self._by_path if other.startswith(path + b"/"))]
