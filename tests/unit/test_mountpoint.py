"""Checks of the directory to mount on, without mounting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from fakefs.errors import UserError
from fakefs.mountpoint import Mount, check, is_stale, lock, mount_at, parse_mountinfo, unmount

FIELDS = some.binary(min_size=1).filter(lambda field: b"\n" not in field)


def escape(field: bytes) -> bytes:
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in field)


@given(some.binary())
def test_any_mountinfo_is_parsed(text: bytes) -> None:
    parse_mountinfo(text)


@given(some.lists(some.tuples(FIELDS, FIELDS)), some.sampled_from([b"", b"shared:1 ", b"shared:1 master:2 "]))
def test_mountinfo(mounts: list[tuple[bytes, bytes]], optional: bytes) -> None:
    lines = [
        b"36 35 98:0 / " + escape(directory) + b" rw,noatime " + optional + b"- fuse.x " + escape(source) + b" rw\n"
        for directory, source in mounts
    ]
    assert parse_mountinfo(b"".join(lines)) == [
        Mount(directory, "fuse.x", source, 36, b"98:0", b"/", b"rw,noatime", b"rw") for directory, source in mounts
    ]


def test_mounts_are_shown_as_the_kernel_shows_them() -> None:
    mounts = Path("/proc/self/mounts")
    shown = mounts.read_bytes(), Path("/proc/self/mountinfo").read_bytes(), mounts.read_bytes()
    while shown[0] != shown[2]:  # somebody has mounted something in between
        shown = mounts.read_bytes(), Path("/proc/self/mountinfo").read_bytes(), mounts.read_bytes()
    assert b"".join(map(bytes, parse_mountinfo(shown[1]))) == shown[0]


def test_an_empty_directory_will_do(tmp_path: Path) -> None:
    check(tmp_path)
    assert mount_at(tmp_path) is None
    assert not is_stale(tmp_path)


def test_wrong_directories(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, says in (
        (tmp_path, "not empty"),
        (tmp_path / "file", "not a directory"),
        (tmp_path / "file" / "x", "not a directory"),
        (tmp_path / "none", "mkdir -p"),
        (Path("/proc"), "mount point"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            check(path)
        assert caught.value.exit_status == 2
        assert "\n" not in str(caught.value)


def test_unmount_touches_only_ours(tmp_path: Path) -> None:
    for path, says in ((tmp_path, "nothing is mounted"), (Path("/proc"), "not ours")):
        with pytest.raises(UserError, match=says):
            unmount(path)


def test_the_second_is_told_who_is_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory, alias = tmp_path / "d", tmp_path / "alias"
    directory.mkdir()
    alias.symlink_to(directory)
    with lock(directory):
        with pytest.raises(UserError, match=f"process {os.getpid()};") as caught, lock(alias):
            pass
        assert caught.value.exit_status == 1
        with lock(tmp_path):
            pass
    with lock(alias):
        pass


def test_the_lock_dies_with_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    holder = (
        "import os, sys; from pathlib import Path; from fakefs.mountpoint import lock\n"
        "with lock(Path(sys.argv[1])): os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", holder, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == -9
    with lock(tmp_path):
        pass


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot make the lock file"), lock(tmp_path):
        pass
