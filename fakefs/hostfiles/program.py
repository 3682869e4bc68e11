"""What a program of the host needs to run in the guest: its loader and libraries, or its interpreter with theirs.

Runs at the command, as its user. Which libraries those are the program's own loader says (`ld.so --list`, as ldd(1)
does): nobody else knows all of its rules. What a program opens later, such as plugins and data, is not looked for.
Follows elf(5), ld.so(8) and execve(2).
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from fakefs.errors import UserError

_CACHE = b"/etc/ld.so.cache"
_HEAD = 256  # bytes, what execve(2) looks at
_INTERPRETERS_MAX = 4
_HEADERS_MAX = 1 << 16
_ELF64_LITTLE_X86 = re.compile(rb"\x7fELF\x02\x01.{12}\x3e\0", re.DOTALL)
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_PT_INTERP = 3
_LISTED = re.compile(rb"\t(?:.* => )?(/.*) \(0x[0-9a-f]+\)")
_MISSING = re.compile(rb"\t(.*) => not found")
# The guest's processor is of another level than this one: only the libraries for every level.
_EVERY_LEVEL = ("--glibc-hwcaps-mask", "none")


@dataclass(frozen=True)
class HostProgram:
    """A program of the host and all files that it needs to start, by absolute paths as the loader finds them."""

    path: bytes
    files: tuple[bytes, ...]
    directory: bytes

    def request(self) -> dict[str, object]:
        """As the daemon is told."""
        return {
            "program": os.fsdecode(self.path),
            "files": [os.fsdecode(path) for path in self.files],
            "directory": os.fsdecode(self.directory),
        }


def host_program(name: str) -> HostProgram:
    """Look a program up as a shell would, and find what it needs. Raises UserError."""
    path = _which(os.fsencode(name))
    files = dict.fromkeys(_needs(path, _INTERPRETERS_MAX))
    return HostProgram(path, tuple(files), os.fsencode(os.getcwd()))


def _which(name: bytes) -> bytes:
    found = shutil.which(name)
    if found is None:
        raise UserError(f"{os.fsdecode(name)}: no such program on this machine", exit_status=127)
    return os.path.abspath(found)


def _needs(path: bytes, depth: int) -> Iterator[bytes]:
    yield path
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            loader = _loader(head, file.fileno())
    except OSError as error:
        raise UserError(f"{os.fsdecode(path)}: {error.strerror}", exit_status=126) from None
    if head.startswith(b"#!"):
        if not depth:
            raise UserError(f"{os.fsdecode(path)}: too many interpreters of interpreters", exit_status=126)
        for interpreter in _interpreters(head):
            yield from _needs(interpreter, depth - 1)
    elif loader is not None:
        yield loader
        yield from _libraries(loader, path)
        if os.path.exists(_CACHE):
            yield _CACHE
    elif not _ELF64_LITTLE_X86.match(head):
        raise UserError(f"{os.fsdecode(path)}: neither a program for x86-64 nor a script", exit_status=126)


def _interpreters(head: bytes) -> Iterator[bytes]:
    """The interpreter that a script's first line names, and for env(1) the program that it is to find."""
    words = head[2:].partition(b"\n")[0].split()
    if words:
        yield os.path.abspath(words[0])
        if os.path.basename(words[0]) == b"env":
            found = next((word for word in words[1:] if not word.startswith(b"-") and b"=" not in word), None)
            if found is not None:
                yield _which(found)


def _loader(head: bytes, fd: int) -> bytes | None:
    """Return what an ELF file's PT_INTERP names; None for a static program, or what is none."""
    if not _ELF64_LITTLE_X86.match(head) or len(head) < 64:
        return None
    [start] = struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    if size != _PROGRAM_HEADER.size or start >= 1 << 63:
        return None
    table = os.pread(fd, min(size * count, _HEADERS_MAX), start)
    for kind, _, offset, _, _, length, *_ in _PROGRAM_HEADER.iter_unpack(table[: len(table) // size * size]):
        if kind == _PT_INTERP and offset < 1 << 63:
            return os.pread(fd, min(length, os.pathconf("/", "PC_PATH_MAX")), offset).partition(b"\0")[0] or None
    return None


def _libraries(loader: bytes, path: bytes) -> list[bytes]:
    """Ask a loader what it would load for a program. Raises UserError."""
    for options in (_EVERY_LEVEL, ()):  # C libraries other than a recent glibc do not know the option
        try:
            done = subprocess.run(
                [loader, *options, "--list", path], stdin=subprocess.DEVNULL, capture_output=True, check=False
            )
        except OSError as error:
            raise UserError(f"{os.fsdecode(loader)}: {error.strerror}", exit_status=126) from None
        if done.returncode == 0:
            break
    lines = done.stdout.splitlines()
    missing = next((found[1] for line in lines if (found := _MISSING.fullmatch(line))), None)
    if missing is not None:
        raise UserError(f"{os.fsdecode(path)}: needs {os.fsdecode(missing)}, which is not found", exit_status=126)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(said[-1] if said else f"{os.fsdecode(path)}: its loader cannot load it", exit_status=126)
    return [os.path.abspath(found[1]) for line in lines if (found := _LISTED.fullmatch(line))]
