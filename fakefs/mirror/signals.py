"""Whom kill(2), tkill(2) and tgkill(2) send a signal to, and what becomes of it there: signal(7).

What is not caught is the host kernel's business: if it ends or stops a process, that is seen later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress

from fakefs.mirror.arguments import signed
from fakefs.mirror.calls import Call
from fakefs.mirror.records import Signal
from fakefs.mirror.seccomp import Notification

_STATUS_MAX = 8192


def sent(notification: Notification, call: Call, groups: Mapping[int, int]) -> Signal:
    """Return the record of a call. `groups`: the thread groups of all threads that are mirrored."""
    arguments = [signed(value) for value in notification.arguments[: 3 if call.name == "tgkill" else 2]]
    *_, target, number = arguments
    if call.name == "kill":
        to = list(receivers(groups[notification.tid], target, sorted(set(groups.values()))))
    else:
        to = [target] if target in groups else []
    caught = [each for each in to if 0 < number <= 64 and catches(each, number)]
    return Signal(notification.tid, call.number, arguments, to, caught)


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


def catches(tid: int, number: int) -> bool:
    """Has the process a handler for a signal?"""
    try:
        with open(f"/proc/{tid}/status", "rb") as file:
            return bool(caught(file.read(_STATUS_MAX)) >> (number - 1) & 1)
    except (OSError, ValueError):
        return False


def caught(status: bytes) -> int:
    """Parse /proc/PID/status for the mask of signals that have a handler. Raises ValueError."""
    _, found, rest = status.partition(b"\nSigCgt:\t")
    if not found:
        raise ValueError("not /proc/PID/status")
    return int(rest.split(b"\n")[0], 16)
