"""Perf events of the guest that programs of the host have opened, and what they do with them.

A task of the guest, the *keeper*, has them open; it shares descriptors and memory with init. What an event counts,
samples, and says of processes is the guest kernel's business. Here are lifetimes, numbers, and the way to the program.
"""

from __future__ import annotations

import base64
import errno
import os
import secrets
import select
import struct
from collections.abc import Callable, Sequence

import trio

from emulator.agent import DATA_SIZE, Call
from emulator.memory import PAGE
from fakefs.files import Caller, Mapped
from fakefs.guestpoll import Polling
from fakefs.mirror.records import EventAnswer, EventControl, EventMap, EventOpen
from fakefs.perf.requests import ID, PERIOD, SET_FILTER, SET_OUTPUT, file_name
from fakefs.perf.ring import TAIL, Ring, is_length
from fakefs.shadow import Handle, Shadow, Shadows
from fakefs.syscalls import AT_FDCWD, Sys, check

_FLAG_CLOEXEC = 8
_MOST_EVENTS = 8192
_PART = 4  # of the guest's memory
_ATTR_FLAGS, _BACKWARD = 40, 1 << 27  # struct perf_event_attr: offset of the bits, write_backward
_MAP_SHARED, _MAP_POPULATE = 1, 0x8000
_PROT_WRITE = 2
_RLIMIT_NOFILE = 7
_PRESENT, _FRAME = 1 << 63, (1 << 55) - 1  # of an entry of /proc/PID/pagemap
_READ_MOST = DATA_SIZE
_SYNC = 0.02
"""Host seconds after which a program that does not ask sees what the guest has written."""


class Event(Mapped):
    """One event, and the file that stands for it. `fd` is the keeper's descriptor; `token` is for who opens it."""

    flags = os.O_RDWR
    seekable = True

    def __init__(self, number: int, handle: Handle, fd: int, polling: Polling, *, backward: bool) -> None:
        self.number = number
        self.handle = handle
        self.fd = fd
        self.polling = polling
        self.backward = backward
        self.token: str | None = secrets.token_hex(8)
        self.ring: Ring | None = None
        self.address = 0  # of the ring, in the keeper
        self.syncing = trio.Lock()

    @property
    def name(self) -> str:
        """The name of its file; that can be opened once."""
        return file_name(self.number, self.token or "")

    @property
    def length(self) -> int:
        """Of what is mapped, in bytes."""
        return 0 if self.ring is None else len(self.ring.contents)

    async def sync(self) -> None:
        """Have the program see what the guest has written, and the guest what the program has read."""
        async with self.syncing:
            ring, pages = self.ring, self.pages
            if ring is None or pages is None:
                return
            if ring.unread:
                tail = await pages.fetch(TAIL, 8)
                if len(tail) == 8:
                    ring.consume(int.from_bytes(tail, "little"))
            if changed := ring.advance():
                await pages.store(changed)


class Events:
    """All events of a guest."""

    def __init__(self, shadows: Shadows, nursery: trio.Nursery) -> None:
        self._shadows = shadows
        self._pump = shadows.pump
        self._nursery = nursery
        self._by_number: dict[int, Event] = {}
        self._last = 0
        self._keeper: Shadow | None = None
        self._room = self._pump.machine.ram_size // _PART  # for all ring buffers
        self._spawning = trio.Lock()
        self._synced = False

    # ---- the keeper

    async def _keep(self) -> Shadow:
        async with self._spawning:
            if self._keeper is None or self._keeper.task.dead:
                init = self._shadows.init
                # By our own number tools that look names up on the host find one.
                keeper = Shadow(await self._shadows.spawn(init, os.getpid()), 0, b"init", init.descriptors)
                most = struct.pack("<QQ", 2 * _MOST_EVENTS, 2 * _MOST_EVENTS)
                await self._call(keeper, most, (Sys.PRLIMIT64, 0, _RLIMIT_NOFILE, keeper.task.virtual(), 0))
                self._keeper = keeper
        return self._keeper

    async def _call(self, keeper: Shadow, data: bytes, *calls: Call, size: int = 0) -> tuple[list[int], bytes]:
        """Have the keeper make calls with `data` in its slot; return their results, and `size` bytes from there."""
        async with keeper.lock:
            self._pump.agent.put(keeper.task, 0, data)
            results = await self._pump.call(keeper.task, calls)
            return results, self._pump.agent.get(keeper.task, 0, size)

    # ---- what the recorder passes on

    async def open(self, record: EventOpen) -> EventAnswer:
        """perf_event_open(2), for whoever is the guest's root: what it says to others depends on its settings.

        Raises OSError.
        """
        if len(self._by_number) >= _MOST_EVENTS:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        pid, opener = record.pid, self._shadows.alive(record.tid)
        if opener is not None and not opener.privileged:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        if pid > 0:
            shadow = self._shadows.alive(pid)
            if shadow is None or not shadow.task.pid:
                raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
            pid = shadow.task.pid
        group = -1 if record.group < 0 else self._find(record.group).fd
        attr = base64.b64decode(record.attr)
        keeper = await self._keep()
        at = keeper.task.virtual()
        call = (Sys.PERF_EVENT_OPEN, at, pid, record.cpu, group, record.flags | _FLAG_CLOEXEC)
        [fd], _ = await self._call(keeper, attr, call)
        handle = Handle(0)
        self._shadows.init.descriptors[handle] = check(fd)
        self._last += 1
        [bits] = struct.unpack_from("<Q", attr, _ATTR_FLAGS)
        polling = Polling(self._shadows, self._nursery, handle, once=select.POLLIN | select.POLLPRI)
        event = Event(self._last, handle, fd, polling, backward=bool(bits & _BACKWARD))
        self._by_number[event.number] = event
        return EventAnswer(record.call, 0, 0, event.name)

    async def control(self, record: EventControl) -> EventAnswer:
        """ioctl(2). Raises OSError."""
        event, argument, data = self._find(record.event), record.argument, b""
        keeper = await self._keep()
        if record.request == SET_OUTPUT and argument != -1:
            argument = self._find(argument).fd
        elif record.request == SET_FILTER:
            data = os.fsencode(record.text) + b"\0"
        elif record.request == PERIOD:
            data = struct.pack("<Q", argument)
        elif record.request == ID:
            data = bytes(8)
        if data:
            argument = keeper.task.virtual()
        [result], answer = await self._call(keeper, data, (Sys.IOCTL, event.fd, record.request, argument), size=8)
        check(result)
        await self.sync()
        return EventAnswer(record.call, 0, int.from_bytes(answer, "little") if record.request == ID else 0)

    async def map(self, record: EventMap) -> EventAnswer:
        """mmap(2). Raises OSError."""
        event = self._find(record.event)
        if event.ring is None:
            if not is_length(record.length):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            if sum(each.length for each in self._mapped()) + record.length > self._room:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            keeper = await self._keep()
            event.address, frames = await self._map(keeper, event.fd, record.length, record.protection)
            keeps = bool(record.protection & _PROT_WRITE)
            event.ring = Ring(self._pump.machine.memory, frames, keeps=keeps, backward=event.backward)
            self._sync_often()
        elif event.length != record.length:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return EventAnswer(record.call, 0)

    async def _map(self, keeper: Shadow, fd: int, length: int, protection: int) -> tuple[int, list[int]]:
        """Map an event in the keeper; return its address there, and the physical addresses of its pages."""
        mmap = (Sys.MMAP, 0, length, protection, _MAP_SHARED | _MAP_POPULATE, fd, 0)
        opened = (Sys.OPENAT, AT_FDCWD, keeper.task.virtual(), os.O_RDONLY | os.O_CLOEXEC, 0)
        [address, pagemap], _ = await self._call(keeper, b"/proc/self/pagemap\0", mmap, opened)
        try:
            check(address)
            check(pagemap)
            size = length // PAGE * 8
            lookup = (Sys.PREAD64, pagemap, keeper.task.virtual(), size, address // PAGE * 8)
            [got], entries = await self._call(keeper, b"", lookup, size=size)
            words = [word for (word,) in struct.iter_unpack("<Q", entries)]
            if got != size or not all(word & _PRESENT for word in words):
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        finally:
            await self._call(keeper, b"", (Sys.CLOSE, pagemap))
        return address, [(word & _FRAME) * PAGE for word in words]

    def _find(self, number: int) -> Event:
        event = self._by_number.get(number)
        if event is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return event

    # ---- what the program's file is asked

    def named(self, name: str) -> Event | None:
        """Return the event that a file name is of, unless its file has been opened."""
        for event in reversed(self._by_number.values()):
            if event.token is not None and event.name == name:
                return event
        return None

    async def read(self, event: Event, caller: Caller, size: int) -> bytes:
        """read(2). Raises OSError."""
        if self._shadows.watching is not None:
            await self._shadows.watching.catch_up(caller.tid)
        await event.sync()
        size = min(size, _READ_MOST)
        keeper = await self._keep()
        [got], data = await self._call(keeper, b"", (Sys.READ, event.fd, keeper.task.virtual(), size), size=size)
        return data[: check(got)]

    async def poll(self, event: Event, caller: Caller, events: int, notify: Callable[[], None] | None) -> int:
        """poll(2)."""

        async def sync_and_notify(notify: Callable[[], None]) -> None:
            await event.sync()
            notify()

        told = None if notify is None else lambda: self._nursery.start_soon(sync_and_notify, notify)
        ready = await event.polling.ready(caller, events, told)
        await event.sync()
        return ready

    async def close(self, event: Event) -> None:
        """The last close(2)."""
        self._by_number.pop(event.number, None)
        await event.polling.close()
        async with event.syncing:
            length, event.ring = event.length, None
        keeper = await self._keep()
        calls: list[Call] = [(Sys.CLOSE, event.fd)]
        if length:
            calls.insert(0, (Sys.MUNMAP, event.address, length))
        self._shadows.init.descriptors.pop(event.handle, None)
        await self._call(keeper, b"", *calls)
        await self._shadows.close(event.handle)

    # ---- what is mapped

    def _mapped(self) -> Sequence[Event]:
        return [event for event in self._by_number.values() if event.ring is not None]

    async def sync(self) -> None:
        """Have all programs see what the guest has written."""
        for event in self._mapped():
            await event.sync()

    def _sync_often(self) -> None:
        if not self._synced:
            self._synced = True
            self._nursery.start_soon(self._keep_synced)

    async def _keep_synced(self) -> None:
        while self._mapped():
            await self.sync()
            await trio.sleep(_SYNC)
        self._synced = False
