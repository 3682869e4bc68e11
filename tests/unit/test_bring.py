"""Bringing files into a guest that does not tell the truth: it ends, and takes no more than the guest could have."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from emulator.agent import DATA_SIZE, Call
from fakefs.files import Caller
from fakefs.hostfiles.bring import HostFiles
from fakefs.shadow import Shadows
from fakefs.syscalls import Sys

ME = Caller(os.getpid(), os.geteuid(), os.getegid())
RAM = 1 << 20


class LyingGuest:
    """Answers each system call with a number of its own, and has as much memory as it likes."""

    def __init__(self, answers: dict[Sys, int], free: int = 1 << 62) -> None:
        self.answers = {Sys.STATX: -2, Sys.OPENAT: 3, **answers}
        self.free = free
        self.calls: list[int] = []
        self.agent = self
        self.machine = SimpleNamespace(ram_size=RAM)
        self.init = SimpleNamespace(lock=trio.Lock(), task=SimpleNamespace(virtual=lambda offset=0: offset))
        self.pump = self

    async def call(self, task: object, calls: Sequence[Call]) -> list[int]:
        await trio.lowlevel.checkpoint()
        self.calls += [call[0] for call in calls]
        assert len(self.calls) < 1000
        return [self.answers.get(Sys(call[0]), 0) for call in calls]

    def put(self, task: object, offset: int, data: bytes) -> None:
        assert 0 <= offset <= offset + len(data) <= DATA_SIZE

    def get(self, task: object, offset: int, size: int) -> bytes:
        return struct.pack("<40xQ56xI", self.free, 1 << 31)[:size].ljust(size, b"\xff")

    def bring(self, path: Path) -> None:
        files = HostFiles(cast(Shadows, cast(Any, self)))
        trio.run(files.bring, ME, [os.fsencode(path)])


@pytest.mark.parametrize("answer", [0, -28, -5, 1 << 40])
def test_any_answer_to_a_write_ends_it(tmp_path: Path, answer: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    guest = LyingGuest({Sys.WRITE: answer})
    if answer > 0:
        guest.bring(path)
        return
    with pytest.raises(OSError, match=str(path)):
        guest.bring(path)
    assert guest.calls.count(Sys.CLOSE) == guest.calls.count(Sys.UNLINKAT) == 1


def test_no_more_is_read_than_the_guest_has_room_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    guest = LyingGuest({Sys.WRITE: 4096})
    with pytest.raises(OSError, match="File too large"):
        guest.bring(path)
    assert Sys.WRITE not in guest.calls


def test_a_guest_that_has_everything_gets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    guest = LyingGuest({Sys.STATX: 0})
    guest.bring(path)
    assert set(guest.calls) == {Sys.STATX, Sys.MKDIRAT}
