"""What /proc says of a thread that is seen for the first time."""

from __future__ import annotations

import contextlib
import os
import threading

from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror.births import parse_birth, read_birth
from fakefs.mirror.records import Birth


def test_a_process_and_a_thread() -> None:
    me = os.getpid()
    old = os.umask(0o027)
    try:
        birth = read_birth(me)
        assert birth is not None
        assert (birth.tid, birth.tgid, birth.parent, birth.umask) == (me, me, os.getppid(), 0o027)
        found: list[Birth | None] = []
        thread = threading.Thread(target=lambda: found.append(read_birth(threading.get_native_id())))
        thread.start()
        thread.join()
        [seen] = found
        assert seen is not None
        assert (seen.tgid, seen.parent) == (me, me)
    finally:
        os.umask(old)
    assert read_birth((1 << 22) + 1) is None


def test_one_that_is_ending_has_no_umask_any_more() -> None:
    text = b"Name:\tsh\nUmask:\t0022\nState:\tR (running)\nTgid:\t5\nPid:\t5\nPPid:\t1\n"
    assert parse_birth(5, text) is not None
    assert parse_birth(5, text.replace(b"Umask:\t0022\n", b"")) is None
    assert parse_birth(5, text.replace(b"R (running)", b"Z (zombie)")) is None


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_any_bytes(first: bytes, second: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_birth(1, first + b"\nUmask:\t0022\nState:\tR\n" + second)
