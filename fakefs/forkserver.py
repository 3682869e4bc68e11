"""Fresh kernels by the dozen: a process that has imported everything and restored the guest forks a child for each.

A mount from the command line takes 0.4 s, nearly all of it Python's imports. A test runner starts one server, and each
test costs a fork. The server never runs the guest it holds, nor trio, nor a thread: what its children inherit is the
snapshot's state, and each continues it alone (copy on write).

The server's standard input is a socket; requests and answers are JSON, a line each, one at a time:

    {"do": "mount", "directory": DIR, "log": FILE, **order}                     -> {"pid": PID}  when the mount answers
    {"do": "run", "argv": [...], "cwd": DIR, "env": {...}, "output": FILE, "errors": FILE, **order}  -> {"pid": PID}
    {"do": "wait", "pid": PID, "seconds": S}      -> {"status": N} as subprocess has it, or null: it is still running
    {"do": "end", "pid": PID}                     -> {"status": N}  after SIGTERM and, 5 s later, SIGKILL

An answer {"error": TEXT} is for a person. An order has "kernel" (path or null), "memory" (bytes), "append",
"deterministic", "wprobe" and "root", all optional. When the client is gone, so are soon the server and its children.

`ForkServer` is the client: only the standard library, so that it costs nothing to import.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from fakefs.errors import UserError

if TYPE_CHECKING:
    from emulator.guest import Guest

_PATIENCE = 5.0  # seconds for a child to end by itself
_PR_SET_PDEATHSIG = 1
_NEEDED = ("client", "daemon", "fuse.session", "mounting", "program", "run_command", "view")


@dataclass(frozen=True)
class Order:
    """Which guest, and how it is served; `memory` is in bytes, 0 means the default, as does `kernel` None."""

    kernel: str | None = None
    memory: int = 0
    append: str = ""
    deterministic: bool = False
    wprobe: str = "unlimited"
    root: str = "/sys/kernel/tracing"


# ---- the client


class ForkServer:
    """A server of this process's own. Methods raise UserError for what goes wrong."""

    def __init__(self) -> None:
        ours, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fakefs.forkserver"], stdin=its.fileno(), stdout=subprocess.DEVNULL, cwd="/"
            )
        self._file = ours.makefile("rw", encoding="utf-8")
        ours.close()

    def mount(self, directory: Path, log: Path, order: Order) -> int:
        """Mount a fresh guest on an empty directory; return its daemon's process id when the mount answers."""
        return int(self._ask({"do": "mount", "directory": str(directory), "log": str(log), **asdict(order)})["pid"])

    def run(
        self, argv: Sequence[str], order: Order, *, cwd: Path, env: Mapping[str, str], output: Path, errors: Path
    ) -> int:
        """Start a program as by `fakefs run`, with what it prints going to files; return its process id."""
        files = {"output": str(output), "errors": str(errors)}
        request = {"do": "run", "argv": list(argv), "cwd": str(cwd), "env": dict(env), **files, **asdict(order)}
        return int(self._ask(request)["pid"])

    def wait(self, pid: int, seconds: float) -> int | None:
        """Return the exit status of a child (negative: the signal it died of), None if it runs on after `seconds`."""
        status = self._ask({"do": "wait", "pid": pid, "seconds": seconds})["status"]
        return None if status is None else int(status)

    def end(self, pid: int) -> int:
        """End a child, if need be by force; return its exit status."""
        return int(self._ask({"do": "end", "pid": pid})["status"])

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._file.write(json.dumps(request) + "\n")
            self._file.flush()
            line = self._file.readline()
        except OSError:
            line = ""
        if not line:
            raise UserError("the server of fresh kernels is gone; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def close(self) -> None:
        """End the server and all its children."""
        with suppress(OSError):
            self._file.close()
        try:
            self._process.wait(2 * _PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# ---- the server


class _Server:
    def __init__(self, channel: IO[str]) -> None:
        self._channel = channel
        self._guests: dict[tuple[str | None, int, str], Guest] = {}
        self._children: set[int] = set()

    def serve(self) -> None:
        """Answer requests until the client is gone."""
        for line in self._channel:
            try:
                answer = self._answer(json.loads(line))
            except Exception as error:  # the client tells a person; the next request may be a better one
                answer = {"error": str(error) or repr(error)}
            try:
                self._channel.write(json.dumps(answer) + "\n")
                self._channel.flush()
            except OSError:
                return

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request:
            case {"do": "mount", "directory": str(directory), "log": str(log)}:
                return {"pid": self._mount(Path(directory), Path(log), _order(request))}
            case {"do": "run", "argv": [str(), *_]}:
                return {"pid": self._run(request, _order(request))}
            case {"do": "wait", "pid": int(pid), "seconds": int() | float() as seconds}:
                return {"status": self._wait(pid, seconds)}
            case {"do": "end", "pid": int(pid)}:
                return {"status": self._end(pid)}
        return {"error": f"no such request: {request.get('do')}"}

    # ---- guests

    def _guest(self, order: Order) -> Guest:
        """Return the guest to fork with: restored once, and never run."""
        key = (order.kernel, order.memory, order.append)
        if key not in self._guests:
            self._guests[key] = _restore(order)
        return self._guests[key]

    # ---- children

    def _fork(self) -> int:
        pid = os.fork()
        if pid == 0:
            _die_with_server()
            return 0
        self._children.add(pid)
        return pid

    def _mount(self, directory: Path, log: Path, order: Order) -> int:
        from fakefs import mountpoint

        guest = self._guest(order)
        mountpoint.check(directory)
        reader, writer = os.pipe()
        pid = self._fork()
        if pid == 0:
            os.close(reader)
            _daemon(guest, directory, log, order, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            word = pipe.read()
        if word != b"ready":
            self._wait(pid, _PATIENCE)
            said = log.read_text(errors="replace").strip() if log.exists() else ""
            reason = word.decode("utf-8", "replace") or "the daemon ended without a word"
            raise UserError(f"{reason} ({said})" if said and said not in reason else reason)
        return pid

    def _run(self, request: dict[str, Any], order: Order) -> int:
        self._guest(order)  # fetches and boots where errors can be told
        pid = self._fork()
        if pid == 0:
            _run(request, order)
        return pid

    def _wait(self, pid: int, seconds: float) -> int | None:
        if pid not in self._children:
            raise UserError(f"no child {pid}")
        import select

        fd = os.pidfd_open(pid)
        try:
            if not select.select([fd], [], [], seconds)[0]:
                return None
        finally:
            os.close(fd)
        _, status = os.waitpid(pid, 0)
        self._children.remove(pid)
        return os.waitstatus_to_exitcode(status)

    def _end(self, pid: int) -> int:
        if pid not in self._children:
            raise UserError(f"no child {pid}")
        os.kill(pid, signal.SIGTERM)
        status = self._wait(pid, _PATIENCE)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            status = self._wait(pid, _PATIENCE)
        return -signal.SIGKILL if status is None else status

    def close(self) -> None:
        """End all children."""
        for pid in self._children:
            os.kill(pid, signal.SIGTERM)
        for pid in list(self._children):
            self._end(pid)


def _order(request: dict[str, Any]) -> Order:
    return Order(**{name: request[name] for name in Order.__dataclass_fields__ if name in request})


def _restore(order: Order) -> Guest:
    """Return a guest; of several servers that need the same first boot (pytest-xdist), one makes it."""
    import fcntl

    from emulator.guest import DEFAULT_MEMORY
    from fakefs import kernels, mounting

    kernel = Path(order.kernel) if order.kernel else None
    cache = kernels.cache_dir()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(cache / "first-boot", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return mounting.get_guest(mounting.Order(Path(), kernel, order.memory or DEFAULT_MEMORY, order.append))
    finally:
        os.close(lock)


def _die_with_server() -> None:
    """SIGTERM, at which a daemon unmounts, comes also when the server is killed."""
    import ctypes

    server = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != server:
        os._exit(1)


def _redirect(descriptor: int, path: str | Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    os.dup2(fd, descriptor)
    os.close(fd)


def _daemon(guest: Guest, directory: Path, log: Path, order: Order, told: int) -> NoReturn:
    """Serve a guest until its directory is unmounted."""
    from fakefs import daemon

    status = 1

    def ready() -> None:
        os.write(told, b"ready")
        os.close(told)

    try:
        os.setsid()
        _redirect(0, os.devnull, os.O_RDONLY)  # the server's socket, too, is not ours
        _redirect(1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(1, 2)
        root = os.fsencode(order.root)
        # `private`: no fusermount3 that watches over us; the server does.
        service = daemon.Service(directory, root, order.deterministic, order.wprobe, private=True)
        daemon.run(guest, service, ready)
        status = 0
    except BaseException as error:
        with suppress(OSError):
            os.write(told, (str(error) or repr(error)).encode())
        print(f"fakefs: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _run(request: dict[str, Any], order: Order) -> NoReturn:
    """Do what `fakefs run` does."""
    import argparse

    from emulator.guest import DEFAULT_MEMORY
    from fakefs import run_command

    status = 125
    try:
        os.setsid()
        _redirect(0, os.devnull, os.O_RDONLY)
        _redirect(1, request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        _redirect(2, request["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        arguments = argparse.Namespace(
            command="run",
            program=request["argv"],
            mount=None,
            kernel=Path(order.kernel) if order.kernel else None,
            memory=order.memory or DEFAULT_MEMORY,
            append=order.append,
            deterministic=order.deterministic,
            wprobe=order.wprobe,
            mirror=None,
        )
        status = run_command.run(arguments)
    except Exception as error:
        with suppress(OSError):
            os.write(2, f"fakefs: {error}\n".encode())
    finally:
        os._exit(status)


def import_all() -> None:
    """Import what children will need, before they are forked."""
    from importlib import import_module

    for name in ("emulator.cpu.native", *(f"fakefs.{name}" for name in _NEEDED)):
        import_module(name)


def main() -> None:
    """Serve the client at the other end of standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the client's; when it ends, so do we
    with socket.socket(fileno=os.dup(0)) as connection, connection.makefile("rw", encoding="utf-8") as channel:
        _redirect(0, os.devnull, os.O_RDONLY)
        import_all()
        gc.freeze()  # a collection in a child would touch, and so copy, all of this
        server = _Server(channel)
        try:
            server.serve()
        finally:
            server.close()


if __name__ == "__main__":
    main()
