"""`fakefs run` when something in it is killed, or when there are many: nothing hangs, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.mount.test_run import _family
from tests.mounted import FAKEFS, PATIENCE, running, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("host_unchanged")]

_READER = "cat /sys/kernel/tracing/trace_pipe & sleep 1000 & echo ready; wait"


def _start(environment: dict[str, str], script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*FAKEFS, "run", "--", "bash", "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _killed(environment: dict[str, str], which: int) -> tuple[int, str]:
    """Kill the process at a place in the order of birth while a reader waits; return the status and what is said."""
    with _start(environment, _READER) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        family = [process.pid, *_family(process.pid)]
        os.kill(family[which], signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE)
        until(lambda: not any(running(pid) for pid in family), PATIENCE, "the end of all that it started")
        return process.returncode, said


def test_each_process_killed(environment: dict[str, str]) -> None:
    """The command, the outer process, the first one of the view."""
    assert _killed(environment, 0)[0] == -signal.SIGKILL
    for which in (1, 2):
        status, said = _killed(environment, which)
        assert (status, said.splitlines()[-1]) == (125, "fakefs: the program's surroundings were killed")


@pytest.mark.parametrize("after", [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0])
def test_interrupted_at_any_time(environment: dict[str, str], after: float) -> None:
    """Ctrl-C goes to the whole process group of the terminal."""
    with _start(environment, "sleep 1000") as process:
        time.sleep(after)
        family = [process.pid, *_family(process.pid)]
        os.killpg(process.pid, signal.SIGINT)
        until(lambda: process.poll() is not None, PATIENCE, "its end")
        process.communicate()
        until(lambda: not any(running(pid) for pid in family), PATIENCE, "the end of all that it started")
    assert process.returncode in (130, -signal.SIGINT, 125)


def test_twenty_at_once(environment: dict[str, str]) -> None:
    script = "cd /sys/kernel/tracing; echo 'p vfs_read' > kprobe_events; cat kprobe_events; echo $PPID > /dev/null"
    processes = [_start(environment, script) for _ in range(20)]
    for process in processes:
        said, complaints = process.communicate(timeout=10 * PATIENCE)
        assert (said, complaints, process.returncode) == ("p:kprobes/p_vfs_read_0 vfs_read\n", "", 0)


def test_writing_where_one_must_not(environment: dict[str, str], tmp_path: Path) -> None:
    """A client gets the guest's errors, or those of a read-only filesystem."""
    script = """
        cd /sys/kernel/tracing
        echo x > available_tracers; touch new; rm trace; mkdir events/mine; mv trace other
        echo 1 > /sys/class/net/lo/mtu; true
    """
    with _start(environment, script) as process:
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert len(said.splitlines()) == 6, said
