"""Shortcuts of the native CPU (native/shortcuts.c): functions of the guest's kernel whose work is done on the host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from ctypes import c_uint64
from enum import IntEnum

from emulator.cpu.core import Core, library
from emulator.errors import EmulatorError

Range = tuple[int, int]  # start and end, guest virtual addresses


class Kind(IntEnum):
    """What is done (enum shortcut_kind)."""

    RECORDS = 0
    SYMBOL = 1


class Shortcuts:
    """The shortcuts of one CPU. Add them while it is stopped, before its guest has changed its code."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._ranges: list[Range] = []

    def skip_records(
        self,
        functions: Sequence[Range],
        *,
        iter_page: int,
        iter_index: int,
        page_next: int,
        page_records: int,
        page_used: int,
        record_size: int,
        record_flags: int,
        busy: int,
    ) -> None:
        """At the entry of the first of `functions`, called by the second, step over records without a `busy` flag.

        The numbers are byte offsets in the kernel's structures. Raises EmulatorError when something does not fit.
        """
        values = self._core.shortcuts
        values.caller_low, values.caller_high = functions[1]
        values.iter_page, values.iter_index = iter_page, iter_index
        values.page_next, values.page_records, values.page_used = page_next, page_records, page_used
        values.record_size, values.record_flags, values.busy = record_size, record_flags, busy
        self._install(Kind.RECORDS, functions)

    def find_symbol_offset(self, function: Range, *, names: Range, markers: int) -> None:
        """Do `function`, which walks the kernel's table of compressed symbol names. Raises EmulatorError."""
        values = self._core.shortcuts
        values.names, values.names_end = names
        values.markers = markers
        self._install(Kind.SYMBOL, [function])

    def _install(self, kind: Kind, functions: Sequence[Range]) -> None:
        flat = [number for start, end in functions for number in (start, end - start)]
        error = library().shortcuts_install(
            self._core, kind, functions[0][0], (c_uint64 * len(flat))(*flat), len(functions)
        )
        if error:
            raise EmulatorError(f"shortcut: {os.strerror(error)}")
        self._ranges += functions

    def stand_for(self, address: int) -> bool:
        """Is the code at a guest virtual address left out when a shortcut is taken?"""
        return any(start <= address < end for start, end in self._ranges)

    def block(self, by: int) -> None:
        """Take no shortcuts while somebody wants to see their code run: `by` is 1 for one more, -1 for one less."""
        self._core.shortcuts.blocked += by

    @property
    def taken(self) -> list[int]:
        """How often each was taken, by kind."""
        return [shortcut.taken for shortcut in self._core.shortcuts.list]
