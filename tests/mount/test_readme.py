"""The README's first terminal session, really run: a reader who repeats it must see what it shows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
_DIRECTORY = "/tmp/tracing"


def session(text: str) -> list[tuple[str, list[str]]]:
    """The first console block of a Markdown text: commands, each with the lines it printed."""
    _, _, rest = text.partition("```console\n")
    steps: list[tuple[str, list[str]]] = []
    for line in rest.partition("```\n")[0].splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], []))
        else:
            steps[-1][1].append(line)
    return steps


def _normal(line: str) -> str:
    """A line without what differs from run to run and from kernel to kernel."""
    line = re.sub(r"^\S+: line \d+: ", "bash: ", line)
    line = re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?", "N", line)
    line = re.sub(r"\[N\] \S+ ", "[N] ", line)  # irqs-off, need-resched...
    return " ".join(line.split())


def test_the_first_session_of_the_readme(environment: dict[str, str], kernel_path: Path, tmp_path: Path) -> None:
    steps = session(README.read_text())
    assert len(steps) > 5
    directory = tmp_path / "tracing"
    mark = "=== next ==="
    script = ""
    for command, _ in steps:
        own = command.replace(_DIRECTORY, shlex.quote(str(directory)))
        own = own.replace("fakefs mount", f"fakefs mount --kernel {shlex.quote(str(kernel_path))}")
        script += f"{own}\necho '{mark}'\n"
    fakefs = tmp_path / "bin" / "fakefs"
    fakefs.parent.mkdir()
    fakefs.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fakefs.cli "$@"\n')
    fakefs.chmod(0o755)
    env = {**environment, "PATH": f"{fakefs.parent}:{os.environ['PATH']}"}
    try:
        done = subprocess.run(
            ["bash", "-c", script],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        subprocess.run([fakefs, "umount", directory], env=env, capture_output=True, check=False)
    printed = [part.splitlines() for part in done.stdout.split(f"{mark}\n")]
    for (command, expected), lines in zip(steps, printed, strict=False):
        seen = [line for line in lines if line != "fakefs: booting Linux (once)"]
        assert [_normal(line) for line in seen] == [_normal(line) for line in expected], command
    assert len(printed) == len(steps) + 1
