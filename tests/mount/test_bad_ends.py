"""Readers, daemons and guests that come to a bad end, and what is left of them: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fakefs import mountpoint
from fakefs.testbed import Tracefs
from tests.mount.golden_cases import errnos
from tests.mounted import FAKEFS, PATIENCE, Mounted, fakefs, in_guest, popen, running, until, wait_for_reader


def slots(mount: Tracefs) -> int:
    """How many tasks of the guest work for the daemon: 1 is its init."""
    return int(mount.status()["slots"])


def test_thirty_blocked_readers_leave_nothing(tracefs: Tracefs) -> None:
    done = tracefs.sh("""
        for i in $(seq 30); do mkdir instances/i$i; done
        for i in $(seq 30); do cat instances/i$i/trace_pipe & done
        while (( $(grep -l request_wait $(jobs -p | sed 's,.*,/proc/&/wchan,') | wc -l) < 30 )); do :; done
        kill -9 $(jobs -p)
        wait
        until rmdir instances/* 2>/dev/null; do :; done
    """)
    assert done.returncode == 0, done.stderr
    until(lambda: slots(tracefs) == 1, PATIENCE, "all slots free")
    assert tracefs.status()["shadows"] == 0


def test_a_killed_daemon_is_cleaned_up_after(mount: Mounted) -> None:
    os.kill(mount.pid, signal.SIGKILL)
    until(lambda: not running(mount.pid), PATIENCE, "the daemon's end")
    until(lambda: mountpoint.mount_at(mount.path) is None, PATIENCE, "the mount's end")
    mount.start()
    assert mount.read("current_tracer") == "nop\n"


def test_a_dead_mount_is_recognised_by_more_than_its_attributes(mount: Mounted) -> None:
    """Without fusermount3 it stays until the next `fakefs mount`; attributes are kept by the host's kernel."""
    assert fakefs("umount", mount.path).returncode == 0
    without = {**os.environ, "PATH": "/nowhere"}
    mount.start(without)
    mount.path.stat()
    os.kill(mount.pid, signal.SIGKILL)
    until(lambda: not running(mount.pid), PATIENCE, "the daemon's end")
    assert mountpoint.is_stale(mount.path)
    mount.start(without)
    assert mount.read("current_tracer") == "nop\n"


def test_a_panic_ends_waiting_readers(tracefs: Tracefs) -> None:
    with popen(tracefs, ["cat", "trace_pipe"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        wait_for_reader(reader.pid)
        begun = time.monotonic()
        crash = in_guest(tracefs, "sh", "-c", "echo c > /proc/sysrq-trigger")
        _, complaint = reader.communicate(timeout=PATIENCE)
        print(f"EIO after {time.monotonic() - begun:.2f} s")
    assert crash.returncode != 0
    assert errnos(complaint.decode()) == ["EIO"]
    after = tracefs.sh(f"cat {tracefs.path}/trace", cwd=Path("/"))
    assert errnos(after.stderr) == ["EIO"], after
    assert "Kernel panic - not syncing: sysrq triggered crash" in fakefs("console", tracefs.path).stdout
    assert "panic" in str(tracefs.status()["dead"])


@pytest.mark.slow
def test_everything_traced_at_once(tracefs: Tracefs) -> None:
    """The host gets far ahead of such a guest's clock, which may not be moved on so far that its watchdog bites."""
    tracefs.write("current_tracer", "function_graph")
    for _ in range(3):
        tracefs.write("events/enable", "1")
        tracefs.guest("sleep 0.1")
        tracefs.write("events/enable", "0")
    assert tracefs.status()["dead"] is None
    assert "soft lockup" not in tracefs.console()


def test_a_looping_guest_still_answers(tracefs: Tracefs) -> None:
    argv = [*FAKEFS, "exec", str(tracefs.path), "--", "sh", "-c", "echo ready; while :; do :; done"]
    with popen(tracefs, argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        begun = time.monotonic()
        assert tracefs.sh("cat current_tracer; echo x > trace_marker; grep -c ': x$' trace").stdout == "nop\n1\n"
        print(f"answers of a busy guest: {time.monotonic() - begun:.3f} s")
        program.kill()
    until(lambda: slots(tracefs) == 1, PATIENCE, "the program's end with its client's")
