"""A `fakefs mount` for tests: started by the command, used by real programs, gone afterwards whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakefs import mountpoint

FAKEFS = (sys.executable, "-m", "fakefs.cli")
_START_SECONDS = 120.0  # a first start boots the kernel
PATIENCE = 30.0
"""Seconds to wait for what comes at once: a busy machine is no reason for a test to fail."""


@dataclass(frozen=True)
class Result:
    """What a script printed and its exit status: 124 when `timeout` ended it."""

    stdout: str
    stderr: str
    returncode: int


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


class Mounted:
    """A mount at `path`. `env` is the environment of the command, and of every script."""

    def __init__(self, path: Path, kernel: Path, env: Mapping[str, str], *options: str) -> None:
        self.path = path
        self.kernel = kernel
        self.env = dict(env)
        self.options = options
        self.pid = 0

    def start(self) -> Mounted:
        """Mount; raises AssertionError with what the command said."""
        self.path.mkdir(exist_ok=True)
        done = self.fakefs("mount", "--kernel", str(self.kernel), *self.options, str(self.path))
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

    def fakefs(
        self, *arguments: str, stdin: str | bytes = b"", timeout: float = _START_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run the command `fakefs`."""
        text = stdin.decode() if isinstance(stdin, bytes) else stdin
        return subprocess.run(
            [*FAKEFS, *arguments],
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            env=self.env,
            timeout=timeout,
            check=False,
        )

    def exec(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program in the guest."""
        return self.fakefs("exec", str(self.path), "--", *argv, stdin=stdin)

    def status(self) -> dict[str, Any]:
        """What `fakefs status` tells."""
        done = self.fakefs("status", str(self.path))
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def sh(self, script: str, *, timeout: float = 60, cwd: Path | None = None, merge: bool = False) -> Result:
        """Run a script by bash in the mount; `merge` sends stderr where stdout goes, in the order written."""
        process = subprocess.Popen(
            ["timeout", "-k", "2", str(timeout), "bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge else subprocess.PIPE,
            cwd=self.path if cwd is None else cwd,
            env=self.env,
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout + 10)
        except subprocess.TimeoutExpired:
            # Not even SIGKILL ends a process whose request the daemon does not answer; the daemon's end does.
            os.kill(self.pid, signal.SIGKILL)
            process.communicate()
            raise AssertionError(f"the mount hangs; its daemon was killed. Script:\n{script}") from None
        return Result(stdout.decode("latin-1"), (stderr or b"").decode("latin-1"), process.returncode)

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a program in the mount that the test talks to."""
        return subprocess.Popen(argv, cwd=self.path, env=self.env, **options)

    # ---- files, by the test's own process

    def read(self, name: str) -> str:
        """Read a file to its end."""
        return (self.path / name).read_bytes().decode("latin-1")

    def write(self, name: str, text: str, *, append: bool = False) -> None:
        """Write in one write(2), after truncating unless `append`. Raises OSError."""
        flags = os.O_WRONLY | (os.O_APPEND if append else os.O_TRUNC)
        fd = os.open(self.path / name, flags)
        try:
            if text:
                os.write(fd, text.encode())
        finally:
            os.close(fd)

    def trace(self) -> list[str]:
        """The lines of `trace` that are events."""
        return [line for line in self.read("trace").splitlines() if line and not line.startswith("#")]


class Resetter:
    """Brings a tracefs back to the state it had when this was made, near enough: what tests use of it."""

    _FILES = (
        "trace_clock",
        "buffer_size_kb",
        "buffer_percent",
        "buffer_subbuf_size_kb",
        "tracing_thresh",
        "tracing_cpumask",
        "saved_cmdlines_size",
        "max_graph_depth",
        "set_ftrace_filter",
        "set_ftrace_notrace",
        "set_ftrace_pid",
        "set_ftrace_notrace_pid",
        "set_event_pid",
        "set_event_notrace_pid",
        "set_graph_function",
        "set_graph_notrace",
    )

    def __init__(self, mount: Mounted) -> None:
        self._mount = mount
        self._events = mount.read("available_events").split()
        self._options = mount.read("trace_options").split()
        files = (name for name in self._FILES if (mount.path / name).exists())
        self._files = {name: _setting(mount.read(name)) for name in files}

    def reset(self, done: str = "") -> None:
        """Reset; `done` is the script that ran: triggers are looked for on the events it names. Raises OSError."""
        mount = self._mount
        mount.write("tracing_on", "0")
        for instance in sorted((mount.path / "instances").iterdir()):
            for trigger in self._triggers(done, instance):
                mount.write(str(trigger.relative_to(mount.path)), "")
            instance.rmdir()
        if "nop" not in mount.read("current_tracer"):
            mount.write("current_tracer", "nop")
        mount.write("events/enable", "0")
        triggers = self._triggers(done, mount.path) if "trigger" in done else []
        for _ in range(2):  # one trigger may hold another
            for trigger in triggers:
                with suppress(OSError):
                    mount.write(str(trigger.relative_to(mount.path)), "")
        for name in self._filtered(done):
            mount.write(name, "0")
        mount.write("dynamic_events", "")
        for name, setting in self._files.items():
            if _setting(mount.read(name)) != setting:
                mount.write(name, setting)
        for option in set(self._options) - set(mount.read("trace_options").split()):
            mount.write("trace_options", option)
        for name in ("snapshot", "error_log", "trace"):
            if name != "snapshot":
                mount.write(name, "")
            elif (mount.path / name).exists():
                mount.write(name, "0")
        mount.write("tracing_on", "1")
        left = mount.read("dynamic_events")
        if left:
            raise OSError(f"dynamic events left: {left}")

    def _named(self, script: str) -> list[str]:
        return [event for event in self._events if event.split(":")[1] in script]

    def _triggers(self, script: str, top: Path) -> list[Path]:
        fixed = [top / "events" / event.replace(":", "/") / "trigger" for event in self._named(script)]
        dynamic = [
            path
            for group in ("kprobes", "uprobes", "eprobes", "fprobes", "tracepoints", "synthetic")
            for path in top.glob(f"events/{group}/*/trigger")
        ]
        return [*dynamic, *(path for path in fixed if path.exists())]

    def _filtered(self, script: str) -> list[str]:
        if "filter" not in script:
            return []
        groups = {event.split(":")[0] for event in self._named(script)} | {
            group for group in {event.split(":")[0] for event in self._events} if f"events/{group}/filter" in script
        }
        return [f"events/{group}/filter" for group in sorted(groups)]


def _setting(text: str) -> str:
    """What to write to a file so that it reads `text`: "local [global]", "7 (expanded: 1408)", "#### all functions"."""
    chosen = re.search(r"\[(\S+)\]|\(expanded: (\d+)\)", text)
    if chosen:
        return chosen[1] or chosen[2]
    return "" if text.startswith(("#", "no pid")) else text
