"""Sockets of the host's processes: of what kind one is, and which addresses are in the guest too.

The guest has no network but its own loopback: what is bound or connected there, or in the filesystem, is as on the
host. Addresses are as in ip(7), ipv6(7) and unix(7).
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections import OrderedDict

from fakefs.mirror.hostpaths import HostPaths, NotMirrored
from fakefs.mirror.records import PathArgument

ADDRESS_MAX = 128
"""Bytes of an address: struct sockaddr_storage."""
_SYS_PIDFD_GETFD = 438
_KNOWN_MAX = 1024
FAMILIES = frozenset((socket.AF_UNIX, socket.AF_INET, socket.AF_INET6))
"""Those that the guest has."""
_PATH_MAX = 107
_MAPPED = bytes(10) + b"\xff\xff"

_libc = ctypes.CDLL(None, use_errno=True)


class Endpoints:
    """Knows the sockets it has been asked about, by the name that the kernel shows."""

    def __init__(self) -> None:
        self._named: OrderedDict[str, str] = OrderedDict()

    def knows(self, link: str) -> bool:
        """Was it asked about this one lately?"""
        return link in self._named

    def named(self, tid: int, fd: int, link: str) -> str:
        """Return the name of a socket, with its domain, type and protocol in it; "" if it is none for the guest.

        `link` is what /proc/TID/fd has. Raises OSError when it is gone.
        """
        name = self._named.get(link)
        if name is None:
            if len(self._named) >= _KNOWN_MAX:
                self._named.popitem(last=False)
            domain, kind, protocol = _look(tid, fd)
            name = self._named[link] = f"{link} {domain} {kind} {protocol}" if domain in FAMILIES else ""
        return name


def parse_name(name: str) -> tuple[int, int, int]:
    """Return domain, type and protocol of the socket with a name of ours."""
    domain, kind, protocol = name.split(" ")[1:]
    return int(domain), int(kind), int(protocol)


def address_in_guest(address: bytes, cwd: str, paths: HostPaths) -> tuple[bytes, PathArgument | None]:
    """Return an address as the guest has it, and the directory that is needed there for one that is a path.

    `cwd` is the working directory that a path may be relative to. Raises NotMirrored if the guest has no such address.
    """
    if len(address) < 2:
        raise NotMirrored
    [family] = struct.unpack_from("<H", address)
    if family == socket.AF_UNIX:
        return _path(address, cwd, paths)
    if family == socket.AF_INET and len(address) >= 8:
        local = address[4:5] == b"\x7f" or address[4:8] == bytes(4)
    elif family == socket.AF_INET6 and len(address) >= 24:
        host = address[8:24]
        local = host in (bytes(16), bytes(15) + b"\1") or host[:13] == _MAPPED + b"\x7f"
    else:
        local = False
    if not local:
        raise NotMirrored
    return address, None


def _path(address: bytes, cwd: str, paths: HostPaths) -> tuple[bytes, PathArgument | None]:
    path = address[2:].split(b"\0")[0]
    if not path:
        return address, None  # abstract, or none
    whole = os.path.normpath(os.fsencode(cwd) + b"/" + path) if path[:1] != b"/" else path
    if len(whole) > _PATH_MAX:
        raise NotMirrored
    directory = os.fsdecode(os.path.dirname(whole) or b"/")
    return address[:2] + whole + b"\0", PathArgument(directory, paths.look(directory, follow=True))


def port_of(pid: int, fd: int, address: bytes) -> bytes:
    """Return the address that a socket was bound to with a port that the kernel has chosen since.

    Raises OSError when the socket is gone.
    """
    with _fetch(pid, fd) as found:
        name = found.getsockname()
    return address[:2] + struct.pack(">H", name[1]) + address[4:]


def has_any_port(address: bytes) -> bool:
    """Does an address of the Internet leave the port to the kernel?"""
    return len(address) > 4 and int.from_bytes(address[:2], "little") != socket.AF_UNIX and address[2:4] == bytes(2)


def _look(pid: int, fd: int) -> tuple[int, int, int]:
    with _fetch(pid, fd) as found:
        return tuple(  # type: ignore[return-value]  # three of them
            found.getsockopt(socket.SOL_SOCKET, option)
            for option in (socket.SO_DOMAIN, socket.SO_TYPE, socket.SO_PROTOCOL)
        )


def _fetch(pid: int, fd: int) -> socket.socket:
    """Return a socket that another process has open."""
    pidfd = os.pidfd_open(pid)
    try:
        own = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0)
        if own < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
    finally:
        os.close(pidfd)
    return socket.socket(fileno=own)
