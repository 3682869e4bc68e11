"""Pages of a file that programs have mapped, as the host's kernel keeps them for it.

What is stored there need not be asked for, and is seen by who has it mapped; what a program writes there can be looked
at. Both are notifications of <fuse_lowlevel.h>, the second of which pyfuse3 has not: `shim.c` has it.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from contextlib import suppress

import trio

from fakefs.fuse import request  # loads the shim, which must come before pyfuse3

# isort: split
import pyfuse3

_cookies = itertools.count(1)
_waiting: dict[int, tuple[trio.Event, bytearray]] = {}


def _retrieved(cookie: int | None, data: int | None, size: int) -> None:
    """Called by libfuse in the trio thread."""
    waiting = _waiting.get(cookie or 0)
    if waiting is not None:
        done, found = waiting
        found += ctypes.string_at(data or 0, size)
        done.set()


_RETRIEVED = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_retrieved)
ctypes.c_void_p.in_dll(request.shim, "shim_retrieved").value = ctypes.cast(_RETRIEVED, ctypes.c_void_p).value
_retrieve = request.shim.shim_retrieve
_retrieve.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]


class HostPages:
    """Implements `fakefs.files.Pages` for a FUSE inode."""

    def __init__(self, inode: int) -> None:
        self._inode = inode

    async def store(self, pieces: Sequence[tuple[int, bytes]]) -> None:
        """See `Pages`. In a thread: the kernel waits for a page that somebody is asking us for."""
        await trio.to_thread.run_sync(self._store, pieces)

    def _store(self, pieces: Sequence[tuple[int, bytes]]) -> None:
        with suppress(OSError):  # the file has been closed
            for offset, data in pieces:
                pyfuse3.notify_store(self._inode, offset, data)

    async def fetch(self, offset: int, size: int) -> bytes:
        """See `Pages`."""
        cookie = next(_cookies)
        done, found = _waiting[cookie] = trio.Event(), bytearray()
        try:
            if _retrieve(self._inode, offset, size, cookie) == 0:
                await done.wait()
        finally:
            del _waiting[cookie]
        return bytes(found)
