"""What becomes of signals on the host: whom kill(2) and its like send one to, and which have run a handler: signal(7).

What is not caught is the host kernel's business: if it ends or stops a process, that is seen later.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from fakefs.mirror.arguments import signed
from fakefs.mirror.calls import Call
from fakefs.mirror.records import Handled, Signal, Stopped
from fakefs.mirror.seccomp import Notification, read_memory
from fakefs.mirror.sigframe import Frame

_TO_A_THREAD = ("tgkill", "rt_tgsigqueueinfo")
_QUEUES = ("rt_sigqueueinfo", "rt_tgsigqueueinfo")
_INFO_SIZE = 128  # bytes of a siginfo_t
_STATUS_MAX = 8192
_INFO = struct.Struct("<3i4x3I4x")  # siginfo_t: si_signo, si_errno, si_code; si_pid, si_uid, si_status or others
_CODE_MIN, _CODE_MAX = -60, 0x80  # <asm-generic/siginfo.h>: SI_ASYNCNL, SI_KERNEL
_ERRNO_MAX = 4095
_JOBS_MAX = 64  # that a shell may have


class Masks(NamedTuple):
    """What /proc/TID/status says of signals, a bit each from the lowest: signal 1."""

    pending: int
    blocked: int
    caught: int


def parse_masks(status: bytes) -> Masks:
    """Parse /proc/TID/status. Raises ValueError."""
    fields = dict(line.split(b":\t", 1) for line in status.split(b"\n") if line.startswith((b"Sig", b"ShdPnd")))
    try:
        thread, process, blocked, caught = (
            int(fields[name], 16) for name in (b"SigPnd", b"ShdPnd", b"SigBlk", b"SigCgt")
        )
    except KeyError:
        raise ValueError("not /proc/TID/status") from None
    return Masks(thread | process, blocked, caught)


def read_masks(tid: int) -> Masks:
    """Return what /proc says of a thread's signals. Raises OSError or ValueError."""
    with open(f"/proc/{tid}/status", "rb", buffering=0) as file:
        return parse_masks(file.read(_STATUS_MAX))


def has(mask: int, number: int) -> bool:
    """Is a signal, or what is given as the number of one, in a mask?"""
    return 0 < number <= 64 and bool(mask >> (number - 1) & 1)


def catches(tid: int, number: int) -> bool:
    """Has the process a handler for a signal?"""
    with suppress(OSError, ValueError):
        return has(read_masks(tid).caught, number)
    return False


def asked(notification: Notification, call: Call) -> list[int]:
    """Return the ids of whom a call is to send a signal to, and the signal's number.

    Raises OSError and ValueError when there is no such process.
    """
    arguments = [signed(value) for value in notification.arguments[: 3 if call.name in _TO_A_THREAD else 2]]
    if call.name == "pidfd_send_signal":
        arguments[0] = pid_behind(notification.tid, arguments[0])
    return arguments


def pid_behind(tid: int, fd: int) -> int:
    """Return the process that a descriptor of a thread's process is of. Raises OSError and ValueError."""
    with open(f"/proc/{tid}/fdinfo/{fd}", "rb") as file:
        _, found, rest = file.read(_STATUS_MAX).partition(b"Pid:\t")
    pid = int(rest.split(b"\n")[0]) if found else 0
    if pid <= 0:
        raise ValueError("not of a process")
    return pid


class Signals:
    """Those that were sent to somebody who has a handler for it, and that no handler is known to have been run for."""

    def __init__(self) -> None:
        self._sending: dict[int, tuple[list[int], int]] = {}  # by threads that have made no call since: to whom, which
        self._sent: dict[int, set[int]] = {}  # by process
        self._begun: set[tuple[int, int]] = set()  # threads and signals: in a handler that was told of

    def sent(self, notification: Notification, call: Call, groups: Mapping[int, int]) -> Signal:
        """Return the record of a call. `groups`: the thread groups of all threads that are mirrored."""
        arguments = asked(notification, call)
        *_, target, number = arguments
        if call.name == "kill":
            to = list(receivers(groups[notification.tid], target, sorted(set(groups.values()))))
        else:
            to = [target] if target in groups else []
        caught = [each for each in to if catches(each, number)]
        if caught:
            self._sending[notification.tid] = [groups[each] for each in caught], number
        info = b""
        if call.name in _QUEUES:
            info = read_memory(notification.tid, notification.arguments[len(arguments)], _INFO_SIZE)
        return Signal(notification.tid, call.number, arguments, to, caught, info.decode("latin-1"))

    def forget(self, tid: int) -> None:
        """A thread has become another program, or has ended."""
        self._sending.pop(tid, None)
        self._sent.pop(tid, None)

    def arrived(self, tid: int, tgid: int) -> Iterator[Handled]:
        """Yield the signals that were sent to a process and are not pending any more: a thread of it makes a call."""
        if tid in self._sending:
            targets, number = self._sending.pop(tid)
            for target in targets:
                self._sent.setdefault(target, set()).add(number)
        if tgid not in self._sent:
            return
        with suppress(OSError, ValueError):
            masks = read_masks(tid)
            for number in [each for each in self._sent[tgid] if not has(masks.pending, each)]:
                self._forget(tgid, number)
                if has(masks.blocked, number):
                    self._begun.add((tid, number))
                yield Handled(tid, number, [])

    def handled(self, tid: int, tgid: int, frame: Frame) -> Iterator[Handled | Stopped]:
        """Yield the signal whose handler a thread leaves, if it has not been told of already.

        Before that of a child the jobs of a shell that are stopped: a terminal may have stopped them.
        """
        number = which(frame, read_masks(tid))
        if not number:
            return
        if number == signal.SIGCHLD:
            yield from map(Stopped, stopped_jobs(tgid, tid))
        self._forget(tgid, number)
        if (tid, number) in self._begun:
            self._begun.discard((tid, number))
        else:
            yield Handled(tid, number, known(frame, number))

    def _forget(self, tgid: int, number: int) -> None:
        for tid, (targets, sent) in list(self._sending.items()):
            if sent == number and tgid in targets:
                targets.remove(tgid)
                if not targets:
                    del self._sending[tid]
        if (numbers := self._sent.get(tgid)) is not None:
            numbers.discard(number)
            if not numbers:
                del self._sent[tgid]


def receivers(sender: int, target: int, processes: list[int]) -> Iterator[int]:
    """Yield the processes that kill(2) with a target of -1, 0, a process or (negative) its group is about."""
    if target > 0:
        yield from (pid for pid in processes if pid == target)
    elif target == -1:
        yield from (pid for pid in processes if pid != sender)
    else:
        with suppress(OSError):
            group = -target or os.getpgid(sender)
            for pid in processes:
                with suppress(OSError):
                    if os.getpgid(pid) == group:
                        yield pid


def stopped_jobs(pid: int, tid: int) -> Iterator[int]:
    """Yield the stopped children of a thread's that are not in its process group, and theirs."""
    with suppress(OSError, ValueError):
        group = os.getpgid(pid)
        for child in children(pid, tid):
            if os.getpgid(child) != group:
                yield from _stopped(child)


def _stopped(pid: int) -> Iterator[int]:
    if is_stopped(pid):
        yield pid
        for child in children(pid, pid):
            yield from _stopped(child)


def children(pid: int, tid: int) -> list[int]:
    """Return the children of a thread. Raises OSError."""
    with open(f"/proc/{pid}/task/{tid}/children", "rb") as file:
        return [int(word) for word in file.read(_STATUS_MAX).split()[:_JOBS_MAX]]


def is_stopped(tid: int) -> bool:
    """Is a thread of the host's stopped?"""
    try:
        with open(f"/proc/{tid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False


def which(frame: Frame, masks: Masks) -> int:
    """Return the signal whose handler leaves by a frame, 0 when that cannot be told.

    It is blocked while the handler runs, and not afterwards, unless the handler is for its being let through by
    sigsuspend(2). So may others be, by sa_mask: then what the handler was given tells, if that is still there.
    """
    signo, *_ = _INFO.unpack(frame.info)
    blocked = masks.blocked & ~frame.mask or masks.blocked & masks.caught
    for among in (blocked, blocked & masks.caught):
        for number in (signo, frame.first):
            if has(among, number):
                return number
        if among and not among & (among - 1):
            return among.bit_length()
    return next((number for number in (signo, frame.first) if not blocked and has(masks.caught, number)), 0)


def known(frame: Frame, number: int) -> list[int]:
    """Return si_errno, si_code and the three words behind of what a handler was given; nothing if it was not."""
    signo, error, code, *words = _INFO.unpack(frame.info)
    if signo != number or not 0 <= error <= _ERRNO_MAX or not _CODE_MIN <= code <= _CODE_MAX:
        return []
    return [error, code, *words]
