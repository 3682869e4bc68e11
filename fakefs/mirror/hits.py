"""What a hit of a uprobe by a program of the host comes to in the guest.

When a thread of the host's comes to a site its shadow does: it is given the page of the file with the instruction, the
thread's registers and the memory that the probe's arguments look at, all at their addresses, and executes that one
instruction. What the uprobe does is the guest kernel's business. The trap behind the instruction, or any other
exception, gives the shadow back.

A function with a uprobe on return has, on the shadow's stack, the return address that the kernel has put there: when
the thread returns, the shadow goes on at that address.
"""

from __future__ import annotations

import base64
import os
import signal
import struct
from collections.abc import Iterable, Mapping

from emulator.agent import CALL_AFTER, CALL_COPY, CALL_ENTER, WINDOW_VIRTUAL, Agent, Call, Task
from fakefs.mirror.mirrored import Mirrored
from fakefs.mirror.probesites import ProbeSites, shown_at
from fakefs.mirror.processes import KEPT, Processes
from fakefs.mirror.records import Hit, Returns, Site
from fakefs.mirror.trampoline import RETURN, SAVED
from fakefs.shadow import Shadows
from fakefs.syscalls import Sys

_PAGE = 4096
_AT_FDCWD = -100
_F_DUPFD_CLOEXEC = 1030
_FIRST_FD = 600  # above those that mirrored files have
_PROT_READ_WRITE, _PROT_READ_EXEC = 3, 5
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_FIXED_NOREPLACE = 2, 0x20, 0x100000
_LOWEST, _HIGHEST = 0x10000, 0x7FFF_FFFF_F000
_INSTRUCTION_MAX = 15
_BELOW_STACK = 64  # what the kernel's code for returns pushes there
# In a slot's data area.
_FRAME, _RESULT, _STACK, _MEMORY = 0, 0x400, 0x1000, 0x2800
_STACK_SIZE = _MEMORY - _STACK
_PAGES_MAX = 9

# struct ucontext and struct sigcontext of <asm/ucontext.h> and <asm/sigcontext.h>
_UCONTEXT = struct.Struct("<QQQixxxxQ18Q4H5Q64xQ")
_IN_FRAME = (
    *(
        "r8",
        "r9",
        "r10",
        "r11",
        "r12",
        "r13",
        "r14",
        "r15",
        "di",
        "si",
        "bp",
        "bx",
        "dx",
        "ax",
        "cx",
        "sp",
        "ip",
        "flags",
    ),
)
_UC_SIGCONTEXT_SS, _UC_STRICT_RESTORE_SS = 2, 4
_USER_CS, _USER_DS = 0x33, 0x2B
_ARITHMETIC_FLAGS, _TRAP_FLAG = 0xCD5, 0x100
_EXCEPTIONS = (signal.SIGILL, signal.SIGTRAP, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV)
_BLOCKED = ~sum((1 << (number - 1) for number in _EXCEPTIONS), KEPT) & (1 << 64) - 1


def frame(registers: Mapping[str, int], task: Task, *, trap: bool) -> bytes:
    """Return a struct ucontext that has a task go on with these registers, and one instruction if it is to `trap`."""
    flags = registers["flags"] & _ARITHMETIC_FLAGS | (_TRAP_FLAG if trap else 0)
    words = [*(registers[name] for name in _IN_FRAME[:-1]), flags]
    head = (_UC_SIGCONTEXT_SS | _UC_STRICT_RESTORE_SS, 0, task.virtual(_STACK), 0, _STACK_SIZE)
    return _UCONTEXT.pack(*head, *words, _USER_CS, 0, 0, _USER_DS, 0, 0, 0, 0, 0, _BLOCKED)


class Page:
    """One page of memory for a shadow: what is in it, from `first` to `last`."""

    __slots__ = ("data", "first", "last")

    def __init__(self) -> None:
        self.data = bytearray(_PAGE)
        self.first, self.last = _PAGE, 0

    def put(self, at: int, data: bytes) -> None:
        self.data[at : at + len(data)] = data
        self.first, self.last = min(self.first, at), max(self.last, at + len(data))

    @property
    def contents(self) -> bytes:
        return bytes(self.data[self.first : self.last])


def pages_of(pieces: Iterable[tuple[int, bytes]], stack: int, taken: range) -> dict[int, Page]:
    """Return pages with what is at some addresses, no more than a slot holds.

    The stack's page comes first, then pieces in their order. None of the addresses is in `taken`, or the window's.
    """
    pages: dict[int, Page] = {}

    def page(address: int) -> Page | None:
        start = address & -_PAGE
        usable = _LOWEST <= start < _HIGHEST and not WINDOW_VIRTUAL <= start < 2 * WINDOW_VIRTUAL and start not in taken
        if start not in pages and usable and len(pages) < _PAGES_MAX:
            pages[start] = Page()
        return pages.get(start)

    for address in (stack, stack - _BELOW_STACK):
        page(address)
    for address, data in pieces:
        while data:
            at = address % _PAGE
            piece, data = data[: _PAGE - at], data[_PAGE - at :]
            there = page(address)
            if there is not None:
                there.put(at, piece)
            address += len(piece)
    return pages


def runs(pages: Iterable[int]) -> list[range]:
    """Return the ranges of addresses that pages make up, of which their first ones are given."""
    found: list[range] = []
    for start in sorted(pages):
        if found and found[-1].stop == start:
            found[-1] = range(found[-1].start, start + _PAGE)
        else:
            found.append(range(start, start + _PAGE))
    return found


class _Batch:
    """Calls of one task. Those that need a mapping are made after it, and not if it was refused."""

    def __init__(self, task: Task, agent: Agent) -> None:
        self._task = task
        self._agent = agent
        self._area = _MEMORY
        self._maps: dict[int, tuple[int, int]] = {}  # address and size by the number of the call
        self.calls: list[Call] = []

    def _add(self, *call: int) -> int:
        self.calls.append(call)
        return len(self.calls) - 1

    def map(self, start: int, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
        number = self._add(Sys.MMAP, start, size, protection, flags | _MAP_FIXED_NOREPLACE, fd, offset)
        self._maps[number] = start, size
        return number

    def copy(self, mapping: int, address: int, data: bytes) -> None:
        if data:
            self._agent.put(self._task, self._area, data)
            self._add(CALL_AFTER | CALL_COPY, address, self._task.virtual(self._area), len(data), 0, 0, mapping)
            self._area += len(data)

    def enter(self, mapping: int | None, context: bytes, catches: bool) -> int:
        self._agent.put(self._task, _FRAME, context)
        after = (CALL_ENTER, 0) if mapping is None else (CALL_AFTER | CALL_ENTER, mapping)
        return self._add(after[0], self._task.virtual(_FRAME), int(not catches), 0, 0, 0, after[1])

    def read_back(self, address: int, size: int) -> int | None:
        """Copy to _RESULT what is in a mapping, if it is in one."""
        for mapping, (start, length) in self._maps.items():
            if start <= address and address + size <= start + length:
                return self._add(CALL_AFTER | CALL_COPY, self._task.virtual(_RESULT), address, size, 0, 0, mapping)
        return None

    def unmap(self) -> None:
        for mapping, (start, size) in self._maps.items():
            self._add(CALL_AFTER | Sys.MUNMAP, start, size, 0, 0, 0, mapping)


class Hits:
    """Has shadows make them."""

    def __init__(self, shadows: Shadows, processes: Processes, sites: ProbeSites) -> None:
        self._pump = shadows.pump
        self._agent = shadows.pump.agent
        self._processes = processes
        self._sites = sites

    async def make(self, record: Hit) -> None:
        """Have the shadow of a thread do what the thread does."""
        shadow, site = self._processes.find(record.tid), self._sites.by_id.get(record.probe)
        if shadow is None or len(record.registers) != len(SAVED) + 1:
            return
        registers = dict(zip((*SAVED, "sp"), record.registers, strict=True))
        await self._processes.settle(shadow)
        async with shadow.lock:
            if record.probe == RETURN:
                if shadow.probed.trampoline:
                    await self._enter(shadow, record, registers | {"ip": shadow.probed.trampoline}, None)
            elif site is not None:
                await self._enter(shadow, record, registers | {"ip": record.address}, site)

    async def _enter(self, shadow: Mirrored, record: Hit, registers: Mapping[str, int], site: Site | None) -> None:
        """Map what is needed, go there, and unmap it, in one go: each call depends on the mapping that it needs."""
        batch = _Batch(shadow.task, self._agent)
        code, taken = None, range(0)
        if site is not None:
            fd = await self._descriptor(shadow, self._sites.file(site))
            start = record.address & -_PAGE
            taken = range(start, (record.address + _INSTRUCTION_MAX + _PAGE - 1) & -_PAGE)
            offset = site.offset - record.address + start
            if fd < 0 or offset < 0 or not _LOWEST <= start < _HIGHEST:
                return
            code = batch.map(start, len(taken), _PROT_READ_EXEC, _MAP_PRIVATE, fd, offset)
        stack = registers["sp"]
        pieces = [(at, base64.b64decode(text)) for at, text in record.memory]
        if record.returns == Returns.TOLD_ALREADY:
            pieces.append((stack, struct.pack("<Q", shadow.probed.trampoline)))
        pages = pages_of(pieces, stack, taken)
        for run in runs(pages):
            mapping = batch.map(run.start, len(run), _PROT_READ_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
            for start in run[::_PAGE]:
                batch.copy(mapping, start + pages[start].first, pages[start].contents)
        entered = batch.enter(code, frame(registers, shadow.task, trap=code is not None), shadow.probed.catches)
        returned = batch.read_back(stack, 8) if record.returns else None
        batch.unmap()
        results = await self._pump.call(shadow.task, batch.calls)
        if results[entered] >= 0:
            shadow.probed.catches = True
        if returned is not None and results[returned] == 0:
            self._note_trampoline(shadow, stack, pieces)

    def _note_trampoline(self, shadow: Mirrored, stack: int, pieces: list[tuple[int, bytes]]) -> None:
        """Note the return address that the guest's kernel has put on the shadow's stack, if it has."""
        now = self._agent.get(shadow.task, _RESULT, 8)
        if all(data[:8] != now for address, data in pieces if address == stack):
            shadow.probed.trampoline = int.from_bytes(now, "little")

    async def _descriptor(self, shadow: Mirrored, number: int) -> int:
        """Return a shadow's descriptor of a file that it is shown. The caller holds its lock."""
        fd = shadow.probed.descriptors.get(number)
        if fd is None:
            self._agent.put(shadow.task, 0, shown_at(number) + b"\0")
            wish = (Sys.OPENAT, _AT_FDCWD, shadow.task.virtual(), os.O_RDONLY | os.O_CLOEXEC, 0)
            [low] = await self._pump.call(shadow.task, [wish])
            if low < 0:
                return low
            moved = [(Sys.FCNTL, low, _F_DUPFD_CLOEXEC, _FIRST_FD), (Sys.CLOSE, low)]
            [fd, _] = await self._pump.call(shadow.task, moved)
            if fd >= 0:
                shadow.probed.descriptors[number] = fd
        return fd
