"""Every block of commands in the documentation, really run: who repeats a page must see what it shows.

How blocks are marked is in `tests.doc_pages`. A page is one shell, in which its blocks run one after the other. What is
not run, and why, is told at the end of pytest's report.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from docs import manual
from fakefs import cli, mountpoint
from tests.doc_pages import PAGES, ROOT, RUN, Block, Step, alike, blocks, not_run, steps

SHOWN = "6.12."
"""How the version of the kernel begins whose answers the pages show."""

CHECKERS = (["groff", "-ww", "-man", "-Tutf8", "-z"], ["mandoc", "-T", "lint"])

_SECONDS = 180
_DIRECTORY = "/tmp/tracing"
_MARK = "=== of step "


@dataclass(frozen=True)
class Part:
    """A piece of a page's script, and what it must print: a command of a console block, or a whole script or file."""

    block: Block
    step: Step
    script: str
    must_succeed: bool = False

    @property
    def where(self) -> str:
        return f"{self.block.page.relative_to(ROOT)}:{self.step.line}: $ {self.step.command}"


def parts(block: Block, home: Path) -> Iterator[Part]:
    """What a block adds to its page's script; `home` is the directory where the page begins."""
    if block.file:
        command = f"cat >{shlex.quote(str(home / block.file))} <<'END OF THE FILE'\n{block.text}END OF THE FILE"
        yield Part(block, Step(block.line, f"{block.file}: written"), command, must_succeed=True)
    elif block.language == "console":
        for step in steps(block):
            yield Part(block, step, step.command)
    elif "def test_" in block.text:
        (home / f"test_line_{block.line}.py").write_text(block.text)
    else:
        file = home / f"line-{block.line}.{block.language}"
        file.write_text(block.text)
        runner = "python3" if block.language == "python" else "bash -eu"
        yield _script(block, f"the {block.language} block", f"{runner} {shlex.quote(str(file))}", home)


def _script(block: Block, name: str, command: str, home: Path) -> Part:
    """A command that must succeed, and whose output is of interest only when it does not."""
    said = shlex.quote(f"{home}/said")
    return Part(block, Step(block.line, name), f"{command} >{said} 2>&1 || {{ cat {said}; false; }}", must_succeed=True)


@pytest.fixture
def shell(environment: dict[str, str], kernel_path: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a page's shell: `fakefs` runs this source with the tests' kernel; its mounts end with it."""
    binaries, runtime = tmp_path / "bin", tmp_path / "run"
    binaries.mkdir()
    runtime.mkdir(mode=0o700)
    fakefs = binaries / "fakefs"
    fakefs.write_text(
        "#!/bin/sh\n"
        f'run() {{ exec {shlex.quote(sys.executable)} -m fakefs "$@"; }}\n'
        "command=$1\n"
        f"kernel={shlex.quote(str(kernel_path))}\n"
        'case $command in mount | run | shell | test) shift; run "$command" --kernel "$kernel" "$@" ;; esac\n'
        'case "$1 $2" in "lab start" | "lab test") lab=$2; shift 2; run lab "$lab" --kernel "$kernel" "$@" ;; esac\n'
        'run "$@"\n'
    )
    fakefs.chmod(0o755)
    path = [str(binaries), str(Path(sys.executable).parent), os.environ["PATH"]]
    own = {"XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(tmp_path / "state"), "SHELL": "/bin/bash"}
    env = {**environment, "PATH": os.pathsep.join(path), **own}
    yield env
    with open("/proc/self/mountinfo", "rb") as file:
        mounts = [mount.directory for mount in mountpoint.parse_mountinfo(file.read())]
    for directory in mounts:
        if directory.startswith(os.fsencode(tmp_path) + b"/"):
            subprocess.run([fakefs, "umount", "--lazy", directory], env=env, capture_output=True, check=False)


def _run(script: str, env: dict[str, str], home: Path) -> str:
    """What a script prints, until it ends or takes too long. Whatever it has started is killed."""
    output = home.parent / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "-c", script],
            env=env,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            with output.open("ab") as more:
                more.write(f"\nnot done after {_SECONDS} s\n".encode())
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return output.read_text(errors="replace")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path, shell: dict[str, str], kernel_path: Path, tmp_path: Path) -> None:
    """A page without what its blocks say they need."""
    chosen = []
    for block in blocks(page, page.read_text()):
        if block.not_run or block.needs:
            not_run.append((block.where, block.not_run or f"{' '.join(block.needs)}: make soak"))
        elif block.language in RUN or block.file:
            chosen.append(block)
    _try(chosen, shell, kernel_path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```console needs " in page.read_text()], ids=lambda p: p.name
)
def test_page_with_tools(page: Path, shell: dict[str, str], kernel_path: Path, tmp_path: Path) -> None:
    """A page with the programs that are installed here."""
    chosen = []
    for block in blocks(page, page.read_text()):
        missing = [program for program in block.needs if not shutil.which(program)]
        if missing:
            not_run.append((block.where, f"no {missing[0]} here"))
        elif (block.language in RUN or block.file) and not block.not_run:
            chosen.append(block)
    _try(chosen, shell, kernel_path, tmp_path)


def _try(chosen: list[Block], shell: dict[str, str], kernel_path: Path, tmp_path: Path) -> None:
    """Compare the shown and the printed step by step; the first difference is told with its file and line."""
    home = tmp_path / "home"
    home.mkdir()
    own = tmp_path / "tracing"
    todo = [part for block in chosen for part in parts(block, home)]
    if tests := [block for block in chosen if block.language == "python" and "def test_" in block.text]:
        todo.append(_script(tests[0], "this page's tests", f"cd {shlex.quote(str(home))}; pytest -q", home))
    version = kernel_path.parent.name if kernel_path.name == "vmlinuz" else kernel_path.name
    if todo and not version.startswith(SHOWN):
        pytest.skip(f"the pages show Linux {SHOWN}x, this is {version}")
    # A function keeps $? for the next command, as a prompt does.
    script = f'_next() {{ local status=$?; printf "%s%s %s\\n" "{_MARK}" "$1" "$status"; return "$status"; }}\n'
    for number, part in enumerate(todo):
        script += f"{part.script.replace(_DIRECTORY, str(own))}\n_next {number}\n"
    printed = _run(script, shell, home).replace(str(own), _DIRECTORY)
    before = 0
    for number, part in enumerate(todo):
        mark = re.compile(rf"{_MARK}{number} (\d+)\n").search(printed, before)
        text = printed[before : mark.start() if mark else len(printed)]
        lines = [line for line in text.splitlines() if line != "fakefs: booting Linux (once)"]
        assert mark, f"{part.where}\nthe shell went no further; it printed:\n{text}"
        if part.must_succeed:
            assert mark[1] == "0", f"{part.where}\nexit status {mark[1]}; it printed:\n{text}"
        else:
            shown = "\n".join(part.step.shown)
            assert alike(part.step.shown, lines), f"{part.where}\nthe page shows:\n{shown}\nit printed:\n{text}"
        before = mark.end()


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker[0])
def test_man_pages_have_no_warnings(checker: list[str], tmp_path: Path) -> None:
    if not shutil.which(checker[0]):
        pytest.skip(f"{checker[0]} is not installed")
    for name, text in manual.man_pages(manual.commands(cli.parser()), "1.0", "2026-11-26"):
        (tmp_path / name).write_text(text)
        done = subprocess.run([*checker, tmp_path / name], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, ""), name
