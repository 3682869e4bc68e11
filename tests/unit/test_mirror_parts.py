"""What the addresses in a call's arguments are of: read from this process's memory, and laid out as in a shadow's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror.calls import BY_NUMBER, NUMBER, TABLE, Call, find
from fakefs.mirror.hostpaths import HostPaths, NotMirrored
from fakefs.mirror.layout import COPIED_MAX, Layout, Room
from fakefs.mirror.parts import MMSGHDR_SIZE, MSGHDR, POLLED_MAX, VECTOR_MAX, Parts
from fakefs.mirror.records import PathArgument, Transfer, Used
from fakefs.mirror.seccomp import Notification

_SIZE = 1 << 13
_MEMORY = ctypes.create_string_buffer(_SIZE)
_AT = ctypes.addressof(_MEMORY)
_ROOM = Room(0x10000, 0xC00, 0x20000, 0x4000, 0x4000)
_ON_FILES = [call for call in TABLE if call.is_on_open_files]


@pytest.fixture(scope="module")
def paths() -> Iterator[HostPaths]:
    root = os.open("/", os.O_PATH)
    yield HostPaths(root, 0)
    os.close(root)


def _read(paths: HostPaths, name: str, *values: int) -> Parts:
    call = find(NUMBER[name], values)
    return Parts(Notification(1, os.getpid(), call.number, (*values, *(0,) * 6)[:6]), call, paths)


def _laid_out(call: Call, parts: Parts, *fds: int, room: Room = _ROOM) -> Layout:
    files = [Used(fd, PathArgument("", []), 0, 0) for fd in fds]
    record = Transfer(1, call.number, files, parts.arguments, parts.parts, [])
    return Layout(call, record, {fd: fd + 100 for fd in fds}, room)


def _put(at: int, data: bytes) -> int:
    ctypes.memmove(_AT + at, data, len(data))
    return _AT + at


def test_a_vector(paths: HostPaths) -> None:
    first, second = _put(0, b"one"), _put(100, b"three")
    vector = _put(200, struct.pack("<4Q", first, 3, second, 5))
    parts = _read(paths, "writev", 7, vector, 2)
    [part] = parts.parts
    assert (part.sizes, part.data) == ([3, 5], "onethree")
    laid_out = _laid_out(BY_NUMBER[NUMBER["writev"]], parts, 7)
    assert laid_out.words == [107, 0x10000, 2]
    assert laid_out.structures == struct.pack("<4Q", 0x20000, 3, 0x20003, 5)
    assert laid_out.buffers == b"onethree"


def test_a_long_vector_is_as_long_in_all(paths: HostPaths) -> None:
    vector = _put(0, struct.pack("<QQ", _AT + 4096, 7) * 100)
    parts = _read(paths, "readv", 0, vector, 100)
    assert (parts.arguments[2], sum(parts.parts[0].sizes)) == (VECTOR_MAX, 700)


def test_messages(paths: HostPaths) -> None:
    data, vector = _put(0, b"hello"), _put(16, struct.pack("<QQ", _AT, 5))
    name = _put(32, struct.pack("<H", socket.AF_UNIX) + b"\0name")
    header = MSGHDR.pack(name, 7, vector, 1, data, 99, 0)
    parts = _read(paths, "sendmmsg", 3, _put(64, header.ljust(MMSGHDR_SIZE, b"\0") * 2), 2, 5)
    assert [(part.sizes, part.data, part.address) for part in parts.parts] == [([5], "hello", "\1\0\0name")] * 2
    laid_out = _laid_out(BY_NUMBER[NUMBER["sendmmsg"]], parts, 3)
    assert laid_out.words[2:] == [2, 5]
    at = laid_out.words[1] - _ROOM.structures
    for message, buffer in ((at, 0x20000), (at + MMSGHDR_SIZE, 0x20005)):
        name, size, vector, count, control, *_ = MSGHDR.unpack_from(laid_out.structures, message)
        assert laid_out.structures[name - 0x10000 :][:size] == b"\1\0\0name"
        assert laid_out.structures[vector - 0x10000 :][:16] == struct.pack("<QQ", buffer, 5)
        assert (count, control) == (1, 0)
    assert laid_out.buffers == b"hellohello"


def test_what_is_polled(paths: HostPaths) -> None:
    """Descriptors become the guest's; what it has not is not waited for."""
    polled = _put(0, struct.pack("<iHHiHHiHH", 4, select.POLLIN, 0, -1, 0, 0, 5, select.POLLOUT, 0))
    parts = _read(paths, "poll", polled, 3, 1000)
    assert list(parts.descriptors()) == [4, 5]
    laid_out = _laid_out(BY_NUMBER[NUMBER["poll"]], parts, 4)
    assert laid_out.words == [0x10000, 3, 1000]
    assert struct.unpack("<iHHiHHiHH", laid_out.structures) == (104, 1, 0, -1, 0, 0, -1, 4, 0)
    reading, writing = _put(0, (1 << 3 | 1 << 7).to_bytes(128, "little")), _put(128, (1 << 9).to_bytes(128, "little"))
    parts = _read(paths, "select", 10, reading, writing, 0, 0)
    assert list(parts.descriptors()) == [3, 7, 9]
    laid_out = _laid_out(BY_NUMBER[NUMBER["select"]], parts, 3, 9)
    assert laid_out.words == [110, 0x10000, 0x10080, 0, 0]
    assert int.from_bytes(laid_out.structures[:128], "little") == 1 << 103
    everything = _put(0, b"\xff" * 128)
    assert len(list(_read(paths, "select", 1024, everything, 0, 0, 0).descriptors())) == POLLED_MAX


def test_what_is_too_large(paths: HostPaths) -> None:
    """Sizes are those of the room at the most, and those of the other buffers what it has left."""
    for name, words in (("read", [105, 0x20000, 0x4000]), ("pread64", [105, 0x20000, 0x4000, 1 << 40])):
        parts = _read(paths, name, 5, _AT, 1 << 62, 1 << 40)
        assert _laid_out(BY_NUMBER[NUMBER[name]], parts, 5).words == words
    parts = _read(paths, "epoll_wait", 5, _AT, 1 << 30, (1 << 64) - 1)
    assert _laid_out(BY_NUMBER[NUMBER["epoll_wait"]], parts, 5).words == [105, 0x20000, 0x4000 // 12, -1]
    parts = _read(paths, "sendfile", 5, 6, 0, (1 << 64) - 1)
    assert _laid_out(BY_NUMBER[NUMBER["sendfile"]], parts, 5, 6).words == [105, 106, 0, COPIED_MAX]
    large = _ROOM._replace(buffers_size=1 << 20)
    _put(0, b"data")
    laid_out = _laid_out(BY_NUMBER[NUMBER["write"]], _read(paths, "write", 5, _AT, 1 << 19), 5, room=large)
    assert (laid_out.words[2], len(laid_out.buffers)) == (1 << 19, large.settable)


_VALUES = st.one_of(
    st.integers(0, 1100),
    st.integers(_AT, _AT + _SIZE),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([1 << 31, 1 << 47]),
)


@given(st.sampled_from(_ON_FILES), st.lists(_VALUES, min_size=6, max_size=6), st.binary(max_size=_SIZE), st.booleans())
def test_anything(paths: HostPaths, call: Call, values: list[int], memory: bytes, refers: bool) -> None:
    """Whatever a program gives, what the guest's call is given is inside the room."""
    if refers:  # to the memory itself
        memory = struct.pack("<Q", _AT) * 8 + memory[64:]
    _put(0, memory.ljust(_SIZE, b"\0")[:_SIZE])
    with contextlib.suppress(NotMirrored, OSError, ValueError, struct.error):
        parts = Parts(Notification(1, os.getpid(), call.number, tuple(values)), call, paths)
        fds = [value for letter, value in zip(call.arguments, values, strict=False) if letter == "O"]
        laid_out = _laid_out(call, parts, *fds, *parts.descriptors())
        assert len(laid_out.structures) <= _ROOM.structures_size
        assert len(laid_out.buffers) <= _ROOM.buffers_size
        for letter, following, word in zip(call.arguments, call.arguments[1:] + " ", laid_out.words, strict=True):
            if letter in "BbT" and word:
                assert 0x20000 <= word <= 0x24000
                if following == "s":
                    assert word + laid_out.words[laid_out.words.index(word) + 1] <= 0x24000
            elif letter in "VvMmSaltupeE" and word:
                assert 0x10000 <= word < 0x10C00
