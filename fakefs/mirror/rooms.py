"""Where the buffers of a shadow's call are: in its slot, or if they are larger in memory of another kind behind that.

What is read may go to a place that all shadows have in common, as nobody looks at it, and what is written comes from
zeros that take no memory. So a shadow can be asked for as large a transfer as its thread without taking any.
"""

from __future__ import annotations

import mmap

from emulator.agent import SINK_SIZE, SLOT_DATA, WINDOW_FD, WINDOW_VIRTUAL, Call
from fakefs.mirror.blocking import LASTING, LASTING_SIZE
from fakefs.mirror.filecalls import ANSWER, ANSWER_SIZE
from fakefs.mirror.layout import Room
from fakefs.mirror.mirrored import Mirrored
from fakefs.pump import Pump
from fakefs.syscalls import Sys

_START = WINDOW_VIRTUAL + (1 << 36)
_PLACE = 2 * SINK_SIZE
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000


class Rooms:
    """Maps them."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump

    async def of(self, shadow: Mirrored, size: int, *, written: bool) -> Room:
        """Return the room for a call with buffers of `size` bytes, which are `written` from. At most 1 MiB is mapped.

        The caller holds the shadow's lock.
        """
        structures = shadow.task.virtual(LASTING), LASTING_SIZE
        if size > ANSWER_SIZE:
            at = _START + (2 * shadow.task.slot + written) * _PLACE
            if written in shadow.rooms or await self._map(shadow, at, written=written):
                shadow.rooms.add(written)
                return Room(*structures, at, SINK_SIZE, ANSWER_SIZE)
        return Room(*structures, shadow.task.virtual(ANSWER), ANSWER_SIZE, ANSWER_SIZE)

    async def _map(self, shadow: Mirrored, at: int, *, written: bool) -> bool:
        own = self._pump.agent.physical(shadow.task) + SLOT_DATA + ANSWER
        access, shared = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
        size = SINK_SIZE - ANSWER_SIZE
        calls: list[Call] = [(Sys.MMAP, at, ANSWER_SIZE, access, shared, WINDOW_FD, own)]
        if written:
            zeros = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
            calls.append((Sys.MMAP, at + ANSWER_SIZE, size, mmap.PROT_READ, zeros, -1, 0))
        else:
            calls.append((Sys.MMAP, at + ANSWER_SIZE, size, access, shared, WINDOW_FD, self._pump.agent.sink))
        return all(result > 0 for result in await self._pump.call(shadow.task, calls))
