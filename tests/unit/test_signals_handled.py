"""What is found out of signals on the host: frames of handlers, masks, and which signal that makes it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror import sigframe
from fakefs.mirror.calls import BY_NUMBER, NUMBER
from fakefs.mirror.records import Handled
from fakefs.mirror.seccomp import Listener, Notification
from fakefs.mirror.sigframe import RT_SIGRETURN, Frame, leave, parse
from fakefs.mirror.signals import Masks, Signals, has, known, parse_masks, read_masks, which

_USR1, _ALRM, _RTMAX = 1 << signal.SIGUSR1 - 1, 1 << signal.SIGALRM - 1, 1 << 63
_LIMIT = 20.0


def frame(mask: int = 0, first: int = 0, info: bytes = bytes(32)) -> Frame:
    return Frame(0x7000, 0x4000, first, 0x5000, 0, mask, info)


def siginfo(number: int, code: int, words: tuple[int, int, int] = (1, 2, 3)) -> bytes:
    return struct.pack("<3i4x3I4x", number, 0, code, *words)


def test_a_frame_is_where_the_stack_pointer_points() -> None:
    context = bytearray(sigframe._SIZE)
    for offset, value in ((40 + 13 * 8, -errno.EINTR), (40 + 16 * 8, 0x4000), (296, _USR1)):
        struct.pack_into("<q", context, offset, value)
    context[304:316] = struct.pack("<3i", 12, 0, -6)
    asked: list[int] = []

    def read(at: int) -> bytes:
        asked.append(at)
        return bytes(context)

    found = parse(b"15 0xa 0x1 0x2 0x3 0x4 0x5 0x7000 0x4000\n", read)
    assert found == Frame(0x7000, 0x4000, 10, 0x4000, -errno.EINTR, _USR1, bytes(context[304:336]))
    assert found.interrupts
    assert asked == [0x7000]
    assert parse(b"1 0xa 0x1 0x2 0x3 0x4 0x5 0x7000 0x4000\n", read) is None
    for line in (b"", b"-1 0x7000 0x4000\n"):
        assert parse(line, read) is None
    with pytest.raises(ValueError, match="running"):
        parse(b"running\n", read)


@given(st.binary(max_size=200), st.binary(max_size=400))
def test_nonsense_is_no_frame(line: bytes, memory: bytes) -> None:
    for text in (line, b"15 0xa 0x1 0x2 0x3 0x4 0x5 0x7000 0x4000\n"):
        try:
            found = parse(text, lambda at: memory)
        except (ValueError, struct.error):
            continue
        assert found is None or len(memory) >= sigframe._MASK + 8


def test_masks() -> None:
    status = b"Name:\tx\nSigPnd:\t0000000000000001\nShdPnd:\t0000000000000002\nSigBlk:\t00000000000000f0\nSigIgn:\t0\n"
    assert parse_masks(status + b"SigCgt:\t8000000000000000\nCapInh:\t0\n") == Masks(3, 0xF0, _RTMAX)
    for text in (b"", status, status + b"SigCgt:\tmuch\n"):
        with pytest.raises(ValueError, match=r"status|invalid"):
            parse_masks(text)
    assert has(_RTMAX, 64)
    assert not any(has((1 << 64) - 1, number) for number in (-1, 0, 65))
    assert not read_masks(os.getpid()).pending


def test_which_signal_it_was() -> None:
    """The one that is no longer blocked; if several are, or none, what the handler was given decides."""
    everything = (1 << 64) - 1
    assert which(frame(), Masks(0, _USR1, _USR1)) == signal.SIGUSR1
    assert which(frame(), Masks(0, _USR1, 0)) == signal.SIGUSR1  # SA_RESETHAND
    assert which(frame(mask=_ALRM), Masks(0, _USR1 | _ALRM, _USR1 | _ALRM)) == signal.SIGUSR1  # in another handler
    assert which(frame(), Masks(0, everything, _USR1)) == signal.SIGUSR1
    assert which(frame(), Masks(0, everything, _USR1 | _ALRM)) == 0
    assert which(frame(first=14), Masks(0, everything, _USR1 | _ALRM)) == signal.SIGALRM
    assert which(frame(info=siginfo(10, 0)), Masks(0, everything, _USR1 | _ALRM)) == signal.SIGUSR1
    assert which(frame(mask=_USR1), Masks(0, _USR1, _USR1 | _ALRM)) == signal.SIGUSR1  # sigsuspend(2)
    assert which(frame(), Masks(0, 0, _USR1)) == 0  # SA_NODEFER
    assert which(frame(first=10), Masks(0, 0, _USR1)) == signal.SIGUSR1
    assert which(frame(first=14), Masks(0, 0, _USR1)) == 0


_WORDS = st.integers(0, (1 << 64) - 1)


@given(_WORDS, _WORDS, _WORDS, _WORDS, st.binary(min_size=32, max_size=32))
def test_it_is_one_that_can_be(blocked: int, caught: int, mask: int, first: int, info: bytes) -> None:
    found = which(frame(mask, first, info), Masks(0, blocked, caught))
    assert found == 0 or has(blocked | caught, found)
    assert len(known(frame(mask, first, info), found)) in (0, 5)


def test_what_is_known_of_the_sender() -> None:
    assert known(frame(info=siginfo(10, -6)), 10) == [0, -6, 1, 2, 3]
    assert known(frame(info=siginfo(17, 1)), 17) == [0, 1, 1, 2, 3]
    assert known(frame(info=siginfo(10, -6)), 12) == []
    assert known(frame(info=siginfo(10, 12345)), 10) == []


def test_one_that_was_sent_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is not pending any more, but not before the sender has done more than ask for it."""
    now = Masks(0, 0, _USR1)
    monkeypatch.setattr("fakefs.mirror.signals.read_masks", lambda tid: now)
    signals, groups = Signals(), {1: 1, 2: 2, 3: 2}
    kill = Notification(0, 1, NUMBER["kill"], (2, signal.SIGUSR1, 0, 0, 0, 0))

    def send() -> None:
        assert signals.sent(kill, BY_NUMBER[kill.number], groups).caught == [2]

    send()
    assert not list(signals.arrived(2, 2))  # it is being sent
    now = Masks(_USR1, 0, _USR1)
    assert not list(signals.arrived(1, 1))
    assert not list(signals.arrived(2, 2))
    now = Masks(0, _USR1, _USR1)
    assert list(signals.arrived(2, 2)) == [Handled(2, 10, [])]  # in its handler
    assert not list(signals.arrived(2, 2))
    assert not list(signals.handled(2, 2, frame()))
    assert list(signals.handled(2, 2, frame())) == [Handled(2, 10, [])]  # another one

    send()
    assert list(signals.handled(3, 2, frame())) == [Handled(3, 10, [])]  # by another thread, before the sender goes on
    assert not list(signals.arrived(1, 1))
    assert not list(signals.arrived(2, 2))
    send()
    assert not list(signals.arrived(1, 1))
    signals.forget(2)
    assert not list(signals.arrived(2, 2))


_NESTED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from fakefs.mirror.seccomp import Rule, install, program
import socket
count = [0, 0]
signal.signal(signal.SIGUSR1, lambda *_: count.__setitem__(0, count[0] + 1))
signal.signal(signal.SIGUSR2, lambda *_: count.__setitem__(1, count[1] + 1))
theirs = socket.socket(fileno=int(sys.argv[2]))
socket.send_fds(theirs, [b"l"], [install(program([Rule(15)]))])
os.kill(os.getpid(), signal.SIGUSR1)
sys.exit(count != [1, 1])
"""


def test_a_handler_interrupted_on_its_way_out() -> None:
    """By a signal whose handler is without SA_RESTART, before the notification is received: nothing is lost."""
    ours, theirs = socket.socketpair()
    home = str(Path(__file__).resolve().parents[2])
    child = os.fork()
    if child == 0:
        theirs.set_inheritable(True)
        os.execv(sys.executable, [sys.executable, "-c", _NESTED, home, str(theirs.fileno())])
    theirs.close()
    _, [fd], _, _ = socket.recv_fds(ours, 1, 1)
    listener = Listener(fd)
    both = _USR1 | 1 << signal.SIGUSR2 - 1
    end = time.monotonic() + _LIMIT
    while not read_masks(child).blocked & _USR1:
        assert time.monotonic() < end
    while Path(f"/proc/{child}/syscall").read_text().split()[0] != str(RT_SIGRETURN):
        assert time.monotonic() < end
    os.kill(child, signal.SIGUSR2)
    while read_masks(child).blocked & both != both:
        assert time.monotonic() < end
    seen: list[tuple[int, bool]] = []
    while len(seen) < 2:
        notification = listener.receive()
        if notification is not None:
            left = leave(notification.tid, partial(listener.is_valid, notification.id))
            assert left is not None
            seen.append((which(left, read_masks(child)), left.interrupts))
            listener.proceed(notification.id)
    assert seen == [(signal.SIGUSR2, True), (signal.SIGUSR1, False)]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(fd)
    ours.close()
