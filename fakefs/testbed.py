"""Fresh kernels for tests: a mounted one, and one that is seen by a script at the real paths.

For the pytest plugin (`fakefs.pytest_plugin`) and `fakefs test` (`fakefs.test_command`); where the kernels come from is
`fakefs.forkserver`.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakefs.errors import UserError
from fakefs.forkserver import ForkServer, Order
from fakefs.records import Record, parse

TRACE_TAIL = 60
"""Lines of a trace that a failure's report shows."""

_TIMED_OUT = 124  # as timeout(1) has it
_KILL_AFTER = 2
_REAL = Path("/sys/kernel/tracing")
_KEPT = ("trace", "error_log", "dynamic_events")
_ENVIRONMENT = {"PATH": "/bin:/sbin:/usr/bin:/usr/sbin", "HOME": "/root", "TERM": "dumb"}

# Runs a program at the real paths and keeps what a report needs: KEEP SECONDS PYTHON PROGRAM [ARGUMENT ...]
_KEEPER = f"""
keep=$1 seconds=$2 python=$3; shift 3
timeout -k {_KILL_AFTER} "$seconds" "$@"
status=$?
echo 0 >{_REAL}/tracing_on  # or a probe of reading would make `trace` endless
for name in {" ".join(_KEPT)}; do cat {_REAL}/$name >"$keep/$name"; done
[ $status = 0 ] || "$python" -m fakefs console >"$keep/console" 2>&1
exit $status
"""


def events(text: str) -> list[str]:
    """The lines of a trace, or any other file, that are neither empty nor comments."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _hits(lines: Sequence[str], event: str) -> list[Record]:
    """Records of an event, which may be named with its group: "kprobes/mine", "kprobes:mine"."""
    name = event.replace(":", "/").rpartition("/")[2]
    return [record for record in parse(lines) if record.event == name]


def _switch(file: Path, value: bytes) -> None:
    """Write to a file as it is: truncating it would be seen by probes of that."""
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def find_kernel(name: str) -> str:
    """Return the path of a kernel given by path, or, of those `fakefs kernel list` shows, by version or suite."""
    from fakefs import kernels

    path = Path(name).expanduser()
    if path.is_file():
        return str(path.absolute())
    for kernel in kernels.installed():
        if name == kernel.version or name in kernel.suites:
            return str(kernel.path)
    raise UserError(f"{name}: no such kernel; give a file, or one of: fakefs kernel list", exit_status=2)


def missing() -> str:
    """Return why nothing can be mounted on this machine; empty when it can."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"cannot open /dev/fuse: {error.strerror}; see: fakefs doctor"
    return ""


class Tracefs:
    """A mounted tracefs, whoever has mounted it. Names of files are relative to `path`, its directory."""

    def __init__(self, path: Path, log: Path | None = None) -> None:
        """`log` is what the daemon writes its complaints to, for reports."""
        self.path = path
        self.log = log
        self._taken = b""

    # ---- files

    def write(self, file: str, text: str, append: bool = False) -> None:
        """Write by one write(2), after truncating unless `append`.

        Raises OSError, with the newest entry of error_log as a note if that is what the write has brought about.
        """
        before = self.error_log()
        fd = os.open(self.path / file, os.O_WRONLY | os.O_CLOEXEC | (os.O_APPEND if append else os.O_TRUNC))
        if file == "trace" and not append:
            self._taken = b""
        try:
            if text:
                os.write(fd, text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            after = self.error_log()
            if after != before:
                error.add_note("\n".join(after.splitlines()[-3:]))
            raise
        finally:
            os.close(fd)

    def read(self, file: str) -> str:
        """Read a file to its end.

        Tracing is paused while a `trace` is read: with a probe of reading it would be endless.
        """
        path = self.path / file
        switch = path.with_name("tracing_on")
        if path.name != "trace" or switch.read_bytes() != b"1\n":
            return _text(path.read_bytes())
        _switch(switch, b"0")
        try:
            return _text(path.read_bytes())
        finally:
            _switch(switch, b"1")

    def lines(self, file: str) -> list[str]:
        """The lines of a file but for empty ones and comments; of `trace` also those that `wait_for()` has read."""
        text = self.read(file)
        return events((_text(self._taken) if file == "trace" else "") + text)

    def error_log(self) -> str:
        """What the kernel has found wrong."""
        return self.read("error_log")

    # ---- events

    def hits(self, event: str) -> list[Record]:
        """The hits of an event in `trace`, oldest first."""
        return _hits(self.lines("trace"), event)

    def wait_for(self, event: str, n: int = 1, timeout: float = 10.0) -> list[Record]:
        """Wait until an event has been hit `n` times in all; return its hits. Raises TimeoutError after `timeout` s.

        It reads `trace_pipe`, so what was waited for leaves `trace`; `lines("trace")` and `hits()` still have it.
        """
        found = self.hits(event)
        if len(found) >= n:
            return found
        end = time.monotonic() + timeout
        fd = os.open(self.path / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            while len(found) < n:
                left = end - time.monotonic()
                if left <= 0 or not poll.poll(left * 1000):
                    raise TimeoutError(f"{event}: {len(found)} of {n} hits within {timeout} s")
                with suppress(BlockingIOError):
                    self._taken += os.read(fd, 1 << 16)
                found = _hits(events(_text(self._taken)), event)
        finally:
            os.close(fd)
        return found

    # ---- programs

    def sh(
        self, script: str, *arguments: str, timeout: float = 60.0, cwd: Path | None = None, merge: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a script by this machine's bash, in the mount or in `cwd`; $TRACEFS names it.

        The status is 124 when it took more than `timeout` seconds. `merge` sends errors where the output goes. Raises
        subprocess.TimeoutExpired when it could not even be killed then, as the mount does not answer.
        """
        return subprocess.run(
            ["timeout", "-k", str(_KILL_AFTER), str(timeout), "bash", "-c", script, "bash", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge else subprocess.PIPE,
            cwd=cwd or self.path,
            env={**os.environ, "TRACEFS": str(self.path)},
            encoding="utf-8",
            errors="surrogateescape",
            timeout=timeout + _KILL_AFTER + 10,
            check=False,
        )

    def guest(
        self, cmd: str | Sequence[str], stdin: str = "", timeout: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command, or a program with arguments, inside the guest, as `fakefs exec` does.

        Raises subprocess.CalledProcessError when it fails, unless not `check`; subprocess.TimeoutExpired after
        `timeout` seconds, and it is killed.
        """
        from fakefs import client
        from fakefs.frames import ERROR, EXIT, FRAME_MAX, STDERR, STDIN, STDOUT

        argv = ["sh", "-c", cmd] if isinstance(cmd, str) else list(cmd)
        request = {"do": "exec", "argv": argv, "env": _ENVIRONMENT, "input_ends": True}
        said = {STDOUT: b"", STDERR: b""}
        end = time.monotonic() + timeout
        with closing(client.Channel(client.find_mount(self.path), request)) as channel:
            data = stdin.encode("utf-8", "surrogateescape")
            for at in range(0, len(data), FRAME_MAX):
                channel.send(STDIN, data[at : at + FRAME_MAX])
            channel.send(STDIN, b"")
            while True:
                if not channel.waiting and not select.select([channel], [], [], max(end - time.monotonic(), 0))[0]:
                    raise subprocess.TimeoutExpired(argv, timeout, _text(said[STDOUT]), _text(said[STDERR]))
                kind, data = channel.receive() or (ERROR, b"the mount's daemon is gone")
                if kind == ERROR:
                    raise UserError(_text(data))
                if kind == EXIT:
                    break
                said[kind] += data
        done = subprocess.CompletedProcess(argv, data[0], _text(said[STDOUT]), _text(said[STDERR]))
        if check and done.returncode:
            error = subprocess.CalledProcessError(done.returncode, argv, done.stdout, done.stderr)
            error.add_note(done.stderr)
            raise error
        return done

    def console(self) -> str:
        """What the guest has printed."""
        from fakefs import client

        return client.ask(client.find_mount(self.path), {"do": "console"})

    def status(self) -> dict[str, Any]:
        """What `fakefs status` tells."""
        from fakefs import client

        status: dict[str, Any] = json.loads(client.ask(client.find_mount(self.path), {"do": "status"}))
        return status

    # ---- when a test has failed

    def sections(self) -> list[tuple[str, str]]:
        """What a report of a failure shows: titles and texts. Raises nothing."""
        readers: list[tuple[str, Callable[[], str]]] = [
            (f"trace (last {TRACE_TAIL} lines)", lambda: _tail(self.lines("trace"))),
            ("error_log", self.error_log),
            ("dynamic_events", lambda: self.read("dynamic_events")),
            ("console", lambda: _tail(self.console().splitlines())),
            ("daemon's log", lambda: self.log.read_text(errors="replace") if self.log else ""),
        ]
        found = []
        for title, read in readers:
            try:
                text = read()
            except (OSError, UserError) as error:
                text = f"cannot be read: {error}"
            if text or title != "daemon's log":
                found.append((title, text))
        return found


class FreshTracefs(Tracefs):
    """The tracefs of a fresh kernel, which ends with `close()`."""

    def __init__(self, server: ForkServer, directory: Path, order: Order) -> None:
        """Mount on an empty directory; the daemon's log goes beside it. Raises UserError."""
        log = directory.with_name(directory.name + ".log")
        super().__init__(directory, log)
        self._server = server
        self.pid = server.mount(directory, log, order)
        """The daemon's process id; 0 once it is closed."""

    def close(self) -> None:
        """Unmount, and end the kernel, whatever is still open in it; the second time it does nothing."""
        from fakefs import mountpoint

        if not self.pid:
            return
        self._server.end(self.pid)
        self.pid = 0
        if mountpoint.is_stale(self.path):
            mountpoint.discard_stale(self.path)

    def sections(self) -> list[tuple[str, str]]:
        """As those of any, until it is closed."""
        return super().sections() if self.pid else []


def _tail(lines: Sequence[str]) -> str:
    return "\n".join(lines[-TRACE_TAIL:])


@dataclass(frozen=True)
class Run:
    """What became of a script at the real paths. `status` is 124 when it took too long."""

    stdout: str
    stderr: str
    status: int
    trace: str
    error_log: str
    dynamic_events: str
    console: str
    """Only of a run with another status than 0."""

    def hits(self, event: str) -> list[Record]:
        """The hits of an event in `trace`, oldest first."""
        return _hits(events(self.trace), event)

    def sections(self) -> list[tuple[str, str]]:
        """What a report of a failure shows: titles and texts."""
        return [
            (f"exit status {self.status}, standard output", self.stdout),
            ("standard error", self.stderr),
            (f"trace (last {TRACE_TAIL} lines)", _tail(events(self.trace))),
            ("error_log", self.error_log),
            ("dynamic_events", self.dynamic_events),
            ("console", _tail(self.console.splitlines())),
        ]


def run_at_real_paths(
    server: ForkServer, argv: Sequence[str], order: Order, directory: Path, timeout: float, cwd: Path | None = None
) -> Run:
    """Run a program as by `fakefs run`, in a fresh kernel; `directory` is an empty one, for the files it leaves.

    Its environment is ours and TRACEFS. Raises UserError when it could not be started.
    """
    # Not the same directory as our sockets are in: that is covered in the program's view of the machine.
    output, errors = directory / "stdout", directory / "stderr"
    environment = {**os.environ, "TRACEFS": str(_REAL), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    keeper = ["sh", "-c", _KEEPER, "sh", str(directory), str(timeout), sys.executable, *argv]
    pid = server.run(keeper, order, cwd=cwd or Path.cwd(), env=environment, output=output, errors=errors)
    status = server.wait(pid, timeout + _KILL_AFTER + 30)
    if status is None:
        server.end(pid)
        status = _TIMED_OUT
    stdout, stderr, *kept = (_kept(directory / name) for name in ("stdout", "stderr", *_KEPT, "console"))
    if not (directory / _KEPT[0]).exists() and status == 125:
        raise UserError(stderr.strip().removeprefix("fakefs: ") or "the script could not be started")
    return Run(stdout, stderr, status, *kept)


def _kept(path: Path) -> str:
    return _text(path.read_bytes()) if path.exists() else ""


def script_argv(script: Path) -> list[str]:
    """How to run a script: by itself if it is executable, else by sh(1)."""
    path = str(script.absolute())
    return [path] if os.access(path, os.X_OK) else [shutil.which("sh") or "/bin/sh", path]
