"""The recorder's part of uprobes: has programs tell when they come to a probed instruction, and notes what is there.

Which instructions have probes the daemon tells, all of them whenever they change. A program gets its trampolines when
it has just been loaded, or at its next notified call; they stay until it ends, and say nothing any more once the probe
is gone. Whether a probe is enabled, and what comes of a hit, is the guest's business.
"""

from __future__ import annotations

import base64
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress

from fakefs.mirror.fetchargs import Memory, look
from fakefs.mirror.patches import Code, Process
from fakefs.mirror.records import Contents, Hit, Message, Placed, Returns, Site, Sites
from fakefs.mirror.seccomp import Notification, read_memory
from fakefs.mirror.trampoline import BELOW_STACK, RETURN, SAVED, SAVED_SIZE

_SAVED_WORDS = struct.Struct(f"<{len(SAVED)}Q")
_WORD = 8
_STACK_SHOWN = 1024
"""Bytes of the stack that come with each hit, for $stackN and stack traces."""
_MEMORY_MAX = 24 << 10
_PENDING_MAX = 1 << 14


class Uprobes:
    """All sites. `guest_device` is st_dev of our mount."""

    def __init__(self, guest_device: int) -> None:
        self._code = Code(guest_device)
        self._sites: dict[int, Site] = {}
        self._coming: dict[int, Site] = {}
        self._by_file: dict[Contents, list[Site]] = {}
        self._seen: set[int] = set()  # threads, since the sites changed
        self._pending: dict[tuple[int, int], int] = {}  # probe by thread and place of the return address

    def take(self, message: Message) -> Placed | None:
        """Take in what the daemon tells. When that was all, return what it waits for."""
        if isinstance(message, Site):
            self._coming[message.id] = message
        if not isinstance(message, Sites):
            return None
        self._sites, self._coming = self._coming, {}
        self._by_file.clear()
        for site in self._sites.values():
            self._by_file.setdefault(site.file, []).append(site)
        self._seen.clear()
        self._seen.add(message.tid)
        self._visit(message.tid, lambda: True)
        return Placed(message.number)

    @property
    def wanted(self) -> bool:
        """Are there any?"""
        return bool(self._by_file)

    def visit(self, tid: int, parent: int, waits: Callable[[], bool], *, loaded: bool) -> None:
        """Look after the process of a thread that waits in a call. `loaded`: its program has just been.

        One that has been forked from a process with several threads may share their memory: it is left alone, and so
        are they, whose `parent` is their process.
        """
        if self._by_file and (loaded or tid not in self._seen):
            self._seen.add(tid)
            if loaded or not _has_threads(parent):
                self._visit(tid, waits)

    def opened(self, tid: int, path: str) -> None:
        """A thread opens a file: if that may be a library, its next call finds it mapped."""
        if ".so" in path:
            self._seen.discard(tid)

    def _visit(self, tid: int, waits: Callable[[], bool]) -> None:
        if self._by_file:
            with suppress(OSError, ValueError), Process(tid, self._code, waits) as process:
                process.place(self._by_file)

    # ---- hits

    def hit(self, notification: Notification, waits: Callable[[], bool]) -> Iterator[Hit]:
        """Yield what a call of a trampoline or a return stub tells, if somebody wants it. Raises OSError."""
        number, frame, address = notification.arguments[:3]
        if number != RETURN and number not in self._sites:
            return
        saved = read_memory(notification.tid, frame, SAVED_SIZE)
        if len(saved) != SAVED_SIZE:
            return
        registers = dict(zip(SAVED, _SAVED_WORDS.unpack(saved), strict=True))
        stack = frame + BELOW_STACK
        with Process(notification.tid, self._code, waits) as process:
            if number == RETURN:
                process.lift(stack)
                registers["sp"] = stack + _WORD
                probe, returns = self._pending.pop((notification.tid, stack), 0), Returns.NOT
                wanted = [site for site in self._sites.values() if probe in (site.id, 0)]
            else:
                registers["sp"] = stack
                returns, wanted = Returns.NOT, [self._sites[number]]
            registers["ip"] = address
            memory = Memory(process.read, _MEMORY_MAX)
            memory.look(registers["sp"], _STACK_SHOWN)
            for site in wanted:
                arguments = (site.returns or []) if number == RETURN else site.entry
                look(arguments, registers, address - site.offset, memory)
                if number != RETURN and site.returns is not None:
                    returns = process.plant(stack)
                    self._note_pending(notification.tid, stack, number)
        pieces = [(at, base64.b64encode(data).decode()) for at, data in memory.pieces.items()]
        yield Hit(notification.tid, number, address, [*(registers[name] for name in (*SAVED, "sp"))], returns, pieces)

    def _note_pending(self, tid: int, stack: int, probe: int) -> None:
        if len(self._pending) >= _PENDING_MAX:
            self._pending.clear()
        self._pending[tid, stack] = probe


def _has_threads(tgid: int) -> bool:
    try:
        return len(os.listdir(f"/proc/{tgid}/task")) > 1
    except OSError:
        return False
