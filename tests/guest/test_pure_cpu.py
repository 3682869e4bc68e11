"""The two CPUs boot the same kernel and give the same guest: the fast one is held against the public API."""

from __future__ import annotations

import errno
import re
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from emulator.agent import DATA_SIZE, Agent
from emulator.cpu.interface import Stop
from emulator.cpu.native import NativeCPU
from emulator.cpu.pure import PureCPU
from emulator.guest import Guest, Recipe, boot

pytestmark = [pytest.mark.guest, pytest.mark.slow]

READ, WRITE, OPEN, CLOSE, GETPID, UNAME, MMAP, MUNMAP, GETDENTS, OPENAT, CLOCK = (
    0, 1, 2, 3, 39, 63, 9, 11, 217, 257, 228,
)  # fmt: skip
AT_FDCWD = -100
O_RDONLY, O_WRONLY, O_APPEND = 0, 1, 0o2000
TRACING = "/sys/kernel/tracing"
# Lines that tell a measured or the wall clock's time.
TIMING = re.compile(r"sched_clock: Marking stable|setting system clock|audit: type=2000|random: crng|took \d|[um]secs")
STAMP = re.compile(r"^\[ *\d+\.\d+\] ?")


class Session:
    """A booted guest and a way to call its kernel."""

    def __init__(self, guest: Guest, console: list[str]) -> None:
        self.guest = guest
        self.agent: Agent = guest.agent
        self.console = console

    def calls(self, *calls: Sequence[int]) -> list[int]:
        """Make system calls in the guest's init."""
        machine = self.guest.machine
        request = self.agent.submit(self.agent.init, calls)
        until = time.monotonic() + 60
        while not request.done:
            assert time.monotonic() < until, machine.console.text(20)
            if self.agent.step(machine.cpu.now + 50_000_000) is Stop.HALTED:
                machine.cpu.now = max(machine.cpu.now, machine.next_event() or 0)
        return request.results

    def open(self, path: str, flags: int) -> int:
        """Open a file of the guest: its descriptor, or a negative errno."""
        self.agent.put(self.agent.init, 0, path.encode() + b"\0")
        return self.calls((OPENAT, AT_FDCWD, self.agent.init.virtual(0), flags, 0))[0]

    def read(self, path: str) -> str:
        """Return what a file of the guest contains."""
        fd = self.open(path, O_RDONLY)
        assert fd >= 0, (path, errno.errorcode.get(-fd))
        text = b""
        while (size := self.calls((READ, fd, self.agent.init.virtual(4096), DATA_SIZE - 4096))[0]) > 0:
            text += self.agent.get(self.agent.init, 4096, size)
        self.calls((CLOSE, fd))
        return text.decode()

    def write(self, path: str, text: str) -> int:
        """Write to a file of the guest: the result of write()."""
        fd = self.open(path, O_WRONLY | O_APPEND)
        assert fd >= 0, (path, errno.errorcode.get(-fd))
        self.agent.put(self.agent.init, 4096, text.encode())
        written = self.calls((WRITE, fd, self.agent.init.virtual(4096), len(text)))[0]
        self.calls((CLOSE, fd))
        return written


@pytest.fixture(scope="module")
def sessions(kernel_path: Path) -> Iterator[dict[str, Session]]:
    made = {}
    for name, factory in (("native", NativeCPU), ("pure", PureCPU)):
        guest = boot(Recipe(kernel_path, append="ignore_loglevel"), cpu_factory=factory)
        made[name] = Session(guest, list(guest.machine.console.lines))
    yield made
    for session in made.values():
        session.guest.close()


def messages(session: Session) -> list[str]:
    """The kernel log without time stamps and the lines that tell a time, sorted: threads of the kernel take turns."""
    lines = (STAMP.sub("", line).strip() for line in session.console)
    return sorted(line for line in lines if not TIMING.search(line))


def test_kernel_log(sessions: dict[str, Session]) -> None:
    native = messages(sessions["native"])
    assert len(native) > 100
    assert native == messages(sessions["pure"])


def test_processor(sessions: dict[str, Session]) -> None:
    def facts(session: Session) -> dict[str, str]:
        lines = (line.partition(":") for line in session.read("/proc/cpuinfo").splitlines() if ":" in line)
        return {key.strip(): value.strip() for key, _, value in lines if key.strip() not in ("bogomips", "cpu MHz")}

    native = facts(sessions["native"])
    assert native == facts(sessions["pure"])
    assert {"apic", "constant_tsc", "arat", "syscall"} <= set(native["flags"].split())
    assert not {"rdrand", "rdseed"} & set(native["flags"].split())


@pytest.mark.parametrize(
    "path",
    [
        *("/proc/version", "/proc/cmdline", "/proc/filesystems", "/proc/devices", "/proc/iomem", "/proc/ioports"),
        *(f"{TRACING}/available_tracers", f"{TRACING}/trace_clock", f"{TRACING}/tracing_on", f"{TRACING}/README"),
        *("/sys/devices/system/clocksource/clocksource0/current_clocksource", "/proc/sys/kernel/tainted"),
    ],
)
def test_files(sessions: dict[str, Session], path: str) -> None:
    native = sessions["native"].read(path)
    assert native == sessions["pure"].read(path)
    assert native


def test_tracing_on(sessions: dict[str, Session]) -> None:
    for session in sessions.values():
        assert session.calls((GETPID,)) == [1]
        assert session.read(f"{TRACING}/tracing_on") == "1\n"


def test_system_calls(sessions: dict[str, Session]) -> None:
    def results(session: Session) -> tuple[int, list[int], bytes, bytes]:
        data = session.agent.init.virtual(4096)
        fd = session.open("/proc/self/status", O_RDONLY)
        answers = session.calls(
            (GETPID,), (READ, fd, data, 20), (READ, 99, data, 1), (READ, fd, 8, 1), (CLOSE, fd), (CLOSE, fd),
            (UNAME, data + 4096), (UNAME, 0xFFFF_8000_0000_0000 - (1 << 64)), (12345,), (WRITE, 1, 0, 0),
            (MMAP, 0x7000_0000, 1 << 20, 3, 0x32, -1, 0), (READ, 99, 0x7000_0000, 1), (MUNMAP, 0x7000_0000, 1 << 20),
            (CLOCK, 1, data + 8192),
        )  # fmt: skip
        return (
            fd,
            answers,
            session.agent.get(session.agent.init, 4096, 20),
            session.agent.get(session.agent.init, 8192, 390).replace(b"\0", b" "),
        )

    native, pure = results(sessions["native"]), results(sessions["pure"])
    assert native == pure
    assert -errno.EFAULT in native[1]
    assert -errno.ENOSYS in native[1]


def test_clock_goes_on(sessions: dict[str, Session]) -> None:
    for session in sessions.values():
        data = session.agent.init.virtual(4096)
        session.calls((CLOCK, 1, data), (GETPID,), (CLOCK, 1, data + 16))
        first, then, later, after = struct.unpack("<4q", session.agent.get(session.agent.init, 4096, 32))
        assert (first, then) < (later, after)


def test_kprobe_hits(sessions: dict[str, Session]) -> None:
    for name, session in sessions.items():
        assert session.write(f"{TRACING}/kprobe_events", "p:twin/read vfs_read count=%dx\n") > 0
        assert session.write(f"{TRACING}/events/twin/read/enable", "1") == 1
        session.read("/proc/version")
        assert session.write(f"{TRACING}/events/twin/read/enable", "0") == 1
        trace = session.read(f"{TRACING}/trace")
        assert re.search(r"\bread: \(vfs_read\+0x[04]/\S+\) count=0x", trace), (name, trace)
        assert session.write(f"{TRACING}/kprobe_events", "-:twin/read\n") > 0
        assert session.write(f"{TRACING}/trace", " ") == 1
