"""What has no path, in the guest: sockets, on its loopback and in its filesystem; eventfd(2), epoll(7) and the like.

The calls that return them are made in the guest without anybody knowing which number they return on the host. What they
have opened waits, first come first served, until a call is about one of that kind which has not been seen yet. Sockets
have names, others are taken for the last one of their kind that is open.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence

from fakefs.mirror.blocking import LASTING
from fakefs.mirror.calls import BY_NUMBER
from fakefs.mirror.endpoints import parse_name
from fakefs.mirror.mirrored import Mirrored, OpenFile, Unclaimed
from fakefs.mirror.records import PathArgument, Plain, Used
from fakefs.shadow import Shadows
from fakefs.syscalls import Sys

F_SETFL = 4
_SIOCSIFFLAGS, _IFF_UP_RUNNING = 0x8914, 0x41
_FLAGS = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_PAIR = struct.Struct("<ii")
_SOCKET = "socket:"


def is_socket(file: PathArgument) -> bool:
    """Is what a record says of an open file a socket?"""
    return file.text.startswith(_SOCKET)


def kind_of(name: str, arguments: Sequence[int] = ()) -> str:
    """Return what those have in common that a call may have returned; "" for a name that no call of this kind returns.

    `name` is that of an open file, or what /proc shows of those that a call with these arguments returns.
    """
    if name.startswith(_SOCKET):
        domain, kind, _ = arguments or parse_name(name)
        return f"{_SOCKET} {domain} {kind & ~_FLAGS}"
    return name if name.startswith("anon_inode:") else ""


class Connections:
    """All of them."""

    def __init__(self, shadows: Shadows) -> None:
        self._shadows = shadows
        self._pump = shadows.pump
        self._up = False

    async def create(self, shadow: Mirrored, record: Plain) -> None:
        """socket(2), eventfd(2) and the like: what they return waits. The caller holds the shadow's lock."""
        kind = kind_of(BY_NUMBER[record.number].returns, record.arguments[:3])
        if record.number == Sys.SOCKETPAIR:
            words = [*record.arguments[:3], shadow.task.virtual(LASTING)]
            [result] = await self._pump.call(shadow.task, [(record.number, *words)])
            fds = _PAIR.unpack(self._pump.agent.get(shadow.task, LASTING, _PAIR.size)) if result == 0 else ()
        else:
            fds = (await self._return(shadow, record),)
        closing = [call for fd in fds if fd >= 0 for call in shadow.opened(kind, fd)]
        if closing:
            await self._pump.call(shadow.task, closing)

    async def _return(self, shadow: Mirrored, record: Plain) -> int:
        if record.number == Sys.SOCKET and not self._up:
            self._up = True
            await self._set_loopback_up()
        return (await self._pump.call(shadow.task, [(record.number, *record.arguments)]))[0]

    async def open(self, shadow: Mirrored, name: str) -> int:
        """Return a descriptor of what has a name on the host. The caller holds the shadow's lock."""
        kind = kind_of(name)
        if not name.startswith(_SOCKET):
            fd = shadow.claim(kind)
            return fd if fd >= 0 else await self._of_its_own(shadow, name)
        fd = await self._of_its_own(shadow, name)
        if fd < 0:
            fd = shadow.claim(kind)
        if fd >= 0:
            return fd
        for other in self._shadows.all():
            if isinstance(other, Mirrored) and not other.task.dead:
                for file in other.files.values():
                    if file.path == name:
                        return await self._of_another(shadow, other, file)
        return await self._return(shadow, Plain(shadow.tid, Sys.SOCKET, list(parse_name(name))))

    async def _of_its_own(self, shadow: Mirrored, name: str) -> int:
        for file in shadow.files.values():
            if file.path == name:
                return (await self._pump.call(shadow.task, [(Sys.DUP, file.fd)]))[0]
        return -errno.ENOENT

    async def set_flags(self, shadow: Mirrored, used: Used, file: OpenFile) -> OpenFile:
        """Have a socket block only if the host's does. The caller holds the shadow's lock."""
        if not (file.flags ^ used.flags) & os.O_NONBLOCK:
            return file
        await self._pump.call(shadow.task, [(Sys.FCNTL, file.fd, F_SETFL, used.flags & os.O_NONBLOCK)])
        file = shadow.files[used.fd] = file._replace(flags=used.flags & (os.O_ACCMODE | os.O_NONBLOCK))
        return file

    def accepted(self, shadow: Mirrored, listening: OpenFile, fd: int) -> None:
        """accept(2) has returned."""
        if fd >= 0:
            shadow.unclaimed.append(Unclaimed(kind_of(listening.path), fd, shadow.tid))

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
