"""A program of the host that makes each call on open files with what no program gives them. It cannot block.

Its argument is a list of calls: number, name, and a letter for each argument as in `fakefs.mirror.calls`.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import socket
import struct
import sys
from contextlib import suppress

_TIMES = 4
_libc = ctypes.CDLL(None, use_errno=True)
_memory = ctypes.create_string_buffer(1 << 16)


def _open() -> list[int]:
    """A descriptor of each kind, and some that are none."""
    pair = socket.socketpair()
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    kinds = [*pair, listening, socket.socket(socket.AF_INET, socket.SOCK_DGRAM)]
    for each in kinds:
        each.setblocking(False)
    fds = [each.detach() for each in kinds]
    fds += [os.open("file", os.O_RDWR | os.O_CREAT), os.open(".", os.O_RDONLY), os.open("/dev/null", os.O_RDWR)]
    fds += [*os.pipe2(os.O_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK), os.open("file", os.O_PATH)]
    return [*fds, -1, 1 << 30, 999]


def _argument(letter: str, fds: list[int]) -> int:
    if letter == "O":
        return random.choice(fds)
    if letter == "w":
        return 0
    if letter in "isck":
        return random.choice([0, 1, 2, 3, 8, 100, 4096, 1 << 20, 1 << 31, -1, -4096, 1 << 62])
    if letter in "tu":
        return ctypes.addressof(_memory) + (1 << 15)  # zeros
    return random.choice([0, 1, 8, 1 << 46, (1 << 47) - 1, -1, ctypes.addressof(_memory) + random.randrange(1 << 14)])


def main() -> None:
    """Make all calls. The memory they refer to has descriptors, sizes, addresses of itself and anything in it."""
    random.seed(7)
    calls = json.loads(sys.argv[1])
    for _ in range(_TIMES):
        fds = _open()
        for number, name, letters in calls:
            words = [0, 1, 2, 16, 4096, 1 << 40, ctypes.addressof(_memory), (1 << 64) - 1]
            content = b"".join(struct.pack("<Q", random.choice(words)) for _ in range(1 << 11))
            ctypes.memmove(_memory, content, len(content))
            given = [_argument(letter, fds) for letter in letters]
            if name in ("flock", "fcntl", "ioctl"):
                given[1] = random.choice([4 | 1, 4 | 2]) if name == "flock" else random.choice([0, 1, 3, 5, 6, 0x541B])
            if name in ("dup2", "dup3"):
                given[1] = random.choice([-1, 100, 1 << 20])
            if name in ("sendto", "recvfrom", "sendmsg", "recvmsg", "sendmmsg", "recvmmsg"):
                given[letters.index("i")] = socket.MSG_DONTWAIT
            if name in ("fallocate", "sendfile", "copy_file_range", "splice", "tee"):
                given[letters.index("k")] = random.choice([0, 1, 5000, -1]) if name == "fallocate" else 5000
            if name == "select":
                given[0] = min(given[0], 1024)
            _libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, given))
        for fd in fds:
            if 2 < fd < 1 << 20:
                with suppress(OSError):
                    os.close(fd)
    print("made")


main()
