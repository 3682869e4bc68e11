"""What `fakefs run` costs: alone, and twenty at once."""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from pathlib import Path

from bench.clock import NotMeasured, cpu_seconds
from bench.figures import FAKEFS, Bench, Figure, Measurement, private_memory, smaps_rollup

_MANY = 20
_PATIENCE = 120  # host seconds
_LOOK = 0.003  # host seconds between two looks at the processes of a run
_SCRIPT = "cat /sys/kernel/tracing/tracing_on && read -r _ && cat /sys/kernel/tracing/current_tracer"


def _family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended
            found += [one for child in path.read_text().split() for one in _family(int(child))]
    return found


def run_true(bench: Bench) -> tuple[float, ...]:
    """`fakefs run -- true`: host seconds, and CPU seconds of all its processes.

    They run side by side, so that what they waited for a processor cannot be told from the host's seconds.
    """
    argv = [*FAKEFS, "run", "--kernel", str(bench.kernel), "--", "true"]
    used: dict[int, float] = {}
    start = time.perf_counter()
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for pid in _family(process.pid):
                used[pid] = cpu_seconds(pid)
            time.sleep(_LOOK)
    taken = time.perf_counter() - start
    if process.returncode:
        raise NotMeasured("fakefs run failed")
    return taken, sum(used.values())


def many(bench: Bench) -> tuple[float, ...]:
    """Start twenty at once: how many finish, and the private memory (MB) of each in the middle."""
    argv = [*FAKEFS, "run", "--kernel", str(bench.kernel), "--", "sh", "-c", _SCRIPT]
    processes = [
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(_MANY)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != b"1\n":
                raise NotMeasured("one of them did not start")
        private = sum(private_memory(smaps_rollup(pid)) for process in processes for pid in _family(process.pid))
        ends = [process.communicate(b"\n", timeout=_PATIENCE)[0] for process in processes]
        finished = sum(
            process.returncode == 0 and end == b"nop\n" for process, end in zip(processes, ends, strict=True)
        )
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return finished, private / _MANY / 1e6


MEASUREMENTS = (
    Measurement(
        run_true,
        (
            Figure("run", "fakefs run -- true", "s", 0.5),
            Figure("run_cpu", "fakefs run -- true, CPU time", "s", 0.45),
        ),
        runs=5,
    ),
    Measurement(
        many,
        (
            Figure("many", f"{_MANY} fakefs run at once: finished", "", _MANY, True),
            Figure("many_private", "private memory of each", "MB", 60),
        ),
        runs=1,
    ),
)
