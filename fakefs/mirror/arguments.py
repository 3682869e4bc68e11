"""What the arguments of a call say: read from the memory of its thread, and from /proc.

A thread can change its memory while it is read: all of it has bounds, and what it refers to is looked at once.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from fakefs.mirror.calls import Call, Level
from fakefs.mirror.hostpaths import HostPaths, NotMirrored, in_name_only
from fakefs.mirror.notes import Note
from fakefs.mirror.records import Files, PathArgument, looks
from fakefs.mirror.seccomp import Notification, read_memory, read_string

AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH = 0x100, 0x1000
_AT_FLAGS = {"fchownat": 4, "newfstatat": 3, "statx": 2, "faccessat2": 3, "fchmodat2": 3, "utimensat": 3}
"""Which argument has flags whose name begins with AT_."""
_OPENS = ("open", "openat", "openat2")
_GOES = ("chdir", "fchdir")
_LOOKS = ("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat")
_OF_THE_KERNELS = frozenset((*_OPENS, *_GOES, *_LOOKS))
"""What is mirrored below /proc, /sys and /dev too."""
_OPEN_HOW = struct.Struct("<QQQ")
_ARGV_MAX, _ARGUMENT_MAX = 16, 256
_VALUE_MAX = 4096


class NoPath(NotMirrored):
    """The call is about the file behind its descriptor."""


class Arguments:
    """Reads those that are paths, or have to do with paths. `paths` knows what the daemon was told of."""

    def __init__(self, paths: HostPaths) -> None:
        self._paths = paths

    def files(self, note: Note, call: Call) -> Files:
        """Return the record of a call with paths in it. Those that the note has are not read any more."""
        notification, start = note.call, os.fsdecode(note.start)
        arguments: list[int | None] = []
        paths: list[PathArgument] = []
        tid, directory, cwd = notification.tid, AT_FDCWD, ""
        follow_all = not self._refuses_links(notification, call)
        kernels = call.name in _OF_THE_KERNELS
        for letter, value in zip(call.arguments, notification.arguments, strict=False):
            if letter == "i":
                arguments.append(signed(value))
            elif letter == "D":
                directory = signed(value)
                arguments.append(AT_FDCWD)
            elif letter in "PL":
                follow = letter == "P" and follow_all
                text = os.fsdecode(note.path) or self._text(notification, call, directory, value)
                path, relative_to = self.path(tid, directory, text, follow=follow, kernels=kernels, start=start)
                cwd, directory = relative_to or cwd, AT_FDCWD
                paths.append(path)
                arguments.append(None)
            elif letter in "bn":
                arguments.append(-1 if letter == "b" else 0)
            elif letter == "B" and value:
                sized = call.arguments[len(arguments) + 1 :].startswith("s")
                size = notification.arguments[len(arguments) + 1] if sized else call.sizes[0]
                paths.append(PathArgument(os.fsdecode(read_memory(tid, value, min(size, _VALUE_MAX))), []))
                arguments.append(None)
            elif letter in "Bs":
                arguments.append(min(value, _VALUE_MAX))
            elif letter == "T":
                paths.append(PathArgument(string_at(tid, value), []))
                arguments.append(None)
            elif letter == "F":
                path, _ = self.path(tid, AT_FDCWD, _descriptor(tid, signed(value)), follow=False, kernels=kernels)
                paths.append(path)
                arguments.append(None)
            elif letter == "H":
                flags, mode, _ = _OPEN_HOW.unpack(read_memory(tid, value, _OPEN_HOW.size))
                arguments += [flags & 0x7FFFFFFF, mode & 0o7777]
        if call.name == "getcwd":
            path, cwd = self.path(tid, AT_FDCWD, ".", follow=True)
            paths.append(path)
        record = Files(tid, call.number, arguments, paths, cwd)
        changes = not looks(record)
        for path in paths:
            for entry in path.entries[-1:]:
                if changes:
                    self._paths.forget(entry.path)
                if call.name not in _GOES and self._paths.is_shown(entry.path):
                    raise NotMirrored
                if call.name in _OPENS and in_name_only(entry.path):
                    flags = arguments[len(arguments) - 2] or 0
                    arguments[len(arguments) - 2] = flags | os.O_PATH
        return record

    @staticmethod
    def _text(notification: Notification, call: Call, directory: int, address: int) -> str:
        """Return a path. Raises NoPath, for a call that is not known by the path of the descriptor as well."""
        flags = notification.arguments[_AT_FLAGS[call.name]] if call.name in _AT_FLAGS else 0
        if address or call.name not in ("utimensat", "newfstatat"):
            text = string_at(notification.tid, address)
            if text or not flags & _AT_EMPTY_PATH:
                return text
        if call.level >= Level.ALL:
            raise NoPath
        return _descriptor(notification.tid, directory)

    @staticmethod
    def _refuses_links(notification: Notification, call: Call) -> bool:
        arguments = notification.arguments
        if call.name in ("open", "openat"):
            flags = arguments[call.arguments.index("i")]
            return bool(flags & os.O_NOFOLLOW) or flags & (os.O_CREAT | os.O_EXCL) == os.O_CREAT | os.O_EXCL
        at = _AT_FLAGS.get(call.name)
        return at is not None and bool(arguments[at] & _AT_SYMLINK_NOFOLLOW)

    def path(
        self, tid: int, directory: int, text: str, *, follow: bool, kernels: bool = False, start: str = ""
    ) -> tuple[PathArgument, str]:
        """Return a path argument, and the working directory if it is relative to that.

        A path that is relative to another directory is made absolute. `start` is the directory, if that is known.
        """
        cwd = ""
        if not text:
            raise NotMirrored
        if text.startswith("/"):
            whole = text
        elif directory == AT_FDCWD:
            cwd = start or os.readlink(f"/proc/{tid}/cwd")
            whole = f"{cwd}/{text}"
        else:
            whole = text = f"{_there(start) if start else _descriptor(tid, directory)}/{text}"
        if not whole.startswith("/") or cwd.endswith(" (deleted)"):
            raise NotMirrored
        return PathArgument(text, self._paths.look(whole, follow=follow, kernels=kernels)), cwd


def _descriptor(tid: int, fd: int) -> str:
    """Return the path of an open file of a process."""
    return _there(os.readlink(f"/proc/{tid}/fd/{fd}"))


def _there(path: str) -> str:
    if not path.startswith("/") or path.endswith(" (deleted)"):
        raise NotMirrored
    return path


def string_at(tid: int, address: int) -> str:
    """Return the string at an address. Raises NotMirrored when there is none."""
    text = read_string(tid, address)
    if text is None:
        raise NotMirrored
    return os.fsdecode(text)


def argv_at(tid: int, address: int) -> Iterator[str]:
    """Yield the first arguments of a program, cut where they are long."""
    for index in range(_ARGV_MAX):
        word = read_memory(tid, address + 8 * index, 8)
        if len(word) < 8 or word == bytes(8):
            return
        yield os.fsdecode(read_memory(tid, int.from_bytes(word, "little"), _ARGUMENT_MAX).split(b"\0")[0])


def room(address: int) -> int | None:
    """Return what a record has for an address at which an answer is wanted, or for none."""
    return None if address else 0


def signed(value: int) -> int:
    """Return an int argument, of which the upper half of the register says nothing."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
