"""The FUSE layer with real programs on it, and `tests/fake_files.py` under it instead of a guest."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mounted import PATIENCE

TESTS = Path(__file__).resolve().parents[1]
FAKE = TESTS / "fake_files.py"

pytestmark = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK) or not list((TESTS.parent / "fakefs/fuse").glob("_shim*.so")),
    reason="needs /dev/fuse and the compiled shim",
)


class Daemon:
    """The fake, served at `path` by a child process."""

    def __init__(self, path: Path, *arguments: str, **env: str) -> None:
        self.path = path
        with suppress(FileExistsError):  # not exist_ok: it would stat, and a stale mount gives ENOTCONN
            os.mkdir(path)
        environ = {**os.environ, "PYTHONPATH": str(TESTS.parent), "XDG_CACHE_HOME": str(path.parent / "cache"), **env}
        self.errors = open(path.parent / f"{path.name}.stderr", "a+b")  # noqa: SIM115 # closed by stop()
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE), str(path), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environ,
        )
        assert self.process.stdout is not None
        self.answer = self.process.stdout.readline()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()
        while is_mounted(self.path) and subprocess.run(["umount", "-l", self.path], check=False).returncode == 0:
            pass

    def stderr(self) -> str:
        return Path(self.errors.name).read_text()

    def sh(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["timeout", "-s", "KILL", "20", "bash", "-c", command],
            cwd=self.path,
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="surrogateescape",
        )

    def out(self, command: str) -> str:
        done = self.sh(command)
        assert (done.stderr, done.returncode) == ("", 0)
        return done.stdout

    def python(self, code: str) -> str:
        done = subprocess.run(
            ["timeout", "-s", "KILL", "30", sys.executable, "-c", code],
            cwd=self.path,
            capture_output=True,
            check=False,
            text=True,
        )
        assert (done.stderr, done.returncode) == ("", 0)
        return done.stdout

    def blocked(self, *command: str) -> subprocess.Popen[bytes]:
        """Start `command`, which will wait for a read on the mount, and wait until it does."""
        child = subprocess.Popen(command, cwd=self.path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while "request_wait" not in Path(f"/proc/{child.pid}/wchan").read_text() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.02)
        return child


def is_mounted(path: Path) -> bool:
    return f" {path} " in Path("/proc/mounts").read_text()


def wait_until(condition: object, seconds: float = PATIENCE) -> bool:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


@pytest.fixture(scope="module")
def fs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("fuse") / "mnt")
    try:
        assert daemon.answer == b"ready\n", daemon.stderr()
        yield daemon
    finally:
        daemon.stop()


def test_plain_files(fs: Daemon) -> None:
    assert fs.out("cat tracing_on link; head -1 current_tracer; wc -c < big") == "1\n1\nnop\n4194304\n"
    ways = ("sha256sum < big", "dd if=big bs=1234 status=none | sha256sum", "cp big /dev/stdout | sha256sum")
    assert len(set(fs.out("; ".join(ways)).split())) == 2  # one sum, and "-"
    assert fs.out("tail -c +4194303 big | od -An -tx1").split() == ["fe", "ff"]
    assert fs.out("readlink link; cat $'\\xff\\xfe'") == "tracing_on\nlatin\n"


def test_offsets_and_short_reads(fs: Daemon) -> None:
    assert fs.python(
        "import os; f = os.open('big', os.O_RDONLY)\n"
        "print(list(os.pread(f, 3, 254)), os.lseek(f, 100, 0), os.read(f, 1))"
    ) == "[254, 255, 0] 100 b'd'\n"
    assert fs.out("cat short") == "0123456789abcdefghij"
    assert fs.python("print(len(open('long', 'rb', 0).read(1000)))") == "1000\n"


def test_write_flags_and_offsets(fs: Daemon) -> None:
    fs.out("echo one > log; echo two >> log; printf 'a\\nb\\n' > log; (echo x; echo y) > log")
    lines = [line.split() for line in fs.out("cat log").splitlines()]
    assert lines[0] == ["0", "4", "1", "0"]
    assert lines[1][1:] == ["4", "0", "1"]
    assert [line[1] for line in lines[2:]] == ["2", "2", "2", "2"]
    assert lines[-1][0] == "2"  # the second echo, at its offset
    big = (1 << 20) - 4096  # a whole MiB only from a page-aligned buffer
    assert fs.python(f"import os; f = os.open('log', os.O_WRONLY); print(os.write(f, b'z' * {big}))") == f"{big}\n"
    assert fs.out("tail -1 log").split()[1] == str(big)  # in one piece


def test_truncate_append_and_short_writes(fs: Daemon) -> None:
    assert fs.out("echo 0 > tracing_on; cat tracing_on; echo 1 >> tracing_on; cat tracing_on") == "0\n0\n1\n"
    assert fs.out("truncate -s 1 tracing_on; cat tracing_on; : > tracing_on; cat tracing_on") == "0"
    assert fs.out("echo 1 > tracing_on; cat tracing_on") == "1\n"
    assert fs.python("import os; f = os.open('short', os.O_WRONLY); print(os.write(f, b'y' * 25))") == "10\n"
    assert fs.sh("echo hello > minus").returncode != 0  # a negative count from the guest does not end the mount


def test_every_errno(fs: Daemon) -> None:
    names = sorted({name.split("_", 1)[1] for name in os.listdir(fs.path / "errors")})
    told = fs.python(
        # PEP 475: Python repeats calls that answer EINTR, so libc is asked.
        "import ctypes\n"
        "c = ctypes.CDLL(None, use_errno=True); buffer = ctypes.create_string_buffer(9)\n"
        f"for name in {names!r}:\n"
        "    got = []\n"
        "    for what, flags in (('open', 0), ('read', 0), ('write', 1)):\n"
        "        f = c.open(f'errors/{what}_{name}'.encode(), flags)\n"
        "        if f >= 0: (c.read if what == 'read' else c.write)(f, buffer, 9)\n"
        "        got.append(ctypes.get_errno())\n"
        "        f >= 0 and c.close(f)\n"
        "    print(name, *got)\n"
    )
    for line in told.splitlines():
        name, *got = line.split()
        want = int(name) if name.isdigit() else getattr(errno, name)
        if name == "ENOSYS":
            want = errno.EOPNOTSUPP
        elif 512 <= want <= 516:
            want = errno.EINTR
        elif want > 511:
            want = errno.EIO
        assert got == [str(want)] * 2 + [str(errno.EAGAIN if want == errno.EINTR else want)], name


def test_errors_in_bash(fs: Daemon) -> None:
    done = fs.sh("echo x > errors/write_EINVAL; echo x > errors/open_EBUSY; cat nothing; mkdir events; ln big new")
    assert [line.split(": ")[-1] for line in done.stderr.splitlines()] == [
        "Invalid argument", "Device or resource busy", "No such file or directory", "File exists",
        "Operation not permitted",
    ]  # fmt: skip
    assert "Resource busy" not in fs.out("exec 3< busy; cat busy 2>&1 | grep -o 'resource busy'; exec 3<&-; cat busy")


def test_a_bug_is_one_line_and_eio(fs: Daemon) -> None:
    assert fs.sh("cat crash").stderr == "cat: crash: Input/output error\n"
    lines = [line for line in fs.stderr().splitlines() if "ZeroDivisionError" in line]
    assert len(lines) == 1
    assert lines[0].startswith("fakefs: read failed: ZeroDivisionError('as asked') at fake_files.py:")
    assert fs.out("cat tracing_on") == "1\n"


def test_the_caller_is_the_reader(fs: Daemon) -> None:
    first, second = fs.out("exec 3< caller; bash -c 'echo $$ 0 0; exec cat <&3'").splitlines()
    assert first == second


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("command", ["cat trace_pipe", "head -1 trace_pipe", "dd if=trace_pipe", "grep x trace_pipe"])
def test_signals_end_blocked_readers(fs: Daemon, command: str, number: signal.Signals) -> None:
    times = [50.0]  # a busy machine gets some tries
    while times[-1] >= 50 and len(times) <= 20:
        child = fs.blocked(*command.split())
        begin = time.perf_counter()
        child.send_signal(number)
        assert child.wait(PATIENCE) in (-number, 130)
        times.append((time.perf_counter() - begin) * 1e3)
        child.communicate()
    print(f"{command}, {number.name}: " + " ".join(f"{ms:.1f}" for ms in times[1:]), "ms")
    assert times[-1] < 50


def test_a_handled_signal_is_eintr_and_then_data_comes(fs: Daemon) -> None:
    child = fs.blocked(
        sys.executable, "-I", "-c",  # -I: no looking for modules in the mount, before there is a handler
        "import os, signal\n"
        "signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'signal '))\n"
        "f = os.open('trace_pipe', os.O_RDONLY)\n"
        "os.write(1, os.read(f, 100))\n",
    )  # fmt: skip
    child.send_signal(signal.SIGUSR1)
    assert child.stdout is not None
    assert os.read(child.stdout.fileno(), 100) == b"signal "
    fs.out("echo feed trace_pipe hello > control")
    assert child.communicate(timeout=PATIENCE)[0] == b"hello\n"


def test_an_inherited_descriptor_is_interrupted_too(fs: Daemon) -> None:
    child = fs.blocked("bash", "-c", "exec 3< trace_pipe; exec cat <&3")
    child.kill()
    child.wait(PATIENCE)
    child.communicate()


def test_nonblock_set_after_open(fs: Daemon) -> None:
    assert fs.python(
        "import os, fcntl\n"
        "f = os.open('trace_pipe', os.O_RDONLY)\n"
        "fcntl.fcntl(f, fcntl.F_SETFL, os.O_NONBLOCK)\n"
        "try: os.read(f, 10)\n"
        "except BlockingIOError: print('EAGAIN')\n"
    ) == "EAGAIN\n"


@pytest.mark.parametrize("way", ["poll", "epoll", "select"])
def test_poll_and_notify(fs: Daemon, way: str) -> None:
    waits = {
        "poll": "p = select.poll(); p.register(f, select.POLLIN); wait = lambda s: bool(p.poll(s * 1000))",
        "epoll": "p = select.epoll(); p.register(f, select.EPOLLIN); wait = lambda s: bool(p.poll(s))",
        "select": "wait = lambda s: bool(select.select([f], [], [], s)[0])",
    }
    told = fs.python(
        "import os, select, threading, time\n"
        "f = os.open('pipe2', os.O_RDONLY)\n"
        f"{waits[way]}\n"
        "print(wait(0), wait(0.05))\n"
        "def feed():\n"
        "    time.sleep(0.1)\n"
        "    with open('control', 'w') as c: c.write('feed pipe2 ho\\n')\n"
        "threading.Thread(target=feed).start()\n"
        "begin = time.monotonic(); ready = wait(30)\n"
        "print(ready, 0.08 < time.monotonic() - begin, os.read(f, 9))\n"
        "print(wait(0))\n"
    )
    assert told == "False False\nTrue True b'ho\\n'\nFalse\n"


def test_plain_files_are_always_ready(fs: Daemon) -> None:
    assert fs.python(
        "import os, select; f = os.open('big', os.O_RDONLY); print(select.select([f], [], [], 30)[0] == [f])"
    ) == "True\n"


def test_a_thousand_blocked_readers_do_not_lock_the_mount(tmp_path: Path) -> None:
    fs = Daemon(tmp_path / "mnt")
    try:
        code = (
            "import os, threading, time\n"
            "threading.stack_size(65536); blocked = [0, 0]; lock = threading.Lock()\n"
            "def read():\n"
            "    try: os.read(os.open('trace_pipe', os.O_RDONLY), 10)\n"
            "    except BlockingIOError:\n"
            "        with lock: blocked[0] += 1\n"
            "ts = [threading.Thread(target=read, daemon=True) for _ in range(1000)]\n"
            "for t in ts: t.start()\n"
            "while blocked[0] < 600: time.sleep(0.01)\n"
            "print(blocked[0], flush=True); time.sleep(60)\n"
        )
        with subprocess.Popen([sys.executable, "-c", code], cwd=fs.path, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"600\n"
            begin = time.perf_counter()
            assert fs.out("cat tracing_on; ls | wc -l; cat trace_pipe 2>&1 || true").splitlines()[::2] == [
                "1", "cat: trace_pipe: Resource temporarily unavailable",
            ]  # fmt: skip
            print(f"with 400 blocked: cat, ls, cat in {(time.perf_counter() - begin) * 1e3:.0f} ms")
            begin = time.perf_counter()
            child.kill()
            child.wait(PATIENCE)
            print(f"SIGKILL of 1000 threads, 400 blocked: {(time.perf_counter() - begin) * 1e3:.0f} ms")
        reader = fs.blocked("cat", "trace_pipe")  # its place is free again
        fs.out("echo feed trace_pipe hello > control")
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"hello\n"
        reader.kill()
        reader.communicate()
    finally:
        fs.stop()


def test_directories_come_and_go(fs: Daemon) -> None:
    fs.out(
        "for i in $(seq 60); do echo mkdir events/x > control; echo file events/x/id $i > control;"
        " test $(cat events/x/id) = $i; test $(ls events) = x; echo rm events/x > control; ! test -e events/x/id; done"
    )
    fs.out(
        "mkdir events/m; echo 1 > events/m/new; cat events/m/new; mv events/m/new events/m/old; cat events/m/old;"
        " ! cat events/m/new 2>/dev/null; ! rmdir events/m 2>/dev/null; rm events/m/old; rmdir events/m;"
        " ! ls events/m 2>/dev/null"
    )


def test_a_removed_directory_is_not_the_new_one(fs: Daemon) -> None:
    told = fs.sh(
        "mkdir events/d; cd events/d; rmdir ../d; mkdir ../d; ls . ; stat -c %h .; touch ../d/file; ls ../d; cat file;"
        " rm ../d/file; rmdir ../d"
    )
    assert told.stdout == "0\nfile\n"
    assert "file: No such file" in told.stderr


def test_fstat_of_a_removed_file(fs: Daemon) -> None:
    assert fs.python(
        "import os\n"
        "open('control', 'w').write('file gone 1\\n')\n"
        "f = os.open('gone', os.O_RDONLY); os.unlink('gone')\n"
        "print(os.fstat(f).st_nlink, os.read(f, 9))\n"
    ) == "0 b'1'\n"


def test_listing(fs: Daemon) -> None:
    fs.out("echo mkdir many > control; echo many many 3000 > control; echo raw many/x > control")
    assert fs.out("ls many | wc -l; find many -type f | wc -l; ls -lR many | grep -c ^-rw-r--r--") == "3000\n" * 3
    assert fs.out("ls -a many | head -2") == ".\n..\n"
    inodes = fs.out("ls -i many | sort -k2 | head -50")
    assert inodes == fs.out("ls -i many | sort -k2 | head -50")
    assert len({line.split()[0] for line in fs.out("ls -i many").splitlines()}) == 3000
    assert fs.python(
        "import os\n"
        "d = os.scandir('many'); first = next(d).name\n"
        "for i in range(3000): os.unlink(f'many/f{i}')\n"
        "rest = [e.name for e in d]\n"  # the listing is the one of opendir
        "print(len({first, *rest}), os.listdir('many'))\n"
    ) == "3000 []\n"
    fs.out("rmdir many 2>/dev/null; ls -lR . > /dev/null; find . > /dev/null; du -a . > /dev/null")


def test_names(fs: Daemon) -> None:
    long = "n" * 255
    fs.out(f"echo x > {long}; cat {long}; rm {long}")
    assert "File name too long" in fs.sh(f"echo x > {long}n").stderr
    assert "File name too long" in fs.sh(f"cat {long}n").stderr
    fs.out("echo 1 > $'\\x80\\xff\\n'; cat $'\\x80\\xff\\n'; rm $'\\x80\\xff\\n'")


def test_attributes(fs: Daemon) -> None:
    assert fs.out("stat -c '%a %u %g %s %F' tracing_on; stat -c %Y.%y tracing_on | cut -c 1-10") == (
        "644 0 0 0 regular empty file\n1000000000\n"
    )
    assert fs.out("chmod 600 secret; chown 7:8 secret; stat -c '%a %u %g' secret") == "600 7 8\n"
    assert fs.out("chown :9 secret; stat -c '%u %g' secret") == "7 9\n"
    fs.out("chmod 640 secret; chown 0:0 secret; touch tracing_on; test -w tracing_on; test ! -x tracing_on")
    assert fs.out("stat -f -c '%T %l %s %b' .").split()[1:] == ["255", "4096", "0"]
    told = fs.python(
        "import os\n"
        "for call in (lambda: os.getxattr('big', 'user.x'), lambda: os.setxattr('big', 'user.x', b''),"
        " lambda: os.fsync(os.open('big', 0))):\n"
        "    try: call()\n"
        "    except OSError as e: print(e.errno)\n"
        "print(os.listxattr('big'))\n"
    )
    assert told.split() == [str(errno.EOPNOTSUPP)] * 2 + [str(errno.EINVAL), "[]"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_others_are_held_to_the_mode_bits(fs: Daemon) -> None:
    for directory in fs.path.parents[:-2]:  # pytest makes its directories 0700
        if directory.stat().st_uid == 0 and "pytest" in str(directory):
            directory.chmod(0o755)
    nobody = "setpriv --reuid=1000 --regid=1000 --clear-groups"
    done = fs.sh(f"{nobody} sh -c 'cat tracing_on; cat secret; echo 1 > tracing_on'")
    assert done.stdout == "1\n"
    assert done.stderr.count("ermission denied") == 2


def test_mknod_and_links(fs: Daemon) -> None:
    assert fs.sh("mknod dev c 1 3").stderr.endswith("Operation not permitted\n")
    fs.out("mkfifo p 2>/dev/null; ln -s tracing_on l; cat l; rm l")


def test_mounts_line(fs: Daemon) -> None:
    line = next(line for line in Path("/proc/mounts").read_text().splitlines() if f" {fs.path} " in line)
    assert line.startswith(f"tracefs {fs.path} fuse.fakefs rw,nosuid,nodev,noexec,relatime")


def test_the_daemon_never_blocks_on_dev_fuse(fs: Daemon) -> None:
    """A request that is withdrawn after epoll announced it would stop the guest until the next one comes."""
    descriptors = Path(f"/proc/{fs.process.pid}/fd")
    number = next(fd.name for fd in descriptors.iterdir() if os.readlink(fd) == "/dev/fuse")
    info = (descriptors.parent / "fdinfo" / number).read_text().splitlines()
    flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))
    assert flags & os.O_NONBLOCK


def test_read_only(tmp_path: Path) -> None:
    fs = Daemon(tmp_path / "mnt", "ro")
    try:
        assert fs.answer == b"ready\n", fs.stderr()
        assert "Read-only" in fs.sh("echo 1 > tracing_on").stderr
    finally:
        fs.stop()


def test_sigterm_unmounts_with_a_blocked_reader(tmp_path: Path) -> None:
    fs = Daemon(tmp_path / "mnt")
    try:
        reader = fs.blocked("cat", "trace_pipe")
        begin = time.perf_counter()
        fs.process.terminate()
        assert fs.process.wait(PATIENCE) == 0
        print(f"stopped in {(time.perf_counter() - begin) * 1e3:.0f} ms")
        assert not is_mounted(fs.path)
        assert reader.wait(PATIENCE) == 1
        reader.communicate()
        assert fs.stderr() == ""
    finally:
        fs.stop()


def test_unmount_from_outside_ends_the_daemon(tmp_path: Path) -> None:
    from fakefs.mountpoint import unmount

    fs = Daemon(tmp_path / "mnt")
    try:
        assert fs.out("cat tracing_on") == "1\n"
        unmount(fs.path)
        assert fs.process.wait(PATIENCE) == 0
        assert not is_mounted(fs.path)
        assert fs.stderr() == ""
    finally:
        fs.stop()


def test_kill_leaves_no_stale_mount(tmp_path: Path) -> None:
    """In one of some tries: fusermount3 leaves it alone when something else is mounted or unmounted as it looks."""
    gone = False
    for number in range(20):
        fs = Daemon(tmp_path / f"mnt{number}")
        try:
            reader = fs.blocked("cat", "trace_pipe")
            fs.process.kill()
            fs.process.wait()
            reader.wait(PATIENCE)
            reader.communicate()
            gone = wait_until(lambda fs=fs: not is_mounted(fs.path), 1)
        finally:
            fs.stop()
        if gone:
            break
    assert gone


def test_a_stale_mount_is_cleaned_by_the_next(tmp_path: Path) -> None:
    bare = tmp_path / "bin"  # no fusermount3 here, so no auto_unmount
    bare.mkdir()
    first = Daemon(tmp_path / "mnt", PATH=str(bare))
    try:
        assert first.answer == b"ready\n", first.stderr()
        first.process.kill()
        first.process.wait()
        with pytest.raises(OSError, match="not connected"):
            os.stat(first.path)
        second = Daemon(tmp_path / "mnt")
        try:
            assert second.answer == b"ready\n", second.stderr()
            assert second.out("cat tracing_on") == "1\n"
        finally:
            second.stop()
    finally:
        first.stop()
    assert not is_mounted(first.path)


def test_two_daemons_on_one_directory(tmp_path: Path) -> None:
    first = Daemon(tmp_path / "mnt")
    try:
        for env, status, message in (
            ({}, 1, f"already served by process {first.process.pid}"),
            ({"XDG_CACHE_HOME": str(tmp_path / "other")}, 2, "already mounted"),
        ):
            done = subprocess.run(
                [sys.executable, str(FAKE), str(first.path)],
                env={**os.environ, "PYTHONPATH": str(TESTS.parent), "XDG_CACHE_HOME": str(tmp_path / "cache"), **env},
                capture_output=True,
                timeout=60,
                text=True,
                check=False,
            )
            assert done.returncode == status
            assert done.stderr.count("\n") == 1
            assert message in done.stderr
        assert first.out("cat tracing_on") == "1\n"
    finally:
        first.stop()
