"""The cpio builder: read back by a parser written from the format's description, and by cpio where it is installed."""

from __future__ import annotations

import shutil
import stat
import subprocess
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.errors import EmulatorError
from emulator.initramfs import Initramfs


class Entry(NamedTuple):
    name: str
    mode: int
    data: bytes
    device: tuple[int, int]


def parse(archive: bytes) -> list[Entry]:
    """Read a newc archive, checking everything that is fixed."""
    entries: list[Entry] = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        inode, mode, uid, gid, links, mtime, size, major, minor, rmajor, rminor, name_size, check = fields
        assert (uid, gid, mtime, major, minor, check) == (0, 0, 0, 0, 0, 0)
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at += (110 + name_size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return entries
        assert inode == len(entries) + 1
        assert links == (2 if stat.S_ISDIR(mode) else 1)
        entries.append(Entry(name[:-1].decode(), mode, archive[at : at + size], (rmajor, rminor)))
        at += (size + 3) // 4 * 4


def sample() -> Initramfs:
    tree = Initramfs()
    tree.add_dir("/dev")
    tree.add_node("/dev/console", stat.S_IFCHR | 0o600, 5, 1)
    tree.add_file("/init", b"\x7fELF...", 0o755)
    tree.add_file("/etc/motd", b"hello\n")
    tree.add_symlink("/bin/sh", "busybox")
    return tree


def test_entries() -> None:
    assert parse(sample().to_bytes()) == [
        Entry("dev", 0o040755, b"", (0, 0)),
        Entry("dev/console", 0o020600, b"", (5, 1)),
        Entry("init", 0o100755, b"\x7fELF...", (0, 0)),
        Entry("etc", 0o040755, b"", (0, 0)),  # the missing parents come by themselves
        Entry("etc/motd", 0o100644, b"hello\n", (0, 0)),
        Entry("bin", 0o040755, b"", (0, 0)),
        Entry("bin/sh", 0o120777, b"busybox", (0, 0)),
    ]


def test_the_same_calls_give_the_same_bytes() -> None:
    tree = sample()
    assert tree.to_bytes() == tree.to_bytes() == sample().to_bytes()
    assert len(tree.to_bytes()) % 4 == 0


def test_cpio_reads_it() -> None:
    cpio = shutil.which("cpio")
    if cpio is None:  # the parser above is all there is then
        return
    run = subprocess.run([cpio, "-itv", "--quiet"], input=sample().to_bytes(), capture_output=True, check=True)
    assert run.stderr == b""
    lines = [line.split() for line in run.stdout.decode().splitlines()]
    assert [(line[0], line[-1]) for line in lines] == [
        ("drwxr-xr-x", "dev"),
        ("crw-------", "dev/console"),
        ("-rwxr-xr-x", "init"),
        ("drwxr-xr-x", "etc"),
        ("-rw-r--r--", "etc/motd"),
        ("drwxr-xr-x", "bin"),
        ("lrwxrwxrwx", "busybox"),
    ]


@pytest.mark.parametrize("path", ["", "/", "a/../b", "./a", "a//b", "a\0b", "TRAILER!!!", "x" * 4096])
def test_impossible_paths(path: str) -> None:
    with pytest.raises(EmulatorError, match="initramfs: "):
        Initramfs().add_file(path, b"")


def test_conflicts() -> None:
    tree = sample()
    with pytest.raises(EmulatorError, match="there twice"):
        tree.add_dir("etc")
    with pytest.raises(EmulatorError, match="'init' is not a directory"):
        tree.add_file("/init/x", b"")
    with pytest.raises(EmulatorError, match="S_IFCHR"):
        tree.add_node("/dev/x", 0o600, 1, 1)
    with pytest.raises(EmulatorError, match="no such device number"):
        tree.add_node("/dev/x", stat.S_IFBLK | 0o600, 1 << 12, 1)
    with pytest.raises(EmulatorError, match="target"):
        tree.add_symlink("/l", "")
    assert tree.to_bytes() == sample().to_bytes()  # a refused entry leaves nothing behind


letters = st.characters(codec="utf-8", exclude_characters="/\0")
names = st.text(letters, min_size=1, max_size=9)


@given(st.dictionaries(names.filter(lambda name: name not in (".", "..", "TRAILER!!!")), st.binary(max_size=50)))
def test_any_files_come_back(files: dict[str, bytes]) -> None:
    tree = Initramfs()
    for name, data in files.items():
        tree.add_file(name, data)
    assert [(entry.name, entry.data) for entry in parse(tree.to_bytes())] == list(files.items())
