"""The FUSE request being handled: who makes it, with which live flags, and whether its caller got a signal.

pyfuse3 tells a handler of reads and writes neither. `shim.c`, loaded here, notes it; **import this module before
pyfuse3**, or the dynamic linker binds pyfuse3 past the shim.

`current()` is right only until the handler's first `await`: take it in the first line. See <fuse_lowlevel.h> for
`fuse_req_interrupt_func()`.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
import sys
from collections.abc import Callable
from functools import lru_cache

from fakefs.errors import UserError
from fakefs.files import Caller


def _load() -> ctypes.PyDLL:
    directory = os.path.dirname(__file__)
    names = sorted(name for name in os.listdir(directory) if name.startswith("_shim") and name.endswith(".so"))
    if not names:
        raise UserError("fakefs/fuse/_shim.so is missing: build the package (pip install .), libfuse3-dev is needed")
    try:
        # PyDLL: the calls are short and stay in this thread, so the GIL need not be given up around them.
        return ctypes.PyDLL(os.path.join(directory, names[0]), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise UserError(f"cannot load libfuse3: {error}; install the package libfuse3-3") from None


shim = _load()

# struct request_note of shim.c: req, tid, uid, gid, flags, poll_events.
_NOTE = struct.Struct("=QiIIiI")
_note = memoryview((ctypes.c_char * _NOTE.size).in_dll(shim, "shim_request")).cast("B")
_sessions = ctypes.c_int.in_dll(shim, "shim_sessions")

_tokens = itertools.count(1)
_callbacks: dict[int, Callable[[], None]] = {}

caller = lru_cache(maxsize=256)(Caller)
"""`Caller(tid, uid, gid)`, the same object for the same caller."""


def _interrupted(_req: int | None, token: int | None) -> None:
    """Called by libfuse for FUSE_INTERRUPT, in the trio thread; C is the caller, so nothing may be raised."""
    callback = _callbacks.pop(token or 0, None)
    if callback is None:
        return
    try:
        callback()
    except BaseException as error:
        sys.stderr.write(f"fakefs: interrupting a request failed: {error!r}\n")


_INTERRUPTED = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(_interrupted)
_on_interrupt = shim.fuse_req_interrupt_func
_on_interrupt.restype = None
_on_interrupt.argtypes = [ctypes.c_uint64, type(_INTERRUPTED), ctypes.c_void_p]


class Request:
    """One request; implements `fakefs.files.Interrupt`. Use as a context manager around what it waits for.

    `flags` are the open flags the descriptor has now; `poll_events` is the mask asked of poll(2), else 0.
    """

    __slots__ = ("_req", "_token", "caller", "flags", "poll_events")

    def __init__(self, req: int, who: Caller, flags: int, poll_events: int) -> None:
        self._req = req
        self._token = 0
        self.caller = who
        self.flags = flags
        self.poll_events = poll_events

    @property
    def tid(self) -> int:
        return self.caller.tid

    @property
    def uid(self) -> int:
        return self.caller.uid

    @property
    def gid(self) -> int:
        return self.caller.gid

    def on_interrupt(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, from the trio thread, when the caller gets a signal; at once if it already has.

        A later callback takes the place of an earlier one. Nothing is called after the request was left.
        """
        if self._req == 0:
            return  # answered: libfuse has freed it
        _callbacks.pop(self._token, None)
        self._token = next(_tokens)
        _callbacks[self._token] = callback
        _on_interrupt(self._req, _INTERRUPTED, self._token)

    def __enter__(self) -> Request:
        return self

    def __exit__(self, *_: object) -> None:
        self._req = 0
        if self._token:
            _callbacks.pop(self._token, None)


def note() -> bytes:
    """What is known of the request whose handler is about to run, to be given to `restore()`."""
    return bytes(_note)


def restore(kept: bytes) -> None:
    """Let `current()` be the request of `note()` again, until the next `await`."""
    _note[:] = kept


def current() -> Request:
    """The request whose handler is running. Only before the handler's first `await`."""
    req, tid, uid, gid, flags, poll_events = _NOTE.unpack_from(_note)
    return Request(req, caller(tid, uid, gid), flags, poll_events)


def in_use() -> bool:
    """Whether the shim saw pyfuse3's session being made."""
    return _sessions.value > 0
