"""`fakefs test`: shell scripts as tests, each in a fresh kernel; results as TAP, the Test Anything Protocol.

A script runs in the mounted tracefs, which $TRACEFS names, or with --real-paths as by `fakefs run`. It passes with exit
status 0 and is skipped with 77, as Automake has it. What it printed, and the trace and error_log of its kernel, follow
as comments when it fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fakefs.arguments import add_command, seconds, size
from fakefs.errors import UserError

# Each command makes the parser of all: what runs scripts is imported when there are some.
if TYPE_CHECKING:
    from fakefs.arguments import Commands
    from fakefs.forkserver import ForkServer, Order
    from fakefs.testbed import Tracefs

_SKIPPED = 77
_TIMED_OUT = (124, 137)  # timeout(1): by SIGTERM, by SIGKILL
_KILL_AFTER = "2"


@dataclass(frozen=True)
class _Outcome:
    status: int
    sections: list[tuple[str, str]]


def add_parser(commands: Commands) -> None:
    """Add the command to those of `fakefs`."""
    examples = (
        "fakefs test tests/*.sh\n"
        "fakefs test --kernel stable --kernel ~/linux/vmlinux --timeout 30 probe.sh\n"
        "fakefs test --real-paths --deterministic probe.sh"
    )
    what = "run scripts as tests, each in a fresh kernel, and print TAP"
    parser = add_command(commands, "test", what, examples)
    parser.add_argument("scripts", metavar="SCRIPT", type=Path, nargs="+", help="run by itself if executable, or by sh")
    parser.add_argument(
        "--kernel",
        metavar="KERNEL",
        dest="kernels",
        action="append",
        help="path, version or suite (see fakefs kernel list); several: every script with each of them",
    )
    parser.add_argument("--memory", metavar="SIZE", type=size, default=0, help="the guest's RAM: 256M (default)")
    parser.add_argument("--append", metavar="TEXT", default="", help="words to add to the kernel's command line")
    parser.add_argument("--deterministic", action="store_true", help="virtual time never follows the host's clock")
    parser.add_argument("--wprobe", choices=("unlimited", "strict", "off"), default="unlimited", help="watchpoints")
    parser.add_argument("--timeout", metavar="S", type=seconds, default=60.0, help="seconds for a script (default 60)")
    parser.add_argument("--real-paths", action="store_true", help="as by fakefs run: at /sys/kernel/tracing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run all scripts with all kernels; return 0 when none has failed."""
    from fakefs.forkserver import ForkServer
    from fakefs.testbed import missing

    for script in arguments.scripts:
        if not script.is_file():
            raise UserError(f"{script}: no such script", exit_status=2)
    if reason := missing():
        raise UserError(reason)
    tests = [(script, order) for order in _orders(arguments) for script in arguments.scripts]
    print("TAP version 13")
    print(f"1..{len(tests)}", flush=True)
    failed = 0
    with closing(ForkServer()) as server:
        for number, (script, order) in enumerate(tests, 1):
            name = str(script) if len(arguments.kernels or []) < 2 else f"{script} on {_version(order)}"
            begun = time.monotonic()
            try:
                outcome = _test(server, script, order, arguments.timeout, real_paths=arguments.real_paths)
            except UserError as error:
                outcome = _Outcome(1, [("fakefs", str(error))])
            seconds = time.monotonic() - begun
            failed += _report(number, name, outcome, arguments.timeout, seconds)
    return 1 if failed else 0


def _orders(arguments: argparse.Namespace) -> Iterator[Order]:
    from fakefs.forkserver import Order
    from fakefs.testbed import find_kernel

    for kernel in arguments.kernels or [None]:
        path = None if kernel is None else find_kernel(kernel)
        yield Order(path, arguments.memory, arguments.append, arguments.deterministic, arguments.wprobe)


def _version(order: Order) -> str:
    """A kernel's name in a report: fetched ones lie in a directory with the name of their version."""
    path = Path(order.kernel or "")
    return path.parent.name if path.name == "vmlinuz" else str(path)


def _test(server: ForkServer, script: Path, order: Order, timeout: float, *, real_paths: bool) -> _Outcome:
    from tempfile import TemporaryDirectory

    from fakefs.testbed import FreshTracefs, run_at_real_paths, script_argv

    with TemporaryDirectory(prefix="fakefs-test-") as temporary:
        if real_paths:
            cwd = Path("/sys/kernel/tracing")
            done = run_at_real_paths(server, script_argv(script), order, Path(temporary), timeout, cwd)
            return _Outcome(done.status, done.sections())
        directory = Path(temporary, "tracing")
        directory.mkdir()
        with closing(FreshTracefs(server, directory, order)) as tracefs:
            return _run_in(tracefs, script_argv(script), timeout)


def _run_in(tracefs: Tracefs, argv: list[str], timeout: float) -> _Outcome:
    import subprocess

    done = subprocess.run(
        ["timeout", "-k", _KILL_AFTER, str(timeout), *argv],
        cwd=tracefs.path,
        env={**os.environ, "TRACEFS": str(tracefs.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    sections = tracefs.sections() if done.returncode not in (0, _SKIPPED) else []
    return _Outcome(done.returncode, [("output", done.stdout), *sections])


def _report(number: int, name: str, outcome: _Outcome, timeout: float, seconds: float) -> bool:
    """Print a test's lines; return whether it has failed."""
    name = name.replace("\n", " ").replace("#", "\\#")
    passed = outcome.status in (0, _SKIPPED)
    skip = " # SKIP" if outcome.status == _SKIPPED else ""
    print(f"{'ok' if passed else 'not ok'} {number} - {name}{skip}")
    if not passed:
        timed_out = outcome.status in _TIMED_OUT and seconds >= timeout
        print(f"# timed out after {timeout:g} s" if timed_out else f"# exit status {outcome.status}")
        for title, text in outcome.sections:
            if text:
                print(f"# ---- {title}")
                print("".join(f"# {line}\n" for line in text.splitlines()), end="")
    sys.stdout.flush()
    return not passed
