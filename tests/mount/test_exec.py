"""`fakefs exec` and `fakefs console`: programs inside the guest of a mount."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess

from fakefs.testbed import Tracefs
from tests.mounted import FAKEFS, PATIENCE, fakefs, in_guest, popen, until, wait_for_reader


def test_exec_carries_input_output_and_status(tracefs: Tracefs) -> None:
    done = in_guest(tracefs, "sh", "-c", "tr a-z A-Z; echo error >&2; exit 7", stdin="hello\n")
    assert (done.stdout, done.stderr, done.returncode) == ("HELLO\n", "error\n", 7)
    assert in_guest(tracefs, "sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL
    big = "0123456789abcdef" * 40_000
    assert in_guest(tracefs, "cat", stdin=big).stdout == big
    missing = in_guest(tracefs, "no-such-program")
    assert missing.returncode != 0
    assert "no-such-program" in missing.stderr


def test_a_client_that_goes_away_ends_its_program_only(tracefs: Tracefs) -> None:
    command = shlex.join([*FAKEFS, "exec", str(tracefs.path)])
    assert tracefs.sh(f"{command} -- yes | head -n 1").stdout == "y\n"
    until(lambda: int(tracefs.status()["slots"]) - int(tracefs.status()["shadows"]) == 1, PATIENCE, "the program's end")


def test_exec_passes_signals_on(tracefs: Tracefs) -> None:
    script = "trap 'exit 5' TERM; echo ready; while :; do sleep 1; done"
    argv = [*FAKEFS, "exec", str(tracefs.path), "--", "sh", "-c", script]
    with popen(tracefs, argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        program.terminate()
        assert program.wait(PATIENCE) == 5


def test_exec_closes_nothing_of_others(tracefs: Tracefs) -> None:
    """The kernel ends a read of trace_pipe_raw when any copy of its descriptor is closed."""
    tracefs.write("buffer_percent", "0")
    with popen(tracefs, ["cat", "per_cpu/cpu0/trace_pipe_raw"], stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        wait_for_reader(reader.pid)
        assert in_guest(tracefs, "ls", "/proc/self/fd").stdout.split() == ["0", "1", "2", "3"]
        tracefs.write("trace_marker", "still there")
        assert b"still there" in os.read(reader.stdout.fileno(), 65536)
        reader.kill()


def test_exec_is_traced_like_any_program(tracefs: Tracefs) -> None:
    tracefs.sh("echo 1 > events/sched/sched_process_exec/enable")
    in_guest(tracefs, "true")
    assert any("sched_process_exec: filename=/bin/busybox" in line for line in tracefs.lines("trace"))


def test_console_shows_what_the_kernel_prints(tracefs: Tracefs) -> None:
    tracefs.guest("echo 7 > /proc/sys/kernel/printk; echo h > /proc/sysrq-trigger")
    assert "sysrq: HELP" in fakefs("console", tracefs.path).stdout
