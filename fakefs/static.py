"""Which names of a tracefs stay for ever, so that the host's kernel need not ask for them each time.

All are static but instances and the events defined after boot. The events a kernel boots with are read once, before
its snapshot is made, and kept with it; a module's events, loaded later, are not among them.
"""

from __future__ import annotations

import os

from emulator.agent import DATA_SIZE
from emulator.errors import EmulatorError
from emulator.guest import Guest
from fakefs.syscalls import AT_FDCWD, Sys

TRACEFS = b"/sys/kernel/tracing"
_PATH_ROOM = 256


def static_events(guest: Guest) -> list[str]:
    """Return the lines of a just booted guest's available_events: "sched:sched_switch" and so on.

    Raises EmulatorError when the kernel has no tracefs.
    """
    agent, at = guest.agent, guest.agent.init.virtual
    path = TRACEFS + b"/available_events\0"
    agent.put(agent.init, 0, path)
    [fd] = guest.call((Sys.OPENAT, AT_FDCWD, at(0), os.O_RDONLY, 0))
    if fd < 0:
        raise EmulatorError(f"this kernel has no tracefs ({os.strerror(-fd)}): use one built with CONFIG_FTRACE")
    text = b""
    while True:
        [size] = guest.call((Sys.READ, fd, at(_PATH_ROOM), DATA_SIZE - _PATH_ROOM))
        if size <= 0:
            break
        text += agent.get(agent.init, _PATH_ROOM, size)
    guest.call((Sys.CLOSE, fd))
    return text.decode("ascii", "replace").split()


class StaticPaths:
    """Tells whether a guest path will stay as long as the guest runs. `events` is what `static_events()` gave."""

    def __init__(self, events: object, tracefs: bytes = TRACEFS) -> None:
        names = [event.encode() for event in events if isinstance(event, str)] if isinstance(events, list) else []
        self._events = frozenset(names)
        self._groups = frozenset(name.split(b":", 1)[0] for name in names)
        self._tracefs = tracefs
        self._prefix = tracefs + b"/"

    def __call__(self, path: bytes) -> bool:
        if not path.startswith(self._prefix):
            return path == self._tracefs
        parts = path[len(self._prefix) :].split(b"/", 3)
        match parts:
            case [b"instances", _, *_]:
                return False
            case [b"events", group] if group not in (b"enable", b"header_event", b"header_page"):
                return group in self._groups
            case [b"events", group, name]:
                return group in self._groups and (name in (b"enable", b"filter") or group + b":" + name in self._events)
            case [b"events", group, name, _]:
                return group + b":" + name in self._events
        return True
