"""What is measured of fakefs: each function makes one measurement on a mount (or a process) of its own.

Not here: how often, what is printed (`bench.run`), the same on QEMU (`bench.qemu`), wprobes (`bench.wprobes`) and
`fakefs run` (`bench.views`), tests and labs (`bench.fresh`). Times are what a user of the mount
waits for on a machine of his own (`bench.clock`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from bench.clock import NotMeasured, cpu_seconds, run, seconds, waited
from fakefs.client import ask, find_mount

FAKEFS = (sys.executable, "-m", "fakefs")

_BOOT = """
import sys, time
from pathlib import Path
from emulator.guest import Recipe, boot
boot(Recipe(Path(sys.argv[1])))
print(time.process_time())
"""
_RESTORE = """
import sys
from pathlib import Path
from bench.clock import seconds
from emulator.guest import Recipe, restore
from emulator.snapshot import open_snapshot
directory = Path(sys.argv[2]) / "snapshots" / Recipe(Path(sys.argv[1])).key
print(seconds(lambda: restore(open_snapshot(directory))))
"""


@dataclass(frozen=True)
class Figure:
    """A number with its target: the most it may be, or the least with `more_is_better`. `key` is QEMU's name for it."""

    key: str
    name: str
    unit: str
    target: float
    more_is_better: bool = False

    def reached(self, value: float) -> bool:
        """Is `value` as good as the target, or better?"""
        return value >= self.target if self.more_is_better else value <= self.target


class Mount:
    """A running mount."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pid = int(_status(directory)["pid"])

    def write(self, name: str, text: str) -> None:
        """Write to a file of the tracefs as `echo >>` does."""
        fd = os.open(self.directory / name, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, text.encode() + b"\n")
        finally:
            os.close(fd)

    def read(self, name: str) -> str:
        """Return a file of the tracefs."""
        return (self.directory / name).read_text()

    def exec(self, *argv: str) -> None:
        """Run a program in the guest."""
        run(*FAKEFS, "exec", str(self.directory), "--", *argv)

    def memory(self) -> dict[str, int]:
        """Return the daemon's smaps_rollup (proc(5)), bytes."""
        return smaps_rollup(self.pid)


class Bench:
    """What the measurements share. `quick` makes them shorter and rougher."""

    def __init__(self, kernel: Path, cache: Path, scratch: Path, *, quick: bool = False) -> None:
        self.kernel = kernel
        self.cache = cache
        self.quick = quick
        self._scratch = scratch
        self._mounts = 0

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """A directory to mount on; whatever is mounted there is unmounted at the end."""
        self._mounts += 1
        path = self._scratch / f"mount{self._mounts}"
        path.mkdir()
        try:
            yield path
        finally:
            subprocess.run([*FAKEFS, "umount", "--lazy", path], check=False, capture_output=True)
            with suppress(OSError):
                path.rmdir()

    def start(self, directory: Path) -> None:
        """Run `fakefs mount`."""
        run(*FAKEFS, "mount", "--kernel", str(self.kernel), str(directory))

    @contextmanager
    def mounted(self) -> Iterator[Mount]:
        """A fresh mount."""
        with self.directory() as directory:
            self.start(directory)
            yield Mount(directory)


def _status(directory: Path) -> dict[str, str]:
    import json

    status: dict[str, str] = json.loads(ask(find_mount(directory), {"do": "status"}))
    return status


def smaps_rollup(pid: int) -> dict[str, int]:
    """Return the numbers of /proc/PID/smaps_rollup in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def private_memory(memory: dict[str, int]) -> int:
    """Return what of smaps_rollup a process has for itself, bytes."""
    return memory["Private_Clean"] + memory["Private_Dirty"]


# ---- the measurements: each returns one value for every figure it stands for


def boot(bench: Bench) -> tuple[float, ...]:
    """CPU seconds of a process that boots the kernel and ends."""
    return (float(run(sys.executable, "-c", _BOOT, str(bench.kernel))),)


def restore(bench: Bench) -> tuple[float, ...]:
    """Open a snapshot and restore it, in a process that has only just imported the emulator; ms."""
    return (float(run(sys.executable, "-c", _RESTORE, str(bench.kernel), str(bench.cache))) * 1000,)


def mount_to_cat(bench: Bench) -> tuple[float, ...]:
    """From `fakefs mount` to the end of a `cat tracing_on`, s."""
    with bench.directory() as directory:

        def mount_and_read() -> None:
            bench.start(directory)
            run("cat", str(directory / "tracing_on"))

        taken = seconds(mount_and_read)
        return (taken - waited(Mount(directory).pid),)


def small_read(bench: Bench) -> tuple[float, ...]:
    """open, read and close of tracing_on: the median, ms."""
    times = []
    with bench.mounted() as mount:
        path = mount.directory / "tracing_on"

        def read_once() -> None:
            fd = os.open(path, os.O_RDONLY)
            os.read(fd, 64)
            os.close(fd)

        for _ in range(200 if bench.quick else 2000):
            times.append(seconds(read_once, mount.pid))
    return (median(times) * 1000,)


def kprobe_cycle(bench: Bench) -> tuple[float, ...]:
    """Create, enable, disable and delete a kprobe: the median, ms."""

    def cycle() -> None:
        mount.write("kprobe_events", "p:bench/probe vfs_read")
        mount.write("events/bench/probe/enable", "1")
        mount.write("events/bench/probe/enable", "0")
        mount.write("kprobe_events", "-:bench/probe")

    with bench.mounted() as mount:
        return (median(seconds(cycle, mount.pid) for _ in range(20)) * 1000,)


def walk(bench: Bench) -> tuple[float, ...]:
    """The first `ls -lR` of a mount; s."""
    with bench.mounted() as mount:
        return (seconds(lambda: run("ls", "-lR", str(mount.directory)), mount.pid),)


def functions(bench: Bench) -> tuple[float, ...]:
    """The first `cat available_filter_functions` of a mount; s."""
    with bench.mounted() as mount:
        return (seconds(lambda: run("cat", str(mount.directory / "available_filter_functions")), mount.pid),)


def _probe_reads_and_writes(mount: Mount) -> None:
    mount.write("buffer_size_kb", "32768")
    mount.write("kprobe_events", "p:bench/read vfs_read")
    mount.write("kprobe_events", "p:bench/write vfs_write")
    mount.write("events/bench/enable", "1")


def copy_bytes(mount: Mount, count: int, source: str = "/dev/zero") -> float:
    """Copy bytes one at a time in the guest; return the daemon's CPU time, s."""
    before = cpu_seconds(mount.pid)
    mount.exec("dd", f"if={source}", "of=/dev/null", "bs=1", f"count={count}")
    return cpu_seconds(mount.pid) - before


def kprobe_hits(bench: Bench) -> tuple[float, ...]:
    """Hits of kprobes on vfs_read and vfs_write while dd copies bytes; a second of CPU time, less its start and end."""
    count = 50_000 if bench.quick else 300_000
    with bench.mounted() as mount:
        _probe_reads_and_writes(mount)
        around = median(copy_bytes(mount, 1) for _ in range(3))
        before, _ = _profile(mount)
        taken = copy_bytes(mount, count) - around
        hits, missed = _profile(mount)
        stats = dict(line.split(": ") for line in mount.read("per_cpu/cpu0/stats").splitlines())
    if missed or int(stats["overrun"]) or hits - before < 2 * count:
        raise NotMeasured(f"{missed} hits missed, {stats['overrun']} events overwritten")
    return ((hits - before) / taken,)


def _profile(mount: Mount) -> tuple[int, int]:
    """Return the sums of hits and misses in kprobe_profile."""
    rows = [line.split() for line in mount.read("kprobe_profile").splitlines()]
    return sum(int(row[1]) for row in rows), sum(int(row[2]) for row in rows)


def drain(bench: Bench) -> tuple[float, ...]:
    """Lines a second out of trace_pipe when the buffer is full of them."""
    with bench.mounted() as mount:
        _probe_reads_and_writes(mount)
        copy_bytes(mount, 10_000 if bench.quick else 100_000)
        mount.write("tracing_on", "0")
        fd = os.open(mount.directory / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        lines = 0

        def read_all() -> None:
            nonlocal lines
            with suppress(BlockingIOError):
                while data := os.read(fd, 128 << 10):
                    lines += data.count(b"\n")

        try:
            taken = seconds(read_all, mount.pid)
            return (lines / taken,)
        finally:
            os.close(fd)


def tracers(bench: Bench) -> tuple[float, ...]:
    """From nop to function, to function_graph, and back to nop; s each."""
    with bench.mounted() as mount:
        return tuple(
            seconds(partial(mount.write, "current_tracer", name), mount.pid)
            for name in ("function", "function_graph", "nop")
        )


def idle(bench: Bench) -> tuple[float, ...]:
    """CPU time of a mount nobody uses, per cent of one CPU."""
    span = 5 if bench.quick else 30
    with bench.mounted() as mount:
        mount.read("tracing_on")
        time.sleep(1)
        before, start = cpu_seconds(mount.pid), time.perf_counter()
        time.sleep(span)
        return ((cpu_seconds(mount.pid) - before) / (time.perf_counter() - start) * 100,)


def memory(bench: Bench) -> tuple[float, ...]:
    """RSS of a mount that was used a little, alone; then the private memory of a second one; MB."""
    with ExitStack() as stack:
        first, second = (_used_a_little(stack.enter_context(bench.mounted())) for _ in range(2))
        return first["Rss"] / 1e6, private_memory(second) / 1e6


def _used_a_little(mount: Mount) -> dict[str, int]:
    for name in ("tracing_on", "available_tracers", "current_tracer", "events/sched/sched_switch/format"):
        mount.read(name)
    time.sleep(0.5)
    return mount.memory()


@dataclass(frozen=True)
class Measurement:
    """A function, the figures it gives, and of how many runs the median is taken."""

    measure: Callable[[Bench], tuple[float, ...]]
    figures: tuple[Figure, ...]
    runs: int = 3


MEASUREMENTS = (
    Measurement(boot, (Figure("boot", "boot to init, CPU time", "s", 5),), runs=1),
    Measurement(restore, (Figure("restore", "restore in a fresh process", "ms", 30),)),
    Measurement(mount_to_cat, (Figure("mount", "fakefs mount to the first cat", "s", 0.4),)),
    Measurement(small_read, (Figure("small_read", "open+read+close of tracing_on, p50", "ms", 0.6),)),
    Measurement(kprobe_cycle, (Figure("kprobe_cycle", "kprobe create+enable+disable+delete, p50", "ms", 10),)),
    Measurement(walk, (Figure("walk", "first ls -lR", "s", 2.5),)),
    Measurement(functions, (Figure("functions", "cat available_filter_functions", "s", 0.5),)),
    Measurement(kprobe_hits, (Figure("kprobe_hits", "kprobe hits, none missed", "/s", 200_000, True),)),
    Measurement(drain, (Figure("drain", "trace_pipe drain", "lines/s", 80_000, True),)),
    Measurement(
        tracers,
        (
            Figure("function", "switch to function", "s", 0.6),
            Figure("function_graph", "switch to function_graph", "s", 1.5),
            Figure("nop", "switch back to nop", "s", 2),
        ),
    ),
    Measurement(idle, (Figure("idle", "idle CPU", "%", 1),), runs=1),
    Measurement(
        memory,
        (
            Figure("rss", "RSS of one idle mount", "MB", 90),
            Figure("private", "private memory of a further mount", "MB", 60),
        ),
    ),
)
