"""Programs inside the guest: `fakefs exec` runs busybox and the like there, with its terminal's input and output.

A launcher task is the program's parent and waits for it; one task each carries its input, output and errors through
pipes. The program itself is a process of its own, in a session of its own.

In deterministic mode one loop looks after these tasks, in a fixed order: which of several tasks of trio's is woken
first is left to chance. Input that ends is all there before the program begins.

These tasks have a table of descriptors of their own. A program forked from that of the shadows would close a copy of
each of their open files, which is no matter to most, but the end of a read of trace_pipe_raw for whoever waits in it.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import trio

from emulator.agent import CALL_SPAWN, FIRST_FD, Call, Request, Task, strings
from fakefs.errors import first_of
from fakefs.frames import ERROR, EXIT, SIGNAL, STDERR, STDIN, STDOUT
from fakefs.pump import Pump
from fakefs.shadow import CLONE_ARGS, Shadow, Shadows
from fakefs.syscalls import Sys

_O_CLOEXEC = 0o2000000
_CLOSE_RANGE_UNSHARE = 2
_STDERR, _ALL_FDS = 2, 0xFFFFFFFF
_CHUNK = 32768
_SIGACTION_SIZE = 32
_STATUS_AT = 0
_PIPES_AT = 64
_DIRECTORY_AT = 0x40
_ARGUMENTS_AT = 0x400
_DIRECTORY_MAX = _ARGUMENTS_AT - _DIRECTORY_AT - 1
_ARGUMENTS_MAX = 0x8000
_SEARCH = ("/bin/", "/sbin/", "/usr/bin/", "/usr/sbin/")


Work = Generator[Call, int, None]
"""What a task of the guest has to do: yields calls, and is sent the result of each."""


class Client(Protocol):
    """Who asked for the program: frames (channel, data) to and from it."""

    async def send(self, channel: int, data: bytes) -> None: ...
    async def receive(self) -> tuple[int, bytes] | None: ...


@dataclass(frozen=True, slots=True)
class Place:
    """The guest path of a program that is not to be searched for, and the directory it starts in."""

    program: bytes
    directory: bytes


async def run_program(
    pump: Pump,
    shadows: Shadows,
    argv: Sequence[str],
    env: dict[str, str],
    client: Client,
    place: Place | None = None,
    *,
    input_ends: bool = False,
) -> None:
    """Run `argv` in the guest; frames carry its input and output, EXIT its status (128 + signal when killed).

    `input_ends`: the client sends its input and the end of it whether or not the program goes on.
    """
    program = _Program(pump, shadows, client, place)
    if input_ends and pump.deterministic:
        await program.take_input()
    with pump.attended():
        try:
            status = await program.run([*map(os.fsencode, argv)], [os.fsencode(f"{k}={v}") for k, v in env.items()])
            answer = EXIT, bytes([status])
        except* OSError as errors:
            reason = os.strerror(getattr(first_of(errors), "errno", errno.EIO))
            answer = ERROR, f"{argv[0]}: {reason}".encode()
        finally:
            with trio.CancelScope(shield=True):
                await program.close()
    await client.send(*answer)  # what comes next finds nothing left of it


class _Program:
    def __init__(self, pump: Pump, shadows: Shadows, client: Client, place: Place | None) -> None:
        self.pump = pump
        self.agent = pump.agent
        self.shadows = shadows
        self.client = client
        self.place = place
        self.helpers: list[Shadow] = []
        self.child: Task | None = None
        self.status = 0
        self.input: bytes | None = None  # all of it, if it was waited for
        self.output: deque[tuple[int, bytes]] = deque()  # frames for the client

    async def take_input(self) -> None:
        """Wait for the end of the input."""
        whole = bytearray()
        while (frame := await self.client.receive()) is not None and frame != (STDIN, b""):
            whole += frame[1] if frame[0] == STDIN else b""
        self.input = bytes(whole)

    async def _helper(self, parent: Shadow) -> Shadow:
        shadow = Shadow(await self.shadows.spawn(parent), 0, b"init")
        self.helpers.append(shadow)
        return shadow

    async def _launcher(self) -> Shadow:
        """A task with none of the files that the shadows have open, and not by closing copies of them."""
        launcher = await self._helper(self.shadows.init)
        await self._call(launcher, Sys.CLOSE_RANGE, FIRST_FD, _ALL_FDS, _CLOSE_RANGE_UNSHARE)
        return launcher

    async def _call(self, shadow: Shadow, *call: int) -> int:
        [result] = await self.pump.call(shadow.task, [call])
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    async def _pipe(self, launcher: Shadow) -> tuple[int, int]:
        await self._call(launcher, Sys.PIPE2, launcher.task.virtual(_PIPES_AT), _O_CLOEXEC)
        ends: tuple[int, int] = struct.unpack("<ii", self.agent.get(launcher.task, _PIPES_AT, 8))
        return ends

    async def run(self, argv: list[bytes], env: list[bytes]) -> int:
        """Run the program; return its exit status."""
        launcher = await self._launcher()
        stdin, stdout, stderr = [await self._pipe(launcher) for _ in range(3)]
        feeder, *drains = [await self._helper(launcher) for _ in range(3)]
        theirs = (stdin[0], stdout[1], stderr[1])
        made = await self._start(launcher, argv, env, theirs)
        await self.pump.call(launcher.task, [(Sys.CLOSE, fd) for fd in theirs])
        works = [
            (drains[0], self._drain(drains[0], stdout[0], STDOUT)),
            (drains[1], self._drain(drains[1], stderr[0], STDERR)),
            (launcher, self._wait(launcher)),
        ]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._feed, feeder, stdin[1])
            if self.pump.deterministic:
                await self._one_by_one(works, (feeder, self._write(feeder, stdin[1], self.input)))
            else:
                await self._at_once(works)
            nursery.cancel_scope.cancel()
        assert self.child is not None
        if self.status == 127 << 8:
            await self._explain(made, argv[0])
        self.agent.forget(self.child)
        self.child = None
        return _exit_status(self.status)

    async def _start(self, launcher: Shadow, argv: list[bytes], env: list[bytes], fds: tuple[int, int, int]) -> Request:
        """Fork and exec; return the child's request."""
        child = self.child = self.agent.new_task()
        stack, stack_size = child.stack
        arguments = CLONE_ARGS.pack(0, 0, 0, 0, signal.SIGCHLD, stack, stack_size, 0, 0, 0, 0)
        at = launcher.task.virtual
        self.agent.put(launcher.task, _PIPES_AT, arguments)
        self.agent.put(launcher.task, _ARGUMENTS_AT, bytes(_SIGACTION_SIZE))
        # init ignores SIGCHLD and its children inherit that; ignored, it would take the exit status away.
        keep_status = (Sys.RT_SIGACTION, signal.SIGCHLD, at(_ARGUMENTS_AT), 0, 8)
        spawn = (CALL_SPAWN, at(_PIPES_AT), len(arguments), child.slot)
        [_, pid] = await self.pump.call(launcher.task, [keep_status, spawn])
        if pid < 0:
            self.agent.forget(child)
            self.child = None
            raise OSError(-pid, os.strerror(-pid))
        child.pid = pid
        return self.pump.begin(child, self._exec_calls(child, argv, env, fds))

    def _exec_calls(self, child: Task, argv: list[bytes], env: list[bytes], fds: tuple[int, int, int]) -> list[Call]:
        words, searched = argv, self.place is None and b"/" not in argv[0]
        if searched:
            paths = [os.fsencode(directory) + argv[0] for directory in _SEARCH]
        else:
            paths = [argv[0] if self.place is None else self.place.program]
        # A program that is no file may be one of busybox's: it goes by its first argument.
        busybox = [b"/bin/busybox"]
        blob, offsets = strings([*paths, *busybox, *words, *env])
        at = child.virtual
        pointers_at = _ARGUMENTS_AT + (len(blob) + 7 & ~7)
        where = [at(_ARGUMENTS_AT + offset) for offset in offsets]
        first = len(paths) + 1
        argv_at, env_at = pointers_at, pointers_at + 8 * (len(words) + 1)
        pointers = [*where[first : first + len(words)], 0, *where[first + len(words) :], 0]
        if env_at + 8 * (len(env) + 1) > _ARGUMENTS_MAX:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        self.agent.put(child, 0, bytes(_SIGACTION_SIZE))  # SIG_DFL
        self.agent.put(child, _ARGUMENTS_AT, blob)
        self.agent.put(child, pointers_at, struct.pack(f"<{len(pointers)}Q", *pointers))
        directory = b"/" if self.place is None or len(self.place.directory) > _DIRECTORY_MAX else self.place.directory
        self.agent.put(child, _DIRECTORY_AT, directory + b"\0")
        candidates = [*paths, *busybox] if searched else paths
        return [
            *((Sys.DUP2, fd, number) for number, fd in enumerate(fds)),
            (Sys.CLOSE_RANGE, _STDERR + 1, _ALL_FDS, 0),
            *((Sys.RT_SIGACTION, number, at(0), 0, 8) for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT)),
            (Sys.SETSID,),
            (Sys.CHDIR, at(_DIRECTORY_AT)),
            *((Sys.EXECVE, where[index], at(argv_at), at(env_at)) for index in range(len(candidates))),
            (Sys.EXIT, 127),
        ]

    # ---- what the tasks do

    async def _at_once(self, works: Sequence[tuple[Shadow, Work]]) -> None:
        async with trio.open_nursery() as nursery:
            for shadow, work in works:
                nursery.start_soon(self._do, shadow, work)

    async def _do(self, shadow: Shadow, work: Work) -> None:
        with suppress(StopIteration):
            call = next(work)
            while True:
                [result] = await self.pump.call(shadow.task, [call])
                call = work.send(result)
                await self._deliver()

    async def _one_by_one(self, works: Sequence[tuple[Shadow, Work]], feeding: tuple[Shadow, Work]) -> None:
        """Do works to their ends; the program may leave what is fed to it."""
        under_way: dict[Work, tuple[Shadow, Request | None]] = {
            work: (shadow, None) for shadow, work in (feeding, *works)
        }
        while any(work in under_way for _, work in works):
            waiting = True
            for work, (shadow, request) in list(under_way.items()):
                if request is not None and not request.done:
                    continue
                waiting = False
                try:
                    call = next(work) if request is None else work.send(request.results[0])
                    under_way[work] = shadow, self.pump.begin(shadow.task, [call])
                except StopIteration:
                    del under_way[work]
            await self._deliver()
            if waiting:
                await self.pump.advance()

    async def _deliver(self) -> None:
        while self.output:
            await self.client.send(*self.output.popleft())

    def _wait(self, launcher: Shadow) -> Work:
        assert self.child is not None
        call = (Sys.WAIT4, self.child.pid, launcher.task.virtual(_STATUS_AT), 0, 0)
        while (yield call) == -errno.EINTR:
            pass
        [self.status] = struct.unpack("<i", self.agent.get(launcher.task, _STATUS_AT, 4))

    def _drain(self, helper: Shadow, fd: int, channel: int) -> Work:
        while True:
            size = yield (Sys.READ, fd, helper.task.virtual(), _CHUNK)
            if size > 0:
                self.output.append((channel, self.agent.get(helper.task, 0, min(size, _CHUNK))))
            elif size != -errno.EINTR:
                return

    def _write(self, helper: Shadow, fd: int, data: bytes | None) -> Work:
        """Write input, and close what it is written to when it is all (`data` was known from the beginning)."""
        left = data or b""
        while left:
            self.agent.put(helper.task, 0, left[:_CHUNK])
            written = yield (Sys.WRITE, fd, helper.task.virtual(), len(left[:_CHUNK]))
            if written <= 0:
                break  # it closed its input
            left = left[written:]
        if self.input is not None:
            yield (Sys.CLOSE, fd)

    async def _explain(self, made: Request, name: bytes) -> None:
        """Exit status 127: say why when it was exec that failed: the child died of the call behind it."""
        if made.done and made.results[-2] < 0:
            await self.client.send(STDERR, b"fakefs exec: %s: %s\n" % (name, os.strerror(-made.results[-2]).encode()))

    async def _feed(self, helper: Shadow, fd: int) -> None:
        """Carry the client's input; its signals and its going away become signals to the program's group."""
        open_ = self.input is None
        while True:
            frame = await self.client.receive()
            if frame is None:
                await self._signal(signal.SIGKILL)
                return
            channel, data = frame
            if channel == SIGNAL and len(data) == 1:
                await self._signal(data[0])
            elif channel == STDIN and not data:
                await self.pump.call(helper.task, [(Sys.CLOSE, fd)])
                open_ = False
            elif channel == STDIN and open_:
                await self._do(helper, self._write(helper, fd, data))

    async def _signal(self, number: int) -> None:
        if self.child is not None and 0 < number < 65:
            init = self.shadows.init
            async with init.lock:
                await self.pump.call(
                    init.task, [(Sys.KILL, -self.child.pid, number), (Sys.KILL, self.child.pid, number)]
                )

    async def close(self) -> None:
        """End what is left of the program, and its helpers: its pipes go with them."""
        try:
            if self.child is not None:
                await self._signal(signal.SIGKILL)
                self.agent.forget(self.child)
            for helper in self.helpers:
                await self.shadows.end(helper)
        except OSError:
            return  # the guest is dead


def _exit_status(status: int) -> int:
    """Return the shell's idea of a wait status."""
    return 128 + (status & 0x7F) if status & 0x7F else status >> 8 & 0xFF
