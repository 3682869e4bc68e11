"""What the FUSE layer asks of the guest's files: the vocabulary shared by `fakefs.fuse` and the guest relay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Caller:
    """The host thread a request comes from: its host thread id, 0 when unknown (init then makes the request)."""

    tid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Stat:
    """A file's attributes as the guest gives them; times in ns since the epoch of the guest's clock."""

    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    ino: int
    blksize: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    lasting: bool = False  # the name stays, and its attributes until a request through this mount or `watch_attributes`


class Interrupt(Protocol):
    """Tells when the caller of a blocked request got a signal."""

    def on_interrupt(self, callback: Callable[[], None]) -> None:
        """Call `callback` (from the trio thread) when the request is interrupted, or at once if it already was."""


class OpenFile(Protocol):
    """A file held open in the guest. One that is not `seekable` gives ESPIPE to lseek(2) and pread(2)."""

    flags: int
    seekable: bool


class Pages(Protocol):
    """The pages of a file that programs may have mapped."""

    async def store(self, pieces: Sequence[tuple[int, bytes]]) -> None:
        """Put bytes at offsets, one after the other; none cross a page. A program that looks sees each at once."""

    async def fetch(self, offset: int, size: int) -> bytes:
        """Return what a program has put there; less when nothing is mapped."""


class Mapped:
    """An open file that programs may map. The host keeps its pages: all are read to the end of the request."""

    pages: Pages | None = None
    """Set when it is opened."""


class Files(Protocol):
    """The guest's files. Paths are absolute guest paths; every method raises OSError with the guest's errno."""

    def watch_attributes(self, changed: Callable[[], None]) -> None:
        """Have `changed` called when lasting attributes may have changed by something else than a request."""

    async def stat(self, path: bytes) -> Stat: ...
    async def entries(self, caller: Caller, path: bytes) -> list[tuple[bytes, Stat]]: ...
    async def open(self, caller: Caller, path: bytes, flags: int, mode: int = 0) -> OpenFile: ...
    async def read(self, caller: Caller, file: OpenFile, offset: int, size: int, flags: int, intr: Interrupt) -> bytes:
        """Read at most `size` bytes; `flags` are the descriptor's live open flags (O_NONBLOCK may have changed)."""

    async def write(
        self, caller: Caller, file: OpenFile, offset: int, data: bytes, flags: int, intr: Interrupt
    ) -> int: ...
    async def close(self, file: OpenFile) -> None: ...
    async def poll(self, caller: Caller, file: OpenFile, events: int, notify: Callable[[], None] | None) -> int:
        """Return the ready events of poll(2); when there are none, call `notify` (if given) once there are."""

    async def mkdir(self, caller: Caller, path: bytes, mode: int) -> None: ...
    async def rmdir(self, caller: Caller, path: bytes) -> None: ...
    async def unlink(self, caller: Caller, path: bytes) -> None: ...
    async def rename(self, caller: Caller, old: bytes, new: bytes, flags: int) -> None: ...
    async def link(self, caller: Caller, old: bytes, new: bytes) -> None: ...
    async def symlink(self, caller: Caller, target: bytes, path: bytes) -> None: ...
    async def mknod(self, caller: Caller, path: bytes, mode: int, rdev: int) -> None: ...
    async def readlink(self, path: bytes) -> bytes: ...
    async def truncate(self, caller: Caller, path: bytes, file: OpenFile | None, size: int) -> None: ...
    async def chmod(self, caller: Caller, path: bytes, mode: int) -> None: ...
    async def chown(self, caller: Caller, path: bytes, uid: int, gid: int) -> None:
        """-1 leaves an id as it is."""
