"""Fixtures with a running mount. Every mount and daemon is gone at the end of the session, or the session fails."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from fakefs import kernels, mountpoint
from tests.doc_pages import not_run
from tests.fuse_daemon import Daemon
from tests.mounted import FAKEFS, PATIENCE, Mounted, running, until
from tests.uprobes import Program

MakeMount = Callable[..., Mounted]
_RUNTIME = "XDG_RUNTIME_DIR"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell which commands of the documentation nobody has tried."""
    if not_run:
        terminalreporter.section(f"{len(not_run)} blocks of the documentation were not run")
        terminalreporter.write_line("\n".join(f"{where}: {why}" for where, why in not_run))


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of all mounts and scripts: sockets and locks of their own, the user's kernels and snapshots."""
    base = tmp_path_factory.mktemp("run")
    runtime, cache = base / "runtime", base / "cache"
    runtime.mkdir(mode=0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKEFS_CACHE", str(kernels.cache_dir()))
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv(_RUNTIME, str(runtime))
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
        patch.setenv("LC_ALL", "C")
        yield dict(os.environ)
    _nothing_left(tmp_path_factory.getbasetemp(), runtime)


def _nothing_left(base: Path, runtime: Path) -> None:
    with open("/proc/self/mountinfo", "rb") as file:
        mounts = [mount for mount in mountpoint.parse_mountinfo(file.read()) if mount.fstype == mountpoint.FSTYPE]
    left = [mount.directory for mount in mounts if mount.directory.startswith(os.fsencode(base) + b"/")]
    assert not left, f"mounts left behind: {left}"
    until(lambda: not _daemons(runtime), PATIENCE, f"the end of all daemons: {_daemons(runtime)}")


def _daemons(runtime: Path) -> list[int]:
    """Processes with our runtime directory in their environment: the mounts' daemons."""
    mark, found = os.fsencode(f"{_RUNTIME}={runtime}"), []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if mark in environ.split(b"\0") and pid != os.getpid() and running(pid):
            found.append(pid)
    return found


@pytest.fixture(scope="session")
def new_mount(kernel_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeMount]:
    """Make mounts by the command, which live until the session ends or `stop()`."""
    with ExitStack() as stack:

        def make(*options: str) -> Mounted:
            # Not the test's tmp_path: a directory that is mounted on cannot be removed.
            mounted = Mounted(tmp_path_factory.mktemp("mnt") / "m", kernel_path, *options)
            stack.callback(mounted.stop)
            return mounted.start()

        yield make


@pytest.fixture
def mount(new_mount: MakeMount) -> Iterator[Mounted]:
    """A mount of the test's own, made by the command."""
    mounted = new_mount()
    yield mounted
    mounted.stop()


@pytest.fixture(scope="session")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A program with the C library in a file of its own."""
    return Program(tmp_path_factory.mktemp("dynamic") / "measure")


@pytest.fixture(scope="module")
def fs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The FUSE layer with no guest under it."""
    daemon = Daemon(tmp_path_factory.mktemp("fuse") / "mnt")
    try:
        yield daemon
    finally:
        daemon.stop()


# ---- fakefs run

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
        open_up = _open_up(home, Path(sys.base_prefix), Path(__file__).resolve().parents[2])
        script = f'set -e; {open_up} mount --bind {fuse} /dev/fuse; exec env {variables} setpriv "$@"'
        ids = ("--reuid=1000", "--regid=1000", "--clear-groups")
        yield User(["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *ids], kernel)


def _open_up(home: Path, *needed: Path) -> str:
    """Shell commands that make directories reachable for everybody, in their mount namespace, though not what is near.

    Python may lie in root's home directory, and the checkout too.
    """
    closed = {
        path: top
        for path in needed
        for top in [next((each for each in reversed(path.parents) if each.stat().st_mode & 0o001 == 0), None)]
        if top is not None
    }
    kept = {path: home / f"kept{number}" for number, path in enumerate(closed)}
    commands = [f"mkdir -p {keep}; mount --bind {path} {keep};" for path, keep in kept.items()]
    commands += [f"mount -t tmpfs -o mode=755 none {top};" for top in sorted(set(closed.values()))]
    commands += [f"mkdir -p {path}; mount --bind {keep} {path};" for path, keep in kept.items()]
    return " ".join(commands)


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


@pytest.fixture
def mirrored(environment: dict[str, str], kernel_path: Path, tmp_path: Path) -> Run:
    """Run a bash script by `fakefs run --mirror`, in a directory of its own."""

    def run_script(script: str, mirror: str = "files", timeout: float = 60) -> subprocess.CompletedProcess[str]:
        argv = [*FAKEFS, "run", "--kernel", str(kernel_path), "--mirror", mirror, "--", "bash", "-c", script]
        return subprocess.run(
            argv,
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout,
            check=False,
        )

    run_script("true", "off")  # boots if need be, and says so
    return run_script


@pytest.fixture
def host_unchanged() -> Iterator[None]:
    """Mounts of this machine are the same before and after, and so are a few of its settings."""
    before = _host()
    yield
    assert _host() == before


def _host() -> tuple[list[str], str, str]:
    with open("/proc/self/mountinfo") as file:
        mounts = [line for line in file if "fuse" not in line]  # other tests have theirs
    return mounts, Path("/proc/sys/kernel/panic").read_text(), os.readlink("/proc/self/ns/mnt")
