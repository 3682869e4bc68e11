"""Which files of a tracefs have to do with wprobes, and what an open one is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from fakefs.files import Caller, Interrupt
from fakefs.guestfiles import GuestFile
from fakefs.static import TRACEFS

_DEBUGFS = b"/sys/kernel/debug"


class Role(Enum):
    """What a file has to do with wprobes."""

    DYNAMIC_EVENTS = auto()
    KPROBE_EVENTS = auto()
    KPROBE_PROFILE = auto()
    KPROBE_LIST = auto()  # debugfs's
    FUNCTIONS = auto()  # enabled_functions and touched_functions
    ERROR_LOG = auto()
    README = auto()
    TRIGGER = auto()


_ROLES = {
    b"dynamic_events": Role.DYNAMIC_EVENTS,
    b"kprobe_events": Role.KPROBE_EVENTS,
    b"kprobe_profile": Role.KPROBE_PROFILE,
    b"enabled_functions": Role.FUNCTIONS,
    b"touched_functions": Role.FUNCTIONS,
    b"README": Role.README,
}


def canonical(path: bytes) -> bytes:
    """Return a guest path with tracefs where it belongs: debugfs shows it as well."""
    alias = _DEBUGFS + b"/tracing"
    return TRACEFS + path[len(alias) :] if path == alias or path.startswith(alias + b"/") else path


def role_of(path: bytes) -> Role | None:
    """Return what a canonical guest path has to do with wprobes, if anything."""
    if path == _DEBUGFS + b"/kprobes/list":
        return Role.KPROBE_LIST
    if not path.startswith(TRACEFS + b"/"):
        return None
    parts = path[len(TRACEFS) + 1 :].split(b"/")
    if parts[0] == b"instances":
        parts = parts[2:]
    match parts:
        case [b"error_log"]:
            return Role.ERROR_LOG
        case [b"events", _, _, b"trigger"]:
            return Role.TRIGGER
        case [name]:
            return _ROLES.get(name)
    return None


def instance_of(path: bytes) -> bytes:
    """Return the directory, below tracefs, of the tracing instance a canonical path belongs to; b"" for the first."""
    parts = path[len(TRACEFS) + 1 :].split(b"/", 2)
    return b"/".join(parts[:2]) if parts[0] == b"instances" and len(parts) > 2 else b""


def directory_of(instance: bytes) -> bytes:
    """Return the guest path of what `instance_of()` gave."""
    return TRACEFS + (b"/" + instance if instance else b"")


class TextFile(GuestFile):
    """An open file whose text is ours to say. `text` is what its reader sees, once it has begun to read."""

    __slots__ = ("role", "text")

    def __init__(self, file: GuestFile, role: Role) -> None:
        super().__init__(file.handle, file.path, file.flags, file.seekable)
        self.role = role
        self.text: bytes | None = None


@dataclass(frozen=True)
class Writing:
    """A write(2) under way: who writes to what, and how."""

    caller: Caller
    file: TextFile
    flags: int
    intr: Interrupt


class Never:
    """The Interrupt of what nobody waits for."""

    def on_interrupt(self, callback: object) -> None:
        """Nothing interrupts it."""
