"""`fakefs run`: what a program inside sees, what it cannot reach, and that nothing is left of it.

As root and as an ordinary user, who here is uid 1000 with a /dev/fuse that it may open.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fakefs import kernels
from fakefs.hostthreads import read_comm
from tests.mount.conftest import MakeMount, Run
from tests.mounted import FAKEFS, PATIENCE, Popen, running, until

FUSE_MAGIC = "65735546"
NO_KERNEL = "fakefs: /nowhere: no such file; give a vmlinuz or vmlinux: fakefs kernel list\n"

pytestmark = pytest.mark.usefixtures("host_unchanged")


def test_usual_paths(run: Run) -> None:
    done = run("""
        id -u
        stat -f -c %t /sys/kernel/tracing /sys/kernel/debug/tracing
        cat /sys/kernel/tracing/current_tracer /sys/kernel/debug/tracing/current_tracer
        awk '$3 == "tracefs" {print $2}' /proc/mounts
        cat /proc/sys/kernel/ftrace_enabled /sys/kernel/debug/kprobes/enabled /sys/devices/system/cpu/possible
        grep -c ' vfs_read$' /proc/kallsyms
        cut -d' ' -f1-2 /proc/version
        grep -q asm_exc_debug /sys/kernel/debug/kprobes/blacklist && echo blacklist
        head -c 2 /sys/kernel/btf/vmlinux | od -An -tx1
    """)
    assert (done.stderr, done.returncode) == ("", 0)
    paths = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"]
    assert done.stdout.split("\n")[:-1] == [
        *("0", FUSE_MAGIC, FUSE_MAGIC, "nop", "nop"),
        *paths,
        *("1", "1", "0", "1", "Linux version", "blacklist", " 9f eb"),
    ]


def test_process_ids_are_the_guests(run: Run) -> None:
    done = run("""
        cd /sys/kernel/tracing
        echo 'p vfs_write' > kprobe_events
        echo $$ > set_event_pid
        echo 1 > events/kprobes/enable
        echo 1 > tracing_on
        cat tracing_on
        echo 0 > events/kprobes/enable
        grep -v '^#' trace | awk '{print $1}' | sort -u
        echo bash-$$
    """)
    assert done.stderr == ""
    one, seen, expected = done.stdout.split()
    assert (one, seen) == ("1", expected)


def test_mount_and_umount(run: Run) -> None:
    done = run("""
        tracefs() { awk '$3 == "tracefs" {print $2}' /proc/mounts | xargs; }
        cd "$(mktemp -d)" && mkdir m
        mount -t tracefs nodev m && stat -f -c %t m && cat m/current_tracer
        tracefs | sed "s:$PWD:HERE:"
        umount m && ls m && rmdir m "$PWD"; cd /
        umount /sys/kernel/tracing && ls /sys/kernel/tracing; tracefs
        mount -t tracefs nodev /sys/kernel/tracing && cat /sys/kernel/tracing/tracing_on; tracefs
        mount -t tracefs nodev /sys/kernel/tracing 2>/dev/null; echo $?
        umount -l /sys/kernel/debug; ls /sys/kernel/debug; mount -t debugfs x /sys/kernel/debug
        cat /sys/kernel/debug/kprobes/enabled
    """)
    usual = "/sys/kernel/tracing", "/sys/kernel/debug/tracing"
    expected = [FUSE_MAGIC, "nop", " ".join([*usual, "HERE/m"]), usual[1], "1", " ".join(usual[::-1]), "32", "1"]
    assert (done.stderr, done.stdout.splitlines(), done.returncode) == ("", expected, 0)


def test_remount(run: Run) -> None:
    """The guest's own tracefs takes the options; with ids of others only root can make anything of them."""
    done = run("""
        cd /sys/kernel/tracing
        options=$(mount | grep -m1 /sys/kernel/tracing | sed 's/.*(\\(.*\\)).*/\\1/')
        mount -t tracefs -o "remount,$options,mode=755" nodev /sys/kernel/tracing; stat -c %a . events
        mount -o remount,mode=711 . ; stat -c %a .
        chmod 600 tracing_on; stat -c %a tracing_on
        mount -o remount,gid=x .; echo $?
        mount -o remount,mode=700 /proc/sys; echo $?
    """)
    wrong = ["mount.fuse.fakefs: mount option 'gid=x': not a number (0 to 4294967294)"]
    assert done.stderr.splitlines() == [*wrong, "mount.fuse.fakefs: /proc/sys: not mounted"]
    assert done.stdout.split() == ["755", "755", "711", "600", "32", "32"]


def test_polling(run: Run) -> None:
    """poll(2) on what is consumed: nothing, until another process writes."""
    done = run(f"""{sys.executable} -I -c '
import os, select
os.chdir("/sys/kernel/tracing")
open("buffer_percent", "w").write("0")
for name in "trace_pipe", "per_cpu/cpu0/trace_pipe_raw":
    fd, poller = os.open(name, os.O_RDONLY | os.O_NONBLOCK), select.poll()
    poller.register(fd, select.POLLIN)
    before = poller.poll(0)
    if os.fork() == 0:
        open("trace_marker", "w").write("arrived")
        os._exit(0)
    print(before, [events for _, events in poller.poll({1000 * PATIENCE})], b"arrived" in os.read(fd, 1 << 16))
    os.wait()
'""")
    assert (done.stderr, done.stdout) == ("", "[] [1] True\n" * 2)


def test_the_machine_is_the_guests(run: Run, kernel_path: Path) -> None:
    done = run("""
        uname -r; uname -v; uname -a; nproc; nproc --all; getconf _NPROCESSORS_ONLN
        cat /proc/sys/kernel/osrelease /proc/sys/kernel/version
    """)
    release, version, everything, *counts, osrelease, osversion = done.stdout.splitlines()
    host = os.uname()
    assert (release, version, counts, done.stderr) == (osrelease, osversion, ["1", "1", "1"], "")
    assert everything.startswith(f"{host.sysname} {host.nodename} {release} {version} {host.machine}")


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 7", 7), ("kill -TERM $$", -signal.SIGTERM), ("kill -KILL $$", -signal.SIGKILL), ("true", 0)],
)
def test_exit_status(run: Run, script: str, status: int) -> None:
    expected = {status, 128 - status} if status < 0 else {status}
    assert run(script).returncode in expected


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["--", "/nowhere/nothing"], 127, "fakefs: /nowhere/nothing: not found\n"),
        (["--", "/etc/passwd"], 126, "fakefs: /etc/passwd: Permission denied\n"),
        ([], 2, "fakefs: no program given: fakefs run -- CMD\n"),
        (["--kernel", "/nowhere", "--", "true"], 125, NO_KERNEL),
        (["--mount", "/", "--", "true"], 125, "fakefs: /: no running mount; start one: fakefs mount /\n"),
    ],
)
def test_bad_calls(environment: dict[str, str], argv: list[str], status: int, said: str) -> None:
    done = subprocess.run([*FAKEFS, "run", *argv], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, said)


def test_signals_reach_the_program(environment: dict[str, str]) -> None:
    script = "trap 'echo got; exit 5' USR1; echo ready; while :; do sleep 0.05; done"
    with Popen[str](
        [*FAKEFS, "run", "--", "bash", "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "got\n"
        assert process.wait(PATIENCE) == 5


def _family(pid: int) -> list[int]:
    """The descendants of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *_family(child)]
    return found


def test_nothing_is_left_when_killed(environment: dict[str, str]) -> None:
    script = "sleep 1000 & setsid sleep 1000 & echo ready; wait"
    with Popen[str](
        [*FAKEFS, "run", "--", "bash", "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        family = _family(process.pid)
        assert len(family) >= 4
        process.kill()
        process.wait()
        until(lambda: not any(running(pid) for pid in family), PATIENCE, "the end of all that it started")


def test_daemon_killed(environment: dict[str, str]) -> None:
    script = """
        cd /sys/kernel/tracing; cat trace_pipe & echo ready; read line
        wait $!; echo reader $?; cat tracing_on; echo status $?
    """
    with Popen[str](
        [*FAKEFS, "run", "--", "bash", "-c", script],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        [daemon] = [pid for pid in _family(process.pid) if os.getsid(pid) == pid]
        os.kill(daemon, signal.SIGKILL)
        until(lambda: not running(daemon), PATIENCE, "the daemon's end")
        out, err = process.communicate("\n", timeout=PATIENCE)
    assert (out, process.returncode) == ("reader 1\nstatus 1\n", 125)
    assert err.splitlines()[-1] == "fakefs: the guest's daemon was killed while the program ran"


def test_shell_has_the_terminal(environment: dict[str, str]) -> None:
    """Job control works inside; Ctrl-C ends what runs in the foreground and not the shell."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(FAKEFS[0], [*FAKEFS, "shell"], {**environment, "SHELL": "/bin/bash", "PS1": "$ ", "TERM": "dumb"})
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + PATIENCE
        while text not in seen:
            assert time.monotonic() < end, seen
            seen += os.read(fd, 4096)
        seen = seen.partition(text)[2]

    try:
        os.write(fd, b"echo so''on; sleep 100\n")
        wait_for(b"soon")
        until(lambda: read_comm(os.tcgetpgrp(fd)) == b"sleep", PATIENCE, "sleep in the foreground")
        os.write(fd, b"\x03")
        os.write(fd, b"sleep 100 & jobs | grep -c Run''ning; kill %1; stat -f -c %t /sys/kernel/tracing; exit 9\n")
        wait_for(b"\n1\r\n")
        wait_for(FUSE_MAGIC.encode())
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    finally:
        os.close(fd)


def test_files_are_closed_in_the_guest_too(run: Run) -> None:
    """Also when the program that had one open ends at the same moment."""
    done = run("""
        cd /sys/kernel/tracing
        for i in {1..12}; do cat tracing_on current_tracer; done > /dev/null
        fakefs exec -- sh -c 'ls -l /proc/1/fd | grep -c tracing/'
    """)
    assert (done.stderr, done.stdout) == ("", "0\n")


def test_attaching_to_a_mount(new_mount: MakeMount, environment: dict[str, str]) -> None:
    mount = new_mount()
    script = "echo 'p:mine vfs_read' > /sys/kernel/tracing/kprobe_events; stat -f -c %t /sys/kernel/debug/tracing"
    done = subprocess.run(
        [*FAKEFS, "run", "--mount", str(mount.path), "--", "sh", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stderr, done.stdout, done.returncode) == ("", f"{FUSE_MAGIC}\n", 0)
    assert "mine" in mount.read("kprobe_events")


def test_many_at_once(environment: dict[str, str]) -> None:
    command = [*FAKEFS, "run", "--", "cat", "/sys/kernel/tracing/current_tracer"]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(6)
    ]
    assert [process.communicate(timeout=60) for process in processes] == [(b"nop\n", b"")] * 6
    assert kernels.cache_dir().exists()
