"""A student's progress in a lab: a small JSON file per lab, replaced as a whole, where the user's state is kept.

    STATE/labs/NAME/progress.json     hints taken, checks made, when it was passed
    STATE/labs/NAME/lock              held while the lab runs, with the process id of `fakefs lab start` in it
    STATE/labs/NAME/reset             there while a reset is asked for

STATE is $XDG_STATE_HOME/fakefs, or ~/.local/state/fakefs (the XDG base directory specification).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from fakefs.errors import UserError


@dataclass(frozen=True)
class Progress:
    """How far a student is. `passed_at` is the time of the first pass, in ISO 8601, or empty."""

    hints: int = 0
    checks: int = 0
    solution_seen: bool = False
    passed_at: str = ""


def place(name: str) -> Path:
    """The directory of a lab's progress."""
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local/state") / "fakefs/labs" / name


def load(directory: Path) -> Progress:
    """Read what is in a directory; a new one when there is nothing, or nothing of sense."""
    try:
        values = json.loads((directory / "progress.json").read_text())
        known = {field.name: type(field.default) for field in fields(Progress)}
        if isinstance(values, dict):
            values = {name: values[name] for name, kind in known.items() if type(values.get(name)) is kind}
            return Progress(**{name: value for name, value in values.items() if type(value) is not int or value >= 0})
    except (OSError, ValueError, RecursionError):
        pass
    return Progress()


def change(directory: Path, **values: object) -> Progress:
    """Change some of it, and write it. Raises UserError."""
    new = replace(load(directory), **values)  # type: ignore[arg-type]  # the callers name fields of the class
    unfinished = directory / f".{os.getpid()}.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(asdict(new)) + "\n")
        unfinished.replace(directory / "progress.json")
    except OSError as error:
        raise UserError(f"cannot keep your progress: {directory}: {error.strerror}") from None
    return new


@contextmanager
def running(name: str) -> Iterator[None]:
    """Hold the lab's lock. Raises UserError when it is running already."""
    import fcntl

    directory = place(name)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; set XDG_STATE_HOME to a directory you can write to") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(lock, 32, 0).decode(errors="replace").strip()
            raise UserError(f"lab {name} is running already, as process {pid}: leave it first") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        (directory / "reset").unlink(missing_ok=True)
        yield
    finally:
        os.close(lock)


def runner(name: str) -> int | None:
    """The process id of the `fakefs lab start` that holds a lab's lock; None when nobody does."""
    import fcntl

    try:
        with open(place(name) / "lock", encoding="ascii", errors="replace") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = int(lock.read(32))
                return pid if pid > 0 else None  # the others are whole groups of processes to kill(2)
    except (OSError, ValueError):
        pass
    return None


def all_running() -> list[str]:
    """The names of the labs that are running now."""
    names = sorted(path.parent.name for path in place("x").parent.glob("*/lock"))
    return [name for name in names if runner(name) is not None]


def ask_reset(name: str) -> None:
    """Have the lab begin anew when its shell ends."""
    (place(name) / "reset").touch()


def take_reset(name: str) -> bool:
    """Whether that was asked for; it is not any more."""
    try:
        (place(name) / "reset").unlink()
    except OSError:
        return False
    return True
