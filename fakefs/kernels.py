"""The kernels at hand: fetch Debian's, keep them in the user's cache, remember which one to use.

    CACHE/kernels/VERSION/vmlinuz     a fetched kernel, with its config beside it
    CACHE/kernels/suite-NAME          symbolic link to the VERSION that was fetched from the suite NAME
    CACHE/kernels/default             symbolic link to the kernel file chosen with `fakefs kernel use`

Everything appears by rename: an interrupted fetch leaves nothing. Talking to apt is `fakefs.debian`, reading a kernel
`emulator.kernel.image`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fakefs.errors import UserError

if TYPE_CHECKING:
    from fakefs.debian import Source

DEFAULT_SUITE = "stable"
_INSTEAD = "to use a kernel file you have: fakefs kernel use PATH"

Progress = Callable[[str], None]
"""Is called with one line a step."""


def say(line: str) -> None:
    """The usual `Progress`: standard output is for results."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel at hand. `suites` are those it was fetched from; the `default` is used unless another is named."""

    version: str
    path: Path
    suites: tuple[str, ...]
    default: bool


def cache_dir() -> Path:
    """Where kernels and snapshots are kept: $FAKEFS_CACHE, else $XDG_CACHE_HOME/fakefs, else ~/.cache/fakefs."""
    if own := os.environ.get("FAKEFS_CACHE"):
        return Path(own).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "fakefs"  # the XDG specification: not if relative


def _kernels() -> Path:
    return cache_dir() / "kernels"


def installed() -> list[Kernel]:
    """The fetched kernels, newest first, and before them the one chosen with `use` if it is another file."""
    directory, default = _kernels(), default_kernel()
    suites: dict[str, list[str]] = {}
    for link in sorted(directory.glob("suite-*")):
        if link.is_symlink():
            suites.setdefault(os.readlink(link), []).append(link.name.removeprefix("suite-"))
    found = [
        Kernel(path.parent.name, path, tuple(suites.get(path.parent.name, ())), path == default) for path in _versions()
    ]
    found.sort(key=lambda kernel: _numbers(kernel.version), reverse=True)
    if default and not any(kernel.default for kernel in found):
        found.insert(0, Kernel(default.name, default, (), True))
    return found


def default_kernel() -> Path | None:
    """The kernel to use when none is named: the one chosen, else the default suite's, else the newest; or None.

    Raises UserError when the chosen one is gone.
    """
    chosen = _kernels() / "default"
    if chosen.is_symlink():
        path = Path(os.readlink(chosen))
        if not path.is_file():
            raise UserError(f"{path}: the kernel chosen with `fakefs kernel use` is gone; choose another")
        return path
    if stable := _fetched(DEFAULT_SUITE):
        return stable
    return max(_versions(), key=lambda path: _numbers(path.parent.name), default=None)


def use(path: Path) -> Path:
    """Make the kernel file at `path` the default one and return its absolute path; raises UserError if it is none."""
    from emulator.errors import EmulatorError
    from emulator.kernel.image import KernelImage

    path = Path(os.path.abspath(path))
    try:
        KernelImage.load(path)
    except EmulatorError as error:
        raise UserError(str(error)) from None
    with locked(say):
        _link(_kernels() / "default", str(path))
    return path


def fetch(suite: str | None = None, progress: Progress = say, *, update: bool = False) -> Path:
    """Return the path of the kernel of a Debian suite, fetching it if it is not there or `update` asks for a newer one.

    Without `suite` it is the default suite's; when that cannot be had, that of the suite this system runs, then this
    system's own kernel, and `progress` is told. Raises UserError.
    """
    if suite is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", suite):
        raise UserError(f"{suite!r} is not the name of a Debian suite; try stable, testing or sid", exit_status=2)
    if not update and (path := _fetched(suite or DEFAULT_SUITE)):
        return path

    from fakefs.debian import AptError, system_source

    with locked(progress):
        if not update and (path := _fetched(suite or DEFAULT_SUITE)):
            return path  # another process fetched it while this one waited
        try:
            source = system_source()
            suites = [suite] if suite else list(dict.fromkeys([DEFAULT_SUITE, source.suites[0]]))
        except AptError as error:
            source, suites, reason = None, [], str(error)
        for name in suites:
            assert source is not None
            try:
                return _fetch(source, name, progress)
            except OSError as error:
                raise UserError(f"could not keep the kernel in {_kernels()}: {error.strerror}") from None
            except AptError as error:
                reason = f"{name}: {error}"
                if suite is None:
                    progress(f"fakefs: no kernel from Debian {reason}")
    if suite is None and (path := _host_kernel()):
        progress(f"fakefs: {reason}; using this system's own kernel {path}")
        return use(path)
    raise UserError(f"could not fetch a kernel: {reason}; {_INSTEAD}")


def _versions() -> list[Path]:
    """The kernel files fetched, each once."""
    return [path for path in _kernels().glob("[!.]*/vmlinuz") if not path.parent.is_symlink()]


def _fetched(suite: str) -> Path | None:
    link = _kernels() / f"suite-{suite}"
    path = _kernels() / os.readlink(link) / "vmlinuz" if link.is_symlink() else link
    return path if path.is_file() else None


def _fetch(source: Source, suite: str, progress: Progress) -> Path:
    """Fetch, unpack and put in place; the lock is held. Raises AptError."""
    import tempfile

    from emulator.errors import EmulatorError
    from emulator.kernel.image import KernelImage
    from fakefs.debian import Apt, AptError, files_of

    directory = _kernels()
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as scratch:
        apt = Apt(Path(scratch, "apt"), source, suite)
        progress(f"fakefs: asking {source.uri} for the kernel of Debian {suite}")
        apt.update()
        parts = apt.parts()
        identity = "".join(f"{name} {version}\n" for name, version in sorted(parts.items()))
        for known in _versions():
            package = known.with_name("package")
            if package.is_file() and package.read_text() == identity:
                _link(directory / f"suite-{suite}", known.parent.name)
                return known
        progress(f"fakefs: downloading {', '.join(parts)}")
        new = Path(scratch, "new")
        new.mkdir()
        for deb in apt.download(list(parts)):
            files_of(deb, _wanted, new)
        try:
            version = KernelImage.load(new / "vmlinuz").version
        except EmulatorError as error:
            raise AptError(f"{', '.join(parts)}: {error}") from None
        if not re.fullmatch(r"[0-9][\w.+~-]*", version):
            raise AptError(f"the kernel has an odd version: {version!r}")
        (new / "package").write_text(identity)
        place = directory / version
        if place.exists():  # a new build under the same name
            place.rename(Path(scratch, "old"))
        new.rename(place)
        _link(directory / f"suite-{suite}", version)
    progress(f"fakefs: Linux {version} is in {place}")
    return place / "vmlinuz"


def _wanted(path: str) -> str | None:
    """What of a Debian kernel package is kept: /boot/NAME-VERSION, since 7.x /usr/lib/modules/VERSION/NAME."""
    match = re.fullmatch(r"boot/(vmlinuz|config)-[^/]+|(?:usr/)?lib/modules/[^/]+/(vmlinuz|config)", path)
    return (match[1] or match[2]) if match else None


def _host_kernel() -> Path | None:
    """The newest kernel in /boot that this user may read and that is recent enough."""
    from emulator.errors import EmulatorError
    from emulator.kernel.image import KernelImage

    for path in sorted(Path("/boot").glob("vmlinuz*"), key=lambda path: _numbers(path.name), reverse=True):
        try:
            KernelImage.load(path)
        except EmulatorError:
            continue
        return path
    return None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _link(link: Path, target: str) -> None:
    """Make or replace a symbolic link in one step."""
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)


@contextmanager
def locked(progress: Progress) -> Iterator[None]:
    """Hold the lock of the kernels' directory, made if need be; clear what a killed fetch left."""
    import fcntl
    import shutil

    directory = _kernels()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; set FAKEFS_CACHE to a directory you can write to") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("fakefs: waiting for another fakefs that is fetching")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in directory.glob(".fetch-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
