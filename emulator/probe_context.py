"""What a probe's handler sees of the guest: registers, memory, the running task and its stack.

It looks at the stopped CPU itself, so it is good only until the handler returns. It changes nothing in the guest.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from emulator.errors import EmulatorError
from emulator.memory import BadAddress
from emulator.unwind import Unwinder

if TYPE_CHECKING:
    from emulator.cpu.watchpoints import Hit
    from emulator.guest import Guest

REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    "rip", "rflags",
)  # fmt: skip
# How functions of the kernel's take their arguments (System V ABI for x86-64, 3.2.3).
_ARGUMENTS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
_READ_MAX = 1 << 20
_WORD = (1 << 64) - 1


class Task(NamedTuple):
    """A task of the guest; 0 and "swapper/0" when it is idle."""

    pid: int
    comm: str


class View:
    """The guest's kernel as the host sees it, shared by all contexts of a guest."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.cpu = guest.machine.cpu
        self.symbols = guest.symbols

    def read(self, address: int, size: int) -> bytes:
        """Return bytes at a guest virtual address, in the present address space. Raises BadAddress."""
        if not 0 <= size <= _READ_MAX:
            raise ValueError(f"a handler can read at most {_READ_MAX} bytes at once")
        return self.guest.machine.memory.read_virtual(address, size, self.cpu.read("cr3"))

    def read_u64(self, address: int) -> int:
        """Return the word at a guest virtual address. Raises BadAddress."""
        return int.from_bytes(self.read(address & _WORD, 8), "little")

    @cached_property
    def unwinder(self) -> Unwinder:
        """For stack traces."""
        return Unwinder(self.symbols, self.guest.btf, self.read)

    @cached_property
    def _task_offsets(self) -> tuple[int, int]:
        return self.guest.btf.offsetof("task_struct", "pid"), self.guest.btf.offsetof("task_struct", "comm")

    def current(self) -> int:
        """Return the address of the running task's task_struct."""
        facts = self.guest.agent.facts
        if facts is None:
            raise EmulatorError("the guest's init has not started yet")
        # Between the kernel's entry and its SWAPGS, and in user mode, its base is in the other register.
        base = self.cpu.read("gs_base")
        if not base >> 63:
            base = self.cpu.read("kernel_gs_base")
        return self.read_u64(facts.current_task + base)

    def task(self, task_struct: int) -> Task:
        """Return pid and comm of a task_struct."""
        pid, comm = self._task_offsets
        name = self.read(task_struct + comm, 16).split(b"\0")[0].decode("utf-8", "replace")
        return Task(int.from_bytes(self.read(task_struct + pid, 4), "little"), name)


class Registers:
    """The CPU's general registers, `rip` and `rflags`, as attributes."""

    def __init__(self, view: View, rip: int | None = None) -> None:
        self._view = view
        self._rip = rip

    def __getattr__(self, name: str) -> int:
        if name not in REGISTERS:
            raise AttributeError(f"there is no register {name}")
        if name == "rip" and self._rip is not None:
            return self._rip
        return self._view.cpu.read(name)


class Context:
    """Given to handlers. `data` is anything they like to keep from a function's entry to its return."""

    def __init__(self, view: View, *, hit: Hit | None = None, data: object = None) -> None:
        self._view = view
        self.hit = hit  # of a wprobe: what was accessed, by which instruction, and the value before it
        self.data = data
        self.regs = Registers(view, hit.next_ip if hit else None)

    def argument(self, number: int) -> int:
        """Return a function's argument, from 0 to 5, at its entry. Raises IndexError."""
        return int(getattr(self.regs, _ARGUMENTS[number]))

    @property
    def return_value(self) -> int:
        """RAX: at a function's return what it returns, if that is a number or an address."""
        return self.regs.rax

    def memory(self, address: int, size: int) -> bytes:
        """Return `size` bytes (at most 1 MiB) at a guest virtual address. Raises BadAddress when it is not mapped."""
        return self._view.read(address, size)

    def string(self, address: int, limit: int = 4096) -> str:
        """Return the NUL-terminated string at a guest virtual address, its first `limit` bytes. Raises BadAddress."""
        data = bytearray()
        while len(data) < limit:
            piece = self.memory(address + len(data), min(limit - len(data), 64 - (address + len(data)) % 64))
            text, found, _ = piece.partition(b"\0")
            data += text
            if found:
                break
        return data.decode("utf-8", "replace")

    def task(self) -> Task:
        """Return the running task."""
        return self._view.task(self._view.current())

    def symbolize(self, address: int) -> str:
        """Write an address as the kernel does: "vfs_read+0x10"."""
        return self._view.symbols.symbolize(address)

    def stack(self, limit: int = 64) -> list[str]:
        """Return where the kernel is, then its callers, innermost first, `limit` at most.

        Exact (see `emulator.unwind`), but in code that ORC does not know: trampolines of ftrace and kprobes, BPF.
        """
        registers = {name: int(getattr(self.regs, name)) for name in REGISTERS}
        found = [registers["rip"]]
        for address in self._view.unwinder.trace(registers):
            if len(found) >= limit:
                break
            found.append(address)
        return [self.symbolize(address) for address in found[: max(limit, 0)]]


__all__ = ["REGISTERS", "BadAddress", "Context", "Registers", "Task", "View"]
