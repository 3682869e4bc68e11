"""`fakefs run`: what a program inside sees, what it cannot reach, and that nothing is left of it.

As root and as an ordinary user, who here is uid 1000 with a /dev/fuse that it may open.
"""

from __future__ import annotations

import os
import pty
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fakefs import kernels, namespace
from fakefs.errors import UserError
from fakefs.shadow import read_comm
from fakefs.view import View, check_inherited
from tests.mount.conftest import MakeMount
from tests.mounted import FAKEFS, PATIENCE, running, until

FUSE_MAGIC = "65735546"
NO_KERNEL = "fakefs: /nowhere: no such file; give a vmlinuz or vmlinux: fakefs kernel list\n"
Run = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class User:
    """An ordinary user: what to put before a command so that it runs it, and a kernel that it may read."""

    before: list[str]
    kernel: Path


@pytest.fixture(scope="session")
def user(environment: dict[str, str], kernel_path: Path) -> Iterator[User]:
    """uid 1000, with caches of its own and a /dev/fuse for everybody; not in pytest's directories, root's alone."""
    with tempfile.TemporaryDirectory(prefix="fakefs-test-") as base:
        home, fuse = Path(base), Path(base, "fuse")
        os.mknod(fuse, 0o666 | stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
        fuse.chmod(0o666)
        kernel = home / "vmlinuz"
        kernel.write_bytes(kernel_path.read_bytes())
        for path in (home, kernel):
            os.chown(path, 1000, 1000)
        variables = f"HOME={home} FAKEFS_CACHE={home}/cache XDG_RUNTIME_DIR={home} XDG_CACHE_HOME={home}"
        script = f'mount --bind {fuse} /dev/fuse && exec env {variables} setpriv "$@"'
        ids = ("--reuid=1000", "--regid=1000", "--clear-groups")
        yield User(["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *ids], kernel)


@pytest.fixture(params=["root", "user"])
def run(request: pytest.FixtureRequest, environment: dict[str, str], kernel_path: Path) -> Run:
    """Run a bash script by `fakefs run`."""
    if os.geteuid() != 0 and request.param == "root":
        pytest.skip("this is not root")
    other = request.param == "user" and os.geteuid() == 0
    who: User = request.getfixturevalue("user") if other else User([], kernel_path)

    def run_script(script: str, *options: str) -> subprocess.CompletedProcess[str]:
        argv = [*who.before, *FAKEFS, "run", "--kernel", str(who.kernel), *options, "--", "bash", "-c", script]
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)

    first = run_script("true")  # boots if need be, and says so
    assert first.returncode == 0, first.stderr
    return run_script


@pytest.fixture(autouse=True)
def _host_unchanged() -> object:
    """Mounts of this machine are the same before and after, and so are a few of its settings."""
    before = _host()
    yield
    assert _host() == before


def _host() -> tuple[list[str], str, str]:
    with open("/proc/self/mountinfo") as file:
        mounts = [line for line in file if "fuse" not in line]  # other tests have theirs
    return mounts, Path("/proc/sys/kernel/panic").read_text(), os.readlink("/proc/self/ns/mnt")


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
        cd "$(mktemp -d)" && mkdir m
        mount -t tracefs nodev m && stat -f -c %t m && cat m/current_tracer
        grep -c "tracefs $PWD/m tracefs" /proc/mounts
        umount m && ls m && rmdir m "$PWD"; cd /
        umount /sys/kernel/tracing && mount -t tracefs nodev /sys/kernel/tracing && cat /sys/kernel/tracing/tracing_on
    """)
    assert (done.stderr, done.stdout, done.returncode) == ("", f"{FUSE_MAGIC}\nnop\n1\n1\n", 0)


def test_the_hosts_tracefs_is_out_of_reach(run: Run) -> None:
    """Neither mounting nor unmounting nor other processes lead there."""
    done = run("""
        cd "$(mktemp -d)" && mkdir m
        for kind in tracefs debugfs sysfs; do
            mount -i -t $kind none m 2>/dev/null && { echo "$kind could be mounted"; stat -f -c %t m; }
        done
        rmdir m "$PWD"
        for i in 1 2 3 4; do umount /sys/kernel/tracing; umount -l /sys/kernel/debug; umount -l /sys/kernel
            umount -R -l /sys; done 2>/dev/null
        for place in /sys/kernel/tracing /sys/kernel/debug/tracing /sys/kernel/debug /proc/[0-9]*/root/sys/kernel/*; do
            type=$(stat -f -c %t "$place" 2>/dev/null)
            case $type in 74726163|64626720) echo "$place is the host's";; esac
        done
        for pid in 1 $PPID; do nsenter -t $pid -m true 2>/dev/null && [ $pid != $$ ] && echo "entered $pid"; done
        awk '$3 == "tracefs" || $3 == "debugfs"' /proc/self/mounts
        true
    """)
    assert (done.stdout, done.returncode) == ("", 0)


def test_a_tracefs_of_the_hosts_elsewhere_is_covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for it is a ramfs: this test touches no real one."""
    monkeypatch.setattr(namespace, "HOST_TRACING", {0x858458F6: "ramfs"})
    place, private = tmp_path / "tracing", tmp_path / "private"
    place.mkdir()
    private.mkdir()

    def outer() -> int:
        namespace.mount("ramfs", place)
        (place / "trace").touch()
        View(private).protect(new_pids=False)
        return 0 if list(place.iterdir()) == [] else 1

    assert os.waitpid(namespace.fork_into(namespace.NEW_USER | namespace.NEW_MOUNTS, outer), 0)[1] == 0


def test_an_open_directory_of_the_hosts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "HOST_TRACING", {0x9FA0: "procfs"})
    fd = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(UserError, match=f"descriptor {fd} is open in the host's procfs"):
            check_inherited()
    finally:
        os.close(fd)


def test_the_hosts_settings_stay(run: Run) -> None:
    done = run("""
        echo 77 > /proc/sys/kernel/panic; cat /proc/sys/kernel/panic
        for file in /sys/power/state /sys/kernel/../block/*/queue/read_ahead_kb /proc/sysrq-trigger /proc/irq/*/x; do
            [ -e $file ] && (echo h > $file) 2>/dev/null && echo "wrote $file"
        done
        true
    """)
    assert done.stdout == "77\n"  # the guest's


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
    with subprocess.Popen(
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
    with subprocess.Popen(
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
    script = "echo ready; read line; cat /sys/kernel/tracing/tracing_on; echo status $?"
    with subprocess.Popen(
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
    assert (out, process.returncode) == ("status 1\n", 125)
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
