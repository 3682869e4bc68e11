"""The FUSE layer with real programs on it and no guest: reads that wait, signals, poll."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuse_daemon import Daemon
from tests.mounted import PATIENCE, Popen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("command", ["cat trace_pipe", "head -1 trace_pipe", "dd if=trace_pipe", "grep x trace_pipe"])
def test_signals_end_blocked_readers(fs: Daemon, command: str, number: signal.Signals) -> None:
    times = [50.0]  # a busy machine gets some tries
    while times[-1] >= 50 and len(times) <= 20:
        child = fs.blocked(*command.split())
        begin = time.perf_counter()
        child.send_signal(number)
        assert child.wait(PATIENCE) in (-number, 130)
        times.append((time.perf_counter() - begin) * 1e3)
        child.communicate()
    print(f"{command}, {number.name}: " + " ".join(f"{ms:.1f}" for ms in times[1:]), "ms")
    assert times[-1] < 50


def test_a_handled_signal_is_eintr_and_then_data_comes(fs: Daemon) -> None:
    child = fs.blocked(
        sys.executable, "-I", "-c",  # -I: no looking for modules in the mount, before there is a handler
        "import os, signal\n"
        "signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'signal '))\n"
        "f = os.open('trace_pipe', os.O_RDONLY)\n"
        "os.write(1, os.read(f, 100))\n",
    )  # fmt: skip
    child.send_signal(signal.SIGUSR1)
    assert child.stdout is not None
    assert os.read(child.stdout.fileno(), 100) == b"signal "
    fs.out("echo feed trace_pipe hello > control")
    assert child.communicate(timeout=PATIENCE)[0] == b"hello\n"


def test_an_inherited_descriptor_is_interrupted_too(fs: Daemon) -> None:
    child = fs.blocked("bash", "-c", "exec 3< trace_pipe; exec cat <&3")
    child.kill()
    child.wait(PATIENCE)
    child.communicate()


def test_nonblock_set_after_open(fs: Daemon) -> None:
    assert (
        fs.python(
            "import os, fcntl\n"
            "f = os.open('trace_pipe', os.O_RDONLY)\n"
            "fcntl.fcntl(f, fcntl.F_SETFL, os.O_NONBLOCK)\n"
            "try: os.read(f, 10)\n"
            "except BlockingIOError: print('EAGAIN')\n"
        )
        == "EAGAIN\n"
    )


@pytest.mark.parametrize("way", ["poll", "epoll", "select"])
def test_poll_and_notify(fs: Daemon, way: str) -> None:
    waits = {
        "poll": "p = select.poll(); p.register(f, select.POLLIN); wait = lambda s: bool(p.poll(s * 1000))",
        "epoll": "p = select.epoll(); p.register(f, select.EPOLLIN); wait = lambda s: bool(p.poll(s))",
        "select": "wait = lambda s: bool(select.select([f], [], [], s)[0])",
    }
    told = fs.python(
        "import os, select, threading, time\n"
        "f = os.open('pipe2', os.O_RDONLY)\n"
        f"{waits[way]}\n"
        "print(wait(0), wait(0.05))\n"
        "def feed():\n"
        "    time.sleep(0.1)\n"
        "    with open('control', 'w') as c: c.write('feed pipe2 ho\\n')\n"
        "threading.Thread(target=feed).start()\n"
        "begin = time.monotonic(); ready = wait(30)\n"
        "print(ready, 0.08 < time.monotonic() - begin, os.read(f, 9))\n"
        "print(wait(0))\n"
    )
    assert told == "False False\nTrue True b'ho\\n'\nFalse\n"


def test_plain_files_are_always_ready(fs: Daemon) -> None:
    assert (
        fs.python("import os, select; f = os.open('big', os.O_RDONLY); print(select.select([f], [], [], 30)[0] == [f])")
        == "True\n"
    )


def test_a_thousand_blocked_readers_do_not_lock_the_mount(tmp_path: Path) -> None:
    fs = Daemon(tmp_path / "mnt")
    try:
        code = (
            "import os, threading, time\n"
            "threading.stack_size(65536); blocked = [0, 0]; lock = threading.Lock()\n"
            "def read():\n"
            "    try: os.read(os.open('trace_pipe', os.O_RDONLY), 10)\n"
            "    except BlockingIOError:\n"
            "        with lock: blocked[0] += 1\n"
            "ts = [threading.Thread(target=read, daemon=True) for _ in range(1000)]\n"
            "for t in ts: t.start()\n"
            "while blocked[0] < 600: time.sleep(0.01)\n"
            "print(blocked[0], flush=True); time.sleep(60)\n"
        )
        with Popen[bytes]([sys.executable, "-c", code], cwd=fs.path, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"600\n"
            begin = time.perf_counter()
            assert fs.out("cat tracing_on; ls | wc -l; cat trace_pipe 2>&1 || true").splitlines()[::2] == [
                "1", "cat: trace_pipe: Resource temporarily unavailable",
            ]  # fmt: skip
            print(f"with 400 blocked: cat, ls, cat in {(time.perf_counter() - begin) * 1e3:.0f} ms")
            begin = time.perf_counter()
            child.kill()
            child.wait(PATIENCE)
            print(f"SIGKILL of 1000 threads, 400 blocked: {(time.perf_counter() - begin) * 1e3:.0f} ms")
        reader = fs.blocked("cat", "trace_pipe")  # its place is free again
        fs.out("echo feed trace_pipe hello > control")
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"hello\n"
        reader.kill()
        reader.communicate()
    finally:
        fs.stop()
