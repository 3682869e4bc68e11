"""What `fakefs run` costs: alone, and twenty at once."""

from __future__ import annotations

import resource
import subprocess
import time
from pathlib import Path

from bench.clock import NotMeasured, run
from bench.figures import FAKEFS, Bench, Figure, Measurement, private_memory, smaps_rollup

_MANY = 20
_PATIENCE = 120  # host seconds
_SCRIPT = "cat /sys/kernel/tracing/tracing_on && read -r _ && cat /sys/kernel/tracing/current_tracer"


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_true(bench: Bench) -> tuple[float, ...]:
    """`fakefs run -- true`: host seconds, and CPU seconds of it and the processes it waits for."""
    cpu, start = _children_cpu(), time.perf_counter()
    run(*FAKEFS, "run", "--kernel", str(bench.kernel), "--", "true")
    return time.perf_counter() - start, _children_cpu() - cpu


def _family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return [pid, *(one for child in children for one in _family(child))]


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
