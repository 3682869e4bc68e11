"""Processes that change their user or groups: so do their shadows, as far as the host lets them."""

from __future__ import annotations

import os

import pytest

from fakefs.records import parse
from tests.mount.conftest import Run, User
from tests.mount.mirrored import GUEST, SETUP, SHOW
from tests.mounted import FAKEFS

_CHANGES = """
import os, subprocess
os.setgroups([5, 6])
os.setresgid(7, 8, 9)
os.setresuid(1000, 1000, 1000)
try:
    os.setuid(0)
except PermissionError:
    print("refused")
try:
    open("/sys/kernel/tracing/tracing_on")
except PermissionError:
    print("not for him")
subprocess.run(["sh", "-c", "exec sleep 0"])
print("ready", os.getpid(), flush=True)
input()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become others")
@pytest.mark.parametrize("run", ["root"], indirect=True)
def test_a_program_becomes_another_user(run: Run) -> None:
    """The guest checks his rights then, and his children have the host's process ids as before."""
    done = run(
        GUEST
        + SETUP
        + f"""
        on sched/sched_process_exec sched/sched_process_fork syscalls/sys_exit_setuid
        coproc {FAKEFS[0]} -c '{_CHANGES}'
        while read line <&${{COPROC[0]}}; do echo "$line"; [[ $line != ready* ]] || break; done
        guest grep -E '^(Uid|Gid|Groups)' /proc/$COPROC_PID/status
        echo >&${{COPROC[1]}}; wait $COPROC_PID
        """
        + SHOW
    )
    assert (done.stderr, done.returncode) == ("", 0)
    refused, not_for_him, ready, *ids = done.stdout.splitlines()[:6]
    assert (refused, not_for_him) == ("refused", "not for him")
    assert [line.split() for line in ids] == [
        ["Uid:", *["1000"] * 4],
        ["Gid:", "7", "8", "9", "8"],
        ["Groups:", "5", "6"],
    ]
    seen = [hit for hit in parse(done.stdout) if hit.event]
    assert next(hit.text for hit in seen if hit.event == "sys_exit_setuid") == "sys_setuid -> 0xffffffffffffffff"
    program = int(ready.split()[1])
    born = [hit.fields["child_pid"] for hit in seen if hit.event == "sched_process_fork" and hit.pid == program]
    executed = {hit.fields["filename"]: hit.pid for hit in seen if hit.event == "sched_process_exec"}
    assert executed["/usr/bin/sh"] == born[0] != program


def test_an_id_that_is_not_there(run: Run, user: User) -> None:
    """In a user namespace most ids do not exist. One inside it is another outside, and in the guest."""
    program = """
import os
print("ids", os.getresuid())
for change in (lambda: os.setuid(1000), lambda: os.setgroups([5]), lambda: os.setgid(0), lambda: os.setuid(0)):
    try:
        print(change())
    except OSError as error:
        print(error.strerror)
print("ready", flush=True)
input()
"""
    done = run(
        GUEST
        + SETUP
        + f"""
        on syscalls/sys_exit_setuid syscalls/sys_exit_setgroups syscalls/sys_exit_setgid
        coproc unshare -r {FAKEFS[0]} -c '{program}'
        while read line <&${{COPROC[0]}}; do echo "$line"; [[ $line != ready* ]] || break; done
        guest grep -E '^(Uid|Gid|Groups)' /proc/$COPROC_PID/status
        echo >&${{COPROC[1]}}; wait $COPROC_PID
        """
        + SHOW
    )
    assert (done.stderr, done.returncode) == ("", 0)
    lines = done.stdout.splitlines()
    assert lines[:6] == [
        "ids (0, 0, 0)",
        "Invalid argument",
        "Operation not permitted",
        "None",
        "None",
        "ready",
    ]
    assert [line.split() for line in lines[6:9]] == [["Uid:", *"0000"], ["Gid:", *"0000"], ["Groups:"]]
    seen = [hit for hit in parse(done.stdout) if hit.event]
    results = [(hit.text.split()[0], int(hit.text.split()[-1], 16) >> 63) for hit in seen]
    assert results == [("sys_setuid", 1), ("sys_setgroups", 1), ("sys_setgid", 0), ("sys_setuid", 0)]
