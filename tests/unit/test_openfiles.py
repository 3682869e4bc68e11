"""What /proc says of open files, held against files of this process."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror.calls import BY_NUMBER, NUMBER
from fakefs.mirror.endpoints import Endpoints
from fakefs.mirror.hostpaths import HostPaths
from fakefs.mirror.openfiles import descriptors, parse_info, transfer
from fakefs.mirror.records import Used
from fakefs.mirror.seccomp import Notification


def _used(fd: int, paths: HostPaths, name: str = "read") -> Used:
    call = BY_NUMBER[NUMBER[name]]
    me = os.getpid()
    record = transfer(Notification(1, me, call.number, (fd, 0, 10, 0, 0, 0)), call, me, paths, Endpoints())
    assert (record.arguments, record.parts) == ([fd, 0, 10], [])
    return record.files[0]


def test_each_kind(tmp_path: Path) -> None:
    root = os.open("/", os.O_PATH)
    paths = HostPaths(root, 0)
    file, fifo = tmp_path / "file", tmp_path / "fifo"
    file.write_text("text")
    os.mkfifo(fifo)
    opened = [os.open(path, os.O_RDWR) for path in (file, fifo, "/dev/null")] + [*os.pipe()]
    os.lseek(opened[0], 3, os.SEEK_SET)
    used = [_used(fd, paths) for fd in opened]
    assert [each.file.text for each in used[:3]] == [str(file), str(fifo), ""]
    assert used[0].position == 3
    assert used[3].file.text == used[4].file.text
    assert used[3].file.text.startswith("pipe:[")
    assert [each.flags & os.O_ACCMODE for each in used[3:]] == [os.O_RDONLY, os.O_WRONLY]
    assert {*opened, root} <= set(descriptors(os.getpid()))
    for fd in (*opened, root):
        os.close(fd)
    assert not set(opened) & set(descriptors(os.getpid()))


@given(st.binary(max_size=200))
def test_any_bytes(text: bytes) -> None:
    for each in (text, b"pos:\t0\nflags:\t0100002\n" + text):
        with contextlib.suppress(ValueError):
            parse_info(each)
