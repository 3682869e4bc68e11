"""What the machine asks of a CPU. Two implementations: `native` (fast, the default) and `pure` (public API alone)."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Protocol

from emulator.errors import EmulatorError

# Virtual time: 4 ns for each translation block executed, and a TSC of 1 GHz on the same counter.
NS_PER_BLOCK = 4
TSC_KHZ = 1_000_000


class Stop(enum.IntEnum):
    """Why `CPU.run()` came back (the values are those of enum core_reason in native/core.h)."""

    DEADLINE = 1
    STOPPED = 2
    READY = 3
    HALTED = 4
    HYPERCALL = 5
    WINDOW = 6
    DEAD = 7
    WATCH = 9  # behind an instruction that hit watchpoints of the host's: `watchpoints.take_hits()`
    TRAP = 8  # in front of an instruction given to `add_trap()`


class GuestDied(EmulatorError):
    """The guest cannot go on: triple fault, panic, or a loop with interrupts off."""


class PortIO(Protocol):
    """What answers IN and OUT."""

    def port_read(self, port: int, size: int) -> int: ...
    def port_write(self, port: int, size: int, value: int) -> None: ...


class CPU(Protocol):
    """One numbered CPU of the machine. Only one thread may run it; `stop()` may come from any."""

    index: int
    fault: BaseException | None  # what a device callback raised; `run()` raises it

    @property
    def now(self) -> int:
        """Virtual time, ns. Settable while the CPU is not running, forwards only."""

    @now.setter
    def now(self, ns: int) -> None: ...

    @property
    def interruptible(self) -> bool:
        """Would the CPU take an interrupt before its next instruction (RFLAGS.IF, no STI or MOV SS shadow)?"""

    def run(self, deadline_ns: int, *, vector: int | None = None, window: bool = False) -> Stop:
        """Run until virtual time `deadline_ns` or another Stop; deliver `vector` first (the CPU must be interruptible).

        With `window` the run ends with Stop.WINDOW as soon as an interrupt would be taken.
        Raises GuestDied for a triple fault, and what a device callback raised.
        """

    def shorten(self, deadline_ns: int) -> None:
        """Bring the deadline of the present run forward; only from a device callback inside it."""

    def stop(self) -> None:
        """End the current or next run soon (Stop.STOPPED). Any thread."""

    def watch(self, fds: Sequence[int]) -> None:
        """End a run soon (Stop.READY) once one of these descriptors (at most 8) is readable."""

    def add_trap(self, address: int, when: Callable[[], bool] | None = None) -> None:
        """End every run with Stop.TRAP in front of the instruction at a guest virtual address; RIP stands there.

        `when` is asked each time, inside the run: if it says False the guest goes on at the cost of about 1 us.
        One trap an address. Code translated earlier does not know of it: use `forget_code()` when the guest has run.
        """

    def remove_trap(self, address: int) -> None:
        """Take back `add_trap()`, while the CPU is stopped. Raises KeyError when there is none."""

    def pass_trap(self) -> None:
        """Let the next run execute the instruction it was stopped in front of."""

    def step(self) -> Stop | None:
        """Execute the instruction at RIP alone, without taking an interrupt or looking at a trap there.

        Returns Stop.DEADLINE behind it, another Stop if it led to one, None when it raised an exception, whose handler
        is next. Raises EmulatorError when this CPU cannot.
        """

    def forget_code(self, start: int, end: int) -> None:
        """Forget translated code at guest virtual addresses start..end-1: the host wrote there."""

    def read(self, register: str) -> int:
        """Return a register by its name in the manual, lower case."""

    def write(self, register: str, value: int) -> None: ...
    def start_at(self, entry: int, registers: dict[str, int], gdt: tuple[int, int], code: int, data: int) -> None:
        """Set up 64-bit mode with paging on, flat segments with these selectors, and RIP = entry."""

    def map_ram(self, physical: int, size: int, host_address: int) -> None:
        """Make memory of this process the guest's RAM at a physical address (bytes)."""

    def map_io(
        self, physical: int, size: int, read: Callable[[int, int], int], write: Callable[[int, int, int], None]
    ) -> None: ...
    def flush_translations(self) -> None:
        """Forget translated code: needed after the host wrote into code in RAM."""

    def save(self) -> bytes:
        """Return the CPU's whole state, opaque, for `load()` of the same implementation and version."""

    def load(self, state: bytes) -> None: ...
    def close(self) -> None: ...
