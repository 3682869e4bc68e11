"""The instructions of the host's programs that have uprobes: found when they are enabled, and told to the recorder.

A site is an instruction of a file that has been brought to the guest, where the uprobe of an enabled event is. What the
guest's kernel lists in uprobe_events says where they are, and what their arguments look at.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import trio

from emulator.agent import OTHER_ROOT
from fakefs.hostfiles.bring import Copy, HostFiles
from fakefs.mirror.enabled import Enabled
from fakefs.mirror.records import Site, Sites
from fakefs.shadow import Shadows
from fakefs.static import TRACEFS
from fakefs.syscalls import Sys

_AT_FDCWD = -100
_MS_BIND = 4096
_PAGE = 4096
_EVENTS = TRACEFS + b"/uprobe_events"
_EVENTS_MAX = 1 << 20
_DIRECTORY = b"/.fakefs-probed"
_PATIENCE = 5.0  # host seconds the recorder gets

_LINE = re.compile(rb"([pr])\S*:\S+ (.+?):0x([0-9a-f]{1,16})(?:\(0x[0-9a-f]+\))?((?: \S+=\S+)*)")


class _Key(NamedTuple):
    """What a site is: an offset in a copy, which is another when the host's file has changed."""

    copy: Copy
    offset: int


class ProbeSites:
    """All sites. `tell` sends a packet to the recorder."""

    def __init__(
        self, shadows: Shadows, host_files: HostFiles, tell: Callable[[Site | Sites], Awaitable[None]]
    ) -> None:
        self._shadows = shadows
        self._pump = shadows.pump
        self._agent = shadows.pump.agent
        self._host_files = host_files
        self._tell = tell
        self._changing = trio.Lock()
        self._enabled: Enabled | None = None
        self._ids: dict[_Key, int] = {}
        self._files: dict[Copy, int] = {}
        self._file_of: dict[int, int] = {}  # a site's
        self.by_id: dict[int, Site] = {}
        self._told = 0
        self._placed = trio.Event()

    def file(self, site: Site) -> int:
        """Return the number of the file that a site is in, for `shown_at()`."""
        return self._file_of[site.id]

    async def changed(self, tid: int) -> None:
        """A thread may have enabled or disabled uprobes: return when the recorder knows, and that thread's process."""
        if self._enabled is None:
            if not self._host_files.named:
                return
            self._enabled = Enabled(self._pump.guest)  # nothing that is just being defined is enabled yet
        if self._enabled.changed or not self._enabled.known:
            async with self._changing:
                await self._tell_all(tid, self._enabled)

    async def _tell_all(self, tid: int, enabled: Enabled) -> None:
        enabled.changed = False
        sites = {
            number: site
            for number, site in (await self._list(self._host_files.named)).items()
            if enabled.has(site.offset)
        }
        if sites == self.by_id:
            return
        self.by_id = sites
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
            directory, new, at = OTHER_ROOT + _DIRECTORY, OTHER_ROOT + shown_at(number), init.task.virtual
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


def shown_at(number: int) -> bytes:
    """Return the path at which mirrored processes have a file with probes."""
    return _DIRECTORY + b"/%d" % number
