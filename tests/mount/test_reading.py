"""Reading the files of a mount: offsets, streams, signals, poll(2) and splice(2)."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

import pytest

from fakefs.testbed import Tracefs
from tests.mount.golden_cases import errnos
from tests.mounted import PATIENCE, popen, until, wait_for_reader

PROMPT = 0.05
"""Seconds a signal may take to end a reader on a quiet machine; a busy one gets some tries."""
TRIES = 20


def test_reading_by_bytes_gives_the_same_as_at_once(tracefs: Tracefs) -> None:
    done = tracefs.sh("""
        for f in available_tracers trace_options events/sched/sched_switch/format; do
            cmp <(cat $f) <(dd if=$f bs=1 status=none) && cmp <(tail -c +11 $f) <(dd if=$f bs=1 skip=10 status=none)
        done
        for i in $(seq 50); do echo "marker $i" > trace_marker; done
        echo 0 > tracing_on
        cmp <(cat trace) <(dd if=trace bs=7 status=none) && cmp <(cat trace) <(dd if=trace bs=64k status=none)
    """)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_reads_at_offsets(tracefs: Tracefs) -> None:
    fd = os.open(tracefs.path / "available_tracers", os.O_RDONLY)
    try:
        whole = os.read(fd, 4096)
        assert os.read(fd, 4096) == b""
        assert os.pread(fd, 5, 3) == whole[3:8]
        os.lseek(fd, 4, os.SEEK_SET)
        assert os.read(fd, 3) + os.read(fd, 4096) == whole[4:]
    finally:
        os.close(fd)


def test_a_stream_cannot_be_sought(tracefs: Tracefs) -> None:
    fd = os.open(tracefs.path / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not str(tracefs.status()["kernel"]).startswith("6.1."):
            with pytest.raises(OSError, match="Illegal seek"):
                os.lseek(fd, 0, os.SEEK_SET)
            with pytest.raises(OSError, match="Illegal seek"):
                os.pread(fd, 1, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", ["trace_pipe", "per_cpu/cpu0/trace_pipe_raw"])
def test_nonblocking_reads(tracefs: Tracefs, name: str) -> None:
    fd = os.open(tracefs.path / name, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(BlockingIOError):
            os.read(fd, 4096)
    finally:
        os.close(fd)
    fd = os.open(tracefs.path / name, os.O_RDONLY)
    try:
        os.set_blocking(fd, False)
        with pytest.raises(BlockingIOError):
            os.read(fd, 4096)
        tracefs.write("trace_marker", "now")
        assert b"now" in os.read(fd, 65536)
    finally:
        os.close(fd)


def test_trace_pipe_has_one_reader(tracefs: Tracefs) -> None:
    fd = os.open(tracefs.path / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert errnos(tracefs.sh("cat trace_pipe").stderr) == ["EBUSY"]
    finally:
        os.close(fd)
    assert tracefs.sh("timeout 0.2 cat trace_pipe").returncode == 124


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_end_a_blocked_reader(tracefs: Tracefs, number: signal.Signals) -> None:
    times = [PROMPT]
    while times[-1] >= PROMPT and len(times) <= TRIES:
        with popen(tracefs, ["cat", "trace_pipe"], stdout=subprocess.PIPE) as reader:
            wait_for_reader(reader.pid)
            begun = time.monotonic()
            reader.send_signal(number)
            assert reader.wait(PATIENCE) == -number
            times.append(time.monotonic() - begun)
        # The guest's file is closed too, or a second open would be refused.
        until(lambda: tracefs.sh("timeout 0.05 cat trace_pipe").returncode == 124, PATIENCE, "trace_pipe free again")
    print(f"{number.name}:", *(f"{took * 1000:.1f}" for took in times[1:]), "ms")
    assert times[-1] < PROMPT


def test_a_blocked_reader_gets_the_next_event(tracefs: Tracefs) -> None:
    with popen(tracefs, ["head", "-n", "1", "trace_pipe"], stdout=subprocess.PIPE) as reader:
        wait_for_reader(reader.pid)
        tracefs.write("trace_marker", "hello")
        out, _ = reader.communicate(timeout=PATIENCE)
    assert b"tracing_mark_write: hello" in out


@pytest.mark.parametrize("name", ["trace_pipe", "per_cpu/cpu0/trace_pipe_raw"])
@pytest.mark.parametrize("how", ["select", "poll", "epoll"])
def test_polling_sees_an_event_arrive(tracefs: Tracefs, name: str, how: str) -> None:
    tracefs.write("buffer_percent", "0")  # else a poll waits until half a buffer is full
    fd = os.open(tracefs.path / name, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert not _ready(how, fd, 0)
        # The writer is another process: the test's own thread sleeps in the poll.
        with popen(tracefs, ["bash", "-c", "read; echo arrived > trace_marker"], stdin=subprocess.PIPE) as writer:
            assert writer.stdin is not None
            writer.stdin.write(b"\n")
            writer.stdin.flush()
            assert _ready(how, fd, PATIENCE)
        assert b"arrived" in os.read(fd, 65536)
        assert not _ready(how, fd, 0)
    finally:
        os.close(fd)


def test_polling_for_something_else_than_before(tracefs: Tracefs) -> None:
    """The guest still waits for what the first poll was about when the second comes."""
    tracefs.write("buffer_percent", "0")
    fd = os.open(tracefs.path / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        poller = select.poll()
        poller.register(fd, select.POLLPRI)
        assert poller.poll(1) == []
        with popen(tracefs, ["bash", "-c", "read; echo arrived > trace_marker"], stdin=subprocess.PIPE) as writer:
            poller.modify(fd, select.POLLIN)
            assert poller.poll(1) == []
            assert writer.stdin is not None
            writer.stdin.write(b"\n")
            writer.stdin.flush()
            begun = time.monotonic()
            assert poller.poll(PATIENCE * 1000) == [(fd, select.POLLIN)]
            assert time.monotonic() - begun < PATIENCE, "when it gives up, poll(2) looks once more"
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [4096, 65536])
def test_splicing_raw_pages_loses_nothing(tracefs: Tracefs, size: int) -> None:
    """Of many more records than the buffer holds, read while they are written; a page at a time, or several."""
    tracefs.write("buffer_percent", "0")
    tracefs.write("buffer_size_kb", "64")
    count = 4000
    script = "for ((i = 0; i < $0; i++)); do echo marker >&3; done 3> trace_marker"
    reader, writer = os.pipe()
    fd = os.open(tracefs.path / "per_cpu/cpu0/trace_pipe_raw", os.O_RDONLY)
    seen = bytearray()
    try:
        with popen(tracefs, ["bash", "-c", script, str(count)]):
            while seen.count(b"marker") < count:
                moved = os.splice(fd, writer, size)
                assert moved % 4096 == 0
                while moved > 0:
                    piece = os.read(reader, moved)
                    moved -= len(piece)
                    seen += piece
        assert seen.count(b"marker") == count
        assert "overrun: 0\n" in tracefs.read("per_cpu/cpu0/stats")
    finally:
        for each in (fd, reader, writer):
            os.close(each)


def test_a_splice_that_waits_can_be_interrupted(tracefs: Tracefs) -> None:
    splice = "import os; os.splice(os.open('per_cpu/cpu0/trace_pipe_raw', os.O_RDONLY), os.pipe()[1], 4096)"
    with popen(tracefs, [sys.executable, "-I", "-c", splice], stderr=subprocess.PIPE) as process:
        wait_for_reader(process.pid)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    assert said.splitlines()[-1] == b"KeyboardInterrupt"


def _ready(how: str, fd: int, seconds: float) -> bool:
    if how == "select":
        return bool(select.select([fd], [], [], seconds)[0])
    if how == "poll":
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        return bool(poller.poll(seconds * 1000))
    with select.epoll() as poller_fd:
        poller_fd.register(fd, select.EPOLLIN)
        return bool(poller_fd.poll(seconds))
