"""Signals that are let through to a task from outside, while it is blocked in a call."""

from __future__ import annotations

import errno
import signal
import struct

import pytest

from emulator.agent import Request, Task
from emulator.cpu.interface import Stop
from emulator.guest import Guest
from fakefs.mirror.signals import has
from fakefs.mirror.sleepers import Sleepers, sleeper_facts
from fakefs.syscalls import Sys
from tests.guest_tasks import call, finish, spawn

_TIME, _SET, _PENDING = 0, 16, 24
_SIG_BLOCK = 0
_LONG = 40  # virtual seconds
_STEP = 10**8  # virtual ns
_TERM = int(signal.SIGTERM)


@pytest.fixture
def sleepers(guest: Guest) -> Sleepers:
    facts = sleeper_facts(guest)
    assert facts is not None
    return Sleepers(guest, facts)


@pytest.fixture
def asleep(guest: Guest) -> tuple[Task, Request]:
    """A process that has SIGTERM blocked, and sleeps."""
    task, _ = spawn(guest)
    guest.agent.put(task, _TIME, struct.pack("<qqQ", _LONG, 0, 1 << (_TERM - 1)))
    assert call(guest, task, (Sys.RT_SIGPROCMASK, _SIG_BLOCK, task.virtual(_SET), 0, 8)) == [0]
    request = guest.agent.submit(task, [(Sys.NANOSLEEP, task.virtual(_TIME), 0)])
    while guest.agent.step(guest.machine.cpu.now + _STEP) is not Stop.HALTED:
        assert not request.done
    return task, request


def test_a_handler_is_run(guest: Guest, sleepers: Sleepers, asleep: tuple[Task, Request]) -> None:
    """The call ends, by a signal that looks like the kernel's, and then all is as before."""
    task, request = asleep
    assert not has(sleepers.pending(task), _TERM)
    with sleepers.sent_by_kernel():
        assert guest.call((Sys.KILL, task.pid, _TERM)) == [0]
    assert has(sleepers.pending(task), _TERM)
    assert not request.done
    began = guest.machine.cpu.now
    with sleepers.open_to(task, _TERM, caught=True) as reached:
        assert reached
        assert finish(guest, request) == [-errno.EINTR]
    assert guest.machine.cpu.now - began < _LONG * 10**9
    assert not has(sleepers.pending(task), _TERM)
    assert guest.call((Sys.KILL, task.pid, _TERM)) == [0]  # it is blocked again
    assert call(guest, task, (Sys.RT_SIGPENDING, task.virtual(_PENDING), 8)) == [0]
    assert struct.unpack("<Q", guest.agent.get(task, _PENDING, 8)) == (1 << (_TERM - 1),)


def test_without_a_handler_it_dies(guest: Guest, sleepers: Sleepers, asleep: tuple[Task, Request]) -> None:
    task, request = asleep
    assert guest.call((Sys.KILL, task.pid, _TERM)) == [0]
    with sleepers.open_to(task, _TERM, caught=False) as reached:
        assert reached
        finish(guest, request)
    assert task.dead
    assert sleepers.pending(task) == 0
    with sleepers.open_to(task, _TERM, caught=True) as reached:
        assert not reached


def test_one_that_is_woken_for_nothing_sleeps_on(guest: Guest, asleep: tuple[Task, Request]) -> None:
    task, request = asleep
    began = guest.machine.cpu.now
    assert guest.agent.stir(task)
    assert finish(guest, request) == [0]
    assert guest.machine.cpu.now - began > (_LONG - 1) * 10**9


def test_a_kernel_that_tells_nothing(guest: Guest, asleep: tuple[Task, Request]) -> None:
    task, _ = asleep
    blind = Sleepers(guest, None)
    assert blind.pending(task) == 0
    with blind.open_to(task, _TERM, caught=True) as reached:
        assert not reached
