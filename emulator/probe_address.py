"""Where a kprobe may be: the checks of the kernel's own register_kprobe(), with its errnos.

Instruction boundaries are found by decoding a function from its beginning, as the kernel does. The decoder is
capstone's, which takes 35 ms to import: at the first probe inside a function; a function's entry needs none.
"""

from __future__ import annotations

import errno
import importlib
from functools import cached_property
from typing import Any

from emulator.errors import EmulatorError
from emulator.kernel.btf import BtfLookupError
from emulator.memory import BadAddress
from emulator.probe_context import View

_BLACKLIST_MAX = 1 << 16
_FUNCTION_MAX = 1 << 20
# Sections no probe may be in: handling one runs through them.
_SECTIONS = ("kprobes_text", "noinstr_text", "entry_text", "irqentry_text", "softirqentry_text")


class ProbeError(EmulatorError):
    """A probe the kernel would refuse too; `errno` is the number it would give."""

    errno = errno.EINVAL


class NotAllowed(ProbeError):
    """Outside the kernel's text, blacklisted, or arguments that make no sense."""


class NoInstruction(ProbeError):
    """Not the first byte of an instruction."""

    errno = errno.EILSEQ


class NoSymbol(ProbeError):
    """The kernel has no symbol of this name."""

    errno = errno.ENOENT


class Addresses:
    """Turns names into addresses, and checks these."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._symbols = view.symbols
        self._text = (self._symbols["_stext"], self._symbols["_etext"])

    def resolve(self, symbol: str | int) -> int:
        """Return the address of a symbol, the first of that name as for the kernel. Raises NoSymbol."""
        if isinstance(symbol, int):
            return symbol
        try:
            return self._symbols[symbol]
        except KeyError:
            raise NoSymbol(f"{symbol}: the kernel has no such symbol") from None

    def check(self, address: int) -> None:
        """Raises NotAllowed or NoInstruction where no kprobe can be."""
        where = self._symbols.symbolize(address)
        if not self._text[0] <= address < self._text[1]:
            raise NotAllowed(f"{where}: not in the kernel's text")
        if any(start <= address < end for start, end in self._blacklist):
            raise NotAllowed(f"{where}: blacklisted, the kernel's own probes run through it")
        self._check_boundary(address, where)

    def is_entry(self, address: int) -> bool:
        """Is this where a function begins?"""
        found = self._symbols.at(address)
        return found is not None and found[1] == 0

    @cached_property
    def _blacklist(self) -> list[tuple[int, int]]:
        """The sections, and the list that NOKPROBE_SYMBOL() and noinstr fill while the kernel boots."""
        ranges = []
        for section in _SECTIONS:
            start, end = f"__{section}_start", f"__{section}_end"
            if start in self._symbols and end in self._symbols:
                ranges.append((self._symbols[start], self._symbols[end]))
        return ranges + self._listed()

    def _listed(self) -> list[tuple[int, int]]:
        read, btf = self._view.read_u64, self._view.guest.btf
        ranges: list[tuple[int, int]] = []
        try:
            head = self._symbols["kprobe_blacklist"]
            start = btf.offsetof("kprobe_blacklist_entry", "start_addr")
            end = btf.offsetof("kprobe_blacklist_entry", "end_addr")
            link = btf.offsetof("kprobe_blacklist_entry", "list")
            entry = read(head)
            while entry != head and len(ranges) < _BLACKLIST_MAX:
                ranges.append((read(entry - link + start), read(entry - link + end)))
                entry = read(entry)
        except (KeyError, BtfLookupError, BadAddress):
            pass
        return ranges

    def _check_boundary(self, address: int, where: str) -> None:
        found = self._symbols.at(address)
        if found is None or not 0 <= found[1] < _FUNCTION_MAX:
            raise NoInstruction(f"{where}: in no function")
        start, offset = address - found[1], found[1]
        if offset == 0:
            return
        code = self._view.read(start, offset + 16)
        at = start
        for _, size, _, _ in self._decoder.disasm_lite(code, start):
            if at >= address:
                break
            at += size
        if at != address:
            raise NoInstruction(f"{where}: in the middle of an instruction")

    @cached_property
    def _decoder(self) -> Any:
        capstone = importlib.import_module("capstone")
        return capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
