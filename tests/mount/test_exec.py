"""`fakefs exec` and `fakefs console`: programs inside the guest of a mount."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess

from tests.mounted import FAKEFS, PATIENCE, Mounted, until, wait_for_reader


def test_exec_carries_input_output_and_status(m: Mounted) -> None:
    done = m.exec("sh", "-c", "tr a-z A-Z; echo error >&2; exit 7", stdin="hello\n")
    assert (done.stdout, done.stderr, done.returncode) == ("HELLO\n", "error\n", 7)
    assert m.exec("sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL
    big = "0123456789abcdef" * 40_000
    assert m.exec("cat", stdin=big).stdout == big
    missing = m.exec("no-such-program")
    assert missing.returncode != 0
    assert "no-such-program" in missing.stderr


def test_a_client_that_goes_away_ends_its_program_only(m: Mounted) -> None:
    command = shlex.join([*FAKEFS, "exec", str(m.path)])
    assert m.sh(f"{command} -- yes | head -n 1").stdout == "y\n"
    until(lambda: int(m.status()["slots"]) - int(m.status()["shadows"]) == 1, PATIENCE, "the program's end")


def test_exec_passes_signals_on(m: Mounted) -> None:
    argv = [*FAKEFS, "exec", str(m.path), "--", "sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 1; done"]
    with m.popen(argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        program.terminate()
        assert program.wait(PATIENCE) == 5


def test_exec_closes_nothing_of_others(m: Mounted) -> None:
    """The kernel ends a read of trace_pipe_raw when any copy of its descriptor is closed."""
    m.write("buffer_percent", "0")
    with m.popen(["cat", "per_cpu/cpu0/trace_pipe_raw"], stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        wait_for_reader(reader.pid)
        assert m.exec("ls", "/proc/self/fd").stdout.split() == ["0", "1", "2", "3"]
        m.write("trace_marker", "still there")
        assert b"still there" in os.read(reader.stdout.fileno(), 65536)
        reader.kill()


def test_exec_is_traced_like_any_program(m: Mounted) -> None:
    m.sh("echo 1 > events/sched/sched_process_exec/enable")
    m.exec("true")
    assert any("sched_process_exec: filename=/bin/busybox" in line for line in m.trace())


def test_console_shows_what_the_kernel_prints(m: Mounted) -> None:
    m.exec("sh", "-c", "echo 7 > /proc/sys/kernel/printk; echo h > /proc/sysrq-trigger")
    assert "sysrq: HELP" in m.fakefs("console", str(m.path)).stdout
    assert m.exec("sh", "-c", "echo 4 > /proc/sys/kernel/printk").returncode == 0
