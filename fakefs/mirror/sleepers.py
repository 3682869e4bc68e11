"""Signals of a shadow that is blocked in a call, where it can neither unblock one nor give it a handler.

Both is written into the kernel's memory as sigprocmask(2) and sigaction(2) would, and the task is woken. What follows
is the kernel's own doing: the call ends as it does on the host, by that very signal, and nothing else shows.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from emulator.agent import Task
from emulator.guest import Guest
from emulator.kernel.facts import Facts
from emulator.memory import PAGE

INTERRUPT = signal.Signals(16)
"""SIGSTKFLT, which no kernel and hardly a program sends: has a handler in shadows, and is never blocked."""
_SIGPENDING = 1 << 2 | 1 << 1
"""TIF_SIGPENDING is bit 2, or 1 in newer kernels; the other is TIF_NOTIFY_RESUME or TIF_NOTIFY_SIGNAL, which have the
task look for work and find none."""
_SEND_SIG_PRIV = 1  # <linux/sched/signal.h>


@dataclass(frozen=True)
class SleeperFacts(Facts):
    """Guest virtual address of do_send_sig_info(int, struct kernel_siginfo *, ...); offsets and a size in bytes."""

    MISSING: ClassVar[str] = "this kernel does not tell of its signals"

    send: int
    flags: int  # in a task_struct, as the four that follow
    blocked: int
    pending: int
    sighand: int
    signal: int
    shared: int  # in a signal_struct, those pending for the process
    actions: int  # in a sighand_struct
    action_size: int


def sleeper_facts(guest: Guest) -> SleeperFacts | None:
    """Look the facts up in a just booted guest; None when its kernel lacks something."""
    from emulator.kernel.btf import BtfLookupError

    btf = guest.btf
    try:
        return SleeperFacts(
            send=guest.symbols["do_send_sig_info"],
            flags=btf.offsetof("task_struct", "thread_info.flags"),
            blocked=btf.offsetof("task_struct", "blocked"),
            pending=btf.offsetof("task_struct", "pending.signal"),
            sighand=btf.offsetof("task_struct", "sighand"),
            signal=btf.offsetof("task_struct", "signal"),
            shared=btf.offsetof("signal_struct", "shared_pending.signal"),
            actions=btf.offsetof("sighand_struct", "action"),
            action_size=btf.sizeof("k_sigaction"),
        )
    except (KeyError, BtfLookupError):
        return None


class Sleepers:
    """Without `facts` none can be reached."""

    def __init__(self, guest: Guest, facts: SleeperFacts | None) -> None:
        self._machine = guest.machine
        self._agent = guest.agent
        self._facts = facts
        self._kernels = False
        if facts is not None:
            self._machine.trap(facts.send, self._send, when=lambda: self._kernels)

    @contextmanager
    def sent_by_kernel(self) -> Iterator[None]:
        """What is sent meanwhile looks as if the kernel had sent it."""
        self._kernels = True
        try:
            yield
        finally:
            self._kernels = False

    def _send(self) -> bool:
        self._machine.cpu.write("rsi", _SEND_SIG_PRIV)
        return False

    def pending(self, task: Task) -> int:
        """Return the mask of signals that are pending for a task or its process; 0 if that cannot be known."""
        at = self._physical(task.task_struct)
        if self._facts is None or at is None or task.dead:
            return 0
        memory = self._machine.memory
        mask = memory.read_u64(at + self._facts.pending)
        process = self._physical(memory.read_u64(at + self._facts.signal))
        return mask if process is None else mask | memory.read_u64(process + self._facts.shared)

    @contextmanager
    def open_to(self, task: Task, number: int, *, caught: bool) -> Iterator[bool]:
        """Have a task that is blocked in a call take a signal meanwhile: by the handler of INTERRUPT, or by default.

        False when it cannot be reached.
        """
        at, facts, memory = self._physical(task.task_struct), self._facts, self._machine.memory
        if facts is None or at is None or task.dead:
            yield False
            return
        handlers = self._physical(memory.read_u64(at + facts.sighand))
        if handlers is None:
            yield False
            return
        size, bit = facts.action_size, 1 << (number - 1)
        action = handlers + facts.actions + size * (number - 1)
        old = memory.read(action, size)
        if caught:
            memory.write(action, memory.read(handlers + facts.actions + size * (INTERRUPT - 1), size))
        memory.write_u64(at + facts.blocked, memory.read_u64(at + facts.blocked) & ~bit)
        memory.write_u64(at + facts.flags, memory.read_u64(at + facts.flags) | _SIGPENDING)
        try:
            yield self._agent.stir(task)
        finally:
            if not task.dead:
                memory.write(action, old)
                memory.write_u64(at + facts.blocked, memory.read_u64(at + facts.blocked) | bit)

    def _physical(self, address: int) -> int | None:
        """Return where an object of the kernel's allocator, smaller than three pages, is; None when that is nowhere."""
        if self._agent.facts is None:
            return None
        at = address - self._agent.facts.direct_map
        return at if 0 <= at <= self._machine.ram_size - 4 * PAGE else None
