"""The mount as a person and programs use it: a real kernel behind plain files."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from fakefs.testbed import FreshTracefs, Tracefs
from tests.mount.conftest import MakeMount
from tests.mount.golden_cases import errnos
from tests.mounted import PATIENCE, Popen, fakefs, popen, running, wait_for_reader

# ---- probes


def test_kprobe_and_kretprobe_show_the_caller(tracefs: Tracefs) -> None:
    done = tracefs.sh("""
        echo 'p:in vfs_read count=$arg3' > kprobe_events
        echo 'r:out vfs_read got=$retval' >> kprobe_events
        cat kprobe_events
        echo 1 > events/kprobes/enable
        bash -c 'echo $$; exec -a reader cat tracing_on'
        echo 0 > events/kprobes/enable
        cat trace
    """)
    assert (done.stderr, done.returncode) == ("", 0)
    lines = done.stdout.splitlines()
    assert lines[0] == "p:kprobes/in vfs_read count=$arg3"
    assert re.fullmatch(r"r\d*:kprobes/out vfs_read got=\$retval", lines[1])  # some kernels show a maxactive
    pid = lines[2]
    events = [line.split(":", 1) for line in lines if f"-{pid} " in line]
    assert any("in: (vfs_read+" in rest or "in: (vfs_read" in rest for _, rest in events)
    assert any("out: (" in rest and "<- vfs_read) got=" in rest for _, rest in events)
    assert all(head.strip().startswith(("cat-", "<...>-")) for head, _ in events)


def test_comm_of_the_caller_is_the_programs(tracefs: Tracefs) -> None:
    done = tracefs.sh(f"""
        cp /bin/cat {tracefs.path.parent}/very_own_name
        echo 'p:c vfs_read comm=$comm' > kprobe_events
        echo 1 > events/kprobes/enable
        {tracefs.path.parent}/very_own_name tracing_on
        echo 0 > events/kprobes/enable
        grep -c 'comm="very_own_name"' trace
    """)
    assert done.stderr == ""
    assert int(done.stdout.split()[-1]) >= 1


def test_truncating_replaces_and_appending_adds(tracefs: Tracefs) -> None:
    done = tracefs.sh("""
        echo 'p:a vfs_read' > kprobe_events; echo 'p:b vfs_write' >> kprobe_events; grep -c . kprobe_events
        echo 'p:c vfs_open' > kprobe_events; cat kprobe_events
        echo '-:c' >> kprobe_events; grep -c . kprobe_events
    """)
    assert done.stdout.splitlines() == ["2", "p:kprobes/c vfs_open", "0"]


def test_event_directories_come_and_go_at_once(tracefs: Tracefs) -> None:
    done = tracefs.sh("""
        for i in 1 2 3 4 5 6 7 8; do
            test -e events/kprobes/own && echo early
            echo 'p:own vfs_read' > kprobe_events
            test -e events/kprobes/own/enable || echo late
            ls events/kprobes | grep -q own || echo unlisted
            echo > kprobe_events
            test -e events/kprobes/own/enable && echo stays
        done; true
    """)
    assert (done.stdout, done.stderr) == ("", "")


# ---- errors


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("cat nothing", ["ENOENT"]),
        ("echo '-:none' >> kprobe_events", ["ENOENT"]),
        ("echo 'p:x vfs_read' > kprobe_events; echo 'p:x vfs_read' >> kprobe_events", ["EEXIST"]),
        ("mkdir instances/i; mkdir instances/i; rmdir instances/i", ["EEXIST"]),
        ("echo 'p:x vfs_read' > kprobe_events; echo 1 > events/kprobes/x/enable; echo > kprobe_events; "
         "echo 0 > events/kprobes/x/enable", ["EBUSY"]),
        ("mkdir instances/i; exec 5<instances/i/trace; rmdir instances/i; exec 5<&-; rmdir instances/i", ["EBUSY"]),
        ("echo 'z:x vfs_read' > kprobe_events", ["EINVAL"]),
        ("echo no_such_tracer > current_tracer", ["EINVAL"]),
        ("echo no:event > set_event", ["EINVAL"]),
        ("cat trace_marker", ["EINVAL"]),
        ("echo x > available_events", ["EINVAL"]),
        ("cat events", ["EISDIR"]),
        ("cat trace/x", ["ENOTDIR"]),
        ("cat trace_marker_raw", ["EINVAL"]),
        ("mkdir options/x", ["EPERM"]),
        ("rmdir options", ["EPERM"]),
        ("rmdir instances/none", ["ENOENT"]),
        ("touch new", ["EACCES"]),
        ("rm tracing_on", ["EPERM"]),
        ("mv trace t", ["EPERM"]),
        ("ln trace t", ["EPERM"]),
        ("ln -s trace t", ["EPERM"]),
        ("mkdir d", ["EPERM"]),
    ],
)  # fmt: skip
def test_errors_are_the_kernels(tracefs: Tracefs, script: str, expected: list[str]) -> None:
    done = tracefs.sh(script)
    assert errnos(done.stderr) == expected, done.stderr


# ---- instances and attributes


def test_instances(tracefs: Tracefs) -> None:
    done = tracefs.sh("""
        mkdir instances/one; ls instances; echo in > instances/one/trace_marker; grep -c ': in$' instances/one/trace
        grep -c ': in$' trace; rmdir instances/one; ls instances
    """)
    assert (done.stdout, done.stderr) == ("one\n1\n0\n", "")


def test_chmod_and_chown_last(tracefs: Tracefs) -> None:
    done = tracefs.sh("""
        chmod 604 tracing_thresh; chown 12:34 tracing_thresh; cat tracing_thresh; stat -c '%a %u %g' tracing_thresh
        chmod 640 tracing_thresh; chown 0:0 tracing_thresh; stat -c '%a %u %g' tracing_thresh
    """)
    assert (done.stdout, done.stderr) == ("0\n604 12 34\n640 0 0\n", "")


def test_mount_options_are_the_guests(new_mount: MakeMount) -> None:
    """As on a tracefs: for every file that is there, for later ones too, and what chgrp says lasts."""
    files = ". events events/sched/sched_switch/enable tracing_on"
    show = f"stat -c %g {files} | uniq; stat -c %a ."
    mount = new_mount("-o", "gid=11,mode=0711")
    done = mount.sh(f"{show}; mkdir instances/i; stat -c %g instances/i instances/i/events; rmdir instances/i")
    assert (done.stdout, done.stderr) == ("11\n711\n11\n11\n", "")
    assert fakefs("mount", "-o", "remount,gid=12,mode=750", mount.path).stderr == ""
    assert mount.sh(show).stdout == "12\n750\n"
    done = mount.sh("chgrp 13 events; chmod 600 tracing_on; stat -c '%g %a' events tracing_on events/sched")
    assert (done.stdout, done.stderr) == ("13 755\n12 600\n12 755\n", "")
    refused = fakefs("mount", "-o", "remount,gid=x", mount.path)
    assert (refused.returncode, refused.stderr) == (1, "fakefs: mount option 'gid=x': not a number (0 to 4294967294)\n")
    mount.stop()


def test_attributes_changed_inside_show(tracefs: Tracefs) -> None:
    """What the host's kernel was told will last is asked for anew after a program ran in the guest."""
    assert tracefs.sh("stat -c %a tracing_on").stdout == "640\n"
    tracefs.guest("chmod 604 /sys/kernel/tracing/tracing_on")
    assert tracefs.sh("stat -c %a tracing_on; chmod 640 tracing_on").stdout == "604\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_has_no_access(tracefs: Tracefs) -> None:
    for directory in tracefs.path.parents:  # pytest's own directories are for root alone
        if directory.stat().st_mode & 0o011 != 0o011 and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o011)
    path = tracefs.path
    as_user = "setpriv --reuid=1000 --regid=1000 --clear-groups"
    done = tracefs.sh(
        f"""
        for c in 'cat {path}/tracing_on' 'ls {path}' 'mkdir {path}/instances/u'; do {as_user} $c; done
        {as_user} bash -c 'echo 1 > {path}/tracing_on'
        """,
        cwd=Path("/"),
    )
    assert (errnos(done.stderr), done.stdout) == (["EACCES"] * 4, "")
    done = tracefs.sh(f"""
        chmod o+rx .; chmod o+r tracing_on; {as_user} cat tracing_on; chmod 700 .; chmod 640 tracing_on
    """)
    assert (done.stdout, done.stderr) == ("1\n", "")


# ---- other roots, several mounts


@pytest.mark.parametrize(
    ("root", "script", "expected"),
    [
        ("/proc", "cat sys/kernel/ostype; readlink self > /dev/null && echo link; cat 1/comm", "Linux\nlink\ninit\n"),
        ("/sys/kernel/debug", "cat tracing/current_tracer", "nop\n"),
    ],
)
def test_other_roots(new_tracefs: Callable[..., FreshTracefs], root: str, script: str, expected: str) -> None:
    with closing(new_tracefs(root=root)) as other:
        done = other.sh(script)
    assert (done.stdout, done.stderr) == (expected, "")


def test_two_mounts_are_two_kernels(tracefs: Tracefs, new_tracefs: Callable[..., FreshTracefs]) -> None:
    with closing(new_tracefs()) as other:
        other.sh("echo 'p:mine vfs_read' > kprobe_events")
        assert other.read("kprobe_events") == "p:kprobes/mine vfs_read\n"
        assert tracefs.read("kprobe_events") == ""


def test_a_directory_is_mounted_once(tracefs: Tracefs, kernel_path: Path) -> None:
    done = fakefs("mount", "--kernel", kernel_path, tracefs.path)
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert "already" in done.stderr
    assert tracefs.read("current_tracer") == "nop\n"


def test_unmounting_by_command(new_mount: MakeMount) -> None:
    mount = new_mount()
    assert fakefs("umount", mount.path).returncode == 0
    assert list(mount.path.iterdir()) == []
    assert not running(mount.pid)


def test_unmounting_lazily_and_once_more(new_mount: MakeMount) -> None:
    """The kernel lives on for an open file, until the second time: then its reader gets an error."""
    mount = new_mount()
    with popen(mount, ["cat", "trace_pipe"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as reader:
        wait_for_reader(reader.pid)
        assert "busy" in fakefs("umount", mount.path).stderr
        assert fakefs("umount", "--lazy", mount.path).returncode == 0
        assert list(mount.path.iterdir()) == []
        assert running(mount.pid)
        assert reader.poll() is None
        done = fakefs("umount", mount.path)
        assert (done.stderr, done.returncode) == ("", 0)
        assert not running(mount.pid)
        assert errnos(reader.communicate(timeout=PATIENCE)[1].decode())[0] == "ECONNABORTED"  # close(2) says more
    assert "nothing is mounted here" in fakefs("umount", mount.path).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a mount namespace")
def test_unmounting_while_another_namespace_has_the_mount(new_mount: MakeMount) -> None:
    mount = new_mount()
    argv = ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo made; read _"]
    with Popen[bytes](argv, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"made\n"
        assert fakefs("umount", mount.path).returncode == 0
        assert not running(mount.pid)
        other.communicate(b"\n")
