"""wprobes on a mount: as a kernel with the series answers (`wprobe_golden/`), and what its documentation promises.

Of the sessions with that kernel those are not here that show another kernel's code (addresses, functions, struct
offsets of its own, types of later kernels), need a second CPU, or count what its shell did to its own files.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from fakefs.testbed import Tracefs
from tests.guest_calls import compile_static
from tests.mount.wprobe_sessions import FILE_THERE, SLEEP, Session, load, normal
from tests.mounted import FAKEFS, PATIENCE, in_guest, popen, until

SESSIONS = load()
"""Two of three that define an fprobe, which takes a while, are among the slow tests."""
OTHERWISE = {
    "6.12.": {
        "the option fields prints addresses": "126",
        "struct file has other offsets": "191 201 202",
        "an unknown type letter is not logged": "239",
    },
    "6.1.": {
        "the option fields is not there": "126",
        "vfs_read has no instruction at 4": "207",
        "an unknown event of an eprobe is ENOENT": "226",
        "an unknown type letter is not logged": "239",
    },
}
"""By a prefix of the kernel's version: how that kernel differs, and how the names of sessions that show it begin."""

_HIT = re.compile(r" *(\S+)-(\d+) +\[\d+\] (\S+) +([\d.]+): (\w+): \((\S+)\)(.*)")


def _guest(mount: Tracefs) -> str:
    """The command before a shell command for the guest."""
    return " ".join([*FAKEFS, "exec", str(mount.path), "--", "sh", "-c"])


def _run(mount: Tracefs, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script whose every command must succeed: `guest` runs a command in the guest, `sleep` lets it tick."""
    done = mount.sh(f'set -e; guest() {{ {_guest(mount)} "$1"; }}; {SLEEP}\n{script}', merge=True)
    assert done.returncode == 0, done.stdout
    return done


def _hits(mount: Tracefs, event: str, trace: str = "trace") -> list[tuple[str, str]]:
    """Function and arguments of an event's records."""
    found = [match for line in mount.read(trace).splitlines() if (match := _HIT.fullmatch(line))]
    return [(match[6].partition("+")[0], match[7].strip()) for match in found if match[5] == event]


def _ticks(mount: Tracefs, event: str, more: int, trace: str = "trace") -> None:
    """Wait until an event that comes with ticks has that many more records; asking for them makes the guest tick."""
    wanted = len(_hits(mount, event, trace)) + more
    until(lambda: len(_hits(mount, event, trace)) >= wanted, PATIENCE, f"{wanted} hits of {event}")


def _needs_fprobes(mount: Tracefs) -> None:
    if "f[:" not in mount.read("README"):
        pytest.skip("this kernel has no fprobe events")


def _object_watch(mount: Tracefs) -> None:
    """Define `watch`, armed by do_truncate and parked by vfs_fallocate."""
    _needs_fprobes(mount)
    script = """
    echo 'w:watch rw@-1:8 address=$addr' >> dynamic_events
    echo 'f:te do_truncate dentry=$arg2' >> dynamic_events
    echo 'f:tc vfs_fallocate file=$arg1' >> dynamic_events
    echo 'set_wprobe:watch:dentry' >> events/fprobes/te/trigger
    echo 'clear_wprobe:watch' >> events/fprobes/tc/trigger
    """
    _run(mount, script)


# ---- as the kernel with the series


def _parameters() -> list[ParameterSet]:
    costly = [session for session in SESSIONS if "'f:" in session.text]
    slow = {session.name for number, session in enumerate(costly) if number % 3}
    marks = {name: [pytest.mark.slow] for name in slow}
    return [pytest.param(session, id=session.name, marks=marks.get(session.name, [])) for session in SESSIONS]


@pytest.mark.fakefs(wprobe="strict")  # four debug registers
@pytest.mark.parametrize("session", _parameters())
def test_answers_as_a_kernel_with_wprobes(tracefs: Tracefs, session: Session) -> None:
    release = str(tracefs.status()["kernel"])
    for version, differences in OTHERWISE.items():
        for reason, names in differences.items():
            if release.startswith(version) and session.name.startswith(tuple(names.split())):
                pytest.skip(f"Linux {release}: {reason}")
    if "'f:" in session.text:
        _needs_fprobes(tracefs)
    if session.name in FILE_THERE:
        in_guest(tracefs, "touch", FILE_THERE[session.name])
    got = tracefs.sh(session.script(_guest(tracefs)), merge=True)
    assert normal(got.stdout) == normal(session.text)


def test_there_are_enough_sessions() -> None:
    assert len({session.name for session in SESSIONS}) == len(SESSIONS) >= 100


# ---- the documentation's examples


def test_who_writes_jiffies(tracefs: Tracefs) -> None:
    script = """
    echo 'w:my_jiffies w@jiffies:8 value=+0($addr)' >> dynamic_events
    echo stacktrace > events/wprobes/my_jiffies/trigger
    echo 1 > events/wprobes/my_jiffies/enable
    """
    _run(tracefs, script)
    _ticks(tracefs, "my_jiffies", 3)
    tracefs.write("events/wprobes/my_jiffies/enable", "0")
    hits = _hits(tracefs, "my_jiffies")
    values = [int(args.removeprefix("value="), 16) for _, args in hits]
    assert {function for function, _ in hits} <= {"do_timer", "tick_do_update_jiffies64"}
    assert len(values) > 2
    assert values == sorted(set(values))
    stacks = tracefs.read("trace").split("<stack trace>")[1:]
    assert len(stacks) >= len(hits)  # the trigger acts before the event is enabled, too
    assert all("=> asm_exc_debug\n => " in stack for stack in stacks)


def test_an_object_from_truncation_to_release(tracefs: Tracefs) -> None:
    _needs_fprobes(tracefs)
    names = tracefs.read("available_filter_functions").split()
    kill = "dentry_kill" if "dentry_kill" in names else "__dentry_kill"
    script = f"""
    echo 'w:watch rw@-1:8 address=$addr value=+0($addr)' >> dynamic_events
    echo 'f:truncate do_truncate dentry=$arg2' >> dynamic_events
    echo 'f:dentry_kill {kill} dentry=$arg1' >> dynamic_events
    echo 'set_wprobe:watch:dentry' >> events/fprobes/truncate/trigger
    echo 'clear_wprobe:watch:dentry' >> events/fprobes/dentry_kill/trigger
    echo 1 >> events/fprobes/truncate/enable
    echo 1 >> events/fprobes/dentry_kill/enable
    cat events/wprobes/watch/enable
    guest 'echo aaa > /tmp/hoge; echo bbb > /tmp/hoge'
    cat events/wprobes/watch/enable
    grep -c 'watch rw@0xffff' dynamic_events
    guest 'rm /tmp/hoge'
    cat events/wprobes/watch/enable
    grep -c 'watch rw@-1:8' dynamic_events
    """
    assert _run(tracefs, script).stdout.split() == ["0*", "1*", "1", "0*", "1"]
    [(_, truncated), *_] = _hits(tracefs, "truncate")
    address = truncated.removeprefix("dentry=")
    hits = _hits(tracefs, "watch")
    assert len(hits) > 3
    assert {args.split()[0] for _, args in hits} == {f"address={address}"}


# ---- what the series' own tests ask for


def test_add_and_remove(tracefs: Tracefs) -> None:
    script = """
    grep -q ' w\\[:\\[<group>/\\]\\[<event>\\]\\] \\[r|w|rw\\]@<addr>\\[:<len>\\]' README
    grep -q 'set_wprobe:<wprobe-event>' README
    echo 'w:my_wprobe w@jiffies' >> dynamic_events
    grep -q my_wprobe dynamic_events; test -d events/wprobes/my_wprobe
    echo 1 > events/wprobes/my_wprobe/enable
    grep -q 1 events/wprobes/my_wprobe/enable
    until grep -q 'my_wprobe: (' trace; do :; done
    echo 0 > events/wprobes/my_wprobe/enable
    grep -q 0 events/wprobes/my_wprobe/enable
    echo '-:my_wprobe' >> dynamic_events
    ! grep -q my_wprobe dynamic_events
    ! test -e events/wprobes
    """
    _run(tracefs, script)


SYNTAX_ERRORS = (
    "^w",
    "w^10 w@jiffies",
    "w ^symbol",
    "w ^a@symbol",
    "w w@^symbol",
    "w w@^0:4",
    "w w@jiffies^+offset",
    "w w@jiffies:^100",
    "w w@jiffies ^$arg1",
    "w w@jiffies ^$retval",
    "w w@jiffies ^$stack",
    "w w@jiffies ^%ax",
)


@pytest.mark.fakefs(wprobe="strict")
def test_syntax_errors_point_at_the_place(tracefs: Tracefs) -> None:
    for marked in SYNTAX_ERRORS:
        with pytest.raises(OSError, match="Errno"):
            tracefs.write("dynamic_events", marked.replace("^", "") + "\n", append=True)
        subsystem, command, caret = tracefs.read("error_log").splitlines()[-3:]
        assert "] wprobe: error: " in subsystem
        assert command == "  Command: " + marked.replace("^", "")
        assert caret.index("^") == len("  Command: ") + marked.index("^")


def test_error_log_keeps_eight_of_the_guests_and_ours(tracefs: Tracefs) -> None:
    for number in range(6):
        for command in (f"p:p{number} nosuch{number}", f"w:w{number} w@nosuch{number}"):
            with pytest.raises(OSError, match="Errno"):
                tracefs.write("dynamic_events", command + "\n", append=True)
    commands = re.findall(r"Command: (\w):\w(\d)", tracefs.read("error_log"))
    assert commands == [(kind, str(number)) for number in range(2, 6) for kind in "pw"]
    tracefs.write("error_log", "")
    assert tracefs.read("error_log") == ""


def test_member_of_the_object_an_embedded_one_lies_in(tracefs: Tracefs) -> None:
    script = """
    echo 'w:watch rw@-1:8 flags=(dentry,d_lockref)$addr->d_flags' >> dynamic_events
    cat dynamic_events
    grep -o 'field:.* flags;' events/wprobes/watch/format
    """
    line, field = _run(tracefs, script).stdout.splitlines()
    assert line == "w:wprobes/watch rw@-1:8 flags=(dentry,d_lockref)$addr->d_flags"
    assert field == "field:u32 flags;"


# ---- what the kernel does with any event


def test_in_an_instance(tracefs: Tracefs) -> None:
    script = """
    mkdir instances/other
    echo 'w:j w@jiffies:8 v=$value' >> dynamic_events
    echo 1 > instances/other/events/wprobes/j/enable
    cat events/wprobes/j/enable
    """
    assert _run(tracefs, script).stdout == "0\n"
    _ticks(tracefs, "j", 2, "instances/other/trace")
    tracefs.write("instances/other/events/wprobes/j/enable", "0")
    assert not _hits(tracefs, "j")


def test_filter_histogram_and_snapshot(tracefs: Tracefs) -> None:
    has_snapshot = (tracefs.path / "snapshot").exists()
    snapshot = "echo 1 > snapshot" if has_snapshot else ""
    script = """
    echo 'w:j w@jiffies:8 v=$value' >> dynamic_events
    echo 'v & 1' > events/wprobes/j/filter
    echo 'hist:keys=__probe_ip.sym' >> events/wprobes/j/trigger
    echo 1 > events/wprobes/j/enable
    """
    _run(tracefs, script)
    _ticks(tracefs, "j", 3)
    _run(tracefs, f"{snapshot}\n echo 0 > events/wprobes/j/enable")
    shot = _hits(tracefs, "j", "snapshot") if has_snapshot else []
    assert all(int(args.removeprefix("v="), 16) & 1 for _, args in [*shot, *_hits(tracefs, "j")])
    counted = re.search(
        r"sym: \[[0-9a-f]+\] (?:do_timer|tick_do\w+) .*hitcount: +(\d+)",
        tracefs.read("events/wprobes/j/hist").replace("__probe_ip", "sym"),
    )
    assert counted is not None
    assert int(counted[1]) > 1
    if has_snapshot:
        assert shot
        tracefs.write("snapshot", "0")


def test_trace_pipes(tracefs: Tracefs) -> None:
    script = """
    echo 'w:j w@jiffies:8 v=$value' >> dynamic_events
    echo 1 > events/wprobes/j/enable
    timeout 30 cat trace_pipe | head -n 2
    timeout 30 cat per_cpu/cpu0/trace_pipe_raw | head -c 4096 | wc -c
    echo 0 > events/wprobes/j/enable
    """
    *lines, size = _run(tracefs, script).stdout.splitlines()
    assert [bool(_HIT.fullmatch(line)) for line in lines] == [True, True]
    assert size == "4096"


# ---- nothing shows how it is done


def test_carriers_are_never_seen(tracefs: Tracefs) -> None:
    script = """
    echo 'p:kp vfs_read' >> dynamic_events
    echo 'w:seen w@jiffies:8 v=$value' >> dynamic_events
    echo 'w:grp/seen rw@-1:8' >> dynamic_events
    echo 1 > events/wprobes/seen/enable
    """
    _run(tracefs, script)
    assert tracefs.read("dynamic_events").splitlines() == [
        "p:kprobes/kp vfs_read",
        "w:wprobes/seen w@jiffies:8 v=$value",
        "w:grp/seen rw@-1:8",
    ]
    assert tracefs.read("kprobe_events") == "p:kprobes/kp vfs_read\n"
    assert [line.split()[0] for line in tracefs.read("kprobe_profile").splitlines()] == ["kp"]
    assert tracefs.read("set_event").split() == ["wprobes:seen"]
    assert [event for event in tracefs.read("available_events").split() if "seen" in event] == [
        "grp:seen",
        "wprobes:seen",
    ]
    shown = tracefs.sh(
        "grep -r emergency_restart dynamic_events kprobe_* enabled_functions error_log set_event events/wprobes"
    )
    assert shown.stdout == ""
    with pytest.raises(OSError, match="Errno"):
        tracefs.write("kprobe_events", "w:no w@jiffies\n", append=True)
    tracefs.write("kprobe_events", "")
    assert tracefs.read("dynamic_events").count("w:") == 2


# ---- what must not do harm


def test_two_hundred_at_once(tracefs: Tracefs) -> None:
    lines = "".join(f"w:n{number} rw@init_task+{8 * number}:8 v=$value\n" for number in range(200))
    tracefs.write("dynamic_events", lines, append=True)
    assert tracefs.read("dynamic_events").count("\n") == 200
    tracefs.write("events/wprobes/enable", "1")
    _run(tracefs, "sleep 0.1")
    tracefs.write("events/wprobes/enable", "0")
    assert len(set(re.findall(r" (n\d+): ", tracefs.read("trace")))) > 4
    tracefs.write("dynamic_events", "")
    assert tracefs.read("dynamic_events") == ""


PLACES = (
    "init_task",
    "dyn_event_list",
    "global_trace",
    "page_offset_base",
    "0xffffc90000000000",
    "0xffffffffff600000",
    "0x8000000000000000",
    "0xfffffffffffffff8",
)


@pytest.mark.parametrize("place", PLACES)
def test_odd_places(tracefs: Tracefs, place: str) -> None:
    """Code, tables the handler uses, hot data, what is mapped nowhere: hits or none, and nothing stops."""
    script = f"""
    echo 'w:odd rw@{place}:8 address=$addr value=$value' >> dynamic_events
    echo 1 > events/wprobes/odd/enable
    ls events > /dev/null; cat tracing_on > /dev/null
    echo 0 > tracing_on
    echo 0 > events/wprobes/odd/enable
    """
    _run(tracefs, script)


@pytest.mark.parametrize("place", ["w@0:8", "w@0x1000:8", "w@0x7fffffffe000:8"])
def test_user_memory_is_refused(tracefs: Tracefs, place: str) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        tracefs.write("dynamic_events", f"w:user {place}\n", append=True)
    assert "wprobe: error: Invalid access memory address" in tracefs.read("error_log")


def test_the_shell_dies_while_triggers_are_attached(tracefs: Tracefs) -> None:
    _object_watch(tracefs)
    loop = "while :; do echo 1 > events/wprobes/watch/enable; echo 0 > events/wprobes/watch/enable; done"
    shell = popen(tracefs, ["bash", "-c", loop], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: tracefs.read("events/wprobes/watch/enable") == "1*\n", PATIENCE, "the shell at work")
    os.kill(shell.pid, signal.SIGKILL)
    shell.wait()
    _run(tracefs, "guest 'echo 1 > /tmp/armed; truncate -s 5 /tmp/armed'; grep -q 'rw@0x' dynamic_events")
    assert "set_wprobe:watch:dentry+0:unlimited" in tracefs.read("events/fprobes/te/trigger")


PERF = r"""
#include <linux/perf_event.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct perf_event_attr attr = { .type = PERF_TYPE_TRACEPOINT, .size = sizeof(attr), .config = atoi(argv[1]) };

    if (syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0) < 0)
        perror("perf_event_open");
    return 0;
}
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_perf_is_not_supported(tracefs: Tracefs, tmp_path: Path) -> None:
    tracefs.write("dynamic_events", "w:j w@jiffies:8\n", append=True)
    number = tracefs.read("events/wprobes/j/id").strip()
    program = base64.b64encode(compile_static(PERF, tmp_path)).decode()
    script = f"base64 -d > /tmp/perf; chmod +x /tmp/perf; /tmp/perf {number} 2>&1; /tmp/perf 1 2>&1"
    done = in_guest(tracefs, "sh", "-c", script, stdin=program)
    assert done.stdout == "perf_event_open: Operation not supported\n"
    assert tracefs.read("events/wprobes/j/enable") == "0\n"


@pytest.mark.fakefs(wprobe="off")
def test_off(tracefs: Tracefs) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        tracefs.write("dynamic_events", "w:j w@jiffies\n", append=True)
    assert "wprobe" not in tracefs.read("README")
