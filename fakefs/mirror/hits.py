"""The daemon's part of uprobes on programs of the host: where they are, and what a hit comes to in the guest.

A site is an instruction of a file that has been brought to the guest, where uprobes are defined on it. When a thread of
the host's comes there its shadow does: it is given the page of the file with the instruction, the thread's registers
and the memory that the probe's arguments look at, all at their addresses, and executes that one instruction. What the
uprobe does is the guest kernel's business. The trap behind the instruction, or any other exception, gives the shadow
back.

A function with a uprobe on return has, on the shadow's stack, the return address that the kernel has put there: when
the thread returns, the shadow goes on at that address.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import stat
import struct
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple

import trio

from emulator.agent import CALL_AFTER, CALL_COPY, CALL_ENTER, OTHER_ROOT, WINDOW_VIRTUAL, Agent, Call, Task
from fakefs.hostfiles.bring import Copy, HostFiles
from fakefs.mirror.processes import KEPT, Mirrored, Processes
from fakefs.mirror.records import Hit, Returns, Site, Sites
from fakefs.mirror.trampoline import RETURN, SAVED
from fakefs.shadow import Shadows
from fakefs.static import TRACEFS
from fakefs.syscalls import Sys

_PAGE = 4096
_AT_FDCWD = -100
_F_DUPFD_CLOEXEC = 1030
_MS_BIND = 4096
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
_EVENTS = TRACEFS + b"/uprobe_events"
_EVENTS_MAX = 1 << 20
_DIRECTORY = b"/.fakefs-probed"
_PATIENCE = 5.0  # host seconds the recorder gets

_LINE = re.compile(rb"([pr])\S*:\S+ (.+?):0x([0-9a-f]{1,16})(?:\(0x[0-9a-f]+\))?((?: \S+=\S+)*)")

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


class _Key(NamedTuple):
    """What a site is: an offset in a copy, which is another when the host's file has changed."""

    copy: Copy
    offset: int


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


class Probes:
    """All sites. `tell` sends a packet to the recorder."""

    def __init__(
        self,
        shadows: Shadows,
        processes: Processes,
        host_files: HostFiles,
        tell: Callable[[Site | Sites], Awaitable[None]],
    ) -> None:
        self._shadows = shadows
        self._pump = shadows.pump
        self._agent = shadows.pump.agent
        self._processes = processes
        self._host_files = host_files
        self._tell = tell
        self._changing = trio.Lock()
        self._ids: dict[_Key, int] = {}
        self._files: dict[Copy, int] = {}
        self._file_of: dict[int, int] = {}  # a site's
        self._sites: dict[int, Site] = {}
        self._told = 0
        self._placed = trio.Event()

    # ---- where they are

    async def changed(self, tid: int) -> None:
        """A thread may have changed the uprobes: return when the recorder knows, and that thread's process."""
        async with self._changing:
            if not self._host_files.named and not self._sites:
                return
            sites = await self._list(self._host_files.named)
            if sites == self._sites:
                return
            self._sites = sites
            self._told += 1
            self._placed = trio.Event()
            with trio.move_on_after(_PATIENCE):
                for site in sites.values():
                    await self._tell(site)
                await self._tell(Sites(self._told, tid))
                await self._placed.wait()

    def placed(self, number: int) -> None:
        """The recorder has placed the sites it was told of."""
        if number == self._told:
            self._placed.set()

    async def _list(self, named: Mapping[bytes, Copy]) -> dict[int, Site]:
        found: dict[int, Site] = {}
        for line in (await self._read_events()).splitlines():
            match = _LINE.fullmatch(line)
            copy = named.get(match[2]) if match is not None else None
            if match is None or copy is None:
                continue
            key = _Key(copy, int(match[3], 16))
            number = self._ids.get(key)
            if number is None:
                number = self._ids[key] = len(self._ids) + 1
                if copy not in self._files:
                    self._files[copy] = len(self._files)
                    await self._show(self._files[copy], copy.path)
                self._file_of[number] = self._files[copy]
            site = found.get(number)
            if site is None:
                site = Site(number, tuple(copy.identity), key.offset, [], None)
            arguments = match[4].decode("latin-1").split()
            if match[1] == b"p":
                site = site._replace(entry=site.entry + arguments)
            else:
                site = site._replace(returns=(site.returns or []) + arguments)
            found[number] = site
        return found

    async def _show(self, number: int, path: bytes) -> None:
        """Show a file to mirrored processes, at a path that stays its own when the other becomes a new file's."""
        init = self._shadows.init
        async with init.lock:
            directory, new, at = OTHER_ROOT + _DIRECTORY, OTHER_ROOT + _name(number), init.task.virtual
            self._agent.put(init.task, 0, directory + b"\0" + new + b"\0" + path + b"\0")
            second = at(len(directory) + 1)
            third = second + len(new) + 1
            calls = [
                (Sys.MKDIRAT, _AT_FDCWD, at(), 0o755),
                (Sys.MKNODAT, _AT_FDCWD, second, stat.S_IFREG | 0o444, 0),
                (Sys.MOUNT, third, second, 0, _MS_BIND, 0),
            ]
            await self._pump.call(init.task, calls)

    async def _read_events(self) -> bytes:
        init, text = self._shadows.init, b""
        async with init.lock:
            self._agent.put(init.task, 0, _EVENTS + b"\0")
            [fd] = await self._pump.call(init.task, [(Sys.OPENAT, _AT_FDCWD, init.task.virtual(), os.O_RDONLY, 0)])
            while fd >= 0 and len(text) < _EVENTS_MAX:
                [size] = await self._pump.call(init.task, [(Sys.READ, fd, init.task.virtual(), _PAGE)])
                if size <= 0:
                    break
                text += self._agent.get(init.task, 0, min(size, _PAGE))
            if fd >= 0:
                await self._pump.call(init.task, [(Sys.CLOSE, fd)])
        return text

    # ---- hits

    async def hit(self, record: Hit) -> None:
        """Have the shadow of a thread do what the thread does."""
        shadow, site = self._processes.find(record.tid), self._sites.get(record.probe)
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
            fd = await self._descriptor(shadow, self._file_of[site.id])
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
            self._agent.put(shadow.task, 0, _name(number) + b"\0")
            wish = (Sys.OPENAT, _AT_FDCWD, shadow.task.virtual(), os.O_RDONLY | os.O_CLOEXEC, 0)
            [low] = await self._pump.call(shadow.task, [wish])
            if low < 0:
                return low
            moved = [(Sys.FCNTL, low, _F_DUPFD_CLOEXEC, _FIRST_FD), (Sys.CLOSE, low)]
            [fd, _] = await self._pump.call(shadow.task, moved)
            if fd >= 0:
                shadow.probed.descriptors[number] = fd
        return fd


def _name(number: int) -> bytes:
    return _DIRECTORY + b"/%d" % number
