"""Labs: each is solved as a student would, and what can go wrong is a line."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakefs.errors import UserError
from fakefs.labs import catalog, progress
from fakefs.modules import headers
from tests.mounted import FAKEFS

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def needed(kernel_path: Path) -> None:
    """The headers that labs with modules need."""
    from emulator.kernel.image import KernelImage

    try:
        headers.find(KernelImage.load(kernel_path).version)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def student(environment: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a student who begins: no progress yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path))
        yield {**environment, "XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}


@pytest.fixture
def fakefs(student: dict[str, str]) -> Command:
    """Run the command; both outputs together."""

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [*FAKEFS, *map(str, words)]
        done = subprocess.run(
            command, env=student, stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
        )
        done.stdout = done.stdout.replace("fakefs: booting Linux (once)\n", "")
        return done

    return run


@pytest.fixture
def lab(tmp_path: Path, fakefs: Command) -> Path:
    """A lab of a teacher's, as `fakefs lab new` makes it."""
    directory = tmp_path / "my-lab"
    assert fakefs("lab", "new", directory).returncode == 0
    return directory


@pytest.mark.parametrize("name", catalog.names())
def test_a_lab_is_solved(name: str, fakefs: Command, kernel_path: Path, request: pytest.FixtureRequest) -> None:
    """Its check fails with a line before anything is done, and passes after what a student would type."""
    if catalog.read(catalog.CATALOG / name).modules:
        request.getfixturevalue("needed")
    done = fakefs("lab", "test", "--kernel", kernel_path, name)
    if "this lab needs fprobe events" in done.stdout:
        pytest.skip("this kernel has no fprobe events")
    assert done.stdout == f"TAP version 13\n1..1\nok 1 - {name}\n"


def test_there_are_enough() -> None:
    labs = catalog.labs()
    assert len(labs) >= 14
    assert [lab.level for lab in labs] == sorted(lab.level for lab in labs)
    assert {lab.level for lab in labs} == {1, 2, 3, 4, 5}
    assert all(lab.hints and lab.text("README.md").startswith("# ") for lab in labs)


class Terminal:
    """A student at a terminal."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, {**env, "TERM": "dumb"})
        self.seen = ""

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Read until `pattern` is there; return what was read up to its end."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            if not select.select([self.fd], [], [], max(end - time.monotonic(), 0))[0]:
                raise AssertionError(f"no {pattern!r} within {seconds} s in:\n{self.seen}")
            try:
                self.seen += os.read(self.fd, 1 << 16).decode(errors="replace")
            except OSError:
                raise AssertionError(f"the end without {pattern!r}:\n{self.seen}") from None
        read, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return read

    def type(self, line: str) -> None:
        os.write(self.fd, line.encode() + b"\n")

    def close(self) -> int:
        """Wait for the end; return the exit status."""
        try:
            while os.read(self.fd, 1 << 16):
                pass
        except OSError:  # EIO: all that had the terminal are gone
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_student_at_a_terminal(student: dict[str, str], kernel_path: Path) -> None:
    command = [*FAKEFS, "lab", "start", "--kernel", str(kernel_path), "first-probe"]
    terminal = Terminal(command, student)
    prompt = r"\[lab first-probe\] /sys/kernel/tracing [#$] "
    assert "vfs_read" in terminal.wait_for(prompt)
    terminal.type("fakefs lab check")
    terminal.wait_for(r"not yet: dynamic_events has an event called reads")
    terminal.type("fakefs lab hint")
    terminal.wait_for("Hint 1 of 3")
    terminal.wait_for(prompt)
    for line in catalog.find("first-probe").text("solution").splitlines():
        terminal.type(line)
        terminal.wait_for(prompt)
    terminal.type("fakefs lab check; echo status $?")
    terminal.wait_for("lab first-probe: passed\r\nstatus 0")

    # The same lab at once is refused; a reset brings a fresh kernel, from inside or from outside.
    second = subprocess.run(command, env=student, capture_output=True, text=True, timeout=60, check=False)
    assert "lab first-probe is running already, as process" in second.stderr
    terminal.type("fakefs lab reset")
    terminal.wait_for("lab first-probe: a fresh kernel")
    terminal.wait_for(prompt)
    terminal.type("wc -c <dynamic_events")
    terminal.wait_for("\n0\r\n")
    terminal.wait_for(prompt)
    subprocess.run([*FAKEFS, "lab", "reset"], env=student, timeout=60, check=True)
    terminal.wait_for("lab first-probe: a fresh kernel")
    terminal.wait_for(prompt)

    # A student who breaks the guest.
    terminal.type("fakefs exec -- sh -c 'echo c >/proc/sysrq-trigger'; fakefs lab check")
    terminal.wait_for("the guest has died .*; a fresh one: fakefs lab reset")
    terminal.type("fakefs lab reset")
    terminal.wait_for("lab first-probe: a fresh kernel")
    terminal.wait_for(prompt)
    terminal.type("sh -c 'echo begun; exec sleep 100'")
    terminal.wait_for("\nbegun")
    os.write(terminal.fd, b"\x03")
    terminal.wait_for(prompt)
    terminal.type("exit")
    terminal.wait_for("lab first-probe: passed")
    terminal.close()
    kept = progress.load(progress.place("first-probe"))
    assert (kept.hints, kept.checks, bool(kept.passed_at)) == (1, 2, True)


def test_two_labs_at_once(student: dict[str, str], lab: Path, kernel_path: Path) -> None:
    """Each with its own kernel; from outside a reset has to say which."""
    prompt = r"\[lab {}\] /sys/kernel/tracing [#$] "
    terminals = {}
    for name in ("first-probe", str(lab)):
        terminal = Terminal([*FAKEFS, "lab", "start", "--kernel", str(kernel_path), name], student)
        terminals[Path(name).name] = terminal
        terminal.wait_for(prompt.format(Path(name).name))
        terminal.type(f"echo 'p:{Path(name).name.replace('-', '_')} vfs_read' > dynamic_events; cat dynamic_events")
        assert terminal.wait_for(r"\np:kprobes/\w+ vfs_read").count("p:kprobes/") == 1
    done = subprocess.run([*FAKEFS, "lab", "reset"], env=student, capture_output=True, text=True, check=False)
    assert done.stderr == "fakefs: several labs are running; name one: fakefs lab reset NAME\n"
    subprocess.run([*FAKEFS, "lab", "reset", "my-lab"], env=student, timeout=60, check=True)
    terminals["my-lab"].wait_for("lab my-lab: a fresh kernel")
    terminals["my-lab"].wait_for(prompt.format("my-lab"))
    terminals["first-probe"].type("cat dynamic_events")
    terminals["first-probe"].wait_for(r"\np:kprobes/first_probe vfs_read")
    for name, terminal in terminals.items():
        terminal.type("exit")
        terminal.wait_for(f"lab {name}: not passed yet")
        terminal.close()


def test_results_for_a_class(fakefs: Command, lab: Path, kernel_path: Path) -> None:
    script = f"fakefs lab check --json; fakefs lab check --json 999; bash {lab}/solution; fakefs lab check --json"
    done = fakefs("lab", "start", "--kernel", kernel_path, lab, "--", "sh", "-c", script)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result["passed"] for result in results] == [False, False, True], done.stdout
    assert results[0]["items"] == [{"text": "there is a probe on vfs_write", "passed": False}]
    assert len(results[2]["items"]) == 3
    assert results[2]["progress"]["checks"] == 4
    assert done.returncode == 0
    listed = json.loads(fakefs("lab", "list", "--json").stdout)
    assert {"lab", "title", "level", "hints", "checks", "solution_seen", "passed_at"} == set(listed[0])
    assert "first-probe" in fakefs("lab", "list").stdout


def test_a_teachers_lab(fakefs: Command, lab: Path, kernel_path: Path) -> None:
    done = fakefs("lab", "test", "--kernel", kernel_path, lab)
    assert done.stdout.endswith(f"ok 1 - {lab}\n"), done.stdout
    (lab / "lab.toml").write_text('title = "too easy"\n')
    (lab / "check").write_text("want 'nothing' true\n")
    assert "its check passes before anything is done" in fakefs("lab", "test", "--kernel", kernel_path, lab).stdout


def _without_readme(lab: Path) -> None:
    (lab / "README.md").unlink()


def _setup_fails(lab: Path) -> None:
    (lab / "setup").write_text("echo 'no coffee'; exit 3\n")


def _no_toml(lab: Path) -> None:
    (lab / "lab.toml").write_text("title = \n")


def _typo(lab: Path) -> None:
    (lab / "lab.toml").write_text('title = "x"\nanser = "y"\n')


def _wrong_type(lab: Path) -> None:
    (lab / "lab.toml").write_text('title = "x"\nlevel = "hard"\n')


def _no_module(lab: Path) -> None:
    (lab / "lab.toml").write_text('title = "x"\nmodules = ["bug.c"]\n')


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (_without_readme, r"lab my-lab: .* has no README.md; start with: fakefs lab new NAME"),
        (_setup_fails, r"lab my-lab: its setup failed with exit status 3: no coffee"),
        (_no_toml, r"lab my-lab: lab.toml: Invalid value.*"),
        (_typo, r"lab my-lab: lab.toml: unknown 'anser'; did you mean 'answer'\?"),
        (_wrong_type, r"lab my-lab: lab.toml: level is a number"),
        (_no_module, r"lab my-lab: lab.toml: there is no bug.c"),
    ],
)
def test_a_broken_lab(fakefs: Command, lab: Path, kernel_path: Path, spoil: Callable[[Path], None], line: str) -> None:
    spoil(lab)
    done = fakefs("lab", "start", "--kernel", kernel_path, lab, "--", "echo", "started")
    assert re.fullmatch(f"fakefs: {line}\n", done.stdout), done.stdout
    assert done.returncode != 0


def test_without_a_lab(fakefs: Command, lab: Path, tmp_path: Path) -> None:
    for action in ("check", "hint", "solution", "text"):
        done = fakefs("lab", action)
        assert (done.returncode, done.stdout) == (
            2,
            "fakefs: no lab is running here; begin one: fakefs lab start NAME\n",
        )
    assert "no lab is running: fakefs lab start NAME" in fakefs("lab", "reset").stdout
    assert fakefs("lab", "start", "frist-probe").stdout == (
        "fakefs: no lab is called frist-probe; did you mean first-probe?\n"
    )
    assert "see: fakefs lab list" in fakefs("lab", "hint", "qqqq").stdout
    assert "is there already" in fakefs("lab", "new", lab).stdout
    assert fakefs("lab", "hint", "first-probe").stdout.startswith("Hint 1 of 3\n")
    assert fakefs("lab", "hint", "first-probe").stdout.startswith("Hint 2 of 3\n")
    assert "vfs_read" in fakefs("lab", "solution", "first-probe").stdout
    assert progress.load(progress.place("first-probe")).solution_seen
    # A progress that makes no sense is a new one.
    (progress.place("first-probe") / "progress.json").write_text('{"hints": "many"')
    assert fakefs("lab", "hint", "first-probe").stdout.startswith("Hint 1 of 3\n")


def test_a_broken_check(fakefs: Command, lab: Path, kernel_path: Path) -> None:
    (lab / "check").write_text("no-such-command\n")
    done = fakefs("lab", "start", "--kernel", kernel_path, lab, "--", "fakefs", "lab", "check")
    assert "lab my-lab: its check is broken (exit status 127): " in done.stdout
    assert shutil.which("bash")


def test_interrupted_while_it_starts(student: dict[str, str], lab: Path, kernel_path: Path) -> None:
    (lab / "setup").write_text("echo >$HOME/begun; sleep 100\n")
    command = [*FAKEFS, "lab", "start", "--kernel", str(kernel_path), str(lab)]
    terminal = Terminal(command, student)
    begun = Path(student["HOME"], "begun")
    end = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.write(terminal.fd, b"\x03")
    assert terminal.close() == 128 + signal.SIGINT
