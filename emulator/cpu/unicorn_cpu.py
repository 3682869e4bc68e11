"""What both CPUs made of a Unicorn engine share: device callbacks, memory, registers by name, the saved state.

A callback comes from C, where no exception can pass: what a device raises is kept, the engine stopped, and `run()` of
the CPU raises it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_char, c_size_t, c_uint32, c_uint64, c_void_p

from emulator.cpu.interface import PortIO
from emulator.cpu.libunicorn import HOOK_CODE, Engine
from emulator.errors import EmulatorError

HYPERCALL_LEAF = 0x46414B45
MAX_WATCHED = 8
# CPUID bits: host randomness off (runs must be reproducible), local APIC, timer that never stops, constant TSC.
FEATURES_OFF = {"1.ecx": 1 << 30, "7.ebx": 1 << 18}
FEATURES_ON = {"1.edx": 1 << 9, "6.eax": 1 << 2, "80000007.edx": 1 << 8}
# sizeof(struct uc_context): sizes and host pointers of the engine it was made by; the registers come behind it.
CONTEXT_HEADER = 40
_MSR_KERNEL_GS_BASE = 0xC0000102


class UnicornCPU:
    """The part of `interface.CPU` that is the same for both."""

    TRAP_HOOK = HOOK_CODE

    def __init__(self, ports: PortIO, index: int) -> None:
        self.index = index
        self.fault: BaseException | None = None
        self.engine = Engine()
        self._ports = ports
        self.trapped: int | None = None
        self._pass: int | None = None
        self._traps: dict[int, Callable[[], bool] | None] = {}
        self._trap_hooks: dict[int, c_size_t] = {}
        self._trap_callback = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, c_uint32, c_void_p)(
            lambda _uc, address, _size, _data: self._on_trap_hook(address)
        )

    # ---- traps

    def add_trap(self, address: int, when: Callable[[], bool] | None = None) -> None:
        """End every run with Stop.TRAP in front of the instruction at a guest virtual address; RIP stands there.

        `when` is asked each time, inside the run: if it says False the guest goes on at the cost of about 1 us.
        """
        self._traps[address] = when
        if address not in self._trap_hooks:
            hook = self.engine.hook(self.TRAP_HOOK, self._trap_callback, begin=address, end=address)
            self._trap_hooks[address] = hook

    def remove_trap(self, address: int) -> None:
        """Take back `add_trap()`, while the CPU is stopped."""
        del self._traps[address]
        if self._pass == address:
            self._pass = None

    def _on_trap_hook(self, address: int) -> None:
        if address not in self._traps:
            return
        try:
            when = self._traps[address]
            if when is None or when():
                self._on_trap(address)
        except BaseException as error:
            self._fail(error)

    def pass_trap(self) -> None:
        """Let the next run execute the instruction it was stopped in front of."""
        self._pass = self.read("rip")

    def _on_trap(self, address: int) -> None:
        if self._pass == address:
            self._pass = None
        else:
            self.trapped = address
            self.engine.stop()

    def _take_trap(self) -> bool:
        trapped, self.trapped = self.trapped is not None, None
        return trapped

    def forget_code(self, start: int, end: int) -> None:
        """Forget translated code at guest virtual addresses start..end-1: the host wrote there."""
        if self.read("cs") & 3:
            self.engine.flush_translations()  # in user mode the engine could not find the kernel's code
        else:
            self.engine.forget_code(start, end)

    # ---- device callbacks

    def _port_read(self, port: int, size: int) -> int:
        try:
            return self._ports.port_read(port, size)
        except BaseException as error:
            self._fail(error)
            return (1 << 8 * size) - 1

    def _port_write(self, port: int, size: int, value: int) -> None:
        try:
            self._ports.port_write(port, size, value)
        except BaseException as error:
            self._fail(error)

    def map_io(
        self, physical: int, size: int, read: Callable[[int, int], int], write: Callable[[int, int, int], None]
    ) -> None:
        """Call `read(offset, size)` and `write(offset, size, value)` for accesses to a physical range."""

        def guarded_read(offset: int, width: int) -> int:
            try:
                return read(offset, width)
            except BaseException as error:
                self._fail(error)
                return (1 << 8 * width) - 1

        def guarded_write(offset: int, width: int, value: int) -> None:
            try:
                write(offset, width, value)
            except BaseException as error:
                self._fail(error)

        self.engine.map_io(physical, size, guarded_read, guarded_write)

    def _fail(self, error: BaseException) -> None:
        self.fault = self.fault or error
        self.engine.stop()

    def _raise_fault(self) -> None:
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault

    # ---- memory and registers

    def map_ram(self, physical: int, size: int, host_address: int) -> None:
        """Make memory of this process the guest's RAM at a physical address (bytes)."""
        self.engine.map_host_memory(physical, size, host_address)

    def flush_translations(self) -> None:
        """Forget translated code and address translations."""
        self.engine.flush_translations()

    def read(self, register: str) -> int:
        """Return a register by its name in the manual, lower case."""
        if register == "kernel_gs_base":
            return self.engine.read_msr(_MSR_KERNEL_GS_BASE)
        return self.engine.read(register)

    def write(self, register: str, value: int) -> None:
        """Set a register by its name in the manual, lower case."""
        self.engine.write(register, value)

    # ---- state

    def save(self) -> bytes:
        """Return the CPU's whole state, opaque, for `load()` of the same version of Unicorn."""
        context = self.engine.context_alloc()
        try:
            self.engine.context_save(context)
            size = self.engine.context_size()
            assert context.value is not None
            return bytes((c_char * size).from_address(context.value).raw)
        finally:
            self.engine.lib.uc_context_free(context)

    def load(self, state: bytes) -> None:
        """Become what `save()` saw. Raises EmulatorError when it comes from another version."""
        size = self.engine.context_size()
        if len(state) != size:
            raise EmulatorError("the saved CPU state is of another Unicorn")
        context = self.engine.context_alloc()
        try:
            assert context.value is not None
            ctypes.memmove(context.value + CONTEXT_HEADER, state[CONTEXT_HEADER:], size - CONTEXT_HEADER)
            self.engine.context_restore(context)
        finally:
            self.engine.lib.uc_context_free(context)
        self.engine.flush_translations()

    def close(self) -> None:
        """Free the engine; it must not run."""
        self.engine.close()
