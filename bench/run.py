"""Measure fakefs, and QEMU beside it: a table on standard output, and build/bench.json.

    bench/run.py [--only REGEX] [--runs N] [--quick] [--kernel PATH]

The exit status is 0 also when a target is not reached: the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FrameType

from bench import figures, fresh, mirror, qemu, views, wprobes
from bench.clock import NotMeasured
from bench.figures import Bench, Figure, Measurement
from emulator.errors import EmulatorError
from fakefs.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MEASUREMENTS = tuple(one for module in (figures, wprobes, views, mirror, fresh) for one in module.MEASUREMENTS)
OUTPUT = ROOT / "build" / "bench.json"


@dataclass(frozen=True)
class Result:
    """A figure and what was measured; `why` says in a few words why there is no `value`."""

    figure: Figure
    value: float | None
    why: str = ""
    qemu: float | None = None

    @property
    def reached(self) -> bool:
        """Is there a value, and is it as good as the target?"""
        return self.value is not None and self.figure.reached(self.value)


def number(value: float | None) -> str:
    """Return a number with three significant digits, or all of a larger one's: 0.123, 12.3, 123,456."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def table(results: Sequence[Result]) -> str:
    """Return the results as lines of columns. QEMU has a column when there is a number for it."""
    compared = any(result.qemu is not None for result in results)
    rows: list[tuple[str, ...]] = [("figure", "value", "target", "reached", "QEMU TCG")]
    for result in results:
        figure = result.figure
        bound = f"{'>=' if figure.more_is_better else '<='} {figure.target:,g} {figure.unit}"
        verdict = ("yes" if result.reached else "no") + (f" ({result.why})" if result.why else "")
        rows.append((figure.name, number(result.value), bound, verdict, number(result.qemu)))
    if not compared:
        rows = [row[:4] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = {1, 4}
    lines = (
        "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "".join(line.rstrip() + "\n" for line in lines)


def to_json(results: Sequence[Result]) -> str:
    """Return the results as a JSON list."""
    rows = []
    for result in results:
        figure = result.figure
        row: dict[str, object] = {
            "figure": figure.name,
            "value": result.value,
            "unit": figure.unit,
            "target": figure.target,
            "reached": result.reached,
        }
        if result.qemu is not None:
            row["qemu"] = result.qemu
        rows.append(row)
    return json.dumps(rows, indent=1) + "\n"


class Progress:
    """One line on a terminal's standard error that says what goes on; nothing elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    def show(self, text: str = "") -> None:
        """Replace the line."""
        if self._terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def run(measurement: Measurement, bench: Bench, runs: int, progress: Progress) -> list[Result]:
    """Return the median of each figure over `runs` runs; a run that fails ends it."""
    wanted = measurement.figures
    taken = []
    try:
        for index in range(runs):
            progress.show(f"{wanted[0].name} ({index + 1}/{runs})")
            taken.append(measurement.measure(bench))
    except (NotMeasured, UserError, EmulatorError, OSError) as error:
        return [Result(figure, None, str(error)) for figure in wanted]
    return [Result(figure, median(column)) for figure, column in zip(wanted, zip(*taken, strict=True), strict=True)]


def selected(pattern: str) -> list[Measurement]:
    """Return the measurements of figures whose key or name matches the regular expression."""
    wanted = re.compile(pattern)
    return [
        measurement
        for measurement in MEASUREMENTS
        if any(wanted.search(figure.key) or wanted.search(figure.name) for figure in measurement.figures)
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description="Measure fakefs, and QEMU TCG beside it.")
    parser.add_argument("--only", metavar="REGEX", default="", help="only figures with a name that matches")
    parser.add_argument("--runs", metavar="N", type=int, help="the median of so many runs; default: 3, 1 of long ones")
    parser.add_argument("--quick", action="store_true", help="one short run of each, for a rough idea")
    parser.add_argument("--kernel", metavar="PATH", type=Path, help="default: the default kernel of fakefs")
    parser.add_argument("--no-qemu", action="store_true", help="leave QEMU out")
    arguments = parser.parse_args()
    try:
        re.compile(arguments.only)
    except re.error as error:
        parser.error(f"--only: {error}")
    if arguments.runs is not None and arguments.runs < 1:
        parser.error("--runs: at least 1")
    return arguments


def _kernel(given: Path | None) -> Path:
    from fakefs import kernels

    kernel = given or kernels.default_kernel()
    if kernel is None:
        raise UserError("no kernel: fakefs kernel fetch, or give one with --kernel")
    if not kernel.is_file():
        raise UserError(f"{kernel}: no such kernel file")
    return kernel.absolute()


@contextmanager
def _scratch() -> Iterator[Path]:
    """A directory for mounts and sockets; a SIGTERM ends the program as Ctrl-C does, after cleaning up."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    with tempfile.TemporaryDirectory(prefix="fakefs-bench-") as name:
        os.environ["XDG_RUNTIME_DIR"] = name
        yield Path(name)


def _measure(arguments: argparse.Namespace, progress: Progress) -> list[Result]:
    from fakefs import kernels

    kernel = _kernel(arguments.kernel)
    results = []
    with _scratch() as scratch:
        # As installed packages are: where PYTHONDONTWRITEBYTECODE is set, every start would compile 40 modules.
        subprocess.run([sys.executable, "-m", "compileall", "-q", "emulator", "fakefs"], cwd=ROOT, check=False)
        bench = Bench(kernel, kernels.cache_dir(), scratch, quick=arguments.quick)
        progress.show("mounting (the first time boots the kernel)")
        with bench.mounted():
            pass  # there is a snapshot now
        chosen = selected(arguments.only)
        for measurement in chosen:
            runs = 1 if arguments.quick or measurement.runs == 1 else arguments.runs or measurement.runs
            results += run(measurement, bench, runs, progress)
        if chosen and qemu.available() and not arguments.no_qemu:
            progress.show("the same on QEMU")
            results = _compared(results, kernel, scratch, quick=arguments.quick)
    return results


def _compared(results: Sequence[Result], kernel: Path, scratch: Path, *, quick: bool) -> list[Result]:
    try:
        theirs = qemu.measure(kernel, scratch, quick=quick)
    except (NotMeasured, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return list(results)
    return [Result(result.figure, result.value, result.why, theirs.get(result.figure.key)) for result in results]


def main() -> int:
    """Run the command line; return the exit status."""
    arguments, progress = _arguments(), Progress()
    before = os.getloadavg()[0]
    try:
        results = _measure(arguments, progress)
    except (NotMeasured, UserError, EmulatorError) as error:
        progress.show()
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.show()
        return 130
    progress.show()
    print(table(results), end="")
    print(f"load average {before:.1f} before, {os.getloadavg()[0]:.1f} after, {os.cpu_count()} CPUs")
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(to_json(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
