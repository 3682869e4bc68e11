"""A program of the host that makes system calls while they are traced, and tells of each what it was and returned.

`call()` is for the scripts it is given; they end with `os._exit()` in children.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NUMBERS: dict[str, int] = json.loads(sys.argv[1])
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_told: list[tuple[int, str, list[int | None], int]] = []
_kept: list[ctypes.Array[ctypes.c_char]] = []

Word = int | bytes | ctypes.Array[ctypes.c_char] | None


def call(name: str, *words: Word) -> int:
    """Make a system call with numbers, and addresses of bytes and buffers; return what it does, or minus its errno."""
    given = [ctypes.c_long(word) if isinstance(word, int) else word for word in words]
    result = int(_libc.syscall(ctypes.c_long(_NUMBERS[name]), *given))
    if result < 0:
        result = -ctypes.get_errno()
    _told.append((os.getpid(), name, [word if isinstance(word, int) else None for word in words], result))
    return result


def room(data: int | bytes) -> ctypes.Array[ctypes.c_char]:
    """Return a buffer of some bytes, or with some in it. It lives as long as the program."""
    _kept.append(ctypes.create_string_buffer(data, data if isinstance(data, int) else len(data)))
    return _kept[-1]


def vector(*buffers: ctypes.Array[ctypes.c_char]) -> ctypes.Array[ctypes.c_char]:
    """Return an array of struct iovec."""
    return room(b"".join(struct.pack("<QQ", ctypes.addressof(each), len(each)) for each in buffers))


def message(*buffers: ctypes.Array[ctypes.c_char], name: bytes = b"") -> bytes:
    """Return a struct msghdr."""
    of_name = ctypes.addressof(room(name)) if name else 0
    return struct.pack("<QI4xQQQQI4x", of_name, len(name), ctypes.addressof(vector(*buffers)), len(buffers), 0, 0, 0)


def finish() -> None:
    """End a child, whose calls are told before its parent's."""
    os.write(_told_by_children, (json.dumps([each for each in _told if each[0] == os.getpid()]) + "\n").encode())
    os._exit(0)


_told_by_children = os.memfd_create("told")


@contextmanager
def traced() -> Iterator[None]:
    """Have the guest trace what is called meanwhile."""
    switch = os.open("/sys/kernel/tracing/tracing_on", os.O_WRONLY)
    os.write(switch, b"1")
    yield
    os.write(switch, b"0")


if __name__ == "__main__":
    with traced():
        exec(compile(sys.argv[2], "script", "exec"))
    told = [each for line in os.pread(_told_by_children, 1 << 20, 0).splitlines() for each in json.loads(line)]
    print(json.dumps(told + _told))
