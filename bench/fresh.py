"""What a fresh kernel costs: a test of the pytest plugin, and a student who starts a lab or begins it anew."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.clock import NotMeasured, run
from bench.figures import FAKEFS, Bench, Figure, Measurement

_LABS = ("first-probe", "suspects")  # without modules, and with some
_RESETS = 5
_PATIENCE = 120  # host seconds; a first start may have to fetch headers
_PROMPT = rb"\[lab [^]]*\] /sys/kernel/tracing [#$] "
_TESTS = """
import pytest
@pytest.mark.parametrize("number", range({count}))
def test_reads(tracefs, number):
    assert tracefs.read("tracing_on") == "1\\n"
"""


def plugin(bench: Bench) -> tuple[float, ...]:
    """What each further test costs one pytest process, from end to end: s of host time."""
    few, many = 1, 21 if bench.quick else 61

    def taken(count: int) -> float:
        with TemporaryDirectory(prefix="fakefs-bench-") as name:
            Path(name, "test_reads.py").write_text(_TESTS.format(count=count))
            options = ("-q", "-c", os.devnull, "--rootdir", name, "-p", "no:cacheprovider", "--fakefs-required")
            start = time.perf_counter()
            run(sys.executable, "-m", "pytest", *options, "--fakefs-kernel", str(bench.kernel), name)
            return time.perf_counter() - start

    taken(few)  # reads the kernel and Python's files for the first time
    return ((taken(many) - taken(few)) / (many - few),)


class _Student:
    """Someone at a terminal who has started a lab."""

    def __init__(self, bench: Bench, lab: str, state: str) -> None:
        self._seen = b""
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.environ |= {"XDG_STATE_HOME": state, "TERM": "dumb"}
            os.execv(FAKEFS[0], [*FAKEFS, "lab", "start", "--kernel", str(bench.kernel), lab])

    def wait_for(self, pattern: bytes) -> None:
        """Read until the pattern is there."""
        end = time.monotonic() + _PATIENCE
        while not (match := re.search(pattern, self._seen)):
            ready = select.select([self._terminal], [], [], max(end - time.monotonic(), 0))[0]
            try:
                if not ready:
                    raise OSError
                self._seen += os.read(self._terminal, 1 << 16)
            except OSError:
                raise NotMeasured((self._seen.decode(errors="replace").split("\n") or [""])[-1]) from None
        self._seen = self._seen[match.end() :]

    def type(self, line: str) -> None:
        os.write(self._terminal, line.encode() + b"\n")

    def leave(self) -> None:
        os.close(self._terminal)
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGHUP)
        os.waitpid(self._pid, 0)


@contextmanager
def _started(bench: Bench, lab: str) -> Iterator[_Student]:
    with TemporaryDirectory(prefix="fakefs-bench-") as state:
        student = _Student(bench, lab, state)
        try:
            student.wait_for(_PROMPT)
            yield student
        finally:
            student.leave()


def labs(bench: Bench) -> tuple[float, ...]:
    """From `fakefs lab start` to the prompt; from `fakefs lab reset` to the next kernel's, the slower lab's; s."""
    for lab in _LABS:
        with _started(bench, lab):
            pass  # modules are built now
    begun = time.perf_counter()
    with _started(bench, _LABS[0]):
        start = time.perf_counter() - begun
    return start, max(_reset(bench, lab) for lab in _LABS)


def _reset(bench: Bench, lab: str) -> float:
    times = []
    with _started(bench, lab) as student:
        for _ in range(1 if bench.quick else _RESETS):
            begun = time.perf_counter()
            student.type("fakefs lab reset")
            student.wait_for(b"a fresh kernel")
            student.wait_for(_PROMPT)
            times.append(time.perf_counter() - begun)
    return median(times)


MEASUREMENTS = (
    Measurement(plugin, (Figure("plugin", "a fresh kernel for a test", "s", 0.15),)),
    Measurement(
        labs,
        (
            Figure("lab_start", "fakefs lab start to the prompt", "s", 1),
            Figure("lab_reset", "fakefs lab reset to the prompt", "s", 1),
        ),
        runs=1,
    ),
)
