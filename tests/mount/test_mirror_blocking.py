"""Calls that block: the shadow is blocked in the guest as long as the process is on the host, and holds up nobody."""

from __future__ import annotations

from tests.mount.conftest import Run
from tests.mount.mirrored import GUEST, SEEN, SETUP, SHOW, hits
from tests.mounted import FAKEFS


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


def test_pipes(mirrored: Run) -> None:
    """A reader waits for the writer, gets as much as that writes, and finds the end when it has gone."""
    done = mirrored(
        SETUP
        + SEEN
        + """
        for event in sys_enter_read sys_exit_read; do echo 'comm == "cat"' > events/syscalls/$event/filter; done
        on syscalls/sys_enter_read syscalls/sys_exit_read syscalls/sys_enter_pipe2
        { until seen 'cat-' 'sys_read(fd: 0,'; do :; done; echo hello; } | cat
        mkfifo "$OLDPWD/fifo"
        cat "$OLDPWD/fifo" &
        { until seen 'cat-' 'sys_read(fd: 3,'; do :; done; echo through; } > "$OLDPWD/fifo"
        wait
        """
        + SHOW,
        "all",
    )
    assert done.stdout.splitlines()[:2] == ["hello", "through"]
    seen = hits(done)
    read = [int(hit.text.split()[-1], 16) for hit in seen if hit.event == "sys_exit_read"]  # the loader reads, too
    assert read[read.index(6) :][:2] == [6, 0]
    assert read[-2:] == [8, 0]
    assert [hit.task for hit in seen if hit.event == "sys_enter_pipe2"][:1] == ["bash"]


def test_a_megabyte_through_a_pipe(mirrored: Run) -> None:
    """It is written at once, and read as it comes: the guest stays in step, and has no more memory in use."""
    done = mirrored(
        SETUP
        + """
        for event in sys_enter_read sys_exit_read sys_enter_write sys_exit_write; do
            echo 'comm == "cat" || comm == "dd"' > events/syscalls/$event/filter
            on syscalls/$event
        done
        dd if=/dev/zero bs=1M count=2 status=none | cat > "$OLDPWD/copy"
        """
        + SHOW,
        "all",
    )
    calls: dict[str, list[int]] = {"dd": [], "cat": []}
    entered: dict[int, str] = {}
    for hit in hits(done):
        if hit.event.startswith("sys_enter"):
            entered[hit.pid] = hit.text
        elif hit.pid in entered:
            what, result = entered.pop(hit.pid), int(hit.text.split()[-1], 16)
            if hit.task == "dd" and "sys_write(fd: 1," in what:
                calls["dd"].append(result)
            elif hit.task == "cat" and "sys_read(fd: 0," in what:
                calls["cat"].append(result)
    assert calls["dd"] == [1 << 20] * 2
    assert sum(size for size in calls["cat"] if size < 1 << 63) == 2 << 20
    assert calls["cat"][-1] == 0


def test_a_terminal(mirrored: Run) -> None:
    program = """
import os, pty
child, terminal = pty.fork()
if child == 0:
    os.execvp("head", ["head", "-n", "1"])
while "typed:" not in open("trace").read():
    pass
os.write(terminal, b"line\\n")
os.waitpid(child, 0)
"""
    done = mirrored(
        SETUP
        + f"""
        echo 'p:typed n_tty_read' > kprobe_events
        echo 'r:got n_tty_read length=$retval:s64' >> kprobe_events
        on kprobes
        {FAKEFS[0]} -c '{program}'
        """
        + SHOW,
        "all",
    )
    seen = hits(done)
    assert [(hit.task, hit.event) for hit in seen] == [("head", "typed"), ("head", "got")]
    assert seen[1].fields["length"] == 1


def test_descriptors(mirrored: Run) -> None:
    """They have the host's numbers where these are known, and those that a program does not inherit are closed."""
    program = """
import fcntl, os
kept, closed = os.open("kept", os.O_WRONLY | os.O_CREAT), os.open("closed", os.O_WRONLY | os.O_CREAT)
for fd in kept, closed:
    os.write(fd, b"text")
os.dup2(kept, 40)
os.write(40, b"more")
os.dup(kept)
fcntl.fcntl(kept, fcntl.F_DUPFD, 50)
os.execvp("sleep", ["sleep", "1000"])
"""
    done = mirrored(
        SETUP
        + GUEST
        + f"""
        cd "$OLDPWD"
        {FAKEFS[0]} -c '{program}' & sleep=$!
        until [ "$(cat /proc/$sleep/comm)" = sleep ]; do :; done
        guest ls -l /proc/$sleep/fd
        kill -KILL $sleep
        """,
        "all",
    )
    links = [line.split(" ")[-3::2] for line in done.stdout.splitlines() if "->" in line]
    names = [(int(number), name.rpartition("/")[2]) for number, name in links]
    assert (40, "kept") in names
    assert "closed" not in [name for _, name in names]
