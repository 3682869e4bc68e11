"""The fast CPU: Unicorn driven by `native/core.c`, which delivers exceptions and interrupts inside the run loop.

Python is entered for port and MMIO accesses only. See native/core.h for the division of work and
`emulator.cpu.layout` for how its private offsets are proven.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_uint32, c_uint64, c_void_p

from emulator.cpu import layout as layouts
from emulator.cpu import libunicorn
from emulator.cpu.core import OFFSETS, TRANSLATE, Core, PollFd, library
from emulator.cpu.interface import NS_PER_BLOCK, GuestDied, PortIO, Stop
from emulator.cpu.shortcuts import Shortcuts
from emulator.cpu.unicorn_cpu import FEATURES_OFF, FEATURES_ON, HYPERCALL_LEAF, MAX_WATCHED, UnicornCPU
from emulator.cpu.watchpoints import CFLAGS_NEXT_TB, Watchpoints
from emulator.errors import EmulatorError

_POLLIN = 1
_RFLAGS_IF = 0x200
_HF_CPL = 3
_HF_INHIBIT_IRQ = 8


class NativeCPU(UnicornCPU):
    """A CPU of the machine (see `interface.CPU`). One a process for now: QEMU's interrupt routine has no user data."""

    def __init__(self, ports: PortIO, index: int = 0, *, plain: bool = False) -> None:
        """With `plain` the guest's code is translated as Unicorn does it: slower, for comparison."""
        super().__init__(ports, index)
        self.watchpoints: Watchpoints | None = None
        self.no_watchpoints = "there is no RAM yet"
        self.layout = layouts.find(self.engine)
        self._lib = library()
        self._core = self._attach()
        self.shortcuts = None if plain else Shortcuts(self._core)
        if not plain:
            self._leave_out_checks()
        self.engine.hook_ports(self._port_read, self._port_write)
        for name, bits in FEATURES_ON.items():
            ctypes.c_uint64.from_address(self.layout.feature_word(name)).value |= bits
        for name, bits in FEATURES_OFF.items():
            ctypes.c_uint64.from_address(self.layout.feature_word(name)).value &= ~bits
        self._eflags = c_uint32.from_address(self.layout.env + self.layout.eflags)
        self._hflags = c_uint32.from_address(self.layout.env + self.layout.hflags)
        self._general = {
            name: c_uint64.from_address(self.layout.env + 8 * number) for number, name in enumerate(layouts.REGS)
        }
        self._general["rip"] = c_uint64.from_address(self.layout.env + self.layout.eip)

    def _attach(self) -> Core:
        core, at = Core(), self.layout
        core.uc, core.cpu, core.env = self.engine.handle, at.cpu, at.env
        for member, symbol in (
            ("emu_start", "uc_emu_start"),
            ("emu_stop", "uc_emu_stop"),
            ("set_rip", "uc_reg_write"),
            ("hook_add", "uc_hook_add"),
            ("do_interrupt", "x86_cpu_do_interrupt_x86_64"),
            ("hardirq", "do_interrupt_x86_hardirq_x86_64"),
            ("read_eflags", "helper_read_eflags_x86_64"),
            ("write_eflags", "helper_write_eflags_x86_64"),
        ):
            setattr(core, member, libunicorn.address(symbol))
        for name in OFFSETS:
            setattr(core.at, name, getattr(at, name))
        core.hypercall_leaf = HYPERCALL_LEAF
        error = self._lib.core_attach(core)
        if error:
            raise libunicorn.UnicornError("uc_hook_add", error)
        c_void_p.from_address(at.exec_interrupt_slot).value = self._lib.core_interrupt_callback()
        return core

    def _leave_out_checks(self) -> None:
        for member, symbol in TRANSLATE.items():
            setattr(self._core.translate, member, libunicorn.address(symbol))
        error = self._lib.core_translate(self._core, self.layout.exit_request)
        if error:
            raise layouts.LayoutError(f"its looks for a stop ({os.strerror(error)})")

    def map_ram(self, physical: int, size: int, host_address: int) -> None:
        super().map_ram(physical, size, host_address)
        if physical == 0:
            try:
                self.watchpoints = Watchpoints(self._core, self.engine, self.layout, host_address, size)
                self._notice_rewritten_code()
            except EmulatorError as error:
                self.no_watchpoints = str(error)

    def _notice_rewritten_code(self) -> None:
        """Have writes to translated code noticed whatever mapping they go through. Raises LayoutError."""
        smc = self._core.smc
        for member, symbol in (
            ("protect_code", "tlb_protect_code_x86_64"),
            ("set_dirty", "tlb_set_dirty_x86_64"),
            ("reset_dirty", "tlb_reset_dirty_x86_64"),
            ("invalidate", "tb_invalidate_phys_range_x86_64"),
            ("code_address", "get_page_addr_code_x86_64"),
        ):
            setattr(smc, member, libunicorn.address(symbol))
        error = self._lib.smc_install(self._core)
        if error:
            raise layouts.LayoutError(f"its tracking of changed code ({os.strerror(error)})")

    # ---- traps

    @contextmanager
    def _in_kernel_mode(self) -> Iterator[None]:
        """Let the engine look up addresses as ring 0 does: in user mode the kernel's would be page faults."""
        ring = self._hflags.value & _HF_CPL
        self._hflags.value &= ~_HF_CPL
        try:
            yield
        finally:
            self._hflags.value |= ring

    def add_trap(self, address: int, when: Callable[[], bool] | None = None) -> None:
        if self.shortcuts and address not in self._traps and self.shortcuts.stand_for(address):
            self.shortcuts.block(1)
        super().add_trap(address, when)

    def remove_trap(self, address: int) -> None:
        super().remove_trap(address)
        if self.shortcuts and self.shortcuts.stand_for(address):
            self.shortcuts.block(-1)
        with self._in_kernel_mode():
            self.engine.unhook(self._trap_hooks.pop(address))

    def forget_code(self, start: int, end: int) -> None:
        with self._in_kernel_mode():
            self.engine.forget_code(start, end)

    def _on_trap(self, address: int) -> None:
        # An instruction that hits a watchpoint is begun twice.
        if not self._lib.watch_again(self._core, address):
            super()._on_trap(address)

    def step(self) -> Stop | None:
        if self.watchpoints is None:
            raise EmulatorError(f"this CPU cannot execute single instructions: {self.no_watchpoints}")
        core = self._core
        self.pass_trap()
        exceptions = core.exceptions
        one = c_uint32.from_address(self.layout.cpu + CFLAGS_NEXT_TB)
        one.value = 1
        ip, matches = self.read("rip"), core.watch.matches
        stop = self.run(self.now + NS_PER_BLOCK)
        if stop is Stop.DEADLINE and self.read("rip") == ip and core.watch.matches != matches:
            # It hits a watchpoint: it was only begun, and takes two blocks.
            self.pass_trap()
            one.value = 1
            stop = self.run(self.now + 2 * NS_PER_BLOCK)
        return stop if core.exceptions == exceptions else None

    # ---- time

    @property
    def now(self) -> int:
        return int(self._lib.core_now(self._core))

    @now.setter
    def now(self, ns: int) -> None:
        self._core.base_ns = ns

    # ---- running

    @property
    def interruptible(self) -> bool:
        return bool(self._eflags.value & _RFLAGS_IF) and not self._hflags.value & _HF_INHIBIT_IRQ

    def run(self, deadline_ns: int, *, vector: int | None = None, window: bool = False) -> Stop:
        core = self._core
        core.deadline_ns = deadline_ns
        core.vector = -1 if vector is None else vector
        core.window = window
        reason = Stop(self._lib.core_run(core))
        self._raise_fault()
        if self._take_trap():
            return Stop.TRAP
        if reason is Stop.DEAD:
            detail = self.engine.lib.uc_strerror(core.error).decode() if core.error else "triple fault"
            raise GuestDied(f"the guest's CPU stopped at {self.read('rip'):#x}: {detail}")
        return reason

    def shorten(self, deadline_ns: int) -> None:
        self._lib.core_shorten(self._core, deadline_ns)

    def stop(self) -> None:
        self._core.stop_word = 1

    def watch(self, fds: Sequence[int]) -> None:
        if len(fds) > MAX_WATCHED:
            raise ValueError(f"at most {MAX_WATCHED} descriptors can be watched")
        for slot, fd in enumerate(fds):
            self._core.fds[slot] = PollFd(fd, _POLLIN, 0)
        self._core.nfds = len(fds)

    @property
    def counters(self) -> dict[str, int]:
        """Exceptions, system calls, interrupts, hypercalls and runs so far."""
        return {
            name: getattr(self._core, name) for name in ("exceptions", "syscalls", "interrupts", "hypercalls", "runs")
        }

    def close(self) -> None:
        super().close()
        self._lib.watch_detach(self._core)
        self._lib.smc_detach(self._core)
        self._lib.translate_detach(self._core)
        self._lib.shortcuts_detach(self._core)

    # ---- state

    def read(self, register: str) -> int:
        known = self._general.get(register)
        return super().read(register) if known is None else known.value

    def write(self, register: str, value: int) -> None:
        known = self._general.get(register)
        if known is None:
            self.engine.write(register, value)
        else:
            known.value = value

    def start_at(self, entry: int, registers: dict[str, int], gdt: tuple[int, int], code: int, data: int) -> None:
        self.engine.write_table("gdtr", *gdt)
        for name in ("cr4", "cr3", "cr0"):
            self.engine.write(name, registers.pop(name))
        # Selectors with their descriptors, which the public API does not load: ES CS SS DS.
        for number, selector, flags in (
            (0, data, 0x00CF9300),
            (1, code, 0x00AF9B00),
            (2, data, 0x00CF9300),
            (3, data, 0x00CF9300),
        ):
            at = self.layout.env + self.layout.segs + layouts.SEGMENT_SIZE * number
            c_uint32.from_address(at).value = selector
            c_uint64.from_address(at + 8).value = 0
            c_uint32.from_address(at + 16).value = 0xFFFFFFFF
            c_uint32.from_address(at + 20).value = flags
        for name, value in registers.items():
            self.write(name, value)
        self.write("rip", entry)
