"""For tests of the command: `fakefs mount` as it is typed, and what waits for its processes.

Tests of what is in a mount, whoever has made it, have a fresh kernel by the plugin's fixture `tracefs`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, AnyStr

from fakefs import mountpoint
from fakefs.testbed import Tracefs

FAKEFS = (sys.executable, "-m", "fakefs")
_START_SECONDS = 120.0  # a first start boots the kernel
PATIENCE = 30.0
"""Seconds to wait for what comes at once: a busy machine is no reason for a test to fail."""


def until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait until `condition` holds; return the seconds that took. Fails the test when it never does."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.002)
    return time.monotonic() - begun


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


def wait_for_reader(pid: int) -> None:
    """Wait until a process sleeps in a read of a mount: the host's kernel waits for the daemon's answer."""
    where = Path(f"/proc/{pid}/wchan")
    until(lambda: "request_wait" in where.read_text(), PATIENCE, f"process {pid} blocked in a read")


class Popen(subprocess.Popen[AnyStr]):
    """A process that a failing test does not wait for."""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, value, traceback)


def fakefs(
    *arguments: str | Path, stdin: str = "", cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command `fakefs`; a first start boots the kernel, which takes a while."""
    return subprocess.run(
        [*FAKEFS, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        errors="replace",
        cwd=cwd,
        env=env,
        timeout=_START_SECONDS,
        check=False,
    )


def in_guest(mount: Tracefs, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program in the guest by `fakefs exec`."""
    return fakefs("exec", mount.path, "--", *argv, stdin=stdin)


def popen(mount: Tracefs, argv: Sequence[str], **options: Any) -> Popen[bytes]:
    """Start a program in the mount that the test talks to."""
    return Popen(argv, cwd=mount.path, **options)


class Mounted(Tracefs):
    """A mount made by `fakefs mount`; gone after `stop()` whatever happens."""

    def __init__(self, path: Path, kernel: Path, *options: str) -> None:
        super().__init__(path)
        self.kernel = kernel
        self.options = options
        self.pid = 0

    def start(self, env: Mapping[str, str] | None = None) -> Mounted:
        """Mount; raises AssertionError with what the command said."""
        self.path.mkdir(exist_ok=True)
        done = fakefs("mount", "--kernel", self.kernel, *self.options, self.path, env=env)
        assert done.returncode == 0, f"fakefs mount failed ({done.returncode}): {done.stderr}"
        self.pid = int(self.status()["pid"])
        return self

    def stop(self) -> None:
        """Unmount, and end the daemon if it does not end by itself."""
        mount = mountpoint.mount_at(self.path)
        if mount is not None and mount.fstype == mountpoint.FSTYPE:
            mountpoint.unmount(self.path, lazy=True)
        if self.pid:
            with suppress(ProcessLookupError):  # it may not end by itself: other namespaces may have the mount too
                os.kill(self.pid, signal.SIGTERM)
            try:
                until(lambda: not running(self.pid), PATIENCE, "the daemon's end after its mount's")
            except AssertionError:
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                raise
