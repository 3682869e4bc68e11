"""What is read of the host's threads: this process, and texts that only look like those of /proc."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import trio
from hypothesis import given
from hypothesis import strategies as st

from fakefs.files import Caller
from fakefs.hostthreads import GROUPS_MAX, HostThread, has_ended, parse_status, read_comm, read_thread, wait_for_exit


def caller(tid: int) -> Caller:
    return Caller(tid, os.geteuid(), os.getegid())


def test_this_process_and_a_thread_of_it() -> None:
    pid = os.getpid()
    thread = read_thread(caller(pid))
    assert thread is not None
    assert (thread.tid, thread.tgid, thread.parent) == (pid, pid, os.getppid())
    assert thread.comm == read_comm(pid)
    assert set(thread.groups) == set(os.getgroups())
    found: list[HostThread | None] = []
    other = threading.Thread(target=lambda: found.append(read_thread(caller(threading.get_native_id()))))
    other.start()
    other.join()
    assert found[0] is not None
    assert (found[0].tgid, found[0].parent) == (pid, pid)


def test_a_process_that_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert not has_ended(process.pid)
        assert process.stdin is not None
        process.stdin.close()
        trio.run(wait_for_exit, process.pid)
        assert has_ended(process.pid)  # a zombie, not waited for
    assert has_ended(process.pid)
    assert read_comm(process.pid) == b""
    assert read_thread(caller(process.pid)) is None


def test_a_status() -> None:
    groups = " ".join(map(str, range(100)))
    text = f"Name:\tsome name\nUmask:\t0022\nTgid:\t7\nPid:\t9\nPPid:\t3\nGroups:\t{groups} \n".encode()
    expected = HostThread(9, 7, b"some name", 1, 2, tuple(range(GROUPS_MAX)), 7)
    assert parse_status(text, Caller(9, 1, 2)) == expected
    assert parse_status(text, Caller(7, 1, 2)) == HostThread(7, 3, b"some name", 1, 2, expected.groups, 7)


LINES = st.sampled_from([b"Name:\tx", b"Tgid:\t1", b"PPid:\t2", b"Groups:\t3 x", b"Tgid:\t", b":\t", b"Name:\t\xff"])


@given(st.lists(st.one_of(LINES, st.binary(max_size=20))))
def test_no_status_at_all(lines: list[bytes]) -> None:
    thread = parse_status(b"\n".join(lines), Caller(1, 0, 0))
    assert thread is None or thread.tid == 1
