"""`fakefs run` and `fakefs shell`: a program in a private view of the machine, with a guest of its own.

Four processes. The *command* (this one) prepares the guest and waits. The *outer* one makes namespaces; its child, the
first process of the new process ids, makes the view, has the *daemon* serve the guest there, and waits for the
*program*, which lives in namespaces of its own inside those. When one ends, those below it are killed, and with the
last of them go namespaces and mounts: nothing has to be tidied up.

What the view shows is `fakefs.view`; how namespaces are made, `fakefs.namespace`.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

from emulator.errors import EmulatorError
from fakefs.errors import UserError

if TYPE_CHECKING:
    from emulator.guest import Guest
    from fakefs.mirror.launch import Launch
    from fakefs.view import View

FAILED, CANNOT_EXECUTE, NOT_FOUND = 125, 126, 127
"""Exit statuses, as those of env(1) and timeout(1): fakefs failed, the program could not be run, there is none."""

_RELAYED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT)
_FROM_KERNEL = 0x80
_READY = b"ready"


@dataclass(frozen=True)
class Errand:
    """What to run, in which guest: a fresh one, or (`mounted`) the one of a running mount."""

    argv: list[str]
    guest: Guest | None
    deterministic: bool = False
    wprobe: str = "unlimited"
    mounted: Path | None = None
    mirror: str = "off"
    prepare: Callable[[], str] | None = None
    """Called inside before the program starts; it returns the directory for that. May raise UserError."""


def run(arguments: argparse.Namespace) -> int:
    """Run the program; return its exit status, or die of the signal that it died of."""
    argv = list(arguments.program)
    if not argv:
        if arguments.command == "run":
            raise UserError("no program given: fakefs run -- CMD", exit_status=2)
        argv = [os.environ.get("SHELL") or "/bin/sh"]
    try:
        return _finish(perform(_errand(arguments, argv)))
    except (UserError, EmulatorError) as error:
        raise UserError(str(error), exit_status=FAILED) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror}", exit_status=FAILED) from None


def perform(errand: Errand) -> int:
    """Run a program in a view of its own; return its wait status. Raises UserError, OSError."""
    from fakefs import runtime, view

    view.check_inherited()
    with _terminal():
        outcome = _outermost(errand, view.View(runtime.directory()))
    if outcome.status is None:
        raise UserError(outcome.failure)
    return outcome.status


def _errand(arguments: argparse.Namespace, argv: list[str]) -> Errand:
    from fakefs import mountpoint
    from fakefs.mounting import Order, get_guest

    if arguments.mount is not None:
        mount = mountpoint.mount_at(arguments.mount)
        if mount is None or mount.fstype != mountpoint.FSTYPE or mountpoint.is_stale(arguments.mount):
            raise UserError(f"{arguments.mount}: no running mount; start one: fakefs mount {arguments.mount}")
        return Errand(argv, None, mounted=arguments.mount.absolute())
    order = Order(Path(), arguments.kernel, arguments.memory, arguments.append)
    # Which process comes first is the host's to say: where it may not matter, processes stay outside.
    mirror = arguments.mirror or ("off" if arguments.deterministic else "files")
    return Errand(argv, get_guest(order), arguments.deterministic, arguments.wprobe, mirror=mirror)


# ---- the command


@dataclass
class _Outcome:
    """What a run came to: the program's wait status, or what went wrong."""

    status: int | None = None
    failure: str = ""


def _outermost(errand: Errand, view: View) -> _Outcome:
    """Make the namespaces and wait. Again without new process ids where these cannot be had."""
    new_pids = errand.mounted is None  # a mount knows the processes that use it by its own namespace's ids
    while True:
        outcome = _attempt(errand, view, new_pids=new_pids)
        if outcome.failure != _NO_PROC:
            return outcome
        new_pids = False


_NO_PROC = "no /proc"


def _attempt(errand: Errand, view: View, *, new_pids: bool) -> _Outcome:
    from fakefs import namespace

    reader, writer = os.pipe()

    def outer() -> int:
        os.close(reader)
        namespace.die_with_parent()
        return _outer(errand, view, writer) if new_pids else _first(errand, view, writer, new_pids=False)

    _block_signals()
    flags = namespace.NEW_USER | namespace.NEW_MOUNTS | (namespace.NEW_PIDS if new_pids else 0)
    try:
        child = namespace.fork_into(flags, outer)
    finally:
        os.close(writer)
    _wait(child)
    with os.fdopen(reader, encoding="utf-8", errors="replace") as pipe:
        word, _, rest = pipe.read().partition(" ")
    if word == "exit":
        return _Outcome(status=int(rest))
    return _Outcome(failure=rest or "the program's surroundings were killed")


def _finish(status: int) -> int:
    """Return the exit status, or die as the program did, so that whoever waits for us sees the same."""
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core to look at is the program's
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    return 128 + number


class _terminal:
    """Gives the terminal back to our process group, which a shell inside leaves with its own."""

    def __enter__(self) -> None:
        self._fd = next((fd for fd in (0, 1, 2) if os.isatty(fd)), None)
        with suppress(OSError):
            if self._fd is not None and os.tcgetpgrp(self._fd) != os.getpgrp():
                self._fd = None

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            with suppress(OSError):
                os.tcsetpgrp(self._fd, os.getpgrp())
            signal.signal(signal.SIGTTOU, before)


# ---- signals


def _block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [*_RELAYED, signal.SIGCHLD])


def _unblock_signals() -> None:
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # those that Python sets
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [*_RELAYED, signal.SIGCHLD])


def _wait(child: int, other: Callable[[int], None] = lambda pid: None) -> int:
    """Wait for a child and return its wait status; pass signals on to it, tell `other` of children that end before.

    What the terminal sends (SI_KERNEL), it sends to the whole process group, and so to the program too.
    """
    while True:
        info = signal.sigwaitinfo([*_RELAYED, signal.SIGCHLD])
        if info.si_signo != signal.SIGCHLD:
            if info.si_code < _FROM_KERNEL:
                with suppress(ProcessLookupError):
                    os.kill(child, info.si_signo)
            continue
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == child:
                    return status
                if pid == 0:
                    break
                other(pid)


# ---- the outer namespaces


def _outer(errand: Errand, view: View, report: int) -> int:
    """Only children of the one who makes a PID namespace are in it: fork the first, and wait."""
    from fakefs import namespace

    child = os.fork()
    if child == 0:
        status = 1
        try:
            namespace.die_with_parent()
            status = _first(errand, view, report, new_pids=True)
        finally:
            os._exit(status)
    os.close(report)
    _wait(child)
    return 0


def _first(errand: Errand, view: View, report: int, *, new_pids: bool) -> int:
    """Make the view, start the daemon and the program, and report what becomes of it."""
    from fakefs.view import NoProc

    try:
        _tell(report, f"exit {_in_view(errand, view, new_pids=new_pids)}")
    except NoProc:
        _tell(report, f"failed {_NO_PROC}")
    except UserError as error:
        _tell(report, f"failed {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _tell(report, f"failed cannot make a private view of the machine: {where}{error.strerror}")
    except BaseException as error:
        _tell(report, f"failed fakefs run failed: {error!r}; please report this")
    return 0


def _tell(fd: int, text: str) -> None:
    with suppress(OSError):
        os.write(fd, os.fsencode(text))  # names need not be UTF-8


def _in_view(errand: Errand, view: View, *, new_pids: bool) -> int:
    """Return the program's wait status. Raises UserError, also when the daemon did not live as long as the program."""
    from fakefs import mountpoint, namespace, runtime
    from fakefs.view import TRACING, reopen_directories

    try:
        directory = os.getcwd()
    except FileNotFoundError:
        raise UserError("the current directory has been removed: go to another") from None
    place = errand.mounted or TRACING
    # What a running mount is reached by, before it is out of sight.
    mounted = errand.mounted and os.open(errand.mounted, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    control = errand.mounted and os.open(runtime.socket_path(errand.mounted), os.O_PATH | os.O_CLOEXEC)
    view.protect(new_pids=new_pids)
    os.environ.setdefault("XDG_RUNTIME_DIR", str(view.private))  # where `fakefs exec` looks for the daemon
    socket = runtime.socket_path(place)
    daemon = launch = None
    if errand.guest is not None:
        launch = _launch(errand)
        daemon = _start_daemon(errand, errand.guest, launch)
        whole = True
        view.show_tracefs(TRACING, whole=True)
    else:
        whole = (place / "sys/kernel/tracing/trace_marker").exists()
        view.show_tracefs(Path(f"/proc/self/fd/{mounted}"), whole=whole)
        socket.touch()
        namespace.bind(Path(f"/proc/self/fd/{control}"), socket)

    def program() -> int:
        namespace.die_with_parent()
        view.show_guest(socket, whole=whole)
        reopen_directories()
        if errand.prepare is None:
            return _execute(errand.argv, directory, launch)
        _unblock_signals()
        try:
            return _execute(errand.argv, errand.prepare(), launch)
        except UserError as error:
            _tell(2, f"fakefs: {error}\n")
            return FAILED

    gone = False

    def ended(pid: int) -> None:
        nonlocal gone
        if launch is not None and launch.ended(pid):
            _tell(2, "fakefs: what follows is not mirrored: the process that records it is gone\n")
        if pid == daemon:
            gone = True
            _tell(2, "fakefs: the guest's daemon is gone: its files answer with errors from now on\n")

    child = namespace.fork_into(namespace.NEW_USER | namespace.NEW_MOUNTS, program)
    if launch is not None:
        launch.supervise(child, TRACING, view.tracefs)
    status = _wait(child, ended)
    if gone or mountpoint.is_stale(view.tracefs):
        raise UserError("the guest's daemon was killed while the program ran")
    return status


def _launch(errand: Errand) -> Launch | None:
    from fakefs.mirror.calls import Level

    level = Level[errand.mirror.upper()]
    if level is Level.OFF:
        return None
    from fakefs.mirror.launch import Launch

    return Launch(level)


def _start_daemon(errand: Errand, guest: Guest, launch: Launch | None) -> int:
    """Fork a daemon that serves the guest's root directory at TRACING; return its pid when the mount answers."""
    from fakefs import daemon, namespace
    from fakefs.view import TRACING

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            namespace.die_with_parent()
            os.close(reader)
            os.setsid()  # away from the terminal and its signals
            _unblock_signals()
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(2, 1)
            recording = None if launch is None else launch.recording()
            service = daemon.Service(
                TRACING, b"/", errand.deterministic, errand.wprobe, private=True, recording=recording
            )
            daemon.run(guest, service, lambda: _tell(writer, "ready"))
        except Exception as error:
            _tell(writer, str(error) or repr(error))
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        word = pipe.read(1 << 16)
    if word != _READY:
        raise UserError(word.decode("utf-8", "replace") or "the daemon ended without a word")
    return child


# ---- the program


def _enter(launch: Launch) -> None:
    try:
        launch.enter()
    except OSError as error:
        _tell(2, f"fakefs: what the program does is not mirrored, as it cannot be watched here ({error.strerror})\n")


def _execute(argv: list[str], directory: str, launch: Launch | None) -> int:
    """Become the program, in the directory of the caller, as it is seen from inside; return an exit status if not."""
    try:
        os.chdir(directory)
    except OSError:
        os.chdir("/")
    _unblock_signals()
    try:
        if launch is not None:
            _enter(launch)
        os.execvp(argv[0], argv)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        _tell(2, f"fakefs: {argv[0]}: not found\n")
        return NOT_FOUND
    except OSError as error:
        script = which(argv[0])
        if error.errno == errno.ENOEXEC and script and _is_text(script):
            os.execv("/bin/sh", ["sh", script, *argv[1:]])  # as execvp(3) does
        _tell(2, f"fakefs: {argv[0]}: {error.strerror}\n")
        return CANNOT_EXECUTE


def _is_text(path: str) -> bool:
    with open(path, "rb") as file:
        return b"\0" not in file.read(4096)
