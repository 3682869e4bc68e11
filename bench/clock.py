"""Time on a machine that others use too: host time less what the measured processes waited for a processor.

The kernel counts that wait for each task (proc(5), schedstat). Where it does not, times are plain host time.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

_waited_by_children = 0.0


class NotMeasured(Exception):
    """A measurement that came to nothing; says why in a few words."""


def _schedstat(pid: int, column: int) -> float:
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[column])
        except (OSError, IndexError, ValueError):
            continue
    return total / 1e9


def waited(pid: int) -> float:
    """Return for how many seconds the threads of a process could have run and had no processor."""
    return _schedstat(pid, 1)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time a process has used, its threads' too."""
    exact = _schedstat(pid, 0)
    if exact:
        return exact
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # it has ended
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(*argv: str) -> str:
    """Run a program and return its output; what it waited for a processor counts as this process's wait."""
    global _waited_by_children
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        output, errors = child.stdout.read(), child.stderr.read()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        _waited_by_children += waited(child.pid)
    if child.returncode:
        raise NotMeasured((errors.strip().splitlines() or [f"{argv[0]} failed"])[-1])
    return output


def seconds(work: Callable[[], object], *pids: int) -> float:
    """Return how long `work` took, less what this process, its children and `pids` waited for a processor."""

    def wait() -> float:
        return sum(map(waited, (os.getpid(), *pids))) + _waited_by_children

    before, start = wait(), time.perf_counter()
    work()
    elapsed = time.perf_counter() - start
    return max(elapsed - (wait() - before), 0.0)
