"""Calls that are not to be made, as they would be about the host where only the guest can be meant.

Follows perf_event_open(2).
"""

from __future__ import annotations

import errno
import os

from fakefs.mirror.calls import Call
from fakefs.mirror.seccomp import Notification, read_memory

_PERF_TYPE_TRACEPOINT = (2).to_bytes(4, "little")


class Refused(Exception):
    """`number` is the error that such a call fails with."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


def perf_event_open(notification: Notification, call: Call) -> tuple[()]:
    """Raise Refused for a tracepoint: the number it has in the guest's tracefs is another's on the host."""
    if read_memory(notification.tid, notification.arguments[0], 4) == _PERF_TYPE_TRACEPOINT:
        raise Refused(errno.ENOENT)
    return ()
