"""poll(2) of the guest's files: a task of the guest sleeps in it, and the host is told when it returns."""

from __future__ import annotations

import errno
import select
import struct
from collections.abc import Callable

import trio

from fakefs.files import Caller
from fakefs.shadow import Handle, Shadow, Shadows
from fakefs.syscalls import Sys, check

_POLLFD_AT = 0
_REVENTS_AT = 6


class _Watch:
    """A task of the guest that sleeps in poll(2) until one of `events`."""

    __slots__ = ("events", "notify", "shadow")

    def __init__(self, events: int, notify: Callable[[], None]) -> None:
        self.events = events
        self.notify = notify
        self.shadow: Shadow | None = None


class Polling:
    """poll(2) of one open file. The guest tells of `once` but once: a histogram tells so of each change."""

    __slots__ = ("_handle", "_nursery", "_once", "_shadows", "_told", "_watch")

    def __init__(self, shadows: Shadows, nursery: trio.Nursery, handle: Handle, *, once: int = select.POLLPRI) -> None:
        self._shadows = shadows
        self._nursery = nursery
        self._handle = handle
        self._watch: _Watch | None = None
        self._once = once
        self._told = 0  # what a watch was told of that is told once

    async def ready(self, caller: Caller, events: int, notify: Callable[[], None] | None) -> int:
        """Return what is ready now; otherwise `notify` is called once when something becomes so. Raises OSError."""
        shadow = await self._shadows.of(caller)
        async with shadow.lock:
            ready = await self._poll(shadow, events, 0) | self._told & events
            self._told &= ~events
        if not ready and notify is not None:
            before = self._watch
            if before is not None and events & ~before.events == 0:
                before.notify = notify
            else:
                watch = self._watch = _Watch(events | (before.events if before else 0), notify)
                self._nursery.start_soon(self._sleep, watch)
                await self._end(before)
        return ready

    async def close(self) -> None:
        """End what sleeps for the file."""
        watch, self._watch = self._watch, None
        await self._end(watch)

    async def _end(self, watch: _Watch | None) -> None:
        if watch is not None and watch.shadow is not None:
            await self._shadows.end(watch.shadow)

    async def _poll(self, shadow: Shadow, events: int, timeout_ms: int) -> int:
        fd = await self._shadows.descriptor(shadow, self._handle)
        agent = self._shadows.pump.agent
        agent.put(shadow.task, _POLLFD_AT, struct.pack("<iHH", fd, events & 0xFFFF, 0))
        call = (Sys.POLL, shadow.task.virtual(_POLLFD_AT), 1, timeout_ms)
        [result] = await self._shadows.pump.call(shadow.task, [call], holds_clock=False)
        if result == -errno.EINTR:
            return 0
        check(result)
        return int.from_bytes(agent.get(shadow.task, _POLLFD_AT + _REVENTS_AT, 2), "little")

    async def _sleep(self, watch: _Watch) -> None:
        """Sleep in the guest's poll until the file is ready, tell the host, and end."""
        try:
            task = await self._shadows.spawn(self._shadows.init)
            shadow = watch.shadow = Shadow(task, 0, b"poll", self._shadows.init.descriptors)
            async with shadow.lock:
                while self._watch is watch:
                    if ready := await self._poll(shadow, watch.events, -1):
                        self._told |= ready & self._once
                        watch.notify()
                        break
            if self._watch is watch:
                self._watch = None
            await self._shadows.end(shadow)  # also when the file was closed while it was being spawned
        except OSError:
            watch.notify()  # the guest is dead or full: the host asks again and gets that answer
            if self._watch is watch:
                self._watch = None
