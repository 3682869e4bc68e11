"""A FUSE mount for tests with `tests/fake_files.py` under it instead of a guest."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.mounted import PATIENCE

TESTS = Path(__file__).resolve().parent
FAKE = TESTS / "fake_files.py"


class Daemon:
    """The fake, served at `path` by a child process."""

    def __init__(self, path: Path, *arguments: str, **env: str) -> None:
        self.path = path
        with suppress(FileExistsError):  # not exist_ok: it would stat, and a stale mount gives ENOTCONN
            os.mkdir(path)
        environ = {**os.environ, "PYTHONPATH": str(TESTS.parent), "XDG_CACHE_HOME": str(path.parent / "cache"), **env}
        self.errors = open(path.parent / f"{path.name}.stderr", "a+b")  # noqa: SIM115 # closed by stop()
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE), str(path), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environ,
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"ready\n":
            self.stop()
            raise AssertionError(self.stderr())

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()
        while is_mounted(self.path) and subprocess.run(["umount", "-l", self.path], check=False).returncode == 0:
            pass

    def stderr(self) -> str:
        return Path(self.errors.name).read_text()

    def sh(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["timeout", "-s", "KILL", "20", "bash", "-c", command],
            cwd=self.path,
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="surrogateescape",
        )

    def out(self, command: str) -> str:
        done = self.sh(command)
        assert (done.stderr, done.returncode) == ("", 0)
        return done.stdout

    def python(self, code: str) -> str:
        done = subprocess.run(
            ["timeout", "-s", "KILL", "30", sys.executable, "-c", code],
            cwd=self.path,
            capture_output=True,
            check=False,
            text=True,
        )
        assert (done.stderr, done.returncode) == ("", 0)
        return done.stdout

    def blocked(self, *command: str) -> subprocess.Popen[bytes]:
        """Start `command`, which will wait for a read on the mount, and wait until it does."""
        child = subprocess.Popen(command, cwd=self.path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while "request_wait" not in Path(f"/proc/{child.pid}/wchan").read_text() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.02)
        return child


def is_mounted(path: Path) -> bool:
    return f" {path} " in Path("/proc/mounts").read_text()


def wait_until(condition: object, seconds: float = PATIENCE) -> bool:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())
