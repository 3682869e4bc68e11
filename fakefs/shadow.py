"""Shadow tasks: for every host thread that uses the mount, a task in the guest with its pid, comm and credentials.

A shadow shares memory, files and working directory with the guest's init, so any shadow can use any descriptor; it is
a task of its own for the scheduler, the tracers and everything that looks at `current`. It is born as a child of its
parent's shadow when there is one, and ends when its host thread does.

Where processes are mirrored (`fakefs.mirror`), their shadows are processes and threads of the guest as they are of the
host, and have descriptors of their own: `descriptor()` gets them one of another's.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from typing import Protocol

import trio

from emulator.agent import CALL_SPAWN, DATA_SIZE, SLOT_SIZE, WINDOW_FD, Call, Task
from emulator.errors import EmulatorError
from fakefs.files import Caller, Interrupt
from fakefs.hostthreads import HostThread, has_ended, read_comm, read_thread, wait_for_exit
from fakefs.pump import Pump
from fakefs.syscalls import Sys

_CLONE_VM, _CLONE_FS, _CLONE_FILES, _CLONE_SIGHAND, _CLONE_THREAD = 0x100, 0x200, 0x400, 0x800, 0x10000
_PROT_READ_WRITE, _MAP_SHARED_FIXED = 3, 0x11
CLONE_ARGS = struct.Struct("<11Q")
_CLONE_ARGS_AT = DATA_SIZE - 256  # in the parent's data area: the arguments, and behind them the pid wished for
_PID_AT = DATA_SIZE - 128
_COMM_AT = DATA_SIZE - 64
_GROUPS_AT = DATA_SIZE - 1024
_PR_SET_NAME = 15
_COMM_MAX = 15
_AT_FDCWD = -100
_LAST_PID = b"/proc/sys/kernel/ns_last_pid"
# A signal can come just before its task sleeps: sent again after this many host seconds.
_SIGNAL_AGAIN = 0.05


class Kind(Enum):
    """What a shadow shares with its parent."""

    SHARING = _CLONE_VM | _CLONE_FS | _CLONE_FILES  # what it has to, to use all descriptors
    PROCESS = 0
    THREAD = _CLONE_VM | _CLONE_FS | _CLONE_FILES | _CLONE_SIGHAND | _CLONE_THREAD


class Handle:
    """A file held open in the guest by thread `opener` of the host: descriptors of it differ from table to table."""

    __slots__ = ("opener",)

    def __init__(self, opener: int) -> None:
        self.opener = opener


class Watching(Protocol):
    """What `Shadows` asks of those who make shadows do what the host's processes do."""

    async def catch_up(self, tid: int) -> None:
        """Return when all is done that was known of before, and this thread's shadow waits for nothing."""

    async def bear(self, thread: HostThread) -> Shadow | None:
        """Bear the shadow of a thread that was not known of; None when it is none of theirs."""

    async def uprobes_changed(self, tid: int) -> None:
        """A thread may have changed the uprobes: return when its programs and others will hit them."""


class Shadow:
    """A guest task for one host thread. Hold `lock` while using its data area.

    `descriptors` are those its descriptor table is known to have; tasks that share a table share them. One that is
    `privileged` (the guest's root) may choose the process id of a child.
    """

    __slots__ = ("comm", "descriptors", "lock", "privileged", "task", "tid")
    apart = False
    """A process with a root directory of its own; others tell when it ends."""
    root = b"/"
    """The guest path of its root directory."""
    interrupted_by = signal.SIGINT
    """The signal that ends the call it is blocked in, and does nothing else."""
    cwd = "/"
    """Its working directory, below its root."""

    def __init__(self, task: Task, tid: int, comm: bytes, descriptors: dict[Handle, int] | None = None) -> None:
        self.task = task
        self.tid = tid
        self.comm = comm
        self.lock = trio.Lock()
        self.privileged = True
        self.descriptors: dict[Handle, int] = {} if descriptors is None else descriptors


class Shadows:
    """All shadows of one mount. `init` is the guest's init, which stands in where no thread is known."""

    def __init__(self, pump: Pump, nursery: trio.Nursery) -> None:
        self.pump = pump
        self.init = Shadow(pump.agent.init, 0, b"init")
        self._nursery = nursery
        self._by_tid: dict[int, Shadow] = {}
        self._births: dict[int, trio.Event] = {}
        self._owner = os.geteuid()
        self.watching: Watching | None = None

    def __len__(self) -> int:
        return len(self._by_tid)

    async def of(self, caller: Caller) -> Shadow:
        """Return the shadow of a caller, born now if need be, with the comm its thread has at the moment.

        Raises OSError: EAGAIN when the guest has no room for another, EIO when it is dead.
        """
        if caller.tid <= 0:
            return self.init
        if self.watching is not None:
            await self.watching.catch_up(caller.tid)
        if self.pump.deterministic:
            await self._end_gone()
        while (birth := self._births.get(caller.tid)) is not None:
            await birth.wait()
        shadow = self._by_tid.get(caller.tid)
        if shadow is not None and shadow.task.dead:  # somebody has killed it in the guest
            self.remove(shadow)
            shadow = None
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
            await self.rename(shadow, comm)
        return shadow

    def alive(self, tid: int) -> Shadow | None:
        """Return the shadow of a host thread if there is one."""
        return self._by_tid.get(tid)

    # ---- birth

    def all(self) -> list[Shadow]:
        """Return the shadows of all host threads."""
        return list(self._by_tid.values())

    def add(self, shadow: Shadow) -> None:
        """Know the shadow of a host thread that somebody else has spawned."""
        self._by_tid[shadow.tid] = shadow

    def remove(self, shadow: Shadow) -> None:
        """Forget a shadow that has ended, or is about to."""
        if self._by_tid.get(shadow.tid) is shadow:
            del self._by_tid[shadow.tid]

    async def _bear(self, thread: HostThread) -> Shadow:
        if self.watching is not None and (watched := await self.watching.bear(thread)) is not None:
            return watched
        if thread.uid == self._owner != 0:  # who mounts is the guest's root
            thread = replace(thread, uid=0, gid=0, groups=())
        parent = self._by_tid.get(thread.parent)
        if parent is None or parent.lock.locked():
            parent = self.init
        task = await self.spawn(parent, thread.tid)
        shadow = Shadow(task, thread.tid, thread.comm, self.init.descriptors)
        shadow.privileged = thread.uid == 0
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
        self.add(shadow)
        self._nursery.start_soon(self._follow, shadow)
        return shadow

    async def spawn(self, parent: Shadow, pid: int = 0, kind: Kind = Kind.SHARING) -> Task:
        """Make a task as a child of `parent`, with `pid` in the guest if that is free there. Raises OSError."""
        try:
            task = self.pump.agent.new_task()
        except EmulatorError as full:
            raise OSError(errno.EAGAIN, str(full)) from None
        try:
            async with parent.lock:
                if pid and not parent.privileged:
                    result = await self._clone_next(parent.task, task, pid, kind)
                else:
                    result = await self._clone(parent.task, task, pid, kind)
                if result < 0 and pid:
                    result = await self._clone(parent.task, task, 0, kind)
        except BaseException:
            self.pump.agent.forget(task)
            raise
        if result < 0:
            self.pump.agent.forget(task)
            raise OSError(-result, os.strerror(-result))
        task.pid = result
        return task

    async def _clone(self, parent: Task, task: Task, pid: int, kind: Kind) -> int:
        agent = self.pump.agent
        stack, stack_size = (0, 0) if kind is Kind.PROCESS else task.stack  # a process has a copy of its parent's
        wish = (parent.virtual(_PID_AT), 1) if pid else (0, 0)
        exit_signal = 0 if kind is Kind.THREAD else signal.SIGCHLD
        arguments = CLONE_ARGS.pack(kind.value, 0, 0, 0, exit_signal, stack, stack_size, 0, *wish, 0)
        agent.put(parent, _CLONE_ARGS_AT, arguments)
        agent.put(parent, _PID_AT, struct.pack("<i", pid))
        physical = agent.physical(task)
        maps = physical if kind is Kind.PROCESS else 0
        calls: list[Call] = [(CALL_SPAWN, parent.virtual(_CLONE_ARGS_AT), len(arguments), task.slot, maps)]
        if kind is Kind.THREAD:
            slot = (task.start, SLOT_SIZE, _PROT_READ_WRITE, _MAP_SHARED_FIXED, WINDOW_FD, physical)
            calls.insert(0, (Sys.MMAP, *slot))
        return (await self.pump.call(parent, calls))[-1]

    async def _clone_next(self, parent: Task, task: Task, pid: int, kind: Kind) -> int:
        """Make a task that has `pid` because it is the next in turn: init says which was the last one."""
        async with self.init.lock:
            before = await self._last_pid()
            await self._last_pid(b"%d" % (pid - 1))
            try:
                return await self._clone(parent, task, 0, kind)
            finally:
                await self._last_pid(before)

    async def _last_pid(self, new: bytes | None = None) -> bytes:
        """Have init read or write what Linux counts process ids on from."""
        agent, init, at = self.pump.agent, self.init.task, self.init.task.virtual
        agent.put(init, 0, _LAST_PID + b"\0")
        [fd] = await self.pump.call(init, [(Sys.OPENAT, _AT_FDCWD, at(0), os.O_RDWR)])
        if fd < 0:
            return b""  # a kernel without: the child gets some number
        agent.put(init, 0, new or bytes(16))
        transfer = (Sys.WRITE, fd, at(0), len(new)) if new else (Sys.READ, fd, at(0), 16)
        [size, _] = await self.pump.call(init, [transfer, (Sys.CLOSE, fd)])
        return agent.get(init, 0, max(min(size, 16), 0)).strip()

    async def rename(self, shadow: Shadow, comm: bytes) -> None:
        """Give a shadow another comm."""
        async with shadow.lock:
            shadow.comm = comm
            self.pump.agent.put(shadow.task, _COMM_AT, comm[:_COMM_MAX] + b"\0")
            await self.pump.call(shadow.task, [(Sys.PRCTL, _PR_SET_NAME, shadow.task.virtual(_COMM_AT))])

    # ---- death

    async def _follow(self, shadow: Shadow) -> None:
        """Wait for the host thread's end, then end its shadow."""
        await wait_for_exit(shadow.tid)
        if self.pump.deterministic:
            return  # its exit belongs in front of the next request, whenever the host tells of it
        if self._by_tid.get(shadow.tid) is shadow:
            del self._by_tid[shadow.tid]
        await self.end(shadow)

    async def _end_gone(self) -> None:
        """End the shadows of all host threads that have ended, in the order of their birth."""
        for shadow in [shadow for shadow in self._by_tid.values() if not shadow.apart and has_ended(shadow.tid)]:
            if self._by_tid.pop(shadow.tid, None) is shadow:
                await self.end(shadow)

    async def end(self, shadow: Shadow) -> None:
        """Make a shadow exit and take its slot back. One that is blocked is interrupted first."""
        async with trio.open_nursery() as nursery:
            if shadow.lock.locked():
                nursery.start_soon(self.keep_interrupting, shadow)
            with suppress(OSError):  # the guest is dead, and so is the shadow
                await self._exit(shadow)
            nursery.cancel_scope.cancel()

    async def _exit(self, shadow: Shadow) -> None:
        async with shadow.lock:
            await self.pump.call(shadow.task, [(Sys.EXIT, 0)])

    async def kill(self, shadow: Shadow, number: int) -> int:
        """Have init send a shadow a signal; return what kill(2) does."""
        async with self.init.lock:
            return (await self.pump.call(self.init.task, [(Sys.KILL, shadow.task.pid, number)]))[0]

    # ---- descriptors

    def holders(self, handle: Handle) -> list[Shadow]:
        """Return a shadow for each descriptor table that has a file: that of the opener where there is a choice."""
        tables: dict[int, Shadow] = {}
        for shadow in (self.init, *self._by_tid.values()):
            if handle in shadow.descriptors and (id(shadow.descriptors) not in tables or shadow.tid == handle.opener):
                tables[id(shadow.descriptors)] = shadow
        return list(tables.values())

    async def descriptor(self, shadow: Shadow, handle: Handle) -> int:
        """Return a shadow's descriptor of a file; from another's table if need be. Raises OSError(EBADF).

        The caller holds the shadow's lock.
        """
        fd = shadow.descriptors.get(handle)
        if fd is not None:
            return fd
        for holder in self.holders(handle):
            if handle not in holder.descriptors:
                continue
            theirs = holder.descriptors[handle]
            [pidfd] = await self.pump.call(shadow.task, [(Sys.PIDFD_OPEN, holder.task.pid, 0)])
            if pidfd < 0:
                continue
            [fd, _] = await self.pump.call(shadow.task, [(Sys.PIDFD_GETFD, pidfd, theirs, 0), (Sys.CLOSE, pidfd)])
            if fd >= 0 and handle in holder.descriptors:
                shadow.descriptors[handle] = fd
                return fd
            if fd >= 0:  # the file was closed meanwhile
                await self.pump.call(shadow.task, [(Sys.CLOSE, fd)])
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    async def inherit(self, shadow: Shadow) -> None:
        """Have init get the files that only this shadow, which is about to end, has open."""
        async with self.init.lock:
            for handle in list(shadow.descriptors):
                if all(holder.descriptors is shadow.descriptors for holder in self.holders(handle)):
                    with suppress(OSError):
                        await self.descriptor(self.init, handle)

    async def close(self, handle: Handle) -> None:
        """Close a file in all tables that have it; one may get it from another that ends meanwhile."""
        while holders := self.holders(handle):
            shadow = holders[0]
            if shadow.lock.locked() and shadow.descriptors is self.init.descriptors:
                shadow = self.init  # blocked in a call: another one with the same table
            async with shadow.lock:
                fd = shadow.descriptors.pop(handle, None)
                if fd is not None:
                    await self.pump.call(shadow.task, [(Sys.CLOSE, fd)])

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
        await self.keep_interrupting(shadow)

    async def keep_interrupting(self, shadow: Shadow) -> None:
        """Interrupt the call a shadow is blocked in, until cancelled."""
        with suppress(OSError):  # the guest is dead
            while True:
                await self.kill(shadow, shadow.interrupted_by)
                await trio.sleep(_SIGNAL_AGAIN)
