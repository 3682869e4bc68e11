"""Loading and removing modules in the guest, at the daemon: finit_module(2) and delete_module(2) by one of its tasks.

The task is called as the command is, and is a child of the guest's init. Errors are those of the system call, with the
line the kernel has logged about it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from emulator.agent import Call
from fakefs.errors import UserError
from fakefs.pump import Pump
from fakefs.shadow import Shadow, Shadows
from fakefs.syscalls import AT_FDCWD, Sys

IMAGE_MAX = 64 << 20
"""The longest module file that is taken, in bytes."""

_PR_SET_NAME = 15
_MFD_CLOEXEC = 1
_NAME_AT = 0
_TEXT_AT = 0x100
_TEXT_MAX = 0x1000
_DATA_AT = 0x1100
_DATA_MAX = 0x8000

_LOADING = {
    errno.EEXIST: "it is loaded already",
    errno.ENOEXEC: "not a module for this kernel",
    errno.ENOENT: "it uses symbols that this kernel does not have",
    errno.EINVAL: "the kernel does not take it",
    errno.ENOMEM: "the guest has no memory for it: --memory gives it more",
}
_REMOVING = {
    errno.ENOENT: "no such module is loaded",
    errno.EWOULDBLOCK: "it is in use: by a probe, an event or another module",
    errno.EBUSY: "it cannot be removed, or is being so",
}


class Modules:
    """The modules of one guest."""

    def __init__(self, pump: Pump, shadows: Shadows) -> None:
        self._pump = pump
        self._shadows = shadows
        self._agent = pump.agent

    async def load(self, name: str, image: bytes, parameters: str) -> None:
        """Load a module; `name` is for messages. Raises UserError."""
        text = os.fsencode(parameters)
        if len(text) >= _TEXT_MAX or b"\0" in text:
            raise UserError(f"{name}: the parameters are longer than {_TEXT_MAX - 1} bytes, or no text")
        async with self._task(b"insmod") as task:
            log = await self._open(task, b"/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
            await self._call(task, (Sys.LSEEK, log, 0, os.SEEK_END))
            file = await self._store(task, image)
            self._agent.put(task.task, _TEXT_AT, text + b"\0")
            result = await self._call(task, (Sys.FINIT_MODULE, file, task.task.virtual(_TEXT_AT), 0))
            if result < 0:
                said = await self._logged(task, log)
                raise UserError(f"{name}: {_reason(_LOADING, -result)}{f' ({said})' if said else ''}")
            await self._pump.call(task.task, [(Sys.CLOSE, fd) for fd in (file, log)])

    async def remove(self, name: str) -> None:
        """Remove a module. Raises UserError."""
        encoded = os.fsencode(name.replace("-", "_"))
        if not re.fullmatch(rb"\w{1,55}", encoded):
            raise UserError(f"{name}: not the name of a module")
        async with self._task(b"rmmod") as task:
            self._agent.put(task.task, _NAME_AT, encoded + b"\0")
            result = await self._call(task, (Sys.DELETE_MODULE, task.task.virtual(_NAME_AT), os.O_NONBLOCK))
            if result < 0:
                raise UserError(f"{name}: {_reason(_REMOVING, -result)}")

    # ---- the task

    @asynccontextmanager
    async def _task(self, comm: bytes) -> AsyncIterator[Shadow]:
        """A task of the guest for this; if a crash in the module has killed it, the guest's log tells."""
        shadow = Shadow(await self._shadows.spawn(self._shadows.init), 0, comm)
        self._agent.put(shadow.task, _NAME_AT, comm + b"\0")
        await self._pump.call(shadow.task, [(Sys.PRCTL, _PR_SET_NAME, shadow.task.virtual(_NAME_AT))])
        try:
            yield shadow
        except _Killed:
            message = "the module has crashed, and the kernel killed what was loading it: fakefs exec -- dmesg"
            raise UserError(message) from None
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                await self._shadows.end(shadow)
            raise
        await self._shadows.end(shadow)

    async def _call(self, shadow: Shadow, call: Call) -> int:
        [result] = await self._pump.call(shadow.task, [call])
        if shadow.task.dead:
            raise _Killed
        return result

    async def _open(self, shadow: Shadow, path: bytes, flags: int) -> int:
        self._agent.put(shadow.task, _TEXT_AT, path + b"\0")
        call = (Sys.OPENAT, AT_FDCWD, shadow.task.virtual(_TEXT_AT), flags | os.O_CLOEXEC, 0)
        return await self._checked(shadow, call)

    async def _checked(self, shadow: Shadow, call: Call) -> int:
        result = await self._call(shadow, call)
        if result < 0:
            raise UserError(f"the guest cannot take a module: {os.strerror(-result)}")
        return result

    async def _store(self, shadow: Shadow, image: bytes) -> int:
        """Write a file of the guest's memory; return a descriptor that reads it, as finit_module(2) wants."""
        at = shadow.task.virtual
        self._agent.put(shadow.task, _NAME_AT, b"module\0")
        file = await self._checked(shadow, (Sys.MEMFD_CREATE, at(_NAME_AT), _MFD_CLOEXEC))
        for start in range(0, len(image), _DATA_MAX):
            piece = image[start : start + _DATA_MAX]
            self._agent.put(shadow.task, _DATA_AT, piece)
            if await self._checked(shadow, (Sys.WRITE, file, at(_DATA_AT), len(piece))) != len(piece):
                raise UserError("the guest has no memory for the module: --memory gives it more")
        readable = await self._open(shadow, b"/proc/self/fd/%d" % file, os.O_RDONLY)
        await self._call(shadow, (Sys.CLOSE, file))
        return readable

    async def _logged(self, shadow: Shadow, log: int) -> str:
        """The last line the kernel has logged since `log` was opened (kmsg(4): a record for each read)."""
        said = b""
        for _ in range(64):
            size = await self._call(shadow, (Sys.READ, log, shadow.task.virtual(_DATA_AT), _DATA_MAX))
            if size <= 0:
                break
            record = self._agent.get(shadow.task, _DATA_AT, min(size, _DATA_MAX))
            said = record.partition(b";")[2].partition(b"\n")[0] or said
        return re.sub(r"[^ -~]", "?", said.decode("ascii", "replace"))[:300]


class _Killed(Exception):
    """The task is no more."""


def _reason(known: dict[int, str], number: int) -> str:
    return known.get(number) or os.strerror(number)
