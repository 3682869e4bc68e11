"""Shadows that can make no call for the moment: one they are in blocks, as it does on the host, or they are stopped.

A call that may block is begun and left alone, so that nobody else waits for it. What ends it in the guest is what ends
it on the host: time, or a mirrored call of another process. At the latest the next record of its thread tells that it
has returned there: what still blocks then is interrupted by a signal.
"""

from __future__ import annotations

import errno
import signal
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from emulator.agent import DATA_SIZE, Call, Request
from fakefs.mirror.mirrored import Blocked, Ending, Mirrored, Returned
from fakefs.mirror.signals import has, is_stopped
from fakefs.mirror.sleepers import Sleepers
from fakefs.shadow import Shadows
from fakefs.syscalls import Sys

LASTING = DATA_SIZE - 0x1000
LASTING_SIZE = 0xC00
"""Room in a data area, offset and size in bytes, for what a call that blocks is given: nothing else is put there."""
_OVERSLEEP = 0.1  # host seconds a guest's sleep may be behind the host's
_BUSY = 0.1  # host seconds a guest that is never idle gets for a call before that counts as blocked
_STOPPING = 1.0  # host seconds after which a process that was sent SIGSTOP has stopped
_TIMESPEC = struct.Struct("<qq")


class Blocking:
    """Begins such calls, and gets shadows out of them."""

    def __init__(self, shadows: Shadows, sleepers: Sleepers) -> None:
        self._shadows = shadows
        self._sleepers = sleepers
        self._pump = shadows.pump
        self._stopped: dict[int, float] = {}  # processes, and since when
        self._woken: set[int] = set()  # those of them that go on for a call they had begun before

    async def begin(
        self,
        shadow: Mirrored,
        calls: Sequence[Call],
        ending: Ending | None = None,
        returned: Returned | None = None,
        limit: float | None = None,
    ) -> None:
        """Begin calls, and return when they are done or blocked. The caller holds the shadow's lock.

        `limit`: they end by themselves after that time, in host seconds.
        """
        until = None if limit is None else time.monotonic() + limit
        request = self._pump.begin(shadow.task, calls)
        await self._rest(request)
        if not request.done:
            shadow.blocked = Blocked(request, calls, until, ending, returned)
        elif returned is not None:
            returned(request.results)

    def sleep(self, shadow: Mirrored, clock: int | None, duration: int) -> None:
        """Begin a sleep of some ns, on a clock or (None) by nanosleep(2). The caller holds the shadow's lock."""
        until = time.monotonic() + duration / 1e9
        self._pump.agent.put(shadow.task, LASTING, _TIMESPEC.pack(*divmod(duration, 10**9)))
        at = shadow.task.virtual(LASTING)
        call = (Sys.NANOSLEEP, at, 0) if clock is None else (Sys.CLOCK_NANOSLEEP, clock, 0, at, 0)
        shadow.blocked = Blocked(self._pump.begin(shadow.task, [call]), [call], until)

    async def settle(self, shadow: Mirrored) -> None:
        """Return when a shadow can make calls: on the host, its thread has just done so."""
        await self._wake(shadow.tgid)
        blocked = shadow.blocked
        if blocked is None:
            return
        await self._rest(blocked.request)
        if blocked.until is None:
            if blocked.ending is not None and not blocked.request.done:
                await blocked.ending()
                await self._rest(blocked.request)
        elif not blocked.request.done:
            late = blocked.until - time.monotonic() + _OVERSLEEP
            if late < 2 * _OVERSLEEP:  # else it was interrupted
                with trio.move_on_after(float("inf") if self._pump.deterministic else max(late, 0)):
                    await self._pump.finish(blocked.request)
        await self.interrupt(shadow)

    async def catch_up(self, shadow: Mirrored) -> None:
        """Wait for what the guest's clock ends, which may be a little behind the host's."""
        if shadow.blocked is not None:
            with trio.move_on_after(_OVERSLEEP):
                await self._pump.finish(shadow.blocked.request)

    async def rest(self, shadow: Mirrored) -> None:
        """Run the guest, and return when it has done all that it can for now."""
        request = Request([]) if shadow.blocked is None else shadow.blocked.request
        self._pump.go_on(request)
        await self._rest(request)

    async def _rest(self, request: Request) -> None:
        with trio.move_on_after(_BUSY):
            await self._pump.rest(request)

    async def interrupt(self, shadow: Mirrored) -> None:
        """Have a shadow return from the call it is in, now."""
        await self._wake(shadow.tgid)
        blocked, shadow.blocked = shadow.blocked, None
        if blocked is None:
            return
        if not blocked.request.done:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._shadows.keep_interrupting, shadow)
                with suppress(OSError):  # the guest is dead
                    await self._pump.finish(blocked.request)
                nursery.cancel_scope.cancel()
        if blocked.returned is not None and blocked.request.done:
            blocked.returned(blocked.request.results)

    def is_blocked(self, shadow: Mirrored) -> bool:
        """Is a shadow in a call that has not returned, and not stopped?"""
        return shadow.blocked is not None and not shadow.blocked.request.done and shadow.tgid not in self._stopped

    async def take(self, shadow: Mirrored, number: int, *, caught: bool) -> bool:
        """Have a shadow take a signal that is pending in the call it is blocked in; False if it is in none."""
        blocked = shadow.blocked
        if blocked is None or blocked.request.done or not has(self._sleepers.pending(shadow.task), number):
            return False
        with self._sleepers.open_to(shadow.task, number, caught=caught) as reached:
            if reached:
                self._pump.go_on(blocked.request)
                await self._rest(blocked.request)
        return blocked.request.done

    @asynccontextmanager
    async def aside(self, shadow: Mirrored, *, sleeps: bool = True) -> AsyncIterator[None]:
        """Have a shadow do something else meanwhile: a call it is in is made again afterwards.

        `sleeps`: a sleep too. The caller does not hold the shadow's lock.
        """
        blocked = shadow.blocked
        await self.interrupt(shadow)
        try:
            yield
        finally:
            if blocked is not None and blocked.request.results[-1:] == [-errno.EINTR] and not shadow.task.dead:
                async with shadow.lock:
                    await self._again(shadow, blocked, sleeps=sleeps)

    async def _again(self, shadow: Mirrored, blocked: Blocked, *, sleeps: bool) -> None:
        left = None if blocked.until is None else blocked.until - time.monotonic()
        number, clock, *_ = blocked.calls[-1]
        if number not in (Sys.NANOSLEEP, Sys.CLOCK_NANOSLEEP):
            await self.begin(shadow, blocked.calls, blocked.ending, blocked.returned, limit=left)
        elif sleeps and left is not None and left > 0:
            self.sleep(shadow, clock if number == Sys.CLOCK_NANOSLEEP else None, int(left * 1e9))

    # ---- stopped processes

    def is_stopped(self, tgid: int) -> bool:
        """Has it, and not been sent the signal to go on?"""
        return tgid in self._stopped

    def stopped(self, tgid: int) -> None:
        """The shadow of a process has been stopped by a signal."""
        self._stopped[tgid] = time.monotonic()

    def continued(self, tgid: int) -> None:
        """The shadow of a process has been sent the signal to go on."""
        self._stopped.pop(tgid, None)
        self._woken.discard(tgid)

    async def _wake(self, tgid: int) -> None:
        if tgid in self._stopped and tgid not in self._woken:
            self._woken.add(tgid)
            if (shadow := self._shadows.alive(tgid)) is not None:
                await self._shadows.kill(shadow, signal.SIGCONT)

    async def stop_again(self) -> None:
        """Stop those that had begun a call on the host before they were stopped there, or that were needed here."""
        for tgid in list(self._woken):
            shadow = self._shadows.alive(tgid)
            if shadow is not None and shadow.lock.locked():
                continue
            self._woken.discard(tgid)
            since = self._stopped.get(tgid, 0)
            if shadow is None or not (time.monotonic() - since < _STOPPING or is_stopped(tgid)):
                self._stopped.pop(tgid, None)  # it goes on there, whoever has told it to
            else:
                await self._shadows.kill(shadow, signal.SIGSTOP)
