"""What the host has at a path and above it, looked at as the kernel would: path_resolution(7).

It never looks into the guest's files or the kernel's, and tells each directory once, until it is changed.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from fakefs.mirror.records import Entry

_LINKS_MAX = 40
_TOLD_MAX = 1 << 16
_SEEN_MAX = 1 << 12
_SEEN_FOR = 1.0  # seconds
_KERNELS = frozenset(("/proc", "/sys"))
_DEVICES = frozenset(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom"))
"""Those that the guest has too, and where opening does no harm."""
_KEPT = "/dev/shm/"
_MAGIC = re.compile(r"/proc/[^/]+/(task/[^/]+/)?(cwd|root|exe|(fd|ns|map_files)/.)")
"""Links that lead to what a process of the guest has open: a trace, which O_TRUNC empties."""


class NotMirrored(Exception):
    """A path that is not for the guest: of the kernel's, of a device, or in another guest's files."""


class _Seen(NamedTuple):
    """The links that a path led over and what was at its end, when all on its way had been told.

    It is enough to look at these, `until` then by the monotonic clock. So if somebody who is not mirrored replaces a
    directory on the way by a link, and at the end is one of the same type, mode, owner and size, that is noticed so
    much later.
    """

    entries: list[Entry]
    until: float


class HostPaths:
    """The files seen from a root directory, which `root` is a descriptor of.

    `guest_device` is st_dev of our mount, `shown` are paths of the kernel's at which it shows the guest's files.
    """

    def __init__(self, root: int, guest_device: int, shown: Iterable[str] = ()) -> None:
        self._root = root
        self._guest_device = guest_device
        self._shown = tuple(f"{path}/" for path in shown)
        self._told: dict[str, Entry] = {}
        self._seen: dict[tuple[str, bool], _Seen] = {}
        self._on_way: dict[str, list[tuple[str, bool]]] = {}  # of those in `_seen`: which lead by a path

    def look(self, path: str, *, follow: bool, kernels: bool = False) -> list[Entry]:
        """Return what was not told yet of the parts of an absolute path, and always what is at its end.

        Where a directory is missing, that is the end. `kernels`: below /proc, /sys and /dev, where both have files of
        their own and nothing is looked at, the end is taken for a directory.

        Raises NotMirrored, and OSError for what the kernel refuses.
        """
        seen = self._seen.get((path, follow))
        if (
            seen is not None
            and time.monotonic() < seen.until
            and all(self._look(entry.path) == entry for entry in seen.entries)
        ):
            return seen.entries[-1:]
        entries: list[Entry] = []
        way: list[Entry] = []
        parts, at, links = deque(_names(path)), "", 0
        while parts:
            name = parts.popleft()
            if name == "..":
                at = at.rpartition("/")[0]
                continue
            at = f"{at}/{name}"
            if is_kernels(at):
                if not kernels or ".." in parts:
                    raise NotMirrored
                return [*entries, Entry("/".join((at, *parts)), stat.S_IFDIR)]
            last = not parts
            entry, told = self._look(at), self._told.get(at)
            way.append(entry)
            if told is not None and entry != told:
                self.forget(at)
            is_followed = stat.S_ISLNK(entry.mode) and (follow or not last)
            if entry != told or (last and not is_followed):
                entries.append(entry)
            if is_followed:
                links += 1
                if links > _LINKS_MAX:
                    raise NotMirrored
                parts.extendleft(reversed(_names(entry.target)))
                at = "" if entry.target.startswith("/") else at.rpartition("/")[0]
            elif not last and not stat.S_ISDIR(entry.mode):
                break
        if len(entries) == 1 and entries == way[-1:]:
            self._see((path, follow), way)
        return entries or [self._look(at or "/")]

    def _see(self, key: tuple[str, bool], way: list[Entry]) -> None:
        if len(self._seen) > _SEEN_MAX:
            self._seen.clear()
            self._on_way.clear()
        if key not in self._seen:
            for entry in way:
                self._on_way.setdefault(entry.path, []).append(key)
        entries = [entry for entry in way[:-1] if stat.S_ISLNK(entry.mode)] + way[-1:]
        self._seen[key] = _Seen(entries, time.monotonic() + _SEEN_FOR)

    def is_shown(self, path: str) -> bool:
        """Is this path of the kernel's in our mount? Then the guest is asked for it anyway."""
        return f"{path}/".startswith(self._shown)

    def tell(self, entries: list[Entry]) -> None:
        """What `look()` returned was passed on: the directories in it need not be told again."""
        if len(self._told) > _TOLD_MAX:
            self._told.clear()
        for entry in entries[:-1]:
            self._told[entry.path] = entry

    def forget(self, path: str) -> None:
        """A path may change: tell again what is there and below."""
        for key in self._on_way.pop(path, ()):
            self._seen.pop(key, None)
        if path in self._told:
            below = path + "/"
            for told in [told for told in self._told if told == path or told.startswith(below)]:
                del self._told[told]

    def _look(self, path: str) -> Entry:
        try:
            found = os.stat(path.lstrip("/") or ".", dir_fd=self._root, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return Entry(path, 0)
        kind = stat.S_IFMT(found.st_mode)
        if found.st_dev == self._guest_device or (kind in (stat.S_IFCHR, stat.S_IFBLK) and path not in _DEVICES):
            raise NotMirrored
        target = os.readlink(path.lstrip("/"), dir_fd=self._root) if kind == stat.S_IFLNK else ""
        size = found.st_size if kind == stat.S_IFREG else 0
        return Entry(path, found.st_mode, found.st_uid, found.st_gid, size, target)


def is_kernels(path: str) -> bool:
    """Is it /proc, /sys, or in /dev, but for devices that do no harm and files that are kept there?"""
    if not path.startswith("/dev/"):
        return path in _KERNELS
    return path not in _DEVICES and not f"{path}/".startswith(_KEPT)


def in_name_only(path: str) -> bool:
    """Is a path of the kernel's to be found in the guest, but not opened, as that might do something?"""
    return _MAGIC.match(path) is not None or (path.startswith("/dev/") and is_kernels(path))


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]
