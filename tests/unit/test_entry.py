"""Ctrl-C while the command is still being imported: the signal ends it, and nothing is said."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest


def _run(module: str, handler: str = "signal.default_int_handler") -> subprocess.CompletedProcess[str]:
    """Run the command, which gets a SIGINT as it imports a module."""
    script = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, {handler})
from fakefs.__main__ import main
sys.argv = ["fakefs", "status", "/nowhere"]
sys.exit(main())
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("module", ["fakefs.cli", "emulator.guest", "fakefs.labs.command"])
def test_interrupted_while_imported(module: str) -> None:
    done = _run(module)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_interrupted_later() -> None:
    """Then somebody may have something to tidy up."""
    done = _run("fakefs.client")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_where_it_is_ignored() -> None:
    """As by nohup(1), or in the background of a shell without job control."""
    done = _run("fakefs.cli", "signal.SIG_IGN")
    assert done.returncode == 2
    assert done.stderr.startswith("fakefs: /nowhere: ")
