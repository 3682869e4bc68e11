"""Signals in the guest: sent by the shadow of the sender, delivered where they are delivered on the host.

In shadows all signals but one of ours are blocked: what a signal does to a process is the host's decision. When a
handler has been run there, the signal is let through to one that does nothing, and sent before that if it was the
host's kernel that has sent it; one that has ended its process there is let through to end its shadow; stopping and
going on are the kernel's at once.
"""

from __future__ import annotations

import signal
import struct
from contextlib import nullcontext

from emulator.agent import Call
from fakefs.mirror.mirrored import Mirrored
from fakefs.mirror.processes import Processes
from fakefs.mirror.records import Handled, Signal, Stopped
from fakefs.mirror.signals import has
from fakefs.mirror.sleepers import INTERRUPT, Sleepers
from fakefs.shadow import Shadows
from fakefs.syscalls import Sys

_SIG_BLOCK, _SIG_UNBLOCK, _SIG_SETMASK = 0, 1, 2
_ACTION_SIZE, _SET_SIZE = 32, 8
_ACTION, _OLD_ACTION, _SET, _PENDING, _SIGINFO = 0, 32, 64, 72, 128  # where they are in a data area
_CORE_DUMPED = 0x80
_SURVIVED = frozenset(
    getattr(signal, f"SIG{name}") for name in ("CHLD", "CONT", "URG", "WINCH", "STOP", "TSTP", "TTIN", "TTOU")
)
_SI_KERNEL, _SI_TKILL = 0x80, -6  # <asm-generic/siginfo.h>
_SIGINFO_LAYOUT = struct.Struct("<3i4x3I100x")
_OF_THREADS = frozenset(getattr(signal, f"SIG{name}") for name in ("SEGV", "BUS", "FPE", "ILL", "TRAP", "SYS", "PIPE"))
_STOPS = (signal.SIGTTIN, signal.SIGTTOU, signal.SIGTSTP)
_KERNELS = _OF_THREADS - {signal.SIGPIPE} | frozenset(
    getattr(signal, f"SIG{name}")
    for name in (
        *("ALRM", "VTALRM", "PROF", "INT", "QUIT", "TSTP", "TTIN", "TTOU", "WINCH", "HUP", "CONT"),
        *("IO", "URG", "XCPU", "XFSZ"),
    )
)
"""Signals that the kernel sends, if nothing else is known of the sender."""


class Delivery:
    """Does that."""

    def __init__(self, shadows: Shadows, processes: Processes, sleepers: Sleepers) -> None:
        self._shadows = shadows
        self._sleepers = sleepers
        self._processes = processes
        self._pump = shadows.pump
        self._agent = shadows.pump.agent

    async def send(self, record: Signal) -> None:
        """kill(2) and its relatives, as far as they reach mirrored processes."""
        sender = self._processes.find(record.tid)
        to = [shadow for tid in record.to if (shadow := self._processes.find(tid)) is not None]
        if sender is None or not to:
            return
        await self._processes.settle(sender)
        *_, target, number = record.arguments
        if target == -1 or (target <= 0 and number == signal.SIGKILL):
            for shadow in to:  # the guest has processes of its own, and may count others to a group
                await self._processes.call(sender, (Sys.KILL, shadow.task.pid, number))
        elif target > 0:
            ids = [self._shadows.alive(each) for each in record.arguments[:-1]]
            pids = [each.task.pid if each is not None else target for each in ids]
            await self._send_to(sender, record, pids, number)
        else:
            await self._processes.call(sender, (record.number, *record.arguments))
        for shadow in to:
            if number == signal.SIGSTOP:
                self._processes.blocking.stopped(shadow.tgid)
            elif number == signal.SIGCONT:
                self._processes.blocking.continued(shadow.tgid)
            if shadow.task.dead:
                continue
            if shadow.tid in record.caught:
                shadow.sent.add(number)
            elif 0 < number <= 64 and number not in _SURVIVED:
                shadow.doomed = number

    async def _send_to(self, sender: Mirrored, record: Signal, pids: list[int], number: int) -> None:
        """Send a signal to one process or thread."""
        async with sender.lock:
            if record.number == Sys.PIDFD_SEND_SIGNAL:
                [fd] = await self._pump.call(sender.task, [(Sys.PIDFD_OPEN, *pids, 0)])
                calls: list[Call] = [(record.number, fd, number, 0, 0), (Sys.CLOSE, fd)]
            else:
                self._agent.put(sender.task, 0, record.info.encode("latin-1"))
                calls = [(record.number, *pids, number, *([sender.task.virtual()] if record.info else []))]
            await self._pump.call(sender.task, calls)

    async def stop(self, record: Stopped) -> None:
        """A process has been stopped by its terminal, or by a signal that it could have caught."""
        shadow = self._processes.find(record.tid)
        if shadow is None or self._processes.blocking.is_stopped(shadow.tgid):
            return
        number = next((each for each in _STOPS if has(self._sleepers.pending(shadow.task), each)), signal.SIGTSTP)
        await self._send(shadow, number, _siginfo(Handled(shadow.tid, number, [])))
        with self._sleepers.open_to(shadow.task, number, caught=False) as reached:
            if reached:
                await self._processes.blocking.rest(shadow)
        self._processes.blocking.stopped(shadow.tgid)

    async def handled(self, record: Handled) -> None:
        """A thread has run a handler: so does its shadow, for the same signal."""
        shadow = self._processes.find(record.tid)
        if shadow is None:
            return
        number, blocking = record.number, self._processes.blocking
        sent = number in shadow.sent
        shadow.sent.discard(number)
        info = None if sent else _siginfo(record)
        taken = False
        if blocking.is_blocked(shadow):
            await self._send(shadow, number, info)
            taken = await blocking.take(shadow, number, caught=True)
        await blocking.interrupt(shadow)
        if not taken:
            async with shadow.lock:
                await self._deliver(shadow, number, info)

    async def _send(self, shadow: Mirrored, number: int, info: bytes | None) -> None:
        """Have init send a signal to a shadow that cannot do so itself, if it is not pending there."""
        if info is None or has(self._sleepers.pending(shadow.task), number):
            return
        init = self._shadows.init
        code = _SIGINFO_LAYOUT.unpack(info)[2]
        async with init.lock:
            self._agent.put(init.task, _SIGINFO, info)
            if code < 0 and code != _SI_TKILL:
                call: Call = (Sys.RT_SIGQUEUEINFO, shadow.task.pid, number, init.task.virtual(_SIGINFO))
            else:
                call = (Sys.KILL, shadow.task.pid, number)
            with self._sleepers.sent_by_kernel() if code == _SI_KERNEL else nullcontext():
                await self._pump.call(init.task, [call])

    async def _deliver(self, shadow: Mirrored, number: int, info: bytes | None) -> None:
        """Let a signal through to the handler of the one that is not blocked; if it is not pending, send it first."""
        at, bit = shadow.task.virtual, shadow.task.virtual(_SET)
        self._agent.put(shadow.task, _SET, struct.pack("<Q", 1 << (number - 1)))
        await self._pump.call(shadow.task, [(Sys.RT_SIGPENDING, at(_PENDING), _SET_SIZE)])
        [pending] = struct.unpack("<Q", self._agent.get(shadow.task, _PENDING, _SET_SIZE))
        calls: list[Call] = []
        if not has(pending, number):
            if info is None:
                return
            self._agent.put(shadow.task, _SIGINFO, info)
            calls.append(_to_itself(shadow, number, at(_SIGINFO)))
        calls += [
            (Sys.RT_SIGACTION, INTERRUPT, 0, at(_ACTION), _SET_SIZE),
            (Sys.RT_SIGACTION, number, at(_ACTION), at(_OLD_ACTION), _SET_SIZE),
            (Sys.RT_SIGPROCMASK, _SIG_UNBLOCK, bit, 0, _SET_SIZE),
        ]
        if number != INTERRUPT:
            calls.append((Sys.RT_SIGPROCMASK, _SIG_BLOCK, bit, 0, _SET_SIZE))
            calls.append((Sys.RT_SIGACTION, number, at(_OLD_ACTION), 0, _SET_SIZE))
        await self._pump.call(shadow.task, calls)

    async def end(self, shadow: Mirrored, status: int | None) -> None:
        """A process has ended on the host without telling: end its shadow likewise.

        `status` is as wait(2) has it; None if it is not known.
        """
        if shadow.task.dead or self._processes.find(shadow.tid) is not shadow:
            return
        status = shadow.doomed if status is None else status
        number = status & ~_CORE_DUMPED & 0x7F
        blocking = self._processes.blocking
        takes = number not in (0, signal.SIGKILL) and blocking.is_blocked(shadow)
        if not takes:
            await blocking.interrupt(shadow)
        await self._processes.forget(shadow, whole=True)
        if takes:
            await self._send(shadow, number, _siginfo(Handled(shadow.tid, number, [])))
            await blocking.take(shadow, number, caught=False)
            await blocking.interrupt(shadow)
        if number == 0:
            await self._processes.call(shadow, (Sys.EXIT_GROUP, status >> 8 & 0xFF))
        elif number == signal.SIGKILL:
            await self._shadows.kill(shadow, number)
        elif not shadow.task.dead:
            await self._die(shadow, number)

    async def _die(self, shadow: Mirrored, number: int) -> None:
        """Of a signal that is pending, or else sent now."""
        at = shadow.task.virtual
        async with shadow.lock:
            self._agent.put(shadow.task, _ACTION, bytes(_ACTION_SIZE))  # SIG_DFL
            calls: list[Call] = [
                (Sys.RT_SIGACTION, number, at(_ACTION), 0, _SET_SIZE),
                (Sys.RT_SIGPENDING, at(_PENDING), _SET_SIZE),
            ]
            await self._pump.call(shadow.task, calls)
            [pending] = struct.unpack("<Q", self._agent.get(shadow.task, _PENDING, _SET_SIZE))
            self._agent.put(shadow.task, _SET, struct.pack("<Q", ~(1 << (number - 1)) & (1 << 64) - 1))
            self._agent.put(shadow.task, _SIGINFO, _siginfo(Handled(shadow.tid, number, [])) or b"")
            calls = [] if has(pending, number) else [_to_itself(shadow, number, at(_SIGINFO))]
            calls += [
                (Sys.RT_SIGPROCMASK, _SIG_SETMASK, at(_SET), 0, _SET_SIZE),
                (Sys.EXIT_GROUP, 128 + number),
            ]
            await self._pump.call(shadow.task, calls)


def _siginfo(record: Handled) -> bytes | None:
    """Return the siginfo_t of a signal that no mirrored process has sent; None of a child's end: that sends it."""
    if record.number == signal.SIGCHLD:
        return None
    sender = [0, _SI_KERNEL if record.number in _KERNELS else 0, 0, 0, 0]
    error, code, *words = record.info or sender
    return _SIGINFO_LAYOUT.pack(record.number, error, code, *words)


def _to_itself(shadow: Mirrored, number: int, info: int) -> Call:
    """Only to itself may a thread send what looks like the kernel's."""
    if shadow.tid == shadow.tgid and number not in _OF_THREADS:
        return (Sys.RT_SIGQUEUEINFO, shadow.task.pid, number, info)
    return (Sys.RT_TGSIGQUEUEINFO, shadow.tgid, shadow.task.pid, number, info)
