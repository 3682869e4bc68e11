"""What is asked of perf events: read from a process that waits, this one, and held until there is an answer."""

from __future__ import annotations

import base64
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror.calls import NUMBER
from fakefs.mirror.notes import HELD_MAX, Progress
from fakefs.mirror.records import EventAnswer, EventControl, EventMap, EventOpen, Record
from fakefs.mirror.seccomp import Listener, Notification
from fakefs.perf import requests
from fakefs.perf.requests import EventCalls, Held, Refused, file_name

_OPEN, _IOCTL, _MMAP = NUMBER["perf_event_open"], NUMBER["ioctl"], NUMBER["mmap"]
_ID = 77
_TID = os.getpid()


class Answers:
    """Stands for a listener."""

    def __init__(self) -> None:
        self.given: list[tuple[str, int]] = []

    def is_valid(self, identity: int) -> bool:
        return identity == _ID

    def proceed(self, identity: int) -> bool:
        self.given.append(("proceed", identity))
        return True

    def refuse(self, identity: int, error: int) -> bool:
        self.given.append(("refuse", error))
        return True

    def complete(self, identity: int, result: int) -> bool:
        self.given.append(("complete", result))
        return True

    def give(self, identity: int, fd: int, flags: int) -> None:
        self.given.append(("give", flags))
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        assert os.lseek(fd, 0, os.SEEK_CUR) == requests.FAR


class Asked:
    """An `EventCalls`, and an open event."""

    def __init__(self, directory: Path) -> None:
        self.answers = Answers()
        self.progress = Progress()
        self.calls = EventCalls(cast(Listener, self.answers), directory, lambda pid: iter(()), self.progress.hold)
        self.name = file_name(5, "0123456789abcdef")
        (directory / self.name).touch()
        self.fd = os.open(directory / self.name, os.O_RDWR)
        self.calls.hold(call(_OPEN, flags=8))
        self.calls.answer(EventAnswer(_ID, 0, 0, self.name))
        assert self.answers.given.pop() == ("give", os.O_CLOEXEC)

    def asks(self, notification: Notification) -> list[Record] | str:
        """Return the records of a call that is held, or what becomes of it at once."""
        handler = {_OPEN: self.calls.opened, _IOCTL: self.calls.controlled, _MMAP: self.calls.mapped}
        records: list[Record] = []
        try:
            for record in handler[notification.number](notification):
                records.append(record)
        except Held:
            self.calls.hold(notification)
            return records
        except Refused as refused:
            return errno.errorcode[refused.number]
        assert not records
        return "the host's"


def call(number: int, *arguments: int, flags: int = 0) -> Notification:
    six = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    if number == _OPEN:
        six[4] = flags
    return Notification(_ID, _TID, number, tuple(each & (1 << 64) - 1 for each in six))


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    asked = Asked(tmp_path)
    yield asked
    os.close(asked.fd)


def test_an_event_is_opened(asked: Asked) -> None:
    attributes = ctypes.create_string_buffer(struct.pack("<IIQ", 2, 64, 300), 64)
    at = ctypes.addressof(attributes)
    attr = base64.b64encode(attributes.raw).decode()
    assert asked.asks(call(_OPEN, at, 0, 0, asked.fd, flags=3)) == [EventOpen(_TID, _ID, attr, _TID, 0, 5, 3)]
    assert asked.asks(call(_OPEN, at, -1, 1, -1)) == [EventOpen(_TID, _ID, attr, -1, 1, -1, 0)]
    assert asked.asks(call(_OPEN, at, 0, 0, 0)) == "EBADF"
    assert asked.asks(call(_OPEN, at, 0, 0, -1, flags=4)) == "EBADF"
    assert asked.asks(call(_OPEN, 8)) == "EFAULT"


@given(
    kind=st.integers(0, 5), size=st.integers(0, 1 << 32 - 1) | st.sampled_from((0, 64, 4096)), config=st.integers(0, 20)
)
def test_whose_an_event_is(tmp_path_factory: pytest.TempPathFactory, kind: int, size: int, config: int) -> None:
    """Tracepoints are the guest's, and what a program that has one opens to be told of processes."""
    asked = Asked(tmp_path_factory.mktemp("events"))
    area = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    area[:16] = struct.pack("<IIQ", kind, size & 0xFFFFFFFF, config)
    found = asked.asks(call(_OPEN, ctypes.addressof(ctypes.c_char.from_buffer(area)), -1, 0, -1))
    if kind != 2 and (kind, config) != (1, 9):
        assert found == "the host's"
    elif size and not 64 <= size <= 4096:
        assert found == "E2BIG"
    else:
        record = found[0]
        assert isinstance(record, EventOpen)
        assert len(base64.b64decode(record.attr)) == (size or 64)
    os.close(asked.fd)


def test_requests(asked: Asked) -> None:
    text = ctypes.create_string_buffer(b"common_pid != 1")
    number = ctypes.c_uint64(12345)

    def control(request: int, value: int) -> list[Record] | str:
        return asked.asks(call(_IOCTL, asked.fd, request, value))

    assert control(requests.ENABLE, 1) == [EventControl(_TID, _ID, 5, requests.ENABLE, 1)]
    assert control(requests.PERIOD, ctypes.addressof(number)) == [EventControl(_TID, _ID, 5, requests.PERIOD, 12345)]
    assert control(requests.SET_OUTPUT, asked.fd) == [EventControl(_TID, _ID, 5, requests.SET_OUTPUT, 5)]
    assert control(requests.SET_OUTPUT, -1) == [EventControl(_TID, _ID, 5, requests.SET_OUTPUT, -1)]
    assert control(requests.SET_OUTPUT, 0) == "EBADF"
    wanted = EventControl(_TID, _ID, 5, requests.SET_FILTER, 0, "common_pid != 1")
    assert control(requests.SET_FILTER, ctypes.addressof(text)) == [wanted]
    assert control(requests.SET_FILTER, 8) == control(requests.PERIOD, 8) == "EFAULT"
    assert control(0x24FF, 0) == "ENOTTY"
    assert asked.asks(call(_IOCTL, 0, requests.ENABLE)) == "the host's"


def test_an_id_is_written(asked: Asked) -> None:
    number = ctypes.c_uint64()
    for address in (ctypes.addressof(number), 8, (1 << 64) - 1):
        assert asked.asks(call(_IOCTL, asked.fd, requests.ID, address)) == [EventControl(_TID, _ID, 5, requests.ID, 0)]
        assert asked.progress.held == [_ID]
        asked.calls.answer(EventAnswer(_ID, 0, 99))
        assert asked.progress.held == []
    assert number.value == 99
    assert asked.answers.given == [("complete", 0), ("refuse", errno.EFAULT), ("refuse", errno.EFAULT)]


def test_mapping(asked: Asked) -> None:
    shared, anonymous = 1, 0x20
    assert asked.asks(call(_MMAP, 0, 8192, 3, shared, asked.fd, 0)) == [EventMap(_TID, _ID, 5, 8192, 3)]
    asked.calls.answer(EventAnswer(_ID, 0))
    assert asked.answers.given == [("proceed", _ID)]
    assert asked.asks(call(_MMAP, 0, 8192, 3, shared, asked.fd, 4096)) == "EINVAL"
    assert asked.asks(call(_MMAP, 0, 1 << 40, 3, shared, asked.fd, 0)) == "EINVAL"
    assert asked.asks(call(_MMAP, 0, 8192, 3, shared | anonymous, asked.fd, 0)) == "the host's"
    assert asked.asks(call(_MMAP, 0, 8192, 3, shared, 0, 0)) == "the host's"


def test_the_daemon_goes(asked: Asked) -> None:
    asked.calls.hold(call(_IOCTL, asked.fd, requests.ENABLE))
    asked.calls.abandon()
    asked.calls.answer(EventAnswer(_ID, 0))  # too late
    assert asked.answers.given == [("refuse", errno.EIO)]


def test_an_event_that_cannot_be_opened(asked: Asked) -> None:
    asked.calls.hold(call(_OPEN))
    asked.calls.answer(EventAnswer(_ID, 0, 0, "missing"))
    assert asked.answers.given == [("refuse", errno.ENOENT)]


@given(st.lists(st.integers(1, (1 << 64) - 1), max_size=HELD_MAX))
def test_calls_that_are_held(held: list[int]) -> None:
    progress = Progress()
    progress.hold(range(1, HELD_MAX + 1))
    progress.hold(held)
    assert progress.held == held
