"""What the recorder tells the daemon of the host's processes, in packets, in the order in which it happened.

The daemon tells it of uprobes.

Paths are texts as os.fsdecode() makes them, so that every name survives. Thread and process ids are those of the PID
namespace in which both live.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, NamedTuple, get_args

from fakefs.mirror.calls import CHANGING, LOOKS

PACKET_MAX = 1 << 16


class Entry(NamedTuple):
    """What the host has at a path. `mode` 0: nothing. Sizes in bytes; `target` of a symbolic link."""

    path: str
    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    target: str = ""


class PathArgument(NamedTuple):
    """A path that a call is given: the text for the guest's call, and what has to be at and above it, top first."""

    text: str
    entries: list[Entry]

    @property
    def entry(self) -> Entry:
        """Of the file itself; of the first directory that is missing if there is one."""
        return self.entries[-1]


class Birth(NamedTuple):
    """A thread is seen for the first time. Of its group's leader `tgid` is `tid`, and `parent` the parent process."""

    tid: int
    tgid: int
    parent: int
    comm: str
    umask: int


class Program(NamedTuple):
    """A process became a program. `cwd` is its working directory, if the path is relative to it."""

    tid: int
    file: PathArgument
    argv: list[str]
    cwd: str = ""


class Exit(NamedTuple):
    """A thread exits, or (`group`) its process does."""

    tid: int
    status: int
    group: bool


class Name(NamedTuple):
    """A thread is given a name."""

    tid: int
    comm: str


class Sleep(NamedTuple):
    """A thread sleeps for some ns. `clock` is None for nanosleep(2)."""

    tid: int
    clock: int | None
    duration: int


class Plain(NamedTuple):
    """A call of numbers alone."""

    tid: int
    number: int
    arguments: list[int]


class Descriptors(NamedTuple):
    """A process has these files open, and no others: execve(2) closes some."""

    tid: int
    numbers: list[int]


class Wait(NamedTuple):
    """A call that waits for a child. `arguments` has None where an address for an answer is given."""

    tid: int
    number: int
    arguments: list[int | None]


class Signal(NamedTuple):
    """kill(2) and its relatives. It is sent `to` these processes or threads; `caught` are those with a handler.

    `arguments` are the ids of whom it is sent to, and the signal; `info` is the siginfo_t it is sent with, in latin-1.
    """

    tid: int
    number: int
    arguments: list[int]
    to: list[int]
    caught: list[int]
    info: str = ""


class Handled(NamedTuple):
    """A thread has run a handler for a signal. `info`: si_errno, si_code and three words; nothing if not known."""

    tid: int
    number: int
    info: list[int]


class Stopped(NamedTuple):
    """A process is stopped, as its parent has just been told."""

    tid: int


class Credentials(NamedTuple):
    """A call of setuid(2)'s family. `ids` are its arguments, or the groups it sets; None if there are no such.

    `capable`: the host does not refuse it for want of a capability.
    """

    tid: int
    number: int
    ids: list[int] | None
    capable: bool


class Files(NamedTuple):
    """A call with paths in it. `arguments` has None where the next of `paths` belongs.

    For the address of room for an answer it has -1. `cwd` is the thread's working directory, if a path is relative to
    it.
    """

    tid: int
    number: int
    arguments: list[int | None]
    paths: list[PathArgument]
    cwd: str


class Used(NamedTuple):
    """A file that a call is about, `fd` on the host, opened there with `flags`; `position` is that before the call.

    `file` has the path of a regular file, directory or named pipe, the name of a pipe, socket or terminal, or nothing.
    """

    fd: int
    file: PathArgument
    position: int
    flags: int


class Part(NamedTuple):
    """What an address in the arguments of a call is of: a buffer, or the several buffers of a vector or a message.

    `sizes` are theirs, in bytes; `data` is what is written from them, as far as it was read, in latin-1; `address` is
    that of a message's socket.
    """

    sizes: list[int]
    data: str = ""
    address: str = ""


class Transfer(NamedTuple):
    """A call on open files. `arguments` are all, those that are addresses as 0 or 1.

    `files` and `parts` are in their order; `needed` are the directories of addresses of sockets.
    """

    tid: int
    number: int
    files: list[Used]
    arguments: list[int]
    parts: list[Part]
    needed: list[Entry]


class Opened(NamedTuple):
    """What a call of the thread that returns descriptors has opened, in the order in which the guest's has."""

    tid: int
    files: list[Used]


class Returns(IntEnum):
    """What is known of the return from a function at whose beginning a thread is."""

    NOT = 0
    """It will not be told of."""
    TOLD = 1
    """It will be."""
    TOLD_ALREADY = 2
    """It will be, and that was so before: the function was jumped to by another that is probed."""


class Hit(NamedTuple):
    """A thread has come to a probed instruction, or (`probe` 0) back from a probed function.

    `registers` are those of `fakefs.mirror.trampoline.SAVED`, then the stack pointer; `address` is that of the
    instruction, or where the function returns to. `memory` is what is at some addresses, in base64.
    """

    tid: int
    probe: int
    address: int
    registers: list[int]
    returns: int
    memory: list[tuple[int, str]]


class Placed(NamedTuple):
    """The sites that the daemon has told of are placed."""

    number: int


class Mark(NamedTuple):
    """From the daemon, and sent back when it was told of so many calls."""

    noted: int


Contents = tuple[int, ...]
"""A file with what is in it: st_dev, st_ino, st_size and st_mtime_ns. A new file may get the inode of an old one."""


class Site(NamedTuple):
    """From the daemon: an instruction with uprobes, in a file of the host's, and their arguments as in uprobe_events.

    `id` is never another's. `returns` are the arguments of those on return, None without such.
    """

    id: int
    file: Contents
    offset: int
    entry: list[str]
    returns: list[str] | None


class Sites(NamedTuple):
    """From the daemon: the sites told of since the last of these are all. `tid` has defined one, and waits."""

    number: int
    tid: int


class EventOpen(NamedTuple):
    """perf_event_open(2) of an event of the guest's.

    `call` is for its answer to name it. `attr` is a struct perf_event_attr in base64; `pid` is not 0; `group` is the
    number of another event, or -1.
    """

    tid: int
    call: int
    attr: str
    pid: int
    cpu: int
    group: int
    flags: int


class EventControl(NamedTuple):
    """ioctl(2) of an event. For an address it has as `argument` or `text` what is there; for a descriptor its event."""

    tid: int
    call: int
    event: int
    request: int
    argument: int
    text: str = ""


class EventMap(NamedTuple):
    """mmap(2) of an event: a ring buffer of `length` bytes, with `protection` as mmap(2) has it."""

    tid: int
    call: int
    event: int
    length: int
    protection: int


class EventAnswer(NamedTuple):
    """From the daemon: what becomes of such a call.

    `error` is an errno or 0, `value` what an ioctl(2) finds; `name` is that of the file to open for a new event.
    """

    call: int
    error: int
    value: int = 0
    name: str = ""


Record = (
    Birth
    | Program
    | Descriptors
    | Exit
    | Name
    | Sleep
    | Plain
    | Wait
    | Signal
    | Handled
    | Stopped
    | Credentials
    | Files
    | Transfer
    | Opened
    | Hit
    | EventOpen
    | EventControl
    | EventMap
)
Message = Record | Placed | Mark | Site | Sites | EventAnswer
_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}


def looks(record: Record) -> bool:
    """Does a record only look at files, and leave everything as it is?"""
    if not isinstance(record, Files) or record.number not in LOOKS:
        return False
    flags = LOOKS[record.number]
    return flags is None or not (record.arguments[flags] or 0) & CHANGING


_encode = json.JSONEncoder(separators=(",", ":")).encode


def encode(record: Message) -> bytes:
    """Return what `packet()` puts together."""
    return _encode([type(record).__name__, *record]).encode()


def packet(encoded: Iterable[bytes]) -> bytes:
    """Return a packet with messages in it."""
    return b"[" + b",".join(encoded) + b"]"


def decode(received: bytes) -> list[Message]:
    """Return what is in a packet. The other end is a process of ours: nothing else arrives."""
    return [_message(kind, values) for kind, *values in json.loads(received)]


def _message(kind: str, values: list[Any]) -> Message:
    if kind == "Program":
        values[1] = _path(values[1])
    elif kind == "Site":
        values[1] = tuple(values[1])
    elif kind == "Transfer":
        values[1:] = _transfer(*values[1:])
    elif kind == "Opened":
        values[1] = _used(values[1])
    elif kind == "Files":
        values[3] = [_path(path) for path in values[3]]
    return _KINDS[kind](*values)


def _transfer(number: int, files: list[Any], arguments: list[int], parts: list[Any], needed: list[Any]) -> list[Any]:
    return [number, _used(files), arguments, [Part(*part) for part in parts], [Entry(*entry) for entry in needed]]


def _used(files: list[Any]) -> list[Used]:
    return [Used(fd, _path(file), *rest) for fd, file, *rest in files]


def _path(value: list[object]) -> PathArgument:
    text, entries = value
    assert isinstance(text, str)
    assert isinstance(entries, list)
    return PathArgument(text, [Entry(*entry) for entry in entries])
