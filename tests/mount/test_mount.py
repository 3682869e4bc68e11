"""The mount as a person and programs use it: a real kernel behind plain files."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakefs import mountpoint
from tests.mount.conftest import MakeMount
from tests.mount.golden_cases import errnos
from tests.mounted import FAKEFS, PATIENCE, Mounted, Resetter, Result, running, until, wait_for_reader

PROMPT = 0.05
"""Seconds a signal may take to end a reader on a quiet machine; a busy one gets some tries."""
TRIES = 20


@pytest.fixture(scope="module")
def resetter(shared_mount: Mounted) -> Resetter:
    return Resetter(shared_mount)


@pytest.fixture
def m(shared_mount: Mounted, resetter: Resetter) -> Iterator[Mounted]:
    """The shared mount, as new afterwards."""
    yield shared_mount
    resetter.reset("trigger sched_switch sched_process_fork")


def slots(mount: Mounted) -> int:
    """How many tasks of the guest work for the daemon: 1 is its init."""
    return int(mount.status()["slots"])


# ---- probes


def test_kprobe_and_kretprobe_show_the_caller(m: Mounted) -> None:
    done = m.sh("""
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


def test_comm_of_the_caller_is_the_programs(m: Mounted) -> None:
    done = m.sh(f"""
        cp /bin/cat {m.path.parent}/very_own_name
        echo 'p:c vfs_read comm=$comm' > kprobe_events
        echo 1 > events/kprobes/enable
        {m.path.parent}/very_own_name tracing_on
        echo 0 > events/kprobes/enable
        grep -c 'comm="very_own_name"' trace
    """)
    assert done.stderr == ""
    assert int(done.stdout.split()[-1]) >= 1


def test_truncating_replaces_and_appending_adds(m: Mounted) -> None:
    done = m.sh("""
        echo 'p:a vfs_read' > kprobe_events; echo 'p:b vfs_write' >> kprobe_events; grep -c . kprobe_events
        echo 'p:c vfs_open' > kprobe_events; cat kprobe_events
        echo '-:c' >> kprobe_events; grep -c . kprobe_events
    """)
    assert done.stdout.splitlines() == ["2", "p:kprobes/c vfs_open", "0"]


def test_event_directories_come_and_go_at_once(m: Mounted) -> None:
    done = m.sh("""
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
def test_errors_are_the_kernels(m: Mounted, script: str, expected: list[str]) -> None:
    done = m.sh(script)
    assert errnos(done.stderr) == expected, done.stderr


# ---- reading


def test_reading_by_bytes_gives_the_same_as_at_once(m: Mounted) -> None:
    done = m.sh("""
        for f in available_tracers trace_options events/sched/sched_switch/format; do
            cmp <(cat $f) <(dd if=$f bs=1 status=none) && cmp <(tail -c +11 $f) <(dd if=$f bs=1 skip=10 status=none)
        done
        for i in $(seq 50); do echo "marker $i" > trace_marker; done
        echo 0 > tracing_on
        cmp <(cat trace) <(dd if=trace bs=7 status=none) && cmp <(cat trace) <(dd if=trace bs=64k status=none)
    """)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_reads_at_offsets(m: Mounted) -> None:
    fd = os.open(m.path / "available_tracers", os.O_RDONLY)
    try:
        whole = os.read(fd, 4096)
        assert os.read(fd, 4096) == b""
        assert os.pread(fd, 5, 3) == whole[3:8]
        os.lseek(fd, 4, os.SEEK_SET)
        assert os.read(fd, 3) + os.read(fd, 4096) == whole[4:]
    finally:
        os.close(fd)


def test_a_stream_cannot_be_sought(m: Mounted) -> None:
    fd = os.open(m.path / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not str(m.status()["kernel"]).startswith("6.1."):
            with pytest.raises(OSError, match="Illegal seek"):
                os.lseek(fd, 0, os.SEEK_SET)
            with pytest.raises(OSError, match="Illegal seek"):
                os.pread(fd, 1, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", ["trace_pipe", "per_cpu/cpu0/trace_pipe_raw"])
def test_nonblocking_reads(m: Mounted, name: str) -> None:
    fd = os.open(m.path / name, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(BlockingIOError):
            os.read(fd, 4096)
    finally:
        os.close(fd)
    fd = os.open(m.path / name, os.O_RDONLY)
    try:
        os.set_blocking(fd, False)
        with pytest.raises(BlockingIOError):
            os.read(fd, 4096)
        m.write("trace_marker", "now")
        assert b"now" in os.read(fd, 65536)
    finally:
        os.close(fd)


def test_trace_pipe_has_one_reader(m: Mounted) -> None:
    fd = os.open(m.path / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert errnos(m.sh("cat trace_pipe").stderr) == ["EBUSY"]
    finally:
        os.close(fd)
    assert m.sh("timeout 0.2 cat trace_pipe").returncode == 124


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_end_a_blocked_reader(m: Mounted, number: signal.Signals) -> None:
    times = [PROMPT]
    while times[-1] >= PROMPT and len(times) <= TRIES:
        with m.popen(["cat", "trace_pipe"], stdout=subprocess.PIPE) as reader:
            wait_for_reader(reader.pid)
            begun = time.monotonic()
            reader.send_signal(number)
            assert reader.wait(PATIENCE) == -number
            times.append(time.monotonic() - begun)
        # The guest's file is closed too, or a second open would be refused.
        until(lambda: m.sh("timeout 0.05 cat trace_pipe").returncode == 124, PATIENCE, "trace_pipe free again")
    print(f"{number.name}:", *(f"{took * 1000:.1f}" for took in times[1:]), "ms")
    assert times[-1] < PROMPT


def test_a_blocked_reader_gets_the_next_event(m: Mounted) -> None:
    with m.popen(["head", "-n", "1", "trace_pipe"], stdout=subprocess.PIPE) as reader:
        wait_for_reader(reader.pid)
        m.write("trace_marker", "hello")
        out, _ = reader.communicate(timeout=PATIENCE)
    assert b"tracing_mark_write: hello" in out


@pytest.mark.parametrize("name", ["trace_pipe", "per_cpu/cpu0/trace_pipe_raw"])
@pytest.mark.parametrize("how", ["select", "poll", "epoll"])
def test_polling_sees_an_event_arrive(m: Mounted, name: str, how: str) -> None:
    m.write("buffer_percent", "0")  # else a poll waits until half a buffer is full
    fd = os.open(m.path / name, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert not _ready(how, fd, 0)
        # The writer is another process: the test's own thread sleeps in the poll.
        with m.popen(["bash", "-c", "read; echo arrived > trace_marker"], stdin=subprocess.PIPE) as writer:
            assert writer.stdin is not None
            writer.stdin.write(b"\n")
            writer.stdin.flush()
            assert _ready(how, fd, PATIENCE)
        assert b"arrived" in os.read(fd, 65536)
        assert not _ready(how, fd, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [4096, 65536])
def test_splicing_raw_pages_loses_nothing(m: Mounted, size: int) -> None:
    """Of many more records than the buffer holds, read while they are written; a page at a time, or several."""
    m.write("buffer_percent", "0")
    m.write("buffer_size_kb", "64")
    count = 4000
    script = "for ((i = 0; i < $0; i++)); do echo marker >&3; done 3> trace_marker"
    reader, writer = os.pipe()
    fd = os.open(m.path / "per_cpu/cpu0/trace_pipe_raw", os.O_RDONLY)
    seen = bytearray()
    try:
        with m.popen(["bash", "-c", script, str(count)]):
            while seen.count(b"marker") < count:
                moved = os.splice(fd, writer, size)
                assert moved % 4096 == 0
                while moved > 0:
                    piece = os.read(reader, moved)
                    moved -= len(piece)
                    seen += piece
        assert seen.count(b"marker") == count
        assert "overrun: 0\n" in m.read("per_cpu/cpu0/stats")
    finally:
        for each in (fd, reader, writer):
            os.close(each)


def test_a_splice_that_waits_can_be_interrupted(m: Mounted) -> None:
    splice = "import os; os.splice(os.open('per_cpu/cpu0/trace_pipe_raw', os.O_RDONLY), os.pipe()[1], 4096)"
    with m.popen([sys.executable, "-I", "-c", splice], stderr=subprocess.PIPE) as process:
        wait_for_reader(process.pid)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    assert said.splitlines()[-1] == b"KeyboardInterrupt"


def _ready(how: str, fd: int, seconds: float) -> bool:
    if how == "select":
        return bool(select.select([fd], [], [], seconds)[0])
    if how == "poll":
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        return bool(poller.poll(seconds * 1000))
    with select.epoll() as poller_fd:
        poller_fd.register(fd, select.EPOLLIN)
        return bool(poller_fd.poll(seconds))


# ---- instances and attributes


def test_instances(m: Mounted) -> None:
    done = m.sh("""
        mkdir instances/one; ls instances; echo in > instances/one/trace_marker; grep -c ': in$' instances/one/trace
        grep -c ': in$' trace; rmdir instances/one; ls instances
    """)
    assert (done.stdout, done.stderr) == ("one\n1\n0\n", "")


def test_chmod_and_chown_last(m: Mounted) -> None:
    done = m.sh("""
        chmod 604 tracing_thresh; chown 12:34 tracing_thresh; cat tracing_thresh; stat -c '%a %u %g' tracing_thresh
        chmod 640 tracing_thresh; chown 0:0 tracing_thresh; stat -c '%a %u %g' tracing_thresh
    """)
    assert (done.stdout, done.stderr) == ("0\n604 12 34\n640 0 0\n", "")


def test_mount_options_are_the_guests(new_mount: MakeMount) -> None:
    """As on a tracefs: for every file that is there, for later ones too, and what chgrp says lasts."""
    files = ". events events/sched/sched_switch/enable tracing_on"
    show = f"stat -c %g {files} | uniq; stat -c %a ."
    m = new_mount("-o", "gid=11,mode=0711")
    done = m.sh(f"{show}; mkdir instances/i; stat -c %g instances/i instances/i/events; rmdir instances/i")
    assert done == Result("11\n711\n11\n11\n", "", 0)
    assert m.fakefs("mount", "-o", "remount,gid=12,mode=750", str(m.path)).stderr == ""
    assert m.sh(show).stdout == "12\n750\n"
    done = m.sh("chgrp 13 events; chmod 600 tracing_on; stat -c '%g %a' events tracing_on events/sched")
    assert done == Result("13 755\n12 600\n12 755\n", "", 0)
    done_ = m.fakefs("mount", "-o", "remount,gid=x", str(m.path))
    assert (done_.returncode, done_.stderr) == (1, "fakefs: mount option 'gid=x': not a number (0 to 4294967294)\n")
    m.stop()


def test_attributes_changed_inside_show(m: Mounted) -> None:
    """What the host's kernel was told will last is asked for anew after a program ran in the guest."""
    assert m.sh("stat -c %a tracing_on").stdout == "640\n"
    m.exec("chmod", "604", "/sys/kernel/tracing/tracing_on")
    assert m.sh("stat -c %a tracing_on; chmod 640 tracing_on").stdout == "604\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_has_no_access(m: Mounted) -> None:
    for directory in m.path.parents:  # pytest's own directories are for root alone
        if directory.stat().st_mode & 0o011 != 0o011 and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o011)
    as_user = "setpriv --reuid=1000 --regid=1000 --clear-groups"
    done = m.sh(
        f"""
        for c in 'cat {m.path}/tracing_on' 'ls {m.path}' 'mkdir {m.path}/instances/u'; do {as_user} $c; done
        {as_user} bash -c 'echo 1 > {m.path}/tracing_on'
        """,
        cwd=Path("/"),
    )
    assert (errnos(done.stderr), done.stdout) == (["EACCES"] * 4, "")
    done = m.sh(f"""
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
def test_other_roots(new_mount: MakeMount, root: str, script: str, expected: str) -> None:
    mount = new_mount("--root", root)
    if root == "/sys/kernel/debug":
        mount.exec("mount", "-t", "debugfs", "debugfs", root)
    done = mount.sh(script)
    mount.stop()
    assert (done.stdout, done.stderr) == (expected, "")


def test_two_mounts_are_two_kernels(shared_mount: Mounted, mount: Mounted) -> None:
    mount.sh("echo 'p:mine vfs_read' > kprobe_events")
    assert mount.read("kprobe_events") == "p:kprobes/mine vfs_read\n"
    assert shared_mount.read("kprobe_events") == ""


def test_a_directory_is_mounted_once(shared_mount: Mounted) -> None:
    done = shared_mount.fakefs("mount", "--kernel", str(shared_mount.kernel), str(shared_mount.path))
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert "already" in done.stderr
    assert shared_mount.read("current_tracer") == "nop\n"


def test_unmounting_by_command(new_mount: MakeMount) -> None:
    mount = new_mount()
    assert mount.fakefs("umount", str(mount.path)).returncode == 0
    assert list(mount.path.iterdir()) == []
    assert not running(mount.pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a mount namespace")
def test_unmounting_while_another_namespace_has_the_mount(new_mount: MakeMount) -> None:
    mount = new_mount()
    argv = ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo made; read _"]
    with subprocess.Popen(argv, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"made\n"
        assert mount.fakefs("umount", str(mount.path)).returncode == 0
        assert not running(mount.pid)
        other.communicate(b"\n")


# ---- inside the guest


def test_exec_carries_input_output_and_status(m: Mounted) -> None:
    done = m.exec("sh", "-c", "tr a-z A-Z; echo error >&2; exit 7", stdin="hello\n")
    assert (done.stdout, done.stderr, done.returncode) == ("HELLO\n", "error\n", 7)
    assert m.exec("sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL
    big = "0123456789abcdef" * 40_000
    assert m.exec("cat", stdin=big).stdout == big
    missing = m.exec("no-such-program")
    assert missing.returncode != 0
    assert "no-such-program" in missing.stderr


def test_a_client_that_goes_away_ends_its_program_only(m: Mounted) -> None:
    command = " ".join(_command(m, "exec"))
    assert m.sh(f"{command} -- yes | head -n 1").stdout == "y\n"
    until(lambda: int(m.status()["slots"]) - int(m.status()["shadows"]) == 1, PATIENCE, "the program's end")


def test_exec_passes_signals_on(m: Mounted) -> None:
    argv = [*_command(m, "exec"), "--", "sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 1; done"]
    with m.popen(argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        program.terminate()
        assert program.wait(PATIENCE) == 5


def _command(mount: Mounted, what: str) -> list[str]:
    return [*FAKEFS, what, str(mount.path)]


def test_exec_closes_nothing_of_others(m: Mounted) -> None:
    """The kernel ends a read of trace_pipe_raw when any copy of its descriptor is closed."""
    m.write("buffer_percent", "0")
    with m.popen(["cat", "per_cpu/cpu0/trace_pipe_raw"], stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        wait_for_reader(reader.pid)
        assert m.exec("ls", "/proc/self/fd").stdout.split() == ["0", "1", "2", "3"]
        m.write("trace_marker", "still there")
        assert b"still there" in os.read(reader.stdout.fileno(), 65536)
        reader.kill()


def test_exec_is_traced_like_any_program(m: Mounted) -> None:
    m.sh("echo 1 > events/sched/sched_process_exec/enable")
    m.exec("true")
    assert any("sched_process_exec: filename=/bin/busybox" in line for line in m.trace())


def test_console_shows_what_the_kernel_prints(m: Mounted) -> None:
    m.exec("sh", "-c", "echo 7 > /proc/sys/kernel/printk; echo h > /proc/sysrq-trigger")
    assert "sysrq: HELP" in m.fakefs("console", str(m.path)).stdout
    assert m.exec("sh", "-c", "echo 4 > /proc/sys/kernel/printk").returncode == 0


# ---- bad ends


def test_thirty_blocked_readers_leave_nothing(mount: Mounted) -> None:
    done = mount.sh("""
        for i in $(seq 30); do mkdir instances/i$i; done
        for i in $(seq 30); do cat instances/i$i/trace_pipe & done
        while (( $(grep -l request_wait $(jobs -p | sed 's,.*,/proc/&/wchan,') | wc -l) < 30 )); do :; done
        kill -9 $(jobs -p)
        wait
        until rmdir instances/* 2>/dev/null; do :; done
    """)
    assert done.returncode == 0, done.stderr
    until(lambda: slots(mount) == 1, PATIENCE, "all slots free")
    assert mount.status()["shadows"] == 0


def test_a_killed_daemon_is_cleaned_up_after(mount: Mounted) -> None:
    os.kill(mount.pid, signal.SIGKILL)
    until(lambda: not running(mount.pid), PATIENCE, "the daemon's end")
    gone = lambda: mountpoint.is_stale(mount.path) or mountpoint.mount_at(mount.path) is None  # noqa: E731
    until(gone, PATIENCE, "the mount's end")
    mount.start()
    assert mount.read("current_tracer") == "nop\n"


def test_a_dead_mount_is_recognised_by_more_than_its_attributes(mount: Mounted) -> None:
    """Without fusermount3 it stays until the next `fakefs mount`; attributes are kept by the host's kernel."""
    assert mount.fakefs("umount", str(mount.path)).returncode == 0
    mount.env["PATH"] = "/nowhere"
    mount.start()
    mount.path.stat()
    os.kill(mount.pid, signal.SIGKILL)
    until(lambda: not running(mount.pid), PATIENCE, "the daemon's end")
    assert mountpoint.is_stale(mount.path)
    mount.start()
    assert mount.read("current_tracer") == "nop\n"


def test_a_panic_ends_waiting_readers(mount: Mounted) -> None:
    with mount.popen(["cat", "trace_pipe"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        wait_for_reader(reader.pid)
        begun = time.monotonic()
        crash = mount.exec("sh", "-c", "echo c > /proc/sysrq-trigger")
        _, complaint = reader.communicate(timeout=PATIENCE)
        print(f"EIO after {time.monotonic() - begun:.2f} s")
    assert crash.returncode != 0
    assert errnos(complaint.decode()) == ["EIO"]
    after = mount.sh(f"cat {mount.path}/trace", cwd=Path("/"))
    assert errnos(after.stderr) == ["EIO"], after
    assert "Kernel panic - not syncing: sysrq triggered crash" in mount.fakefs("console", str(mount.path)).stdout
    assert "panic" in str(mount.status()["dead"])


def test_a_looping_guest_still_answers(mount: Mounted) -> None:
    argv = [*_command(mount, "exec"), "--", "sh", "-c", "echo ready; while :; do :; done"]
    with mount.popen(argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        begun = time.monotonic()
        assert mount.sh("cat current_tracer; echo x > trace_marker; grep -c ': x$' trace").stdout == "nop\n1\n"
        print(f"answers of a busy guest: {time.monotonic() - begun:.3f} s")
        program.kill()
    until(lambda: slots(mount) == 1, PATIENCE, "the program's end with its client's")
