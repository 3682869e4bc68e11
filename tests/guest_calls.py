"""System calls of the guest's init, in the shape tests want them: whole files and programs."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
from pathlib import Path

from emulator.agent import CALL_SPAWN
from emulator.cpu.interface import Stop
from emulator.guest import Guest

AT_FDCWD = -100
READ, WRITE, CLOSE, GETPID, EXECVE, EXIT, WAIT4, GETPPID, OPENAT, DUP2 = 0, 1, 3, 39, 59, 60, 61, 110, 257, 33
RT_SIGACTION = 13
PATH_AT, DATA_AT = 0, 0x400
CHUNK = 0x8000
TRACING = "/sys/kernel/tracing/"


def open_file(guest: Guest, path: str, flags: int = os.O_RDONLY, mode: int = 0) -> int:
    """openat() in the guest; a descriptor of init's."""
    init = guest.agent.init
    guest.agent.put(init, PATH_AT, os.fsencode(path) + b"\0")
    [fd] = guest.call((OPENAT, AT_FDCWD, init.virtual(PATH_AT), flags, mode))
    assert fd >= 0, f"{path}: {os.strerror(-fd)}"
    return fd


def write_file(guest: Guest, path: str, data: bytes, flags: int = os.O_WRONLY | os.O_APPEND) -> None:
    """Write a file of the guest's."""
    init = guest.agent.init
    fd = open_file(guest, path, flags, 0o755)
    for at in range(0, len(data), CHUNK):
        piece = data[at : at + CHUNK]
        guest.agent.put(init, DATA_AT, piece)
        assert guest.call((WRITE, fd, init.virtual(DATA_AT), len(piece))) == [len(piece)]
    guest.call((CLOSE, fd))


def read_file(guest: Guest, path: str) -> bytes:
    """Read a file of the guest's to its end."""
    init, data = guest.agent.init, b""
    fd = open_file(guest, path)
    while (size := guest.call((READ, fd, init.virtual(DATA_AT), CHUNK))[0]) > 0:
        data += guest.agent.get(init, DATA_AT, size)
    guest.call((CLOSE, fd))
    return data


def trace(guest: Guest, name: str, text: str | None = None) -> str:
    """Append `text` to a file of the guest's tracefs, or without one read it."""
    if text is None:
        return read_file(guest, TRACING + name).decode()
    write_file(guest, TRACING + name, text.encode())
    return ""


def run_for(guest: Guest, ns: int) -> None:
    """Let virtual time pass in an idle guest."""
    cpu = guest.machine.cpu
    end = cpu.now + ns
    while cpu.now < end:
        if guest.agent.step(end) is Stop.HALTED:
            event = guest.machine.next_event()
            cpu.now = max(cpu.now, min(end, end if event is None else event))


def compile_static(source: str, directory: Path) -> bytes:
    """Return a static program made of C, for the guest to run."""
    assert shutil.which("cc")
    (directory / "p.c").write_text(source)
    command = ["cc", "-static", "-O1", "-s", "-w", "-o", str(directory / "p"), str(directory / "p.c")]
    subprocess.run(command, check=True)
    return (directory / "p").read_bytes()


def run_program(guest: Guest, program: bytes, *arguments: str) -> tuple[int, str]:
    """Run a program in the guest; its wait status and what it wrote to its standard output."""
    agent, init = guest.agent, guest.agent.init
    write_file(guest, "/tmp/program", program, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    out = open_file(guest, "/tmp/output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    child = agent.new_task()
    stack, stack_size = child.stack
    clone_args = struct.pack("<11Q", 0, 0, 0, 0, signal.SIGCHLD, stack, stack_size, 0, 0, 0, 0)
    agent.put(init, 0, clone_args)
    agent.put(init, 0x100, bytes(32))
    default = (RT_SIGACTION, signal.SIGCHLD, init.virtual(0x100), 0, 8)
    [_, pid] = guest.call(default, (CALL_SPAWN, init.virtual(0), len(clone_args), child.slot))
    assert pid > 0
    words = ["/tmp/program", *arguments]
    blob, pointers = b"", []
    for word in words:
        pointers.append(child.virtual(0x800 + len(blob)))
        blob += word.encode() + b"\0"
    agent.put(child, 0, struct.pack(f"<{len(pointers) + 2}Q", *pointers, 0, 0))
    agent.put(child, 0x800, blob)
    at = child.virtual
    calls = [(DUP2, out, 1), (EXECVE, pointers[0], at(0), at(8 * len(pointers))), (EXIT, 127)]
    agent.submit(child, calls)
    assert guest.call((WAIT4, pid, init.virtual(0), 0, 0)) == [pid]
    agent.forget(child)
    guest.call((CLOSE, out))
    [status] = struct.unpack("<i", agent.get(init, 0, 4))
    return status, read_file(guest, "/tmp/output").decode()
