"""Calls that block: the shadow is blocked in the guest as long as the process is on the host, and holds up nobody."""

from __future__ import annotations

from tests.mount.conftest import Run
from tests.mount.mirrored import SEEN, SETUP, SHOW, hits


def test_waiting_for_a_child(mirrored: Run) -> None:
    """It is woken by the child's exit, whether that exits or is killed, and finds the child's number."""
    done = mirrored(
        SETUP
        + SEEN
        + """
        exec 2>/dev/null  # where bash may tell of it
        echo 'p:waits do_wait' > kprobe_events
        on kprobes/waits sched/sched_process_exit sched/sched_process_fork syscalls/sys_exit_wait4
        bash -c 'sleep 1000; exit 3' & waiting=$!
        until seen "-$waiting " 'waits:'; do :; done
        child=$(sed -n "s/.*-$waiting .*child_pid=//p" trace)
        kill -TERM $child; wait $waiting; echo "status $?"
        /bin/true; ( exit 7 ); echo "status $?"
        sh -c 'kill -KILL $$'; echo "status $?"
        """
        + SHOW
        + "echo waited $waiting for $child",
        "all",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("status")] == ["status 3", "status 7", "status 137"]
    waiting, child = map(int, lines[-1].split()[1::2])
    seen = hits(done)
    order = [
        (hit.event, hit.pid, hit.text.split()[-1])
        for hit in seen
        if (hit.event, hit.pid) == ("sched_process_exit", child) or (hit.pid == waiting and "wait4" in hit.event)
    ]
    assert [each[:2] for each in order[:2]] == [("sched_process_exit", child), ("sys_exit_wait4", waiting)]
    assert order[1][2] == hex(child)
