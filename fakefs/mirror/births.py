"""What /proc says of a thread that was not seen before, or may have become another program: proc(5)."""

from __future__ import annotations

import errno
import os

from fakefs.mirror.records import Birth

Image = tuple[bytes, ...]
"""Where stack, code, heap and arguments of a program begin: at random places in each."""

_LINES = 8
"""Lines of /proc/TID/status that say all that is needed here, of some sixty."""


def read_birth(tid: int) -> Birth | None:
    """Return what /proc says of a thread; None when it has ended."""
    try:
        text = _read(f"/proc/{tid}/status")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH):
            raise
        return None
    return parse_birth(tid, text)


def parse_birth(tid: int, text: bytes) -> Birth | None:
    """Parse /proc/TID/status. Raises ValueError, when it is something else."""
    lines = text.split(b"\n", _LINES)[:_LINES]
    fields = dict(line.split(b":\t", 1) for line in lines if b":\t" in line)
    if b"Umask" not in fields or fields.get(b"State", b"Z")[:1] in b"ZX":
        return None  # it is ending: that it has given up already
    if not {b"Tgid", b"PPid", b"Name"} <= fields.keys():
        raise ValueError("not /proc/TID/status")
    tgid, parent = int(fields[b"Tgid"]), int(fields[b"PPid"])
    return Birth(tid, tgid, parent if tgid == tid else tgid, os.fsdecode(fields[b"Name"]), int(fields[b"Umask"], 8))


def read_image(tid: int) -> Image | None:
    """Return what tells a thread's memory from another program's; None when that cannot be known."""
    try:
        fields = _read(f"/proc/{tid}/stat").rpartition(b")")[2].split()
        image = (fields[23], fields[25], *fields[44:46])  # startcode, startstack, start_brk, arg_start: proc(5)
    except (OSError, IndexError):
        return None
    return None if image[1] == b"0" else image  # hidden


def _read(path: str) -> bytes:
    """Return the beginning of a file. A file object would take as long as the reading."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)
