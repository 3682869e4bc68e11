"""What a tired student types: each mistake is one line that says what to do, exit status 1 or 2, and nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fakefs import mountpoint
from tests.mounted import FAKEFS, PATIENCE, Mounted, fakefs, running, until


@dataclass(frozen=True)
class Student:
    """A directory to make mistakes in, holding `empty`, an empty directory; `run` is `fakefs` there."""

    home: Path
    env: Mapping[str, str]

    def run(self, *words: str, prefix: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, *FAKEFS, *words],
            cwd=self.home,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def errs(self, *words: str, says: str, status: int, prefix: tuple[str, ...] = (), **env: str) -> None:
        """The command fails with one line on stderr that has `says` in it, and leaves no mount."""
        done = self.run(*words, prefix=prefix, **env)
        lines = [line for line in done.stderr.splitlines() if line not in _PROGRESS]
        assert (done.returncode, done.stdout) == (status, ""), done
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("fakefs"), lines[0]
        assert says in lines[0], lines[0]
        assert mountpoint.mount_at(self.home / "empty") is None
        assert not list((self.home / "empty").iterdir())


_PROGRESS = ("fakefs: booting Linux (once)", "fakefs: no kernel yet, fetching Debian's (once)")


@pytest.fixture
def student(environment: dict[str, str], kernel_path: Path, tmp_path: Path) -> Student:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "homework").touch()
    (tmp_path / "text").write_text("not a kernel\n" * 1000)
    arm64 = b"MZ" + bytes(54) + b"ARM\x64" + bytes(4096)  # Documentation/arch/arm64/booting.rst: magic at 56
    (tmp_path / "arm64").write_bytes(arm64)
    (tmp_path / "half").write_bytes(kernel_path.read_bytes()[:1_000_000])
    return Student(tmp_path, environment)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ("", 2, "see: fakefs --help"),
        ("mout empty", 2, "invalid choice: 'mout'"),
        ("mount", 2, "DIR; see: fakefs mount --help"),
        ("mount empty full", 2, "unrecognized arguments: full"),
        ("mount missing", 2, "mkdir -p missing"),
        ("mount full", 2, "give an empty directory"),
        ("mount text", 2, "not a directory"),
        ("mount /proc", 2, "is a mount point"),
        ("mount --memory lots empty", 2, "not a size"),
        ("mount --memory 3G empty", 2, "not a size"),
        ("mount --memory 16M empty", 1, "too little for this kernel: --memory"),
        ("mount -o colour=red empty", 2, "unknown mount option 'colour=red'"),
        ("mount -o uid=me empty", 2, "not a number"),
        ("mount --root sys empty", 2, "starts with /"),
        ("mount --root /nowhere empty", 2, "No such file or directory (in the guest)"),
        ("umount empty", 2, "nothing is mounted here"),
        ("umount missing", 2, "nothing is mounted here"),
        ("exec empty", 2, "no program given"),
        ("exec empty -- ls", 2, "fakefs mount empty"),
        ("console empty", 2, "fakefs mount empty"),
        ("status missing", 2, "fakefs mount missing"),
        ("kernel", 2, "see: fakefs kernel --help"),
        ("kernel use text", 1, "not a kernel"),
        ("kernel use missing", 1, "No such file"),
    ],
)
def test_a_mistake_is_one_line_with_a_remedy(
    student: Student, kernel_path: Path, words: str, status: int, says: str
) -> None:
    argv = words.split()
    if argv[:1] == ["mount"]:
        argv[1:1] = ["--kernel", str(kernel_path)]
    student.errs(*argv, status=status, says=says)


@pytest.mark.parametrize(
    ("kernel", "status", "says"),
    [
        ("missing", 2, "no such file"),
        ("full", 2, "not a file"),
        ("text", 1, "not a kernel"),
        ("/bin/true", 1, "not a kernel"),
        ("arm64", 1, "aarch64; an x86-64 kernel is needed"),
        ("half", 1, "damaged"),
    ],
)
def test_what_is_no_kernel(student: Student, kernel: str, status: int, says: str) -> None:
    student.errs("mount", "--kernel", kernel, "empty", status=status, says=says)


def test_a_relative_directory_is_as_good_as_another(student: Student, kernel_path: Path) -> None:
    done = student.run("mount", "--kernel", str(kernel_path), "empty")
    try:
        assert (done.returncode, done.stderr.replace(_PROGRESS[0], "").strip()) == (0, "")
        assert (student.home / "empty" / "tracing_on").read_text() == "1\n"
        assert student.run("exec", "empty", "--", "true").returncode == 0
    finally:
        assert student.run("umount", "empty").returncode == 0


def test_mounting_twice(student: Student, mount: Mounted) -> None:
    student.errs(
        "mount", "--kernel", str(mount.kernel), str(mount.path), status=1, says=f"process {mount.pid}; unmount it first"
    )
    assert mount.read("tracing_on") == "1\n"


def test_a_stale_mount_is_replaced(mount: Mounted) -> None:
    os.kill(mount.pid, signal.SIGKILL)
    until(lambda: not running(mount.pid), PATIENCE, "the daemon's death")
    mount.start()
    assert mount.read("tracing_on") == "1\n"


def test_a_busy_mount_stays_and_a_lazy_unmount_takes_it(mount: Mounted) -> None:
    with (mount.path / "trace").open("rb"):
        done = fakefs("umount", mount.path)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "umount --lazy" in done.stderr
        assert mount.read("tracing_on") == "1\n"
        assert fakefs("umount", "--lazy", mount.path).returncode == 0


@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "FAKEFS_CACHE"])
def test_a_directory_that_cannot_be_made(student: Student, kernel_path: Path, variable: str) -> None:
    student = replace(student, env={**student.env, variable: "/proc/nowhere"})
    kernel = () if variable == "FAKEFS_CACHE" else ("--kernel", str(kernel_path))
    student.errs("mount", *kernel, "empty", status=1, says=f"set {variable}")


def _unshare(*options: str, script: str = "") -> tuple[str, ...]:
    """A command prefix: run with namespaces of its own, after `script`. Skips the test where that is not allowed."""
    if subprocess.run(["unshare", *options, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare(1) is not allowed here")
    return ("unshare", *options, "sh", "-ec", f'{script}\nexec "$@"', "sh")


def test_no_fuse(student: Student, kernel_path: Path) -> None:
    prefix = _unshare("-m", script="mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3")
    student.errs("mount", "--kernel", str(kernel_path), "empty", status=1, says="modprobe fuse", prefix=prefix)


def test_a_full_disk(student: Student) -> None:
    prefix = _unshare("-m", script='mount -t tmpfs -o nr_inodes=2 none "$TINY"')
    (student.home / "tiny").mkdir()
    tiny = str(student.home / "tiny")
    cache = f"{tiny}/cache"
    student.errs("mount", "empty", status=1, says="set FAKEFS_CACHE", prefix=prefix, TINY=tiny, FAKEFS_CACHE=cache)


def test_no_kernel_and_no_network(student: Student) -> None:
    prefix = _unshare("-m", "-n", script="mount -t tmpfs none /boot")
    cache = student.home / "cache"
    done = student.run("mount", "empty", prefix=prefix, FAKEFS_CACHE=str(cache))
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert all(line.startswith("fakefs: ") for line in lines), done.stderr
    assert lines[-1].endswith("to use a kernel file you have: fakefs kernel use PATH")
    assert [path.name for path in (cache / "kernels").iterdir()] == [".lock"]
    assert mountpoint.mount_at(student.home / "empty") is None


def test_ctrl_c_during_the_boot(student: Student, kernel_path: Path) -> None:
    cache = student.home / "cache"
    words = ("mount", "--kernel", str(kernel_path), "empty")
    process = subprocess.Popen(
        [*FAKEFS, *words],
        cwd=student.home,
        env={**student.env, "FAKEFS_CACHE": str(cache)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    with process, process.stderr:
        assert process.stderr.readline().rstrip() == _PROGRESS[0]
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()  # to the end of the child that boots, too: it has the pipe
        assert process.wait(PATIENCE) == 130
    assert "Traceback" not in rest
    assert not list(cache.rglob("ram"))
    assert mountpoint.mount_at(student.home / "empty") is None
