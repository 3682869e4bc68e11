"""`fakefs mount` up to the point where a daemon serves: kernel, snapshot, fork, and the word that it worked."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emulator.errors import EmulatorError
from emulator.guest import DEFAULT_MEMORY, Guest, Recipe, find, make_snapshot
from fakefs import kernels, mountpoint
from fakefs.errors import UserError
from fakefs.prepare import look

if TYPE_CHECKING:
    from fakefs.daemon import Service

_READY = b"ready"


@dataclass(frozen=True)
class Order:
    """What `fakefs mount` was asked for. `kernel` None is the default one, fetched if need be; `memory` in bytes."""

    directory: Path
    kernel: Path | None = None
    memory: int = DEFAULT_MEMORY
    append: str = ""
    root: str = "/sys/kernel/tracing"
    options: str = ""
    deterministic: bool = False
    wprobe: str = "unlimited"
    foreground: bool = False


def mount(order: Order) -> None:
    """Mount and return when the mount answers; with `foreground`, serve until the end.

    Raises UserError or EmulatorError.
    """
    with mountpoint.lock(order.directory) as lock_file:
        mountpoint.check(order.directory)
        service = _service(order)
        log_path(service.mountpoint)
        guest = get_guest(order)
        if order.foreground:
            _serve(guest, service, lambda: kernels.say(f"fakefs: {order.directory} is mounted; Ctrl-C unmounts"))
        else:
            _serve_in_background(guest, service, lock_file)
            _check_root(service)


def get_guest(order: Order) -> Guest:
    """Return the guest that is asked for, after fetching its kernel and booting it once if need be."""
    kernel = order.kernel or kernels.default_kernel()
    if kernel is None:
        kernels.say("fakefs: no kernel yet, fetching Debian's (once)")
        kernel = kernels.fetch()
    if not kernel.is_file():
        what = "not a file" if kernel.exists() else "no such file"
        raise UserError(f"{kernel}: {what}; give a vmlinuz or vmlinux: fakefs kernel list", exit_status=2)
    recipe = Recipe(kernel.absolute(), order.memory, order.append)
    cache = kernels.cache_dir()
    guest = find(recipe, cache, lambda line: kernels.say(f"fakefs: {line}"))
    if guest is None:
        _boot_in_child(recipe, cache)
        guest = find(recipe, cache)
    if guest is None:
        raise UserError(f"the snapshot under {cache} went away while it was being made; try again")
    return guest


def _service(order: Order) -> Service:
    from fakefs.daemon import Service
    from fakefs.fuse.options import MountOptions

    if not order.root.startswith("/"):
        raise UserError(f"--root {order.root}: a path in the guest starts with /", exit_status=2)
    root = os.fsencode(os.path.normpath(order.root))
    options = MountOptions.parse(order.options)
    return Service(order.directory.absolute(), root, order.deterministic, order.wprobe, options)


def _boot_in_child(recipe: Recipe, cache: Path) -> None:
    """Boot in a process of its own, whose memory goes when it ends, and show how far it is."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            make_snapshot(recipe, cache, lambda done: _tell(writer, f"{done:.3f}\n"), look)
            status = 0
        except (EmulatorError, UserError) as error:
            _tell(writer, f"!{error}\n")
        except KeyboardInterrupt:
            status = 130
        except BaseException as error:
            _tell(writer, f"!booting failed: {error!r}; please report this\n")
        finally:
            os._exit(status)
    os.close(writer)
    complaint = ""
    with os.fdopen(reader, encoding="utf-8", errors="replace") as lines, ExitStack() as stack:
        show = None
        for line in lines:
            if complaint or line.startswith("!"):
                complaint += line
                continue
            show = show or stack.enter_context(_progress())
            show(float(line))
    _, status = os.waitpid(child, 0)
    if complaint:
        raise UserError(complaint[1:].rstrip())
    if status:
        raise UserError(
            "booting the kernel was interrupted" if status in (2, 130 << 8) else f"booting failed ({status})"
        )


def _tell(fd: int, text: str) -> None:
    os.write(fd, text.encode())


@contextmanager
def _progress() -> Iterator[Callable[[float], None]]:
    what = "booting Linux (once)"
    if not sys.stderr.isatty():
        kernels.say(f"fakefs: {what}")
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("fakefs: {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda done: progress.update(task, completed=done)


def _serve(guest: Guest, service: Service, ready: Callable[[], None]) -> None:
    from fakefs import daemon

    daemon.run(guest, service, ready)


def _check_root(service: Service) -> None:
    """The guest's directory of choice has to be there; that of tracing is."""
    try:
        os.stat(service.mountpoint)
    except OSError as error:
        mountpoint.unmount(service.mountpoint, lazy=True)
        raise UserError(f"--root {os.fsdecode(service.root)}: {error.strerror} (in the guest)", exit_status=2) from None


def _serve_in_background(guest: Guest, service: Service, lock_file: int) -> None:
    """Fork the daemon; return when it says that the mount answers, raise what it says went wrong."""
    log = log_path(service.mountpoint)
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            _detach(log)
            mountpoint.sign(lock_file)
            _serve(guest, service, lambda: _say_ready(writer))
            status = 0
        except (EmulatorError, UserError) as error:
            _tell_if_open(writer, str(error))
            kernels.say(f"fakefs: {error}")
        except BaseException as error:
            _tell_if_open(writer, f"the daemon failed: {error!r}")
            kernels.say(f"fakefs: the daemon failed: {error!r}")
        finally:
            with suppress(OSError):
                if log.stat().st_size == 0:
                    log.unlink()
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        word = pipe.read()
    if word != _READY:
        os.waitpid(child, 0)
        raise UserError((word.decode("utf-8", "replace") or "the daemon ended without a word") + _reason(log))


def _reason(log: Path) -> str:
    """Return what libfuse said in the log of a daemon that is no more, and remove the log: it tells nobody else."""
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            said = [line.strip() for line in lines if not line.startswith("fakefs: ")]
        log.unlink()
    except OSError:
        return ""
    return f" ({said[0]})" if said else ""


def _say_ready(fd: int) -> None:
    os.write(fd, _READY)
    os.close(fd)


def _tell_if_open(fd: int, text: str) -> None:
    try:
        _tell(fd, text)
    except OSError:
        return


def log_path(directory: Path) -> Path:
    """Return where the daemon of a mount writes what it has to say."""
    from fakefs import runtime

    return runtime.socket_path(directory).with_suffix(".log")


def _detach(log_file: Path) -> None:
    """Leave the terminal: a session of its own, no input, output to a log."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)
    os.chdir("/")
