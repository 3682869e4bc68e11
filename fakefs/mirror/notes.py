"""Notifications in the order of the calls, of which those that only look at a file have gone on already.

A thread in C (`notes.c`) receives them and passes them on through a socket of packets. `Progress` is the memory in
which the three processes that take part tell each other how far that is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Collection
from enum import IntEnum
from typing import NamedTuple

from fakefs.errors import UserError
from fakefs.mirror.calls import BY_NUMBER, CHANGING, LOOKS, NUMBER, Level
from fakefs.mirror.seccomp import Listener, Notification

# struct note of notes.c: id, tid, number, state, path_size, start_size, arguments
_NOTE = struct.Struct("=QiiIHH6Q")
_PACKET_MAX = 4096
_LOOKS_MAX = 32
_AT_HAND = frozenset("PLDibsn")
"""Arguments of which no more than a path has to be read before a call goes on: letters of `Call`."""
_IN_HANDS, _RECEIVED, _NOTED, _DONE, _RECORDER, _HELD = range(6)  # words of shared memory
HELD_MAX = mmap.PAGESIZE // 8 - _HELD - 1
"""Calls that can be held at a time."""


class State(IntEnum):
    """Of a call that was noted: as in notes.c."""

    WAITS = 0
    GOES_ON = 1
    GONE = 2
    """Its thread has been killed."""


class Note(NamedTuple):
    """A notification. Of a look that goes on: its `path`, and where that starts if it is relative."""

    call: Notification
    state: State
    path: bytes = b""
    start: bytes = b""


class Progress:
    """Memory that recorder, daemon and first process share. Made before they are forked."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    @property
    def address(self) -> int:
        """In this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._words))

    @property
    def noted(self) -> int:
        """How many calls have been received: those that have gone on, and those that wait to."""
        return self._words[_NOTED]

    @property
    def done(self) -> int:
        """How many of these the daemon was told of."""
        return self._words[_DONE]

    @property
    def recorder(self) -> int:
        """The recorder's process id; 0 before it runs."""
        return self._words[_RECORDER]

    @property
    def unanswered(self) -> tuple[int, int]:
        """Ids of notifications that are being handled, 0 for none; others lie in the socket."""
        return self._words[_IN_HANDS], self._words[_RECEIVED]

    @property
    def held(self) -> list[int]:
        """Ids of notifications that wait for the guest."""
        words = self._words[_HELD:].tolist()
        return words[: words.index(0)]

    def hold(self, identities: Collection[int]) -> None:
        """These are held now, at most HELD_MAX."""
        for at, identity in enumerate((*identities, 0), _HELD):
            self._words[at] = identity

    def begin(self) -> None:
        """This process is the recorder."""
        self._words[_RECORDER] = os.getpid()

    def take(self, identity: int) -> None:
        """The recorder takes a notification in hands; 0: nothing."""
        self._words[_IN_HANDS] = identity

    def count(self, more: int) -> None:
        """The daemon was told of so many more."""
        self._words[_DONE] += more


class _Look(ctypes.Structure):
    _fields_ = (
        ("number", ctypes.c_int32),
        ("path", ctypes.c_int32),
        ("directory", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("changing", ctypes.c_uint64),
    )


class _Notes(ctypes.Structure):
    _fields_ = (
        ("listener", ctypes.c_int32),
        ("out", ctypes.c_int32),
        ("progress", ctypes.c_uint64),
        ("count", ctypes.c_int64),
        ("looks", _Look * _LOOKS_MAX),
    )


def load() -> ctypes.CDLL:
    """Load the part in C. Raises UserError."""
    try:
        return ctypes.CDLL(os.path.join(os.path.dirname(__file__), "_notes.so"))
    except OSError:
        raise UserError(
            "fakefs/mirror/_notes.so is missing: build the package (pip install .; in a checkout: make setup)"
        ) from None


def _looks(level: Level) -> list[_Look]:
    """Return the calls that may go on before they are noted. Of arch_prctl(2) there is nothing to note."""
    found = [_Look(NUMBER["arch_prctl"], -1, -1, -1, 0)]
    for number, flags in LOOKS.items():
        call = BY_NUMBER[number]
        if call.level <= level and _AT_HAND.issuperset(call.arguments):
            path = max(map(call.arguments.find, "PL"))
            directory = call.arguments.find("D")
            found.append(_Look(number, path, directory, -1 if flags is None else flags, CHANGING))
    return found


class Notes:
    """The recorder's end. `ends` are the two of a socket of packets, of which the first process has the second too."""

    def __init__(
        self,
        library: ctypes.CDLL,
        listener: Listener,
        ends: tuple[socket.socket, socket.socket],
        progress: Progress,
        level: Level,
    ) -> None:
        """Start to receive. Raises OSError."""
        self.listener = listener
        self._library = library
        self._sending, self._socket = ends
        self._socket.setblocking(False)
        looks = _looks(level)
        self._in_c = _Notes(
            listener.fd, self._sending.fileno(), progress.address, len(looks), (_Look * _LOOKS_MAX)(*looks)
        )
        error = library.notes_start(ctypes.byref(self._in_c))
        if error:
            raise OSError(error, os.strerror(error))

    def fileno(self) -> int:
        """For poll(2)."""
        return self._socket.fileno()

    def take(self) -> Note:
        """Return the next one. Raises BlockingIOError when there is none, EOFError when none will come."""
        return next_note(self._socket)

    def trust(self, tid: int, *, trusted: bool) -> None:
        """May the looks of a thread go on at once? All has to be known of it that its memory or /proc has told."""
        self._library.notes_trust(tid, trusted)

    def hold(self, *, held: bool) -> None:
        """Let no call go on before it is taken, or do so again."""
        self._library.notes_hold(held)


def next_note(packets: socket.socket) -> Note:
    """Return the next one. Raises BlockingIOError when there is none, EOFError when none will come."""
    packet = packets.recv(_PACKET_MAX)
    if not packet:
        raise EOFError
    return parse(packet)


def parse(packet: bytes) -> Note:
    """Parse a packet of notes.c's."""
    identity, tid, number, state, path, start, *arguments = _NOTE.unpack_from(packet)
    call = Notification(identity, tid, number, tuple(arguments))
    at = _NOTE.size
    return Note(call, State(state), packet[at : at + path], packet[at + path : at + path + start])
