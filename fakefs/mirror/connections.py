"""Sockets of mirrored processes in the guest: on its loopback, and in its filesystem.

socket(2) and accept(2) are made in the guest without anybody knowing which number they return on the host. What they
have opened waits, first come first served, until a call is about a socket of that kind which has not been seen yet.
"""

from __future__ import annotations

import os
import socket
import struct
from functools import partial

from fakefs.mirror.blocking import LASTING
from fakefs.mirror.calls import BY_NUMBER, NUMBER
from fakefs.mirror.endpoints import parse_name
from fakefs.mirror.filecalls import ANSWER, ANSWER_SIZE
from fakefs.mirror.processes import Mirrored, OpenFile, Processes, Unclaimed
from fakefs.mirror.records import Transfer
from fakefs.shadow import Shadows
from fakefs.syscalls import Sys

_F_SETFL = 4
_SIOCSIFFLAGS, _IFF_UP_RUNNING = 0x8914, 0x41
_FLAGS = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_UNCLAIMED_MAX = 16
_ACCEPTS = frozenset(NUMBER[name] for name in ("accept", "accept4"))


class Connections:
    """All of them."""

    def __init__(self, shadows: Shadows, processes: Processes) -> None:
        self._shadows = shadows
        self._pump = shadows.pump
        self._processes = processes
        self._up = False

    async def create(self, shadow: Mirrored, domain: int, kind: int, protocol: int) -> int:
        """socket(2). The caller holds the shadow's lock."""
        if not self._up:
            self._up = True
            await self._set_loopback_up()
        [fd] = await self._pump.call(shadow.task, [(Sys.SOCKET, domain, kind & ~_FLAGS, protocol)])
        return fd

    async def keep(self, shadow: Mirrored, domain: int, kind: int, fd: int) -> None:
        """Let a socket that a call has returned wait for its name. The caller holds the shadow's lock."""
        if fd < 0:
            return
        shadow.unclaimed.append(Unclaimed(domain, kind & ~_FLAGS, fd))
        if len(shadow.unclaimed) > _UNCLAIMED_MAX:
            await self._pump.call(shadow.task, [(Sys.CLOSE, shadow.unclaimed.pop(0).fd)])

    async def open(self, shadow: Mirrored, name: str) -> int:
        """Return a descriptor of the socket that has a name on the host. The caller holds the shadow's lock."""
        domain, kind, protocol = parse_name(name)
        for file in shadow.files.values():
            if file.path == name:
                return (await self._pump.call(shadow.task, [(Sys.DUP, file.fd)]))[0]
        for waiting in shadow.unclaimed:
            if (waiting.domain, waiting.kind) == (domain, kind):
                shadow.unclaimed.remove(waiting)
                return waiting.fd
        for other in self._shadows.all():
            if isinstance(other, Mirrored) and not other.task.dead:
                for file in other.files.values():
                    if file.path == name:
                        return await self._of_another(shadow, other, file)
        return await self.create(shadow, domain, kind, protocol)

    async def make(self, shadow: Mirrored, record: Transfer, file: OpenFile) -> None:
        """connect(2), bind(2), accept(2), send(2) and the like. The caller holds the shadow's lock."""
        task, agent = shadow.task, self._pump.agent
        size = min(record.arguments[1] or 0, ANSWER_SIZE) if len(record.arguments) > 1 else 0
        data, address = record.data.encode("latin-1")[:size], record.address.encode("latin-1")
        if data:
            agent.put(task, ANSWER, data + bytes(size - len(data)))
        agent.put(task, LASTING, address)
        words: list[int] = []
        for letter, word in zip(BY_NUMBER[record.number].arguments[1:], record.arguments, strict=False):
            if letter in "Bb":
                words += [task.virtual(ANSWER), size]
            elif letter == "S":
                words += [task.virtual(LASTING), len(address)] if address else [0, 0]
            elif letter == "n":
                words.append(0)
            elif letter == "i":
                words.append(word or 0)
        returned = partial(self._accepted, shadow, file) if record.number in _ACCEPTS else None
        call = (record.number, file.fd, *words)
        await self._processes.blocking.begin(shadow, [call], returned=returned)

    async def set_flags(self, shadow: Mirrored, record: Transfer, file: OpenFile) -> OpenFile:
        """Have a socket block only if the host's does. The caller holds the shadow's lock."""
        if not (file.flags ^ record.flags) & os.O_NONBLOCK:
            return file
        await self._pump.call(shadow.task, [(Sys.FCNTL, file.fd, _F_SETFL, record.flags & os.O_NONBLOCK)])
        file = shadow.files[record.fd] = file._replace(flags=record.flags & (os.O_ACCMODE | os.O_NONBLOCK))
        return file

    def _accepted(self, shadow: Mirrored, listening: OpenFile, results: list[int]) -> None:
        if results[-1] >= 0:
            domain, kind, _ = parse_name(listening.path)
            shadow.unclaimed.append(Unclaimed(domain, kind, results[-1]))

    async def _of_another(self, shadow: Mirrored, other: Mirrored, file: OpenFile) -> int:
        call = self._pump.call
        [pidfd] = await call(shadow.task, [(Sys.PIDFD_OPEN, other.task.pid, 0)])
        [fd, _] = await call(shadow.task, [(Sys.PIDFD_GETFD, pidfd, file.fd, 0), (Sys.CLOSE, pidfd)])
        return fd

    async def _set_loopback_up(self) -> None:
        init = self._shadows.init
        async with init.lock:
            self._pump.agent.put(init.task, 0, struct.pack("<16sh22x", b"lo", _IFF_UP_RUNNING))
            [fd] = await self._pump.call(init.task, [(Sys.SOCKET, socket.AF_INET, socket.SOCK_DGRAM, 0)])
            at = init.task.virtual(0)
            await self._pump.call(init.task, [(Sys.IOCTL, fd, _SIOCSIFFLAGS, at), (Sys.CLOSE, fd)])
