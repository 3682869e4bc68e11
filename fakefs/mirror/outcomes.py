"""What some calls have come to on the host, as it is seen when their thread makes its next one.

A call goes on before anybody could see its result. But for the guest it matters which sockets accept(2), socket(2) and
socketpair(2) have returned, as several may wait to be told apart, and which port bind(2) has chosen.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from fakefs.mirror import openfiles
from fakefs.mirror.calls import Call
from fakefs.mirror.endpoints import Endpoints, has_any_port, port_of
from fakefs.mirror.hostpaths import HostPaths, NotMirrored
from fakefs.mirror.records import Opened, Record, Transfer
from fakefs.mirror.seccomp import Notification, read_memory

_LOOKED_AT_MAX = 256
"""Of a process that has more files open nobody finds out which of them is new."""
_PAIR = struct.Struct("<ii")


class _Call(NamedTuple):
    """One that has not returned yet, for all that is known. `pid` is its thread's process."""

    pid: int
    name: str
    address: int
    record: Record


class Outcomes:
    """Of one program and its descendants."""

    def __init__(self, paths: HostPaths, endpoints: Endpoints) -> None:
        self._look = partial(openfiles.look, paths=paths, endpoints=endpoints)
        self._endpoints = endpoints
        self._calls: dict[int, _Call] = {}

    def expect(self, notification: Notification, call: Call, pid: int, record: Record) -> Iterator[Record]:
        """Yield the record of a call, if it need not wait until the outcome is seen."""
        binds = isinstance(record, Transfer) and call.name == "bind"
        if call.name in ("accept", "accept4", "socket", "socketpair") or (binds and _any_port(record)):
            self._calls[notification.tid] = _Call(pid, call.name, notification.arguments[3], record)
        if not binds or notification.tid not in self._calls:
            yield record

    def seen(self, tid: int) -> Iterator[Record]:
        """Yield what is to be told of the last call of a thread, which has returned."""
        call = self._calls.pop(tid, None)
        if call is not None:
            with suppress(OSError, ValueError, NotMirrored, struct.error):
                yield self._outcome(tid, call)

    def seen_of(self, pid: int) -> Iterator[Record]:
        """The same for all threads of a process that are not in a call that blocks: what it forks has it all."""
        for tid, call in list(self._calls.items()):
            if call.pid == pid and not call.name.startswith("accept"):
                yield from self.seen(tid)

    def _outcome(self, tid: int, call: _Call) -> Record:
        if isinstance(call.record, Transfer) and call.name == "bind":
            return _with_port(call.record, call.pid)
        if call.name == "socketpair":
            fds = list(_PAIR.unpack(read_memory(tid, call.address, _PAIR.size)))
        else:
            fds = openfiles.descriptors(tid)
        new = [fd for fd in fds if self._is_new(tid, fd)] if len(fds) <= _LOOKED_AT_MAX else []
        if len(new) != (2 if call.name == "socketpair" else 1):
            raise NotMirrored
        return Opened(tid, [self._look(tid, call.pid, fd) for fd in new])

    def _is_new(self, tid: int, fd: int) -> bool:
        try:
            link = os.readlink(f"/proc/{tid}/fd/{fd}")
        except OSError:
            return False
        return link.startswith("socket:[") and not self._endpoints.knows(link)


def _any_port(record: Record) -> bool:
    return isinstance(record, Transfer) and any(has_any_port(part.address.encode("latin-1")) for part in record.parts)


def _with_port(record: Transfer, pid: int) -> Transfer:
    [part] = record.parts
    with suppress(OSError):
        address = port_of(pid, record.files[0].fd, part.address.encode("latin-1"))
        part = part._replace(address=address.decode("latin-1"))
    return record._replace(parts=[part])
