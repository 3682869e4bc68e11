"""Addresses that the guest has too, and sockets of this process."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror.endpoints import ADDRESS_MAX, Endpoints, address_in_guest, parse_name
from fakefs.mirror.hostpaths import HostPaths, NotMirrored


@pytest.fixture(scope="module")
def paths() -> Iterator[HostPaths]:
    root = os.open("/", os.O_PATH)
    yield HostPaths(root, 0)
    os.close(root)


def _inet(host: str) -> bytes:
    return struct.pack("<H2s4s8x", socket.AF_INET, b"\x30\x39", socket.inet_aton(host))


def _inet6(host: str) -> bytes:
    return struct.pack("<H2sI16sI", socket.AF_INET6, b"\x30\x39", 0, socket.inet_pton(socket.AF_INET6, host), 0)


def _unix(path: bytes) -> bytes:
    return struct.pack("<H", socket.AF_UNIX) + path


@pytest.mark.parametrize(
    "address",
    [
        *map(_inet, ("127.0.0.1", "127.9.9.9", "0.0.0.0")),
        *map(_inet6, ("::1", "::", "::ffff:127.0.0.1")),
        _unix(b"\0abstract"),
        _unix(b""),
    ],
)
def test_there_as_it_is(address: bytes, paths: HostPaths) -> None:
    assert address_in_guest(address, "/", paths) == (address, None)


@pytest.mark.parametrize("address", [_inet("192.0.2.1"), _inet6("2001:db8::1"), b"", b"\2", b"\x10\0" + bytes(20)])
def test_not_there(address: bytes, paths: HostPaths) -> None:
    with pytest.raises(NotMirrored):
        address_in_guest(address, "/", paths)


def test_paths(paths: HostPaths, tmp_path: Path) -> None:
    whole = os.fsencode(tmp_path / "s")
    for given_path in (whole, b"s"):
        address, directory = address_in_guest(_unix(given_path + b"\0junk"), str(tmp_path), paths)
        assert address == _unix(whole + b"\0")
        assert directory is not None
        assert directory.entry.path == str(tmp_path)
    with pytest.raises(NotMirrored):
        address_in_guest(_unix(b"s"), "/" + "d" * 107, paths)


def test_sockets_are_known_by_their_kind() -> None:
    endpoints = Endpoints()
    for domain, kind in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)):
        with socket.socket(domain, kind) as one:
            link = os.readlink(f"/proc/self/fd/{one.fileno()}")
            name = endpoints.named(os.getpid(), one.fileno(), link)
            assert name.startswith(link)
            assert parse_name(name)[:2] == (domain, kind)
            assert endpoints.named(0, 0, link) == name  # known
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as one:
        assert endpoints.named(os.getpid(), one.fileno(), "socket:[x]") == ""
    with pytest.raises(OSError, match="pidfd_getfd"):
        endpoints.named(os.getpid(), 1 << 20, "socket:[y]")


@given(st.binary(max_size=ADDRESS_MAX))
def test_any_bytes(paths: HostPaths, address: bytes) -> None:
    with contextlib.suppress(NotMirrored, OSError, ValueError):
        address_in_guest(address, "/tmp", paths)
