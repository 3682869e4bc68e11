"""A running lab: a fresh guest in the private view of `fakefs run`, with the lab's modules, setup and workload in it.

`start()` is outside and forks one view after the other, as resets ask for it. What is inside knows the lab by a
directory that FAKEFS_LAB names; it lies in the view's own filesystem and goes with it.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import string
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fakefs import client, kernels, runtime
from fakefs.errors import UserError
from fakefs.frames import ERROR, EXIT, STDIN
from fakefs.labs import catalog, progress
from fakefs.labs.catalog import Lab
from fakefs.labs.script import TRACING, run_script

_VARIABLE = "FAKEFS_LAB"
_SETUP_SECONDS = 60
_GUEST_PATH = "/bin:/sbin:/usr/bin:/usr/sbin"
_IN_GUEST = "cat >/tmp/workload && { setsid sh /tmp/workload </dev/null >/dev/null 2>&1 & }"
_RC = """\
[ -f ~/.bashrc ] && . ~/.bashrc
PATH={path}
PS1='[lab {name}] \\w \\$ '
unset PROMPT_COMMAND
"""

WhenReady = Callable[["Session"], None]


@dataclass(frozen=True)
class Session:
    """What is known inside: the lab's directory, where progress is kept, the secret word, the shell's process id."""

    lab: str
    progress: str
    secret: str
    shell: int

    @staticmethod
    def directory() -> Path:
        """Where a session keeps its files: the same path in every view, and each view's own."""
        return runtime.directory() / "lab"

    @classmethod
    def current(cls) -> Session | None:
        """The session this process is in."""
        try:
            return cls(**json.loads(Path(os.environ[_VARIABLE], "session.json").read_text()))
        except (KeyError, OSError, ValueError, TypeError):
            return None

    def environment(self) -> dict[str, str]:
        """The variables of the lab's scripts."""
        return {**os.environ, _VARIABLE: str(self.directory()), "SECRET": self.secret}


@dataclass(frozen=True)
class Guests:
    """Which kernel a lab runs with, and how much memory (bytes) it has; None and 0 are the defaults."""

    kernel: Path | None = None
    memory: int = 0


def start(lab: Lab, guests: Guests, command: Sequence[str] = ()) -> int:
    """Run a lab's shell, or a command, until it ends without a reset; return its exit status. Raises UserError."""
    keep = progress.place(lab.name)
    with progress.running(lab.name):
        place = Place(lab, guests)
        silent = bool(command)

        def begin(_: Session) -> None:
            if not silent:
                show(lab)

        while True:
            status = place.run(keep, command or _shell(), begin)
            if not progress.take_reset(lab.name):
                break
            kernels.say(f"fakefs: lab {lab.name}: a fresh kernel")
            silent = True
    if not command:
        state = "passed" if progress.load(keep).passed_at else "not passed yet"
        kernels.say(f"fakefs: lab {lab.name}: {state}")
    return status


class Place:
    """Where a lab takes place: its modules, built, and a guest that is never run, but forked with."""

    def __init__(self, lab: Lab, guests: Guests) -> None:
        """Fetch, boot and build what is needed. Raises UserError."""
        from emulator.guest import DEFAULT_MEMORY
        from fakefs import forkserver
        from fakefs.modules.build import build
        from fakefs.mounting import Order, get_guest

        self.lab = lab
        self._guest = get_guest(Order(Path(), guests.kernel, guests.memory or DEFAULT_MEMORY))
        self._modules = [build(lab.directory / module, self._guest.release) for module in lab.modules]
        forkserver.import_all()

    def run(self, keep: Path | None, argv: Sequence[str], when_ready: WhenReady) -> int:
        """Run a program in the lab with a fresh guest; return its exit status.

        `when_ready` is called inside, before the program. Progress is kept in `keep`, without that in the session.
        """
        from fakefs import run_command

        secret = random.choice(self.lab.secret) if self.lab.secret else ""

        def prepare() -> str:
            session = _open(self.lab, keep, secret, self._modules)
            _set_up(self.lab, session, self._modules)
            when_ready(session)
            return str(TRACING)

        status = run_command.perform(run_command.Errand(list(argv), self._guest, prepare=prepare))
        code = os.waitstatus_to_exitcode(status)
        return 128 - code if code < 0 else code


def _open(lab: Lab, keep: Path | None, secret: str, modules: Sequence[Path]) -> Session:
    directory = Session.directory()
    directory.mkdir()
    session = Session(str(lab.directory), str(keep or directory), secret, os.getpid())
    (directory / "session.json").write_text(json.dumps(asdict(session)))
    (directory / "rc").write_text(_RC.format(path=shlex.quote(os.environ["PATH"]), name=lab.name))
    if modules:
        (directory / "modules").mkdir()
        for module in modules:
            (directory / "modules" / module.name).symlink_to(module)
        os.environ["MODULES"] = str(directory / "modules")
    os.environ[_VARIABLE] = str(directory)
    os.environ["PS1"] = f"[lab {lab.name}] $ "  # for shells that read no file
    return session


def _shell() -> list[str]:
    """The student's shell. The labs' texts are for bash."""
    shell = f'bash --rcfile "${_VARIABLE}/rc"' if shutil.which("bash") else "sh"
    return ["sh", "-c", f"exec {shell} -i"]


def _set_up(lab: Lab, session: Session, modules: Sequence[Path]) -> None:
    """Bring the guest into the state that the lab begins with. Raises UserError."""
    from fakefs.modules import client as module_client

    mount = client.find_mount(None)
    values = {"SECRET": session.secret}
    for module in modules:
        module_client.insert(mount, module, shlex.split(string.Template(lab.parameters).safe_substitute(values)))
    if lab.text("setup"):
        _run_setup(lab, session)
    if workload := lab.text("workload"):
        _start_workload(lab, mount, workload, values)


def _run_setup(lab: Lab, session: Session) -> None:
    argv = ["sh", "-e", str(lab.directory / "setup")]
    done = run_script(lab, "setup", argv, session.environment(), _SETUP_SECONDS)
    if done.returncode:
        said = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"lab {lab.name}: its setup failed with exit status {done.returncode}: {said}")


def _start_workload(lab: Lab, mount: Path, text: str, values: dict[str, str]) -> None:
    """Have a script run in the guest, away from us."""
    request = {"do": "exec", "argv": ["sh", "-c", _IN_GUEST], "env": {"PATH": _GUEST_PATH, "HOME": "/root", **values}}
    with closing(client.Channel(mount, request)) as channel:
        channel.send(STDIN, text.encode())
        channel.send(STDIN, b"")
        while (frame := channel.receive()) is not None and frame[0] not in (EXIT, ERROR):
            pass
    if frame is None or frame != (EXIT, b"\0"):
        said = frame[1].decode(errors="replace") if frame and frame[0] == ERROR else "the guest needs busybox"
        raise UserError(f"lab {lab.name}: its workload could not be started: {said}")


def show(lab: Lab) -> None:
    """Print the text for the student."""
    text = lab.text("README.md")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console(width=min(shutil.get_terminal_size().columns, 100)).print(Markdown(text))
    else:
        print(text)
    print("\nfakefs lab check | hint | solution | reset | text, and `exit` to leave\n", flush=True)


def reset(name: str | None) -> None:
    """Have the lab that is running begin anew with a fresh guest: its shell is told to end. Raises UserError."""
    session = Session.current()
    if session is not None:
        lab = catalog.read(Path(session.lab))
        if session.progress == str(Session.directory()):
            raise UserError("this lab is being tested: there is nothing to reset")
        progress.ask_reset(lab.name)
        os.kill(session.shell, signal.SIGHUP)
        return
    running = [name] if name else progress.all_running()
    if len(running) != 1:
        why = "no lab is running" if not running else "several labs are running; name one"
        raise UserError(f"{why}: fakefs lab {'reset' if running else 'start'} NAME")
    pid = progress.runner(running[0])
    if pid is None:
        raise UserError(f"lab {running[0]} is not running: fakefs lab start {running[0]}")
    progress.ask_reset(running[0])
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGHUP)
