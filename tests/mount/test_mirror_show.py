"""What mirroring is for, each as its documentation has it: wprobes, kprobes and pid filters see the host's programs.

The wprobe example and selftest are those of version 18 of its series, as far as shared notes and the transcript of a
real kernel (case act-doc-dentry) tell: they use the file /tmp/hoge, which is in a /tmp of their own here.
"""

from __future__ import annotations

import subprocess

import pytest

from fakefs.records import Record, parse
from tests.mount.conftest import Run
from tests.mount.mirrored import SETUP, SHOW, hits

_OWN_TMP = "mount -t tmpfs tmpfs /tmp\n"
_DENTRY = """
    cd /sys/kernel/tracing
    K=dentry_kill; grep -wq "[tT] __dentry_kill" /proc/kallsyms && K=__dentry_kill
    echo 0 > tracing_on
    echo 'w:watch rw@-1:8 address=$addr value=+0($addr)' >> dynamic_events
    echo 'f:truncate do_truncate dentry=$arg2' >> dynamic_events
    echo 'set_wprobe:watch:dentry' >> events/fprobes/truncate/trigger
    echo "f:dentry_kill $K dentry=\\$arg1" >> dynamic_events
    echo 'clear_wprobe:watch:dentry' >> events/fprobes/dentry_kill/trigger
    echo 1 >> events/fprobes/truncate/enable
    echo 1 >> events/fprobes/dentry_kill/enable
"""


def _accesses(done: subprocess.CompletedProcess[str]) -> tuple[int, set[tuple[str, int]], list[Record]]:
    """Check that one object was watched; return the shell's pid, who has accessed it, and all records."""
    seen = [hit for hit in parse(done.stdout) if hit.event]
    first = next(hit for hit in seen if hit.event == "truncate")
    assert first.task == "bash"
    watched = [hit for hit in seen if hit.event == "watch"]
    assert {hit.fields["address"] for hit in watched} == {first.fields["dentry"]}
    released = [hit for hit in seen if hit.event == "dentry_kill" and hit.fields["dentry"] == first.fields["dentry"]]
    assert released
    assert released[0].task == "rm"
    assert all(hit.timestamp <= released[0].timestamp for hit in watched)
    return first.pid, {(hit.task, hit.pid) for hit in watched}, seen


@pytest.mark.parametrize(
    ("before", "armed_by", "then"),
    [
        ("", "echo aaa > /tmp/hoge; echo bbb > /tmp/hoge", "echo ccc > /tmp/hoge"),
        (": > /tmp/hoge\n", "echo aaa > /tmp/hoge", "echo bbb > /tmp/hoge"),
    ],
)
def test_the_documented_wprobe_example(mirrored: Run, before: str, armed_by: str, then: str) -> None:
    """Who creates a file does not truncate it: of a new one, the second to write to it arms the watch."""
    done = mirrored(
        _OWN_TMP
        + before
        + _DENTRY
        + f"""
        cat events/wprobes/watch/enable
        echo 1 >> tracing_on
        {armed_by}
        cat events/wprobes/watch/enable
        grep -c 'watch rw@0xffff' dynamic_events
        {then}
        rm /tmp/hoge
        echo 0 >> tracing_on
        cat events/wprobes/watch/enable
        grep watch dynamic_events
        cat trace
        echo '!set_wprobe:watch:dentry' >> events/fprobes/truncate/trigger
        echo '!clear_wprobe:watch' >> events/fprobes/dentry_kill/trigger
        cat events/wprobes/watch/enable
        cat error_log
        """
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:5] == ["0*", "1*", "1", "0*", "w:wprobes/watch rw@-1:8 address=$addr value=+0($addr)"]
    assert lines[-1] == "0"
    shell, who, _ = _accesses(done)
    assert {task for task, _ in who} == {"bash", "rm"}
    assert [pid for task, pid in who if task == "bash"] == [shell]
    assert len(who) == 2


def test_the_wprobe_triggers_selftest(mirrored: Run) -> None:
    """Its steps: triggers read back, `enable` says 0 before and after, accesses in between, and nothing is left."""
    done = mirrored(
        _OWN_TMP
        + "set -e"
        + _DENTRY
        + """
        fail() { echo "$1" >&2; exit 1; }
        grep -q 'set_wprobe:<wprobe-event>' README || fail unsupported
        grep -q '^set_wprobe' events/fprobes/truncate/trigger || fail set
        grep -q '^clear_wprobe' events/fprobes/dentry_kill/trigger || fail clear
        grep -q 0 events/wprobes/watch/enable || fail 'enabled before'
        echo 1 >> tracing_on
        echo aaa > /tmp/hoge
        echo bbb > /tmp/hoge
        rm /tmp/hoge
        echo 0 >> tracing_on
        grep -q 0 events/wprobes/watch/enable || fail 'enabled after'
        cat trace
        echo '!set_wprobe:watch:dentry' >> events/fprobes/truncate/trigger
        echo '!clear_wprobe:watch:dentry' >> events/fprobes/dentry_kill/trigger
        ! grep -hv '^#' events/fprobes/truncate/trigger events/fprobes/dentry_kill/trigger || fail 'triggers left'
        echo 0 > events/enable
        echo > dynamic_events
        ! grep . dynamic_events || fail 'events left'
        """
    )
    assert (done.stderr, done.returncode) == ("", 0)
    _, who, _ = _accesses(done)
    assert {task for task, _ in who} == {"rm"}


def test_a_probe_sees_sleep(mirrored: Run) -> None:
    done = mirrored(
        SETUP
        + """
        echo 'p:myprobe do_nanosleep' >> kprobe_events
        echo 1 > events/kprobes/myprobe/enable
        sleep 0.1 & wait $!; echo "sleeper $!"
        """
        + SHOW
    )
    [hit] = hits(done)
    assert (hit.event, hit.task) == ("myprobe", "sleep")
    assert done.stdout.startswith(f"sleeper {hit.pid}\n")


@pytest.mark.parametrize(
    ("option", "file", "tracing"),
    [
        ("event-fork", "set_event_pid", "on sched/sched_process_exec"),
        ("function-fork", "set_ftrace_pid", "echo bprm_execve > set_ftrace_filter; echo function > current_tracer"),
    ],
)
def test_a_pid_is_followed_with_its_children(mirrored: Run, option: str, file: str, tracing: str) -> None:
    """A shell of the host that runs already is named by its pid; its children and theirs are traced, others are not."""
    done = mirrored(
        SETUP
        + f"echo 1 > options/{option}\n{tracing}\n"
        + f"""
        bash -c 'until [ -e $0/go ]; do :; done; /bin/true; ( /bin/true; ); sh -c "/bin/echo; exit"; exec /bin/true' \\
            "$OLDPWD" &
        echo $! > {file}
        /bin/false
        : > "$OLDPWD/go"
        wait $!; echo "followed $!"
        /bin/false
        """
        + SHOW
    )
    seen = hits(done)
    [_, followed] = next(line for line in done.stdout.splitlines() if line.startswith("followed")).split()
    assert "false" not in {hit.task for hit in seen}
    assert len({hit.pid for hit in seen}) == 5
    assert int(followed) in {hit.pid for hit in seen}
