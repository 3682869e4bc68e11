"""The recorder's part of uprobes: a program of this machine is patched while it waits, and tells."""

from __future__ import annotations

import base64
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakefs.mirror.patches import Code, Process
from fakefs.mirror.records import Placed, Site, Sites
from fakefs.mirror.seccomp import Notification
from fakefs.mirror.trampoline import BELOW_STACK, NUMBER, SAVED, SIGNATURE, STUB_CODE
from fakefs.mirror.uprobes import Uprobes
from tests.uprobes import Program

_SOURCE = r"""
#include <stdio.h>

__attribute__((noinline)) int add(int a, int b)
{
	return a * 3 + b;
}

int main(void)
{
	int a;

	while (scanf("%d", &a) == 1) {
		printf("%d\n", add(a, 1));
		fflush(stdout);
	}
	return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("program") / "program", text=_SOURCE)


@pytest.fixture
def running(program: Program) -> Iterator[subprocess.Popen[str]]:
    """It waits for a number: in read(2), and the next one comes from us."""
    with subprocess.Popen([program.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert ask(process, 1) == 4
        yield process
        assert process.stdin is not None
        process.stdin.close()


def await_waiting(process: subprocess.Popen[str]) -> int:
    """Return its stack pointer, once it waits in read(2)."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        words = Path(f"/proc/{process.pid}/syscall").read_text().split()
        if len(words) > 2 and words[0] == "0":
            return int(words[-2], 16)
    raise TimeoutError


def ask(process: subprocess.Popen[str], number: int) -> int:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{number}\n")
    process.stdin.flush()
    answer = int(process.stdout.readline())
    await_waiting(process)
    return answer


def site(program: Program, returns: list[str] | None = None) -> Site:
    status = program.path.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return Site(3, identity, program.offset("add"), ["a=%di", "b=+0($stack):x64"], returns)


def first_bytes(process: subprocess.Popen[str], program: Program) -> bytes:
    with Process(process.pid, Code(0), lambda: True) as memory:
        start = next(each.start - each.offset for each in memory.mapped if each.path == str(program.path))
        return memory.read(start + program.offset("add"), 5)


def test_a_program_that_waits_is_patched(program: Program, running: subprocess.Popen[str]) -> None:
    uprobes, before = Uprobes(0), first_bytes(running, program)
    assert uprobes.take(site(program)) is None
    assert uprobes.take(Sites(7, running.pid)) == Placed(7)
    after = first_bytes(running, program)
    assert after[:1] == b"\xe9" != before[:1]
    assert [ask(running, number) for number in (2, 3)] == [7, 10]
    uprobes.visit(running.pid, os.getpid(), lambda: True, loaded=True)
    assert first_bytes(running, program) == after
    uprobes.take(Sites(8, running.pid))  # they stay
    assert ask(running, 4) == 13


def test_a_file_with_other_contents_is_another(program: Program, running: subprocess.Popen[str]) -> None:
    uprobes, before = Uprobes(0), first_bytes(running, program)
    device, inode, size, mtime = site(program).file
    uprobes.take(site(program)._replace(file=(device, inode, size, mtime + 1)))
    uprobes.take(Sites(1, running.pid))
    assert first_bytes(running, program) == before


def test_a_thread_that_waits_no_more_is_left_alone(program: Program, running: subprocess.Popen[str]) -> None:
    uprobes, before = Uprobes(0), first_bytes(running, program)
    uprobes.take(site(program))
    uprobes.take(Sites(1, 0))
    uprobes.visit(running.pid, os.getpid(), lambda: False, loaded=True)
    assert first_bytes(running, program) == before


def test_what_a_hit_tells(program: Program, running: subprocess.Popen[str]) -> None:
    """Of registers that some other part of the program's memory stands for."""
    uprobes = Uprobes(0)
    uprobes.take(site(program))
    uprobes.take(Sites(1, 0))
    with Process(running.pid, Code(0), lambda: True) as memory:
        [mapped] = [each for each in memory.mapped if each.path == str(program.path)]
        frame = mapped.start + 64
        saved = memory.read(frame, 8 * len(SAVED))
        stack = memory.read(frame + BELOW_STACK, 1024)
    arguments = (3, frame, 0x1234, 0, 0, 0)
    [hit] = uprobes.hit(Notification(1, running.pid, NUMBER, arguments), lambda: True)
    assert (hit.tid, hit.probe, hit.address) == (running.pid, 3, 0x1234)
    assert hit.registers == [*struct.unpack(f"<{len(SAVED)}Q", saved), frame + BELOW_STACK]
    assert hit.memory == [(frame + BELOW_STACK, base64.b64encode(stack).decode())]
    assert list(uprobes.hit(Notification(1, running.pid, NUMBER, (4, *arguments[1:])), lambda: True)) == []
    assert list(uprobes.hit(Notification(1, running.pid, NUMBER, (3, 0, 0, 0, 0, 0)), lambda: True)) == []


def test_return_addresses(running: subprocess.Popen[str]) -> None:
    """They are noted and replaced, once each, as long as there is room."""
    with Process(running.pid, Code(0), lambda: True) as memory:
        found = memory.stub()
        assert found is not None
        at, entries = found
        assert memory.read(at, len(SIGNATURE)) == SIGNATURE
        assert memory.stub() == found
        free = await_waiting(running) - 0x4000 & -16  # of the stack, far below what is used
        slots = [free + 8 * index for index in range(entries + 1)]
        for slot in slots:
            memory.write(slot, struct.pack("<Q", slot + 1))
        assert [memory.plant(slot) for slot in slots] == [1] * entries + [0]
        assert memory.plant(slots[0]) == 2
        assert memory.read(slots[0], 8) == struct.pack("<Q", at + STUB_CODE)
        assert memory.read(slots[-1], 8) == struct.pack("<Q", slots[-1] + 1)
        memory.lift(slots[3])
        assert memory.plant(slots[-1]) == 1
    assert ask(running, 5) == 16
