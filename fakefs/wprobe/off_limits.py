"""Memory no wprobe may watch: what recording a hit is itself made of.

Always: the carriers' code, the tables the CPU finds its handlers and stacks in, and the pages of all trace buffers,
those of instances and snapshots included. With four debug registers also what the series keeps them off, because its
#DB handler reads it before it has switched them off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from emulator.errors import EmulatorError
from emulator.guest import Guest
from emulator.kernel.facts import Facts
from emulator.memory import PAGE, BadAddress

_WORD = (1 << 64) - 1
_CODE = (
    "emergency_restart",
    "hw_breakpoint_exceptions_notify",
    "kprobe_dispatcher",
    "asm_exc_debug",
    "exc_debug",
)
_IDT_SIZE = 4096
_CPU_ENTRY_AREA = (0xFFFF_FE00_0000_0000, 0xFFFF_FE80_0000_0000)  # Documentation/arch/x86/x86_64/mm.rst
_ARRAYS_MAX = 1024
_PAGES_MAX = 1 << 20  # of all buffers: 4 GiB
_FLAGS = 3  # in the links between the pages of a ring buffer


@dataclass(frozen=True)
class BufferFacts(Facts):
    """A guest virtual address, and byte offsets in the kernel's structures."""

    MISSING: ClassVar[str] = "this kernel cannot carry wprobes"

    arrays: int  # ftrace_trace_arrays
    array_list: int  # in trace_array
    buffer: int
    snapshot: int  # the same as `buffer` in a kernel without snapshots
    buffers: int  # in trace_buffer
    order: int  # of its pages; that of `buffers` in a kernel where they are all of one page
    pages: int  # in ring_buffer_per_cpu
    nr_pages: int
    reader_page: int
    page_list: int  # in buffer_page
    page: int


def off_limits(guest: Guest) -> dict[str, Any] | None:
    """Look up in a just booted guest what may not be watched, as JSON values; None when its kernel lacks something."""
    from emulator.kernel.btf import BtfLookupError

    symbols, btf = guest.symbols, guest.btf
    per_cpu = max(guest.machine.cpu.read("gs_base"), guest.machine.cpu.read("kernel_gs_base"))

    def of_cpu(name: str, size: int) -> list[list[int]]:
        found = symbols.find(name)
        return [[found[0].address + per_cpu & _WORD, size]] if found else []

    try:
        names = sorted({symbol.address for symbol in symbols})
        at = [symbols[name] for name in _CODE]
        always = [[start, next(each for each in names[_place(names, start) :] if each > start) - start] for start in at]
        always += [
            [symbols["idt_table"], _IDT_SIZE],
            [_CPU_ENTRY_AREA[0], _CPU_ENTRY_AREA[1] - _CPU_ENTRY_AREA[0]],
            *of_cpu("gdt_page", PAGE),
            *of_cpu("cpu_tss_rw", btf.sizeof("tss_struct")),
        ]
        strict = [
            [symbols["__per_cpu_offset"], 8],
            *of_cpu("cpu_tlbstate", btf.sizeof("tlb_state")),
            *of_cpu("cpu_dr7", 8),
        ]
        return {"always": always, "strict": strict, "buffers": _buffer_facts(guest).to_json()}
    except (KeyError, BtfLookupError, StopIteration):
        return None


def _place(sorted_addresses: list[int], address: int) -> int:
    from bisect import bisect_left

    return bisect_left(sorted_addresses, address)


def _buffer_facts(guest: Guest) -> BufferFacts:
    from emulator.kernel.btf import BtfLookupError

    btf = guest.btf

    def either(struct: str, *paths: str) -> int:
        for path in paths[:-1]:
            try:
                return btf.offsetof(struct, path)
            except BtfLookupError:
                continue
        return btf.offsetof(struct, paths[-1])

    return BufferFacts(
        arrays=guest.symbols["ftrace_trace_arrays"],
        array_list=btf.offsetof("trace_array", "list"),
        buffer=btf.offsetof("trace_array", "array_buffer.buffer"),
        snapshot=either("trace_array", "snapshot_buffer.buffer", "max_buffer.buffer", "array_buffer.buffer"),
        buffers=btf.offsetof("trace_buffer", "buffers"),
        order=either("trace_buffer", "subbuf_order", "buffers"),
        pages=btf.offsetof("ring_buffer_per_cpu", "pages"),
        nr_pages=btf.offsetof("ring_buffer_per_cpu", "nr_pages"),
        reader_page=btf.offsetof("ring_buffer_per_cpu", "reader_page"),
        page_list=btf.offsetof("buffer_page", "list"),
        page=btf.offsetof("buffer_page", "page"),
    )


class OffLimits:
    """Answers whether a range of guest virtual addresses may be watched."""

    def __init__(self, guest: Guest, noted: object) -> None:
        """`noted` is what `off_limits()` gave. Raises EmulatorError."""
        if not isinstance(noted, Mapping):
            raise EmulatorError(BufferFacts.MISSING)
        self._machine = guest.machine
        self._always = _ranges(noted.get("always"))
        self._strict = _ranges(noted.get("strict"))
        self._facts = BufferFacts.from_json(noted.get("buffers"))
        self._buffers: dict[tuple[int, int], frozenset[int]] = {}  # by per-CPU buffer and its size: numbers of pages

    def __call__(self, address: int, length: int) -> bool:
        """Is any of `length` bytes at `address` never to be watched?"""
        if _overlap(self._always, address, length):
            return True
        pages = range(address // PAGE, (address + length - 1) // PAGE + 1)
        return any(not buffer.isdisjoint(pages) for buffer in self._all_pages())

    def strictly(self, address: int, length: int) -> bool:
        """Is it something that four debug registers are kept off?"""
        return _overlap(self._strict, address, length)

    # ---- trace buffers

    def _all_pages(self) -> list[frozenset[int]]:
        known: dict[tuple[int, int], frozenset[int]] = {}
        try:
            for per_cpu, order in self._per_cpu_buffers():
                key = (per_cpu, self._word(per_cpu + self._facts.nr_pages))
                room = _PAGES_MAX - sum(map(len, known.values()))
                known[key] = self._buffers.get(key) or frozenset(islice(self._pages(per_cpu, order), room))
        except BadAddress:
            pass  # in the middle of a change; what was found counts
        self._buffers = known
        return list(known.values())

    def _per_cpu_buffers(self) -> Iterator[tuple[int, int]]:
        """Yield each ring_buffer_per_cpu, and the order of its pages."""
        facts, at = self._facts, self._facts.arrays
        for _ in range(_ARRAYS_MAX):
            at = self._word(at)
            if at == facts.arrays:
                return
            for member in sorted({facts.buffer, facts.snapshot}):
                buffer = self._word(at - facts.array_list + member)
                if buffer:
                    order = self._word(buffer + facts.order) & 0xFF if facts.order != facts.buffers else 0
                    yield self._word(self._word(buffer + facts.buffers)), min(order, 10)

    def _pages(self, per_cpu: int, order: int) -> Iterator[int]:
        """Yield the numbers of a ring buffer's pages, without end if the guest has it so."""
        facts = self._facts
        for node in self._nodes(per_cpu):
            number = self._word(node - facts.page_list + facts.page) // PAGE
            yield from range(number, number + (1 << order))

    def _nodes(self, per_cpu: int) -> Iterator[int]:
        """Yield where pages are linked: the reader's, which is outside the ring, and the ring's."""
        yield self._word(per_cpu + self._facts.reader_page) + self._facts.page_list
        first = at = self._word(per_cpu + self._facts.pages) & ~_FLAGS
        while True:
            yield at
            at = self._word(at) & ~_FLAGS
            if at == first:
                return

    def _word(self, at: int) -> int:
        return int.from_bytes(self._machine.memory.read_virtual(at, 8, self._machine.cpu.read("cr3")), "little")


def _ranges(noted: object) -> list[tuple[int, int]]:
    """Check what a snapshot says. Raises EmulatorError."""
    found = []
    for each in noted if isinstance(noted, list) else [None]:
        match each:
            case [int(start), int(size)] if 0 <= start <= _WORD and 0 < size <= _WORD:
                found.append((start, size))
            case _:
                raise EmulatorError("snapshot: what may not be watched is not of this version")
    return found


def _overlap(ranges: Iterable[tuple[int, int]], address: int, length: int) -> bool:
    return any(start < address + length and address < start + size for start, size in ranges)
