"""Shadow tasks: for every host thread that uses the mount, a task in the guest with its pid, comm and credentials.

A shadow shares memory, files and working directory with the guest's init, so any shadow can use any descriptor; it is
a task of its own for the scheduler, the tracers and everything that looks at `current`. It is born as a child of its
parent's shadow when there is one, and ends when its host thread does.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import trio

from emulator.agent import CALL_SPAWN, DATA_SIZE, Call, Task
from emulator.errors import EmulatorError
from fakefs.files import Caller, Interrupt
from fakefs.pump import Pump
from fakefs.syscalls import Sys

_CLONE_VM, _CLONE_FS, _CLONE_FILES = 0x100, 0x200, 0x400
CLONE_ARGS = struct.Struct("<11Q")
_CLONE_ARGS_AT = DATA_SIZE - 256  # in the parent's data area: the arguments, and behind them the pid wished for
_PID_AT = DATA_SIZE - 128
_COMM_AT = DATA_SIZE - 64
_GROUPS_AT = DATA_SIZE - 1024
_GROUPS_MAX = 64
_PR_SET_NAME = 15
_COMM_MAX = 15
# A signal can come just before its task sleeps: sent again after this many host seconds.
_SIGNAL_AGAIN = 0.05
# A guest task is gone a moment after its exit(2); asked for again after this many host seconds.
_EXIT_POLL = 0.001


@dataclass(frozen=True, slots=True)
class HostThread:
    """What /proc says of a host thread."""

    tid: int
    parent: int  # of a thread that is not its group's leader: the leader; else the parent process
    comm: bytes
    uid: int
    gid: int
    groups: tuple[int, ...]


class Shadow:
    """A guest task for one host thread. Hold `lock` while using its data area."""

    __slots__ = ("comm", "lock", "task", "tid")

    def __init__(self, task: Task, tid: int, comm: bytes) -> None:
        self.task = task
        self.tid = tid
        self.comm = comm
        self.lock = trio.Lock()


class Shadows:
    """All shadows of one mount. `init` is the guest's init, which stands in where no thread is known."""

    def __init__(self, pump: Pump, nursery: trio.Nursery) -> None:
        self.pump = pump
        self.init = Shadow(pump.agent.init, 0, b"init")
        self._nursery = nursery
        self._by_tid: dict[int, Shadow] = {}
        self._births: dict[int, trio.Event] = {}
        self._owner = os.geteuid()

    def __len__(self) -> int:
        return len(self._by_tid)

    async def of(self, caller: Caller) -> Shadow:
        """Return the shadow of a caller, born now if need be, with the comm its thread has at the moment.

        Raises OSError: EAGAIN when the guest has no room for another, EIO when it is dead.
        """
        if caller.tid <= 0:
            return self.init
        if self.pump.deterministic:
            await self._end_gone()
        while (birth := self._births.get(caller.tid)) is not None:
            await birth.wait()
        shadow = self._by_tid.get(caller.tid)
        if shadow is None:
            thread = read_thread(caller)
            if thread is None:
                return self.init
            birth = self._births[caller.tid] = trio.Event()
            try:
                shadow = await self._bear(thread)
            finally:
                del self._births[caller.tid]
                birth.set()
            return shadow
        comm = read_comm(caller.tid)
        if comm and comm != shadow.comm:
            await self._rename(shadow, comm)
        return shadow

    def alive(self, tid: int) -> Shadow | None:
        """Return the shadow of a host thread if there is one."""
        return self._by_tid.get(tid)

    # ---- birth

    async def _bear(self, thread: HostThread) -> Shadow:
        if thread.uid == self._owner != 0:  # who mounts is the guest's root
            thread = replace(thread, uid=0, gid=0, groups=())
        parent = self._by_tid.get(thread.parent)
        if parent is None or parent.lock.locked():
            parent = self.init
        task = await self.spawn(parent, thread.tid)
        shadow = Shadow(task, thread.tid, thread.comm)
        agent, at = self.pump.agent, task.virtual
        agent.put(task, _COMM_AT, thread.comm[:_COMM_MAX] + b"\0")
        calls: list[Call] = [(Sys.PRCTL, _PR_SET_NAME, at(_COMM_AT))]
        if thread.groups:
            agent.put(task, _GROUPS_AT, struct.pack(f"<{len(thread.groups)}I", *thread.groups))
            calls.append((Sys.SETGROUPS, len(thread.groups), at(_GROUPS_AT)))
        if thread.gid:
            calls.append((Sys.SETRESGID, thread.gid, thread.gid, thread.gid))
        if thread.uid:
            calls.append((Sys.SETRESUID, thread.uid, thread.uid, thread.uid))
        await self.pump.call(task, calls)
        self._by_tid[thread.tid] = shadow
        self._nursery.start_soon(self._follow, shadow)
        return shadow

    async def spawn(self, parent: Shadow, pid: int = 0) -> Task:
        """Make a task as a child of `parent`, with `pid` in the guest if that is free there. Raises OSError."""
        try:
            task = self.pump.agent.new_task()
        except EmulatorError as full:
            raise OSError(errno.EAGAIN, str(full)) from None
        try:
            async with parent.lock:
                result = await self._clone(parent.task, task, pid)
                if result < 0 and pid:
                    result = await self._clone(parent.task, task, 0)
        except BaseException:
            self.pump.agent.forget(task)
            raise
        if result < 0:
            self.pump.agent.forget(task)
            raise OSError(-result, os.strerror(-result))
        task.pid = result
        return task

    async def _clone(self, parent: Task, task: Task, pid: int) -> int:
        agent = self.pump.agent
        stack, stack_size = task.stack
        wish = (parent.virtual(_PID_AT), 1) if pid else (0, 0)
        flags = _CLONE_VM | _CLONE_FS | _CLONE_FILES
        arguments = CLONE_ARGS.pack(flags, 0, 0, 0, signal.SIGCHLD, stack, stack_size, 0, *wish, 0)
        agent.put(parent, _CLONE_ARGS_AT, arguments)
        agent.put(parent, _PID_AT, struct.pack("<i", pid))
        call = (CALL_SPAWN, parent.virtual(_CLONE_ARGS_AT), len(arguments), task.slot)
        return (await self.pump.call(parent, [call]))[0]

    async def _rename(self, shadow: Shadow, comm: bytes) -> None:
        async with shadow.lock:
            shadow.comm = comm
            self.pump.agent.put(shadow.task, _COMM_AT, comm[:_COMM_MAX] + b"\0")
            await self.pump.call(shadow.task, [(Sys.PRCTL, _PR_SET_NAME, shadow.task.virtual(_COMM_AT))])

    # ---- death

    async def _follow(self, shadow: Shadow) -> None:
        """Wait for the host thread's end, then end its shadow."""
        await _wait_for_exit(shadow.tid)
        if self.pump.deterministic:
            return  # its exit belongs in front of the next request, whenever the host tells of it
        if self._by_tid.get(shadow.tid) is shadow:
            del self._by_tid[shadow.tid]
        await self.end(shadow)

    async def _end_gone(self) -> None:
        """End the shadows of all host threads that have ended, in the order of their birth."""
        for shadow in [shadow for shadow in self._by_tid.values() if has_ended(shadow.tid)]:
            if self._by_tid.pop(shadow.tid, None) is shadow:
                await self.end(shadow)

    async def end(self, shadow: Shadow) -> None:
        """Make a shadow exit and take its slot back. One that is blocked is interrupted first."""
        async with trio.open_nursery() as nursery:
            if shadow.lock.locked():
                nursery.start_soon(self._keep_interrupting, shadow)
            with suppress(OSError):  # the guest is dead, and so is the shadow
                await self._exit(shadow)
            nursery.cancel_scope.cancel()

    async def _exit(self, shadow: Shadow) -> None:
        async with shadow.lock:
            self.pump.begin(shadow.task, [(Sys.EXIT, 0)])
            while True:  # its slot may be used again only when it runs no more
                if await self._kill(shadow, 0) == -errno.ESRCH:
                    break
                await trio.sleep(_EXIT_POLL)
            self.pump.agent.forget(shadow.task)

    async def _kill(self, shadow: Shadow, number: int) -> int:
        async with self.init.lock:
            return (await self.pump.call(self.init.task, [(Sys.KILL, shadow.task.pid, number)]))[0]

    # ---- interruptible work

    async def read_interruptibly(
        self, shadow: Shadow, calls: Sequence[Call], interrupt: Interrupt, *, holds_clock: bool
    ) -> list[int]:
        """Make calls that may block in the guest; a signal to the host thread becomes one to its shadow."""
        request = self.pump.begin(shadow.task, calls)
        if request.done:
            return request.results
        signalled = trio.Event()
        interrupt.on_interrupt(signalled.set)
        dead: OSError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._interrupt_when, signalled, shadow)
            try:
                await self.pump.finish(request, holds_clock=holds_clock)
            except OSError as error:
                dead = error  # raised in here, the nursery would make a group of it
            nursery.cancel_scope.cancel()
        if dead is not None:
            raise dead
        return request.results

    async def _interrupt_when(self, signalled: trio.Event, shadow: Shadow) -> None:
        await signalled.wait()
        await self._keep_interrupting(shadow)

    async def _keep_interrupting(self, shadow: Shadow) -> None:
        with suppress(OSError):  # the guest is dead
            while True:
                await self._kill(shadow, signal.SIGINT)
                await trio.sleep(_SIGNAL_AGAIN)


async def _wait_for_exit(tid: int) -> None:
    """Return when a host thread has ended: by its pidfd, or that of its process for a thread of several."""
    try:
        fd = os.pidfd_open(tid)
    except OSError:
        while read_comm(tid):  # a thread of several: no pidfd for it before Linux 6.9
            await trio.sleep(0.5)
            continue
        return
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)


def read_comm(tid: int) -> bytes:
    """Return a host thread's comm; empty when it is gone."""
    try:
        fd = os.open(f"/proc/{tid}/comm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 64).rstrip(b"\n")
    except OSError:
        return b""
    finally:
        os.close(fd)


def has_ended(tid: int) -> bool:
    """Has a host thread ended, waited for or not?"""
    try:
        with open(f"/proc/{tid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except (OSError, IndexError):
        return True


def read_thread(caller: Caller) -> HostThread | None:
    """Return what /proc says of a caller; None when it is gone or out of sight (another pid namespace)."""
    try:
        with open(f"/proc/{caller.tid}/status", "rb") as file:
            text = file.read(8192)
    except OSError:
        return None
    return parse_status(text, caller)


def parse_status(text: bytes, caller: Caller) -> HostThread | None:
    """Parse /proc/TID/status (proc(5)); None when it is not one."""
    fields = dict(line.split(b":\t", 1) for line in text.split(b"\n") if b":\t" in line)
    try:
        tgid, ppid = int(fields[b"Tgid"]), int(fields[b"PPid"])
        groups = tuple(int(group) for group in fields.get(b"Groups", b"").split()[:_GROUPS_MAX])
        comm = fields[b"Name"]
    except (KeyError, ValueError):
        return None
    parent = ppid if tgid == caller.tid else tgid
    return HostThread(caller.tid, parent, comm, caller.uid, caller.gid, groups)
