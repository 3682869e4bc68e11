"""Runs the guest inside the trio loop, and hands out its calls: `await pump.call(task, calls)`.

One thread does everything. A call first runs the guest at once, in place, until it is done: most calls take 20 to
100 us and no task switch. What takes longer (or blocks in the guest) is carried on by `Pump.run()` in slices that end
as soon as a FUSE request waits. An idle guest costs nothing: the pump sleeps until the guest's next timer.

Virtual time: in real-time mode it follows the host's monotonic clock whenever the guest is idle, less what it was far
behind by then; in deterministic mode it stands still between requests and jumps to the next timer while one that
`holds_clock` is under way. There the guest must not notice when the host does something: requests are made one after
the other (`turn`), and once the guest runs it runs until it is idle, whoever waits. Who does several things at once
`attends` it, and says when it goes on.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from emulator.agent import Call, Request, Task
from emulator.cpu.interface import GuestDied, Stop
from emulator.guest import Guest

# Virtual ns a call may run in place before the loop gets its turn (about as much host time).
_IN_PLACE = 1_000_000
# Virtual ns of a slice; it ends earlier when a watched descriptor is readable.
_SLICE = 10_000_000
# Deterministic: virtual ns a guest may go on by itself after a request, before the next one finds it busy.
_SETTLE = 100_000_000
# Virtual ns the clock of an idle guest may be moved past its next timer. One that is 10 s late is a lock-up to its
# watchdog.
_CATCH_UP = 1_000_000_000
# Host seconds a task stays at its hypercall after a call: cat's next request comes within this, and needs no wake-up.
_GRACE = 0.0005


class Turn:
    """One request at a time, in the order of their arrival. One that waits for another gives up its turn for good."""

    def __init__(self) -> None:
        self._lock = trio.Lock()

    def take_at_once(self) -> bool:
        """Take the turn if nobody has it or waits for it."""
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            return False
        return True

    async def take(self) -> None:
        """Wait for the turn."""
        await self._lock.acquire()

    def give_up(self) -> None:
        """End the turn of this task, if it has it."""
        if self._lock.statistics().owner is trio.lowlevel.current_task():
            self._lock.release()


class Pump:
    """The guest's clockwork. `dead` says why the guest is gone, once it is; every call then fails with EIO."""

    def __init__(self, guest: Guest, *, deterministic: bool = False) -> None:
        self.guest = guest
        self.agent = guest.agent
        self.machine = guest.machine
        self.deterministic = deterministic
        self.dead: GuestDied | None = None
        self.turn = Turn() if deterministic else None
        self._idle = True
        self._busy_by_itself = False
        self._kick = trio.Event()
        self._waiters: dict[Request, trio.Event] = {}
        self._clock_holders: set[Request] = set()
        self._attendants = 0
        self._watched: tuple[int, ...] = ()
        self._epoch = time.monotonic_ns() - self.machine.cpu.now

    # ---- calls

    async def call(self, task: Task, calls: Sequence[Call], *, holds_clock: bool = True) -> list[int]:
        """Have a task of the guest make system calls; return their results (negative errno for failures).

        Only one `call()` may use a task's data area at a time. With `holds_clock` false the call waits for something
        a later request brings about (a read of trace_pipe), so deterministic time does not run for it.
        Raises OSError(EIO) when the guest is or gets dead.
        """
        request = self.begin(task, calls)
        if not request.done:
            await self.finish(request, holds_clock=holds_clock)
        return request.results

    def begin(self, task: Task, calls: Sequence[Call]) -> Request:
        """Submit calls and run the guest in place; the request may be `done` afterwards, or wants `finish()`."""
        self._check_alive()
        request = self.agent.submit(task, calls)
        self._run_in_place(request)
        return request

    async def finish(self, request: Request, *, holds_clock: bool = True) -> None:
        """Wait until a request is done. Raises OSError(EIO) when the guest dies first."""
        while self._attendants and holds_clock and not request.done:
            await self.advance()
        if request.done:
            return
        self._check_alive()
        event = self._waiters[request] = trio.Event()
        request.on_done = event.set
        if holds_clock:
            self._clock_holders.add(request)
        self._wake()
        if self.turn is not None and not holds_clock:
            self.turn.give_up()
        try:
            await event.wait()
        finally:
            del self._waiters[request]
            self._clock_holders.discard(request)
        if not request.done:
            self._check_alive()

    def go_on(self, request: Request) -> None:
        """Run the guest in place for a request that is not done: something was changed that lets it go on."""
        self._check_alive()
        self._run_in_place(request)

    async def rest(self, request: Request) -> None:
        """Return when a request is done, or the guest has done all that it can for now: it is blocked then."""
        while not request.done and self.dead is None:
            if self.agent.held is not None:
                self._idle = False  # let that task go to sleep: others may have something to do
            elif self._idle and not self.agent.busy:
                return
            self._wake()
            if self._attendants:
                await self.advance()
            await trio.lowlevel.checkpoint()

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Deterministic: the guest goes on by `advance()` alone while this lasts.

        The loop would go on while a task of trio's that was just woken has yet to be scheduled.
        """
        self._attendants += self.deterministic
        try:
            yield
        finally:
            self._attendants -= self.deterministic
            self._wake()

    async def advance(self) -> None:
        """Deterministic: run the guest until it is idle, and if it is, from its next timer on. Raises OSError."""
        self._check_alive()
        self._slice(())
        self._check_alive()
        await trio.lowlevel.checkpoint()

    def _check_alive(self) -> None:
        if self.dead is not None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _run_in_place(self, request: Request) -> None:
        if self._watched:
            self._watch(())
        self._follow_host()
        limit = self.machine.cpu.now + _IN_PLACE
        try:
            # Deterministic: what the guest still does after the call must not depend on when the next one comes.
            while not request.done or (self.deterministic and not self._idle):
                stop = self.agent.step(limit)
                self._idle = self._is_idle(stop)
                if stop is Stop.DEADLINE or (stop is Stop.HALTED and not self.agent.busy):
                    break
        except GuestDied as death:
            self._die(death)
        if not self._kick.is_set():
            self._wake()

    # ---- the loop

    async def run(self, watch: Sequence[int] = ()) -> None:
        """Keep the guest going until it dies, which raises GuestDied. `watch`: descriptors that end a slice."""
        while True:
            if self.dead is not None:
                raise self.dead
            delay = self._delay()
            if delay is None or delay > 0:
                await self._sleep(delay)
                continue
            self._slice(watch)
            await trio.lowlevel.checkpoint()

    def _delay(self) -> float | None:
        """Return for how many host seconds the guest has nothing to do; None means until something is asked of it."""
        if self._attendants:
            return None
        if self.agent.busy or not self._idle:
            return 0
        held = self.agent.held is not None
        if self.deterministic:
            # Those that are done may not know yet: which task of ours comes first is left to chance.
            return None if all(request.done for request in self._clock_holders) else 0
        if held:
            return 0 if self._busy_by_itself else _GRACE
        event = self.machine.next_event()
        return None if event is None else max(event - self._host_now(), 0) / 1e9

    async def _sleep(self, delay: float | None) -> None:
        self._kick = trio.Event()
        held = self.agent.held
        with trio.move_on_after(float("inf") if delay is None else delay) as timeout:
            await self._kick.wait()
        if timeout.cancelled_caught and held is not None and self.agent.held is held:
            self._idle = False  # the grace is over: let the task go to sleep

    def _slice(self, watch: Sequence[int]) -> None:
        if self.deterministic and self._idle and self.agent.held is None and not self.agent.busy:
            event = self.machine.next_event()
            if event is not None:
                self.machine.cpu.now = max(self.machine.cpu.now, event)
        else:
            self._follow_host()
        self._watch(() if self.deterministic else tuple(watch))
        try:
            stop = self.agent.step(self.machine.cpu.now + _SLICE)
            limit = self.machine.cpu.now + _SETTLE
            while self.deterministic and stop is not Stop.HALTED and self.machine.cpu.now < limit:
                stop = self.agent.step(limit)
        except GuestDied as death:
            self._die(death)
            return
        self._busy_by_itself = stop is not Stop.HALTED and (self._busy_by_itself or stop is not Stop.HYPERCALL)
        self._idle = self._is_idle(stop)

    def _is_idle(self, stop: Stop) -> bool:
        """Has the guest nothing to do, or (in real time) nothing as urgent as the next request of the task it holds?"""
        if stop is Stop.HYPERCALL:
            return not self._busy_by_itself and not self.deterministic
        return stop is Stop.HALTED

    def _watch(self, fds: tuple[int, ...]) -> None:
        if fds != self._watched:
            self.machine.cpu.watch(fds)
            self._watched = fds

    def _wake(self) -> None:
        self._kick.set()

    # ---- time

    def _host_now(self) -> int:
        return time.monotonic_ns() - self._epoch

    def _follow_host(self) -> None:
        """An idle guest's clock catches up with the host's; a busy one's runs by its own instructions.

        What it has fallen far behind while it was busy, or this process was stopped, is left out for good.
        """
        if not self.deterministic and self._idle:
            cpu, now = self.machine.cpu, self._host_now()
            if now - cpu.now > _CATCH_UP and (event := self.machine.next_event()) is not None:
                latest = max(event, cpu.now) + _CATCH_UP
                self._epoch += max(now - latest, 0)
                now = min(now, latest)
            cpu.now = max(cpu.now, now)

    # ---- the end

    def _die(self, death: GuestDied) -> None:
        self.dead = death
        for event in self._waiters.values():
            event.set()
        self._wake()
