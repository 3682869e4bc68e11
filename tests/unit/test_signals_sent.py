"""Whom a signal is sent to, held against this machine's processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror.calls import BY_NUMBER, NUMBER
from fakefs.mirror.records import Signal
from fakefs.mirror.seccomp import Notification
from fakefs.mirror.signals import Signals, catches, parse_masks, pid_behind, receivers, stopped_jobs

_LIMIT = 20.0  # seconds


def test_handlers_are_seen() -> None:
    me = os.getpid()
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        assert catches(me, signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert not catches(me, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not catches((1 << 22) + 1, signal.SIGUSR1)


def test_receivers() -> None:
    me, parent = os.getpid(), os.getppid()
    everybody = [parent, me, (1 << 22) + 1]
    assert list(receivers(me, parent, everybody)) == [parent]
    assert list(receivers(me, -1, everybody)) == [parent, everybody[2]]
    assert me in list(receivers(me, 0, everybody))
    assert list(receivers(me, -os.getpgrp(), everybody)) == list(receivers(me, 0, everybody))
    assert list(receivers(me, 5, everybody)) == []


def test_stopped_jobs() -> None:
    """In another process group than the shell's, and what they have started, as long as they are stopped."""
    me, [ours, theirs] = os.getpid(), os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        grandchild = os.fork()
        if grandchild == 0:
            os.kill(os.getppid(), signal.SIGSTOP)
            os.write(theirs, struct.pack("<i", os.getpid()))
            signal.pause()
        signal.pause()
    try:
        [grandchild] = struct.unpack("<i", os.read(ours, 4))
        os.waitpid(child, os.WUNTRACED)
        assert list(stopped_jobs(me, me)) == [child]
        os.kill(grandchild, signal.SIGSTOP)
        end = time.monotonic() + _LIMIT
        while list(stopped_jobs(me, me)) != [child, grandchild]:
            assert time.monotonic() < end
        os.kill(-child, signal.SIGCONT)
        while list(stopped_jobs(me, me)):
            assert time.monotonic() < end
    finally:
        os.kill(-child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ours)
        os.close(theirs)
    assert list(stopped_jobs(child, child)) == []


def test_a_thread_is_told_apart_from_its_process() -> None:
    groups = {10: 10, 11: 10, 20: 20}
    tgkill, kill = (BY_NUMBER[NUMBER[name]] for name in ("tgkill", "kill"))
    minus_one = (1 << 64) - 1
    record = Signals().sent(Notification(1, 20, tgkill.number, (10, 11, 9, 0, 0, 0)), tgkill, groups)
    assert record == Signal(20, tgkill.number, [10, 11, 9], [11], [])
    record = Signals().sent(Notification(1, 20, kill.number, (11, minus_one, 9, 0, 0, 0)), kill, groups)
    assert record == Signal(20, kill.number, [11, -1], [], [])


def test_relatives_of_kill() -> None:
    me = os.getpid()
    pidfd = os.pidfd_open(me)
    try:
        assert pid_behind(me, pidfd) == me
        call = BY_NUMBER[NUMBER["pidfd_send_signal"]]
        record = Signals().sent(Notification(1, me, call.number, (pidfd, 0, 0, 0, 0, 0)), call, {me: me})
        assert record == Signal(me, call.number, [me, 0], [me], [])
    finally:
        os.close(pidfd)
    with open(os.devnull) as file, pytest.raises(ValueError, match="not of a process"):
        pid_behind(me, file.fileno())
    info = ctypes.create_string_buffer(b"info", 128)
    call = BY_NUMBER[NUMBER["rt_tgsigqueueinfo"]]
    record = Signals().sent(Notification(1, me, call.number, (5, 6, 0, ctypes.addressof(info), 0, 0)), call, {me: me})
    assert record == Signal(me, call.number, [5, 6, 0], [], [], info.raw.decode("latin-1"))


@given(st.binary(max_size=300))
def test_any_bytes(status: bytes) -> None:
    for text in (status, b"\nSigCgt:\t" + status):
        with contextlib.suppress(ValueError):
            parse_masks(text)
