"""What calls have come to: sockets of this process, which are made between a call and the next."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from fakefs.mirror.calls import BY_NUMBER, NUMBER
from fakefs.mirror.endpoints import Endpoints
from fakefs.mirror.hostpaths import HostPaths
from fakefs.mirror.outcomes import Outcomes
from fakefs.mirror.records import Opened, Part, PathArgument, Plain, Record, Transfer, Used
from fakefs.mirror.seccomp import Notification

_ME = os.getpid()


@pytest.fixture
def outcomes() -> Iterator[Outcomes]:
    root = os.open("/", os.O_PATH)
    endpoints = Endpoints()
    for name in os.listdir("/proc/self/fd"):  # what pytest has is no news
        try:
            link = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if link.startswith("socket:"):
            endpoints.named(_ME, int(name), link)
    yield Outcomes(HostPaths(root, 0), endpoints)
    os.close(root)


def _expect(outcomes: Outcomes, name: str, record: Record, *values: int) -> list[Record]:
    call = BY_NUMBER[NUMBER[name]]
    notification = Notification(1, _ME, call.number, (*values, *(0,) * 6)[:6])
    return list(outcomes.expect(notification, call, _ME, record))


def test_a_new_socket(outcomes: Outcomes) -> None:
    record = Plain(_ME, NUMBER["socket"], [2, 1, 0])
    assert _expect(outcomes, "socket", record) == [record]
    with socket.socket() as made:
        [opened] = outcomes.seen(_ME)
        assert isinstance(opened, Opened)
        assert [used.fd for used in opened.files] == [made.fileno()]
        assert list(outcomes.seen(_ME)) == []  # told once
        _expect(outcomes, "socket", record)
        assert list(outcomes.seen(_ME)) == []  # that one has failed
    _expect(outcomes, "socket", record)
    with socket.socket(), socket.socket():
        assert list(outcomes.seen(_ME)) == []  # which one is it?


def test_a_pair(outcomes: Outcomes) -> None:
    one, two = socket.socketpair()
    with one, two:
        room = ctypes.create_string_buffer(struct.pack("<ii", one.fileno(), two.fileno()))
        record = Plain(_ME, NUMBER["socketpair"], [1, 1, 0, 1])
        _expect(outcomes, "socketpair", record, 1, 1, 0, ctypes.addressof(room))
        [opened] = outcomes.seen_of(_ME)
        assert isinstance(opened, Opened)
        assert [used.fd for used in opened.files] == [one.fileno(), two.fileno()]
    _expect(outcomes, "socketpair", record, 1, 1, 0, 1)  # no address
    assert list(outcomes.seen(_ME)) == []


def test_a_port(outcomes: Outcomes) -> None:
    """A bind that leaves it to the kernel waits for it; one that does not is told at once."""
    with socket.socket() as bound:
        used = Used(bound.fileno(), PathArgument("", []), 0, 0)
        anywhere, there = (
            struct.pack("<H", 2) + port + bytes([127, 0, 0, 1]) + bytes(8) for port in (b"\0\0", b"\1\2")
        )
        for address in (there, anywhere):
            part = Part([], "", address.decode("latin-1"))
            record = Transfer(_ME, NUMBER["bind"], [used], [bound.fileno(), 1, 16], [part], [])
            assert _expect(outcomes, "bind", record) == ([record] if address is there else [])
        bound.bind(("127.0.0.1", 0))
        [told] = outcomes.seen(_ME)
        assert isinstance(told, Transfer)
        port = bound.getsockname()[1].to_bytes(2, "big")
        assert told.parts[0].address.encode("latin-1") == anywhere[:2] + port + anywhere[4:]
    _expect(outcomes, "bind", record)
    assert list(outcomes.seen(_ME)) == [record]  # closed meanwhile
    _expect(outcomes, "accept", record)
    assert list(outcomes.seen_of(_ME)) == []  # may be waiting yet
