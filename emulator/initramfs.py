"""Build an initramfs: a cpio archive in the "newc" format of the kernel's initramfs buffer format document.

The same calls give the same bytes: times are 0, owner and group are root, entries stay in the order they were added
(with missing parent directories before them) and inode numbers count up from 1. Not compressed.
"""

from __future__ import annotations

import stat

from emulator.errors import EmulatorError

TRAILER = "TRAILER!!!"
#: newc holds sizes in eight hexadecimal digits.
FILE_MAX = 0xFFFFFFFF
#: The longest path the kernel takes, its final NUL included.
PATH_MAX = 4096


class Initramfs:
    """An archive in the making. Paths are absolute or relative to /, modes are permission bits."""

    def __init__(self) -> None:
        self._archive = bytearray()
        self._directories: dict[str, bool] = {}  # every path added: is it a directory?

    def add_dir(self, path: str, mode: int = 0o755) -> None:
        """Add a directory."""
        self._add(path, stat.S_IFDIR | mode)

    def add_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(path, stat.S_IFREG | mode, data)

    def add_symlink(self, path: str, target: str) -> None:
        """Add a symbolic link to `target`."""
        if not 0 < len(target.encode()) < PATH_MAX:
            raise EmulatorError(f"initramfs: {path}: a link needs a target of 1 to {PATH_MAX - 1} bytes")
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def add_node(self, path: str, mode: int, major: int, minor: int) -> None:
        """Add a device node; `mode` says which kind: stat.S_IFCHR or stat.S_IFBLK, with the permissions."""
        if not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
            raise EmulatorError(f"initramfs: {path}: a device node's mode needs S_IFCHR or S_IFBLK")
        if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
            raise EmulatorError(f"initramfs: {path}: no such device number: {major}:{minor}")
        self._add(path, mode, device=(major, minor))

    def to_bytes(self) -> bytes:
        """Return the archive, with its trailer, padded to a multiple of four bytes."""
        return bytes(self._archive + _entry(0, TRAILER, 0, b"", (0, 0)))

    def _add(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        name = path.strip("/")
        parts = name.split("/")
        if not name or name == TRAILER or "\0" in name or not {"", ".", ".."}.isdisjoint(parts):
            raise EmulatorError(f"initramfs: {path!r} cannot be the path of an entry")
        if len(name.encode()) >= PATH_MAX or len(data) > FILE_MAX:
            raise EmulatorError(f"initramfs: {path[:60]!r}: path or contents are too long")
        if name in self._directories:
            raise EmulatorError(f"initramfs: {path!r} is there twice")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            if parent not in self._directories:
                self._append(parent, stat.S_IFDIR | 0o755, b"", (0, 0))
            elif not self._directories[parent]:
                raise EmulatorError(f"initramfs: {path!r}: {parent!r} is not a directory")
        self._append(name, mode, data, device)

    def _append(self, name: str, mode: int, data: bytes, device: tuple[int, int]) -> None:
        self._directories[name] = stat.S_ISDIR(mode)
        self._archive += _entry(len(self._directories), name, mode, data, device)


def _entry(inode: int, name: str, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    owner = group = time = check = 0
    fields = (inode, mode, owner, group, links, time, len(data), 0, 0, *device, len(encoded), check)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + encoded) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
