"""System calls in a guest without a daemon: what tests of the emulator need of files, tasks and programs there."""

from __future__ import annotations

import os
import signal
import struct
import zlib

from emulator.agent import CALL_SPAWN, Call, Request, Task
from emulator.cpu.interface import Stop
from emulator.guest import Guest
from fakefs.syscalls import Sys

AT_FDCWD = -100
TRACEFS = "/sys/kernel/tracing"
_CLONE_ARGS = struct.Struct("<11Q")
_PATH, _BUFFER = 0, 0x1000
_STEP = 100_000_000
_PATIENCE = 60_000_000_000  # ns of virtual time


def finish(guest: Guest, request: Request) -> list[int]:
    """Run the guest until a request is done; return its results."""
    machine, agent = guest.machine, guest.agent
    end = machine.cpu.now + _PATIENCE
    while not request.done:
        assert machine.cpu.now < end, "the guest does not come to an end with it"
        if agent.step(machine.cpu.now + _STEP) is Stop.HALTED and not agent.busy:
            event = machine.next_event()
            machine.cpu.now = max(machine.cpu.now, event if event is not None else machine.cpu.now + _STEP)
    return request.results


def call(guest: Guest, task: Task, *calls: Call) -> list[int]:
    """Have a task make system calls."""
    return finish(guest, guest.agent.submit(task, calls))


def write_file(guest: Guest, path: str, data: bytes, flags: int = os.O_WRONLY | os.O_TRUNC, mode: int = 0) -> int:
    """Open, write once, close; return what write(2) (or open) gave."""
    init, agent = guest.agent.init, guest.agent
    agent.put(init, _PATH, os.fsencode(path) + b"\0")
    agent.put(init, _BUFFER, data)
    [fd] = guest.call((Sys.OPENAT, AT_FDCWD, init.virtual(_PATH), flags, mode))
    if fd < 0:
        return fd
    written, closed = guest.call((Sys.WRITE, fd, init.virtual(_BUFFER), len(data)), (Sys.CLOSE, fd))
    assert closed == 0
    return written


def read_file(guest: Guest, path: str) -> bytes:
    """Read a file to its end."""
    init, agent, parts = guest.agent.init, guest.agent, []
    agent.put(init, _PATH, os.fsencode(path) + b"\0")
    [fd] = guest.call((Sys.OPENAT, AT_FDCWD, init.virtual(_PATH), os.O_RDONLY, 0))
    assert fd >= 0, os.strerror(-fd)
    while True:
        [size] = guest.call((Sys.READ, fd, init.virtual(_BUFFER), 0x8000))
        assert size >= 0, os.strerror(-size)
        if not size:
            break
        parts.append(agent.get(init, _BUFFER, size))
    guest.call((Sys.CLOSE, fd))
    return b"".join(parts)


def spawn(guest: Guest, *, pid: int = 0, flags: int = 0) -> tuple[Task, int]:
    """Make a child of init, with `pid` if given; return it and clone3's result. With `flags` 0 it is a process."""
    agent, init = guest.agent, guest.agent.init
    child = agent.new_task()
    stack, stack_size = child.stack
    wish = (init.virtual(_BUFFER), 1) if pid else (0, 0)
    agent.put(init, _BUFFER, struct.pack("<i", pid))
    agent.put(init, _PATH, _CLONE_ARGS.pack(flags, 0, 0, 0, signal.SIGCHLD, stack, stack_size, 0, *wish, 0))
    [result] = guest.call((CALL_SPAWN, init.virtual(_PATH), _CLONE_ARGS.size, child.slot))
    if result < 0:
        agent.forget(child)
    else:
        child.pid = result
    return child, result


def run_elf(guest: Guest, program: bytes, path: str = "") -> int:
    """Put a program into the guest, at a path of its own if none is given, and run it; return its wait status."""
    path = path or f"/tmp/{zlib.crc32(program):08x}"
    agent, init = guest.agent, guest.agent.init
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    assert write_file(guest, path, program, flags, 0o755) == len(program)
    agent.put(init, _PATH, bytes(32))  # SIG_DFL: init ignores SIGCHLD, which would take the status away
    guest.call((Sys.RT_SIGACTION, signal.SIGCHLD, init.virtual(_PATH), 0, 8))
    child, pid = spawn(guest)
    assert pid > 0, os.strerror(-pid)
    agent.put(child, _PATH, os.fsencode(path) + b"\0")
    agent.put(child, 0x100, struct.pack("<QQ", child.virtual(_PATH), 0))
    agent.submit(child, [(Sys.EXECVE, child.virtual(_PATH), child.virtual(0x100), child.virtual(0x108))])
    [gone] = guest.call((Sys.WAIT4, pid, init.virtual(_BUFFER), 0, 0))
    assert gone == pid
    agent.forget(child)
    return int(struct.unpack("<i", agent.get(init, _BUFFER, 4))[0])


def elf(code: bytes) -> bytes:
    """A static x86-64 program that starts at the first byte of `code`."""
    at, start = 0x400000, 0x78
    size = start + len(code)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, at + start, 0x40, 0, 0, 0x40, 0x38, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, at, at, size, size, 0x1000)
    return header + segment + code
