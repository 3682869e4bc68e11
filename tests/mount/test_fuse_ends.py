"""The FUSE layer without a guest: how a daemon, or its mount, begins and ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuse_daemon import FAKE, TESTS, Daemon, is_mounted, wait_until
from tests.mounted import PATIENCE


def test_the_daemon_never_blocks_on_dev_fuse(fs: Daemon) -> None:
    """A request that is withdrawn after epoll announced it would stop the guest until the next one comes."""
    descriptors = Path(f"/proc/{fs.process.pid}/fd")
    number = next(fd.name for fd in descriptors.iterdir() if os.readlink(fd) == "/dev/fuse")
    info = (descriptors.parent / "fdinfo" / number).read_text().splitlines()
    flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))
    assert flags & os.O_NONBLOCK


def test_read_only(tmp_path: Path) -> None:
    fs = Daemon(tmp_path / "mnt", "ro")
    try:
        assert "Read-only" in fs.sh("echo 1 > tracing_on").stderr
    finally:
        fs.stop()


def test_sigterm_unmounts_with_a_blocked_reader(tmp_path: Path) -> None:
    fs = Daemon(tmp_path / "mnt")
    try:
        reader = fs.blocked("cat", "trace_pipe")
        begin = time.perf_counter()
        fs.process.terminate()
        assert fs.process.wait(PATIENCE) == 0
        print(f"stopped in {(time.perf_counter() - begin) * 1e3:.0f} ms")
        assert not is_mounted(fs.path)
        assert reader.wait(PATIENCE) == 1
        reader.communicate()
        assert fs.stderr() == ""
    finally:
        fs.stop()


def test_unmount_from_outside_ends_the_daemon(tmp_path: Path) -> None:
    from fakefs.mountpoint import unmount

    fs = Daemon(tmp_path / "mnt")
    try:
        assert fs.out("cat tracing_on") == "1\n"
        unmount(fs.path)
        assert fs.process.wait(PATIENCE) == 0
        assert not is_mounted(fs.path)
        assert fs.stderr() == ""
    finally:
        fs.stop()


def test_kill_leaves_no_stale_mount(tmp_path: Path) -> None:
    for number in range(5):  # fusermount3 races with the kernel, which lets go of what the process had open
        fs = Daemon(tmp_path / f"mnt{number}")
        try:
            reader = fs.blocked("cat", "trace_pipe")
            fs.process.kill()
            fs.process.wait()
            reader.wait(PATIENCE)
            reader.communicate()
            assert wait_until(lambda fs=fs: not is_mounted(fs.path))
        finally:
            fs.stop()


def test_a_stale_mount_is_cleaned_by_the_next(tmp_path: Path) -> None:
    bare = tmp_path / "bin"  # no fusermount3 here, so no auto_unmount
    bare.mkdir()
    first = Daemon(tmp_path / "mnt", PATH=str(bare))
    try:
        first.process.kill()
        first.process.wait()
        with pytest.raises(OSError, match="not connected"):
            os.stat(first.path)
        second = Daemon(tmp_path / "mnt")
        try:
            assert second.out("cat tracing_on") == "1\n"
        finally:
            second.stop()
    finally:
        first.stop()
    assert not is_mounted(first.path)


def test_two_daemons_on_one_directory(tmp_path: Path) -> None:
    first = Daemon(tmp_path / "mnt")
    try:
        for env, status, message in (
            ({}, 1, f"already served by process {first.process.pid}"),
            ({"XDG_CACHE_HOME": str(tmp_path / "other")}, 2, "already mounted"),
        ):
            done = subprocess.run(
                [sys.executable, str(FAKE), str(first.path)],
                env={**os.environ, "PYTHONPATH": str(TESTS.parent), "XDG_CACHE_HOME": str(tmp_path / "cache"), **env},
                capture_output=True,
                timeout=60,
                text=True,
                check=False,
            )
            assert done.returncode == status
            assert done.stderr.count("\n") == 1
            assert message in done.stderr
        assert first.out("cat tracing_on") == "1\n"
    finally:
        first.stop()
