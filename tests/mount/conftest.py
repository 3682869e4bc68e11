"""Fixtures with a running mount. Every mount and daemon is gone at the end of the session, or the session fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fakefs import kernels, mountpoint
from tests.mounted import PATIENCE, Mounted, running, until

MakeMount = Callable[..., Mounted]
_RUNTIME = "XDG_RUNTIME_DIR"


@pytest.fixture(scope="session")
def fuse() -> None:
    """Fail with one clear sentence where there is no FUSE."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        pytest.fail(f"the mount tests need /dev/fuse: {error.strerror} (modprobe fuse, or leave out: -m 'not mount')")


@pytest.fixture(scope="session")
def environment(fuse: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of mounts and scripts: own sockets and locks, the user's kernels and snapshots."""
    base = tmp_path_factory.mktemp("run")
    runtime, cache = base / "runtime", base / "cache"
    runtime.mkdir(mode=0o700)
    env = {
        **os.environ,
        _RUNTIME: str(runtime),
        "XDG_CACHE_HOME": str(cache),
        "FAKEFS_CACHE": str(kernels.cache_dir()),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "LC_ALL": "C",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("FAKEFS_CACHE", env["FAKEFS_CACHE"])
        yield env
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
def new_mount(
    environment: dict[str, str], kernel_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeMount]:
    """Make mounts that live until the session ends or `stop()`."""
    with ExitStack() as stack:

        def make(*options: str) -> Mounted:
            # Not the test's tmp_path: a directory that is mounted on cannot be removed.
            mounted = Mounted(tmp_path_factory.mktemp("mnt") / "m", kernel_path, environment, *options)
            stack.callback(mounted.stop)
            return mounted.start()

        yield make


@pytest.fixture
def mount(new_mount: MakeMount) -> Iterator[Mounted]:
    """A mount of the test's own."""
    mounted = new_mount()
    yield mounted
    mounted.stop()


@pytest.fixture(scope="session")
def shared_mount(new_mount: MakeMount) -> Mounted:
    """One mount for tests that leave it as they found it (`tests.mounted.Resetter`)."""
    return new_mount()
