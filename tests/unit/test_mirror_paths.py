"""Paths of mirrored calls: what is told of the host's files, and what is known of the guest's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror.hostpaths import HostPaths, NotMirrored, in_name_only
from fakefs.mirror.records import (
    Birth,
    Credentials,
    Descriptors,
    Entry,
    Exit,
    Files,
    Name,
    Part,
    PathArgument,
    Plain,
    Program,
    Record,
    Signal,
    Sleep,
    Transfer,
    Used,
    Wait,
    decode,
    encode,
    packet,
)


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[HostPaths]:
    """The files below `tmp_path`, as if that were the root directory."""
    root = os.open(tmp_path, os.O_PATH)
    yield HostPaths(root, 0)
    os.close(root)


def told(entries: list[Entry]) -> list[tuple[str, str]]:
    """Paths and kinds of files."""
    kinds = {0: "none", stat.S_IFDIR: "dir", stat.S_IFREG: "file", stat.S_IFLNK: "link", stat.S_IFIFO: "fifo"}
    return [(entry.path, kinds[stat.S_IFMT(entry.mode)]) for entry in entries]


def test_directories_are_told_once(paths: HostPaths, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").write_text("text")
    first = paths.look("/a//./b/file", follow=True)
    assert told(first) == [("/a", "dir"), ("/a/b", "dir"), ("/a/b/file", "file")]
    assert paths.look("/a/../a/b/../b/file", follow=True)[-1] == first[-1]
    assert first[-1].size == 4
    assert paths.look("/a/b/file", follow=True) == first  # nobody was told
    paths.tell(first)
    assert told(paths.look("/a/b/file", follow=True)) == [("/a/b/file", "file")]
    assert told(paths.look("/a/b/none", follow=True)) == [("/a/b/none", "none")]
    assert told(paths.look("/a/b/file/", follow=True)) == [("/a/b/file", "file")]
    paths.forget("/a")
    assert told(paths.look("/a/b/file", follow=True)) == told(first)
    paths.tell(first)
    (tmp_path / "a/b").rename(tmp_path / "a/c")
    (tmp_path / "a/b").symlink_to("c")
    changed = paths.look("/a/b/file", follow=True)
    assert told(changed) == [("/a/b", "link"), ("/a/c", "dir"), ("/a/c/file", "file")]


def test_links(paths: HostPaths, tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/cat").touch()
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "absolute").symlink_to("/bin/cat")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/file")
    expected = [("/bin", "link"), ("/usr", "dir"), ("/usr/bin", "dir"), ("/usr/bin/cat", "file")]
    found = paths.look("/bin/cat", follow=True)
    assert told(found) == expected
    assert found[0].target == "usr/bin"
    assert told(paths.look("/absolute", follow=False)) == [("/absolute", "link")]
    assert told(paths.look("/absolute", follow=True)) == [("/absolute", "link"), *expected]
    assert told(paths.look("/dangling", follow=True)) == [("/dangling", "link"), ("/nowhere", "none")]
    with pytest.raises(NotMirrored):
        paths.look("/loop", follow=True)
    assert told(paths.look("/loop", follow=False)) == [("/loop", "link")]


def test_what_is_not_for_the_guest(paths: HostPaths, tmp_path: Path) -> None:
    (tmp_path / "dev/pts").mkdir(parents=True)
    (tmp_path / "dev/shm").mkdir()
    for path in ("/proc", "/proc/1/mem", "/sys/kernel/tracing/trace", "/dev/mem", "/dev/pts/0"):
        with pytest.raises(NotMirrored):
            paths.look(path, follow=True)
    (tmp_path / "fd").symlink_to("/proc/self/fd")
    with pytest.raises(NotMirrored):
        paths.look("/fd/1", follow=True)
    here = os.open(tmp_path, os.O_PATH)
    with pytest.raises(NotMirrored):  # in the guest's files, mounted somewhere
        HostPaths(here, tmp_path.stat().st_dev).look("/dev", follow=True)
    os.close(here)
    os.mkfifo(tmp_path / "fifo")
    assert told(paths.look("/fifo", follow=True)) == [("/fifo", "fifo")]


def test_to_the_kernels_directories_and_back(paths: HostPaths, tmp_path: Path) -> None:
    """They are taken for what they are called: chdir(2) may go there."""
    (tmp_path / "link").symlink_to("sys/kernel/./tracing")
    tracing = ("/sys/kernel/tracing", "dir")
    assert told(paths.look("/link", follow=True, kernels=True)) == [("/link", "link"), tracing]
    assert told(paths.look("//sys/kernel/tracing/", follow=True, kernels=True)) == [tracing]
    assert told(paths.look("/proc", follow=True, kernels=True)) == [("/proc", "dir")]
    with pytest.raises(NotMirrored):
        paths.look("/sys/kernel/../..", follow=True, kernels=True)
    (tmp_path / "dev").mkdir()
    assert told(paths.look("/dev//tty", follow=True, kernels=True)) == [("/dev", "dir"), ("/dev/tty", "dir")]


def test_what_is_kept_in_memory_is_files(paths: HostPaths, tmp_path: Path) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    (tmp_path / "dev/shm/x").touch()
    expected = [("/dev", "dir"), ("/dev/shm", "dir"), ("/dev/shm/x", "file")]
    assert told(paths.look("/dev/shm/x", follow=True)) == expected
    with pytest.raises(NotMirrored):
        paths.look("/dev/shmem", follow=True)


def test_what_is_only_looked_up() -> None:
    """Devices, but for those that do no harm, and what leads on to open files."""
    links = ("1/fd/3", "self/task/7/fd/0", "self/exe", "self/cwd/x", "thread-self/root", "1/ns/net", "1/map_files/0-1")
    devices = ("mem", "tty", "pts/0", "ttyS0", "snapshot", "watchdog", "stdout", "fd/1")
    for path in (*(f"/proc/{each}" for each in links), *(f"/dev/{each}" for each in devices)):
        assert in_name_only(path), path
    files = ("/proc", "/proc/1/fd", "/proc/self/status", "/proc/self/fdinfo/1", "/proc/uptime", "/sys/class/net")
    for path in (*files, "/dev/null", "/dev/full", "/dev/shm/x", "/etc/exe"):
        assert not in_name_only(path), path


def test_what_our_mount_shows() -> None:
    paths = HostPaths(-1, 0, ["/proc/sys", "/proc/version", "/sys/kernel"])
    for path in ("/proc/sys", "/proc/sys/kernel/pid_max", "/proc/version", "/sys/kernel/tracing/trace"):
        assert paths.is_shown(path), path
    for path in ("/proc/sysvipc/shm", "/proc/versions", "/sys", "/sys/class", "/"):
        assert not paths.is_shown(path), path
    assert not HostPaths(-1, 0).is_shown("/proc/sys")


def test_names_of_any_bytes(paths: HostPaths, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xfe new\nline")
    (tmp_path / name).touch()
    assert told(paths.look("/" + name, follow=True)) == [("/" + name, "file")]


_TEXT = st.binary(max_size=40).map(os.fsdecode)
_INT = st.integers(-(1 << 31), (1 << 63) - 1)
_ENTRY = st.builds(Entry, _TEXT, _INT, _INT, _INT, _INT, _TEXT)
_PATH = st.builds(PathArgument, _TEXT, st.lists(_ENTRY, max_size=3))
_RECORD = st.one_of(
    st.builds(Birth, _INT, _INT, _INT, _TEXT, _INT),
    st.builds(Program, _INT, _PATH, st.lists(_TEXT)),
    st.builds(Exit, _INT, _INT, st.booleans()),
    st.builds(Name, _INT, _TEXT),
    st.builds(Sleep, _INT, st.none() | _INT, _INT),
    st.builds(Plain, _INT, _INT, st.lists(_INT, max_size=3)),
    st.builds(Files, _INT, _INT, st.lists(st.none() | _INT, max_size=6), st.lists(_PATH, max_size=2), _TEXT),
    st.builds(
        *(Transfer, _INT, _INT, st.lists(st.builds(Used, _INT, _PATH, _INT, _INT), max_size=2)),
        *(st.lists(_INT, max_size=3), st.lists(st.builds(Part, st.lists(_INT), _TEXT, _TEXT), max_size=2)),
        st.lists(_ENTRY, max_size=2),
    ),
    st.builds(Wait, _INT, _INT, st.lists(st.none() | _INT, max_size=5)),
    st.builds(Descriptors, _INT, st.lists(_INT, max_size=5)),
    st.builds(Signal, _INT, _INT, st.lists(_INT, max_size=3), st.lists(_INT), st.lists(_INT)),
    st.builds(Credentials, _INT, _INT, st.none() | st.lists(_INT, max_size=5), st.booleans()),
)


@given(st.lists(_RECORD, max_size=3))
def test_records_arrive_as_they_were_sent(records: list[Record]) -> None:
    assert decode(packet(map(encode, records))) == records


def test_what_was_seen_is_looked_at_again(paths: HostPaths, tmp_path: Path) -> None:
    """By somebody who is not mirrored, a file or link on the way is changed: that shows at once."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").touch()
    (tmp_path / "link").symlink_to("a/file")
    (tmp_path / "up").symlink_to("a")

    def look(path: str) -> list[tuple[str, str]]:
        entries = paths.look(path, follow=True)
        paths.tell(entries)
        return told(entries)

    for path in ("/a/file", "/link", "/up/file", "/a/none", "/none/none"):
        look(path)
        assert len(look(path)) == 1, path
        assert look(path) == look(path)
    (tmp_path / "link").unlink()
    assert look("/link") == [("/link", "none")]
    (tmp_path / "b").mkdir()
    (tmp_path / "b/file").touch()
    (tmp_path / "up").unlink()
    (tmp_path / "up").symlink_to("b")
    assert look("/up/file") == [("/up", "link"), ("/b", "dir"), ("/b/file", "file")]
    (tmp_path / "a/file").chmod(0o600)
    assert stat.S_IMODE(paths.look("/a/file", follow=True)[0].mode) == 0o600
    (tmp_path / "a/none").touch()
    assert look("/a/none") == [("/a/none", "file")]
    (tmp_path / "none").mkdir()
    assert look("/none/none") == [("/none", "dir"), ("/none/none", "none")]


def test_what_mirrored_calls_change_is_looked_at_anew(paths: HostPaths, tmp_path: Path) -> None:
    """Even if what is there then seems the same."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").touch()
    paths.tell(paths.look("/a/file", follow=True))
    for _ in range(2):
        assert told(paths.look("/a/file", follow=True)) == [("/a/file", "file")]
    paths.forget("/a")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").symlink_to("b")
    assert told(paths.look("/a/file", follow=True)) == [("/a", "link"), ("/b", "dir"), ("/b/file", "file")]
