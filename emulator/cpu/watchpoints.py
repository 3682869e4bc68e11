"""Watchpoints of the native CPU: ranges of guest virtual addresses whose reads or writes are reported.

The work is done in native/watch.c; here it is set up, after its offsets and the five functions it replaces have been
checked. A build of Unicorn that is not as expected has no watchpoints, and `Watchpoints` says why; all else works.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from ctypes import c_uint32, c_uint64, c_void_p
from enum import IntEnum, IntFlag
from typing import NamedTuple

from emulator.cpu import libunicorn
from emulator.cpu.core import Core, library
from emulator.cpu.layout import Layout, LayoutError
from emulator.cpu.libunicorn import Engine
from emulator.errors import EmulatorError

CFLAGS_NEXT_TB = 24
_ICOUNT = 304
_DR = 5400
_WATCHPOINT = 5464
_CR = 424
_ICOUNT_WITHIN = 64  # bytes: the counter lies just below env
_STUBS = (
    "cpu_watchpoint_insert_x86_64",
    "cpu_watchpoint_remove_by_ref_x86_64",
    "cpu_watchpoint_remove_all_x86_64",
    "cpu_watchpoint_address_matches_x86_64",
    "cpu_check_watchpoint_x86_64",
)


class Access(IntFlag):
    """What is watched for, and what was done."""

    READ = 1
    WRITE = 2
    CHANGE = 4  # with WRITE, and asked for alone: not when the bytes are what they were


class Kind(IntEnum):
    """Who is told (enum watch_kind)."""

    REGISTER = 0
    STOP = 1  # the host: `CPU.run()` ends with Stop.WATCH
    DEBUG = 2  # the guest's kernel, see `Watchpoints.redirect()`


class Hit(NamedTuple):
    """One watchpoint hit by one instruction. Addresses are guest virtual, lengths in bytes.

    Of a store across the end of a page only the part is known that is on the pages it overlaps the range on.
    """

    token: int
    address: int  # what was accessed
    length: int
    ip: int  # of the instruction
    next_ip: int  # of the one after it
    watched: int  # start of the watched range
    old: int  # 8 bytes before the instruction, little-endian: the range's first; of more than 8 those accessed first
    access: Access


class Watchpoints:
    """The watchpoints of one CPU. Add, move and remove them only while it is stopped."""

    def __init__(self, core: Core, engine: Engine, layout: Layout, ram: int, ram_size: int) -> None:
        """`ram` is the host address of the guest's RAM. Raises LayoutError when this Unicorn is not as expected."""
        self._core = core
        self._lib = library()
        self.redirecting = False
        _check(engine, layout)
        watch = core.watch
        watch.restore_state = libunicorn.address("cpu_restore_state_x86_64")
        watch.loop_exit = libunicorn.address("cpu_loop_exit_noexc_x86_64")
        watch.flush_tlb = libunicorn.address("tlb_flush_x86_64")
        watch.at.cpu_cflags_next_tb = CFLAGS_NEXT_TB
        watch.at.cpu_icount = _ICOUNT
        watch.at.env_dr = _DR
        watch.at.env_watchpoint = _WATCHPOINT
        watch.at.env_cr = _CR
        watch.ram, watch.ram_size = ram, ram_size
        stubs = (c_void_p * 5)(*(libunicorn.address(name) for name in _STUBS))
        error = self._lib.watch_install(core, stubs)
        if error:
            raise LayoutError(f"its watchpoint functions ({os.strerror(error)})")

    def add(self, address: int, length: int, access: Access, kind: Kind, token: int = 0) -> int:
        """Watch `length` bytes; return the watchpoint's number. Each Hit has its `token`. Raises EmulatorError."""
        return self._result(self._lib.watch_add(self._core, address, length, access, kind, token))

    def move(self, number: int, address: int) -> None:
        """Watch another address from now on. Raises EmulatorError."""
        self._result(self._lib.watch_move(self._core, number, address))

    def remove(self, number: int) -> None:
        """Watch no more. Raises EmulatorError."""
        self._result(self._lib.watch_remove(self._core, number))

    def _result(self, result: int) -> int:
        if result < 0:
            what = "too many watchpoints" if result == -errno.ENOSPC else os.strerror(-result)
            raise EmulatorError(f"watchpoint: {what}")
        return result

    def take_hits(self) -> list[Hit]:
        """Return the STOP hits of the instruction a run has just ended behind (Stop.WATCH)."""
        watch = self._core.watch
        hits = [
            Hit(hit.token, hit.address, hit.length, hit.ip, hit.next_ip, hit.watched, hit.old, Access(hit.access))
            for hit in watch.hits[: watch.nhits]
            if hit.kind == Kind.STOP
        ]
        watch.nstops = 0
        if not any(hit.kind == Kind.DEBUG for hit in watch.hits[: watch.nhits]):
            watch.nhits = 0
        return hits

    def ignore_handler_stack(self, low: int, high: int) -> None:
        """Hits with RSP inside low+1..high do not count: the guest handles a #DB there."""
        self._core.watch.handler_low, self._core.watch.handler_high = low, high

    def redirect(
        self,
        notifier: int,
        dispatcher: int,
        *,
        back: int,
        access_names: int,
        die_args_regs: int,
        kprobe_addr: int,
        lent: Sequence[int],
    ) -> None:
        """Have DEBUG hits handed to the guest's `dispatcher(kprobe, regs)` when its `notifier` is called for a #DB.

        The dispatcher returns to `back`, behind the notifier's first instruction, which must leave the stack alone.
        The hit's token is the kprobe's guest virtual address. At `access_names` the guest has "r", "w" and "rw", 8
        bytes each. The others are byte offsets in the kernel's structures: `lent` are those members of pt_regs that
        carry watched address, address accessed, old value, size and access (enum redirect_value).
        """
        redirect = self._core.redirect
        redirect.notifier, redirect.dispatcher = notifier, dispatcher
        redirect.back, redirect.access_names = back, access_names
        redirect.die_args_regs, redirect.kprobe_addr = die_args_regs, kprobe_addr
        redirect.lent[:] = lent
        if not self.redirecting:
            error = self._lib.redirect_install(self._core)
            if error:
                raise libunicorn.UnicornError("uc_hook_add", error)
            self.redirecting = True

    @property
    def counters(self) -> dict[str, int]:
        """Checks, matches, deliveries and drops so far, and hits handed to the guest's probes or lost."""
        watch, redirect = self._core.watch, self._core.redirect
        return {
            "checks": watch.checks,
            "matches": watch.matches,
            "delivered": watch.delivered,
            "dropped": watch.dropped,
            "redirected": redirect.calls,
            "lost": redirect.lost,
        }


def _check(engine: Engine, layout: Layout) -> None:
    """Verify the offsets watch.c uses. Raises LayoutError."""
    if c_uint32.from_address(layout.cpu + CFLAGS_NEXT_TB).value != 0xFFFF_FFFF:
        raise LayoutError("cflags_next_tb")
    icount = c_uint64.from_address(layout.cpu + _ICOUNT).value
    if not layout.env - _ICOUNT_WITHIN <= icount < layout.env:
        raise LayoutError("the instruction counter")
    saved = engine.read("cr2")
    for value in (0x1234_5678_9ABC_D000, saved):
        engine.write("cr2", value)
        if c_uint64.from_address(layout.env + _CR + 2 * 8).value != value:
            raise LayoutError("the control registers")
    for number in range(4):
        saved = engine.read(f"dr{number}")
        for value in (0x7000_0000_1000 + number, saved):
            engine.write(f"dr{number}", value)
            if ctypes.c_uint64.from_address(layout.env + _DR + 8 * number).value != value:
                raise LayoutError("the debug registers")
        if c_uint64.from_address(layout.env + _WATCHPOINT + 8 * number).value:
            raise LayoutError("the debug registers' watchpoints")
