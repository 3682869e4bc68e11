"""Processes and threads of the guest that stand for the host's: birth, exec, exit, credentials.

A shadow does nothing by itself: it makes the calls it is given, and all signals but one of ours are blocked, so that it
lives as long as its thread on the host.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import struct
import sys
from collections.abc import Callable

import trio

from emulator.agent import OTHER_ROOT, WINDOW_FD, Call, Task, strings
from fakefs.mirror.blocking import LASTING, Blocking
from fakefs.mirror.credentials import NO_ID
from fakefs.mirror.guestpaths import GuestPaths
from fakefs.mirror.mirrored import Mirrored, OpenFile, Probed
from fakefs.mirror.records import Birth, Credentials, Exit, Program, Sleep, Wait
from fakefs.mirror.sleepers import INTERRUPT, Sleepers
from fakefs.shadow import Kind, Shadows
from fakefs.syscalls import AT_FDCWD, Sys

_SIG_SETMASK = 2
KEPT = 1 << (INTERRUPT - 1)
"""The one signal that is not blocked."""
_WORDS = 0x8000  # where pointers and structures lie in a data area, behind strings
_COMM_MAX = 15
_NOT_REAPED = struct.pack("<QQ16x", 0, 2)  # struct sigaction: SIG_DFL, SA_NOCLDWAIT
_ANSWER_SIZE = 256  # room for a status, siginfo or rusage
# <linux/pidfd.h>: struct pidfd_info, of which what is asked for, and the status
_PIDFD_GET_INFO, _PIDFD_INFO_EXIT, _PIDFD_INFO = 0xC040FF0B, 1 << 3, struct.Struct("<Q52xi")


class Processes:
    """All mirrored processes.

    `died` is called when one was killed on the host, with its status as wait(2) has it, or None.
    `reaped`: it is waited for by its parent's shadow, as mirrored processes do.
    """

    def __init__(
        self,
        shadows: Shadows,
        paths: GuestPaths,
        nursery: trio.Nursery,
        died: Callable[[Mirrored, int | None], None],
        sleepers: Sleepers,
        *,
        reaped: bool,
    ) -> None:
        self._shadows = shadows
        self._pump = shadows.pump
        self._agent = shadows.pump.agent
        self._paths = paths
        self._nursery = nursery
        self._died = died
        self._reaped = reaped
        self._bearing = trio.Lock()
        self.blocking = Blocking(shadows, sleepers)
        self._ends = select.poll()
        self._followed: dict[int, Mirrored] = {}  # by pidfd
        self._full = False

    def find(self, tid: int) -> Mirrored | None:
        """Return the shadow of a thread; None also for one that was killed in the guest."""
        shadow = self._shadows.alive(tid)
        return shadow if isinstance(shadow, Mirrored) and not shadow.task.dead else None

    def group(self, tgid: int) -> list[Mirrored]:
        """Return the shadows of a process's threads."""
        return [shadow for shadow in self._shadows.all() if isinstance(shadow, Mirrored) and shadow.tgid == tgid]

    async def call(self, shadow: Mirrored, *calls: Call) -> list[int]:
        """Have a shadow make calls that need nothing in its data area."""
        async with shadow.lock:
            return await self._pump.call(shadow.task, calls)

    # ---- birth

    async def bear(self, birth: Birth) -> Mirrored | None:
        """Make the shadow of a new thread by its parent's; None, said once, when the guest has no room for it."""
        async with self._bearing:
            return await self._bear(birth)

    async def _bear(self, birth: Birth) -> Mirrored | None:
        known = self.find(birth.tid)
        if known is not None:
            return known
        parent, kind = self.find(birth.parent), Kind.PROCESS if birth.tid == birth.tgid else Kind.THREAD
        if parent is None and kind is Kind.THREAD:
            return None
        try:
            task = await self._spawn(parent, birth.tid, kind)
        except OSError as error:
            if error.errno == errno.EIO:
                raise
            if parent is not None and parent.task.dead:  # it has just been killed in the guest
                return await self._bear(birth)
            self._say_full()
            return None
        shadow = self._of(task, birth, parent, kind)
        self._shadows.add(shadow)
        if parent is None:
            await self._leave_init(shadow)
        elif shadow.comm != parent.comm:
            await self._shadows.rename(shadow, shadow.comm)
        if kind is Kind.PROCESS:
            self._nursery.start_soon(self._follow, shadow)
        return shadow

    async def _spawn(self, parent: Mirrored | None, tid: int, kind: Kind) -> Task:
        if parent is None:
            return await self._shadows.spawn(self._shadows.init, tid, kind)
        async with self.blocking.aside(parent):  # another thread's child, or one that is seen late
            return await self._shadows.spawn(parent, tid, kind)

    def _of(self, task: Task, birth: Birth, parent: Mirrored | None, kind: Kind) -> Mirrored:
        if parent is None:
            return Mirrored(task, birth, {})
        shares = kind is Kind.THREAD
        shadow = Mirrored(task, birth, parent.descriptors if shares else dict(parent.descriptors))
        shadow.cwd = parent.cwd
        shadow.privileged = parent.privileged
        shadow.files = parent.files if shares else dict(parent.files)
        shadow.unclaimed = parent.unclaimed if shares else list(parent.unclaimed)
        shadow.probed = parent.probed if shares else parent.probed.copy()
        shadow.sent = parent.sent if shares else set()
        return shadow

    async def _leave_init(self, shadow: Mirrored) -> None:
        """The first one, a child of init: a session, root directory, signals and (no) descriptors of its own."""
        at = shadow.task.virtual
        async with shadow.lock:
            self._agent.put(shadow.task, 0, struct.pack("<Q", ~KEPT & (1 << 64) - 1))
            self._agent.put(shadow.task, 512, bytes(32) if self._reaped else _NOT_REAPED)  # init ignores it
            self._agent.put(shadow.task, 64, OTHER_ROOT + b"\0/\0" + shadow.comm[:_COMM_MAX] + b"\0")
            await self._pump.call(
                shadow.task,
                [
                    (Sys.RT_SIGACTION, signal.SIGCHLD, at(512), 0, 8),
                    (Sys.RT_SIGPROCMASK, _SIG_SETMASK, at(0), 0, 8),
                    (Sys.CLOSE_RANGE, 0, WINDOW_FD - 1, 0),
                    (Sys.SETSID,),
                    (Sys.CHROOT, at(64)),
                    (Sys.CHDIR, at(64 + len(OTHER_ROOT) + 1)),
                    (Sys.UMASK, shadow.umask),
                    (Sys.PRCTL, 15, at(64 + len(OTHER_ROOT) + 3)),
                ],
            )
            if self._reaped:
                await self._take_standard_files(shadow)

    async def _take_standard_files(self, shadow: Mirrored) -> None:
        """Have something open at 0, 1 and 2, as programs have, so that the numbers of what is opened are the host's."""
        self._agent.put(shadow.task, 0, b"/dev/null\0")
        opening = (Sys.OPENAT, AT_FDCWD, shadow.task.virtual(), os.O_RDWR, 0)
        fds = await self._pump.call(shadow.task, [opening, (Sys.DUP, 0), (Sys.DUP, 0)])
        shadow.files.update((fd, OpenFile("", os.O_RDWR, fd, 0)) for fd in fds if fd >= 0)

    def _say_full(self) -> None:
        if not self._full:
            self._full = True
            most = self._agent.slots - 1
            sys.stderr.write(f"fakefs: the guest has no room for more processes (at most {most}): not all are traced\n")

    # ---- exec

    async def execute(self, program: Program) -> None:
        """execve(2): the stub, under the program's name. It ends the other threads of the process."""
        shadow = self.find(program.tid)
        if shadow is None:
            return
        await self.settle(shadow)
        await self._paths.make_program(program.file.entries)
        for thread in self.group(shadow.tgid):
            if thread is not shadow:
                self._shadows.remove(thread)
        shadow.descriptors = dict(shadow.descriptors)  # the kernel makes a shared table its own
        shadow.files = dict(shadow.files)
        shadow.probed = Probed()
        shadow.rooms = set()
        shadow.sent = set()
        name = os.fsencode(program.file.text)
        where = b"%d %d %d" % (shadow.task.slot, self._agent.physical(shadow.task), not self._reaped)
        async with shadow.lock:
            argv = [os.fsencode(word) for word in program.argv] or [b""]
            blob, offsets = strings([name, where, os.fsencode(program.cwd), *argv])
            path, variable, cwd, *words = [shadow.task.virtual(offset) for offset in offsets]
            pointers = [*words, 0, variable, 0]
            self._agent.put(shadow.task, 0, blob)
            self._agent.put(shadow.task, _WORDS, struct.pack(f"<{len(pointers)}Q", *pointers))
            at = shadow.task.virtual(_WORDS)
            calls: list[Call] = [(Sys.EXECVE, path, at, at + 8 * (len(words) + 1))]
            if shadow.task.pid == 0:
                return
            if program.cwd not in ("", shadow.cwd):
                calls.insert(0, (Sys.CHDIR, cwd))
                shadow.cwd = program.cwd
            *_, result = await self._pump.call(shadow.task, calls)
        comm = name.rpartition(b"/")[2][:_COMM_MAX]
        if result < 0:
            await self._shadows.rename(shadow, comm)
        shadow.comm = comm

    # ---- credentials

    async def change(self, record: Credentials) -> None:
        """setuid(2) and its relatives; one that the host refuses is made so that the guest refuses it too."""
        shadow = self.find(record.tid)
        if shadow is None:
            return
        await self.settle(shadow)
        async with shadow.lock:
            ids = record.ids if record.capable or not shadow.privileged else None
            words = [NO_ID] * 3 if ids is None else ids
            if record.number == Sys.SETGROUPS and ids is not None:
                self._agent.put(shadow.task, 0, struct.pack(f"<{len(ids)}I", *ids))
                words = [len(ids), shadow.task.virtual(0)]
            [_, user] = await self._pump.call(shadow.task, [(record.number, *words), (Sys.GETEUID,)])
        shadow.privileged = user == 0

    # ---- the end

    async def exit(self, record: Exit) -> None:
        """exit_group(2), or exit(2) of one thread."""
        shadow = self.find(record.tid)
        if shadow is None:
            return
        await self.settle(shadow)
        await self.forget(shadow, whole=record.group)
        await self.call(shadow, (Sys.EXIT_GROUP if record.group else Sys.EXIT, record.status))

    async def give_up(self, shadow: Mirrored) -> None:
        """End a shadow that does not answer."""
        await self.forget(shadow, whole=True)
        await self._shadows.kill(shadow, signal.SIGKILL)

    async def forget(self, shadow: Mirrored, *, whole: bool) -> None:
        """Nothing more is asked of a shadow, or (`whole`) its process; files that only it has open go over to init."""
        if whole and shadow.descriptors:
            await self._shadows.inherit(shadow)
        for thread in self.group(shadow.tgid) if whole else [shadow]:
            self._shadows.remove(thread)
        if whole:
            self.blocking.continued(shadow.tgid)

    async def _follow(self, shadow: Mirrored) -> None:
        """Wait for the end of a process; most have told of it before."""
        try:
            fd = os.pidfd_open(shadow.tid)
        except ProcessLookupError:
            self._ended(shadow, None)
            return
        except OSError:
            return  # no descriptors left: it is followed only if it tells of its end
        self._followed[fd] = shadow
        self._ends.register(fd, select.POLLIN)
        try:
            await trio.lowlevel.wait_readable(fd)
            self.look_for_ends()
        finally:
            self._ends.unregister(fd)
            del self._followed[fd]
            os.close(fd)

    def look_for_ends(self) -> None:
        """Report the processes that have ended by now without telling."""
        for fd, _ in self._ends.poll(0):
            shadow = self._followed[fd]
            if shadow.task.dead:
                self._shadows.remove(shadow)
            elif not shadow.ended:
                self._ended(shadow, read_exit_status(fd, shadow.tid))

    def _ended(self, shadow: Mirrored, status: int | None) -> None:
        shadow.ended, shadow.status = True, status
        self._died(shadow, status)

    def ended_children(self, tid: int, *, told: bool) -> list[tuple[Mirrored, int | None]]:
        """Return the children which have ended by now without telling, if a thread was waiting for one or `told`."""
        shadow = self.find(tid)
        if shadow is None or not (told or (shadow.blocked is not None and shadow.blocked.until is None)):
            return []
        self.look_for_ends()
        everybody = [each for each in self._shadows.all() if isinstance(each, Mirrored)]
        return [(each, each.status) for each in everybody if each.ended and each.parent == shadow.tgid]

    # ---- calls that block

    async def wait(self, record: Wait) -> None:
        """wait4(2) or waitid(2)."""
        shadow = self.find(record.tid)
        if shadow is None:
            return
        await self.settle(shadow)
        async with shadow.lock:
            room = shadow.task.virtual(LASTING)
            words = [room + _ANSWER_SIZE * at if word is None else word for at, word in enumerate(record.arguments)]
            await self.blocking.begin(shadow, [(record.number, *words)])

    async def settle(self, shadow: Mirrored) -> None:
        """Return when a shadow can make calls: on the host, its thread has just done so."""
        await self.blocking.settle(shadow)

    async def sleep(self, record: Sleep) -> None:
        """nanosleep(2) or clock_nanosleep(2): begin it."""
        shadow = self.find(record.tid)
        if shadow is None:
            return
        await self.settle(shadow)
        async with shadow.lock:
            self.blocking.sleep(shadow, record.clock, record.duration)


def read_exit_status(pidfd: int, pid: int) -> int | None:
    """Return how a process ended, as wait(2) has it; None when that cannot be known any more."""
    info = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, 0))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)  # Linux 6.15
        known, status = _PIDFD_INFO.unpack(info)
        if known & _PIDFD_INFO_EXIT:
            return int(status)
    except OSError:
        pass  # before that: as long as nobody has waited for it
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[-1]) if fields[0] == b"Z" else None
    except (OSError, ValueError, IndexError):
        return None
