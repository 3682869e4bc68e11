"""`fakefs doctor`: is everything there that fakefs needs, and if not, which command fixes it.

Each check is a function that looks at one thing, changes nothing and returns a `Check`. Fixes are in Debian's words.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

from fakefs import kernels
from fakefs.errors import UserError
from fakefs.namespace import SYSCTLS

UNICORN = "2.1.4"
"""The one version whose insides emulator/native knows."""

_MIB = 1 << 20
DISK_NEEDED = 1024 * _MIB
"""Bytes in the cache: a download and its unpacked form (100 MiB) and the snapshots of a few kernels."""
MEMORY_NEEDED = 512 * _MIB
"""Bytes: the guest's RAM and Unicorn's translations of a busy kernel."""


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, whether it is as it should be, what was seen, and the command that fixes it ("" if ok)."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def checks() -> list[Check]:
    """Look at everything, in the order things are needed."""
    return [check() for check in _CHECKS]


def run() -> int:
    """Print every check, with the fix under each that failed; return the exit status: 0 if all is well, else 1."""
    results = checks()
    width = max(len(check.name) for check in results)
    for check in results:
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:{width}}  {check.detail}")
        if not check.ok:
            print(f"      {'':{width}}  fix: {check.remedy}")
    failed = sum(not check.ok for check in results)
    print("all is well" if not failed else f"{failed} of {len(results)} checks failed")
    return 1 if failed else 0


def python_version() -> Check:
    """Python 3.11 has what the daemon uses (exception groups, slots in dataclasses)."""
    version = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info[:2] >= (3, 11)
    return Check("Python", ok, version, "" if ok else "apt-get install python3  (3.11 or newer)")


_LOAD_FUSE = "sudo modprobe fuse  (in a container: start it with --device /dev/fuse)"


def fuse_device(path: Path = Path("/dev/fuse")) -> Check:
    """The device that a FUSE mount is made of."""
    name = "FUSE device"
    if not path.exists():
        return Check(name, False, f"{path} does not exist", _LOAD_FUSE)
    try:
        os.close(os.open(path, os.O_RDWR))
    except PermissionError:
        return Check(name, False, f"{path} cannot be opened by this user", f"sudo chmod 666 {path}")
    except OSError as error:
        return Check(name, False, f"{path} cannot be opened: {error.strerror}", _LOAD_FUSE)
    return Check(name, True, f"{path} can be opened")


def fusermount() -> Check:
    """The helper that mounts for users who are not root."""
    found = shutil.which("fusermount3")
    return Check("fusermount3", found is not None, found or "not found", "" if found else "apt-get install fuse3")


def pyfuse3_module() -> Check:
    """The binding to libfuse3: it imports only if the library is there too."""
    try:
        import_module("pyfuse3")
        return Check("pyfuse3", True, metadata.version("pyfuse3"))
    except (ImportError, OSError) as error:
        return Check("pyfuse3", False, _line(error), "apt-get install libfuse3-dev pkg-config && pip install pyfuse3")


def unicorn_version() -> Check:
    """The CPU emulator, whose version is pinned: the native part reaches into it."""
    try:
        version = metadata.version("unicorn")
    except metadata.PackageNotFoundError:
        version = "not installed"
    ok = version == UNICORN
    return Check("Unicorn", ok, version, "" if ok else f"pip install unicorn=={UNICORN}")


def native_parts(root: Path = Path(__file__).parent.parent) -> Check:
    """The shared objects that building the package makes: the CPU's, FUSE's and mirroring's fast parts."""
    missing = [
        f"{directory}/{name}.so"
        for directory, name in (("emulator", "_core"), ("fakefs/fuse", "_shim"), ("fakefs/mirror", "_notes"))
        if not any((root / directory).glob(f"{name}*.so"))
    ]
    detail = f"not built: {', '.join(missing)}" if missing else "built"
    return Check("native parts", not missing, detail, "pip install .  (in a checkout: make setup)" if missing else "")


def kernel() -> Check:
    """A kernel to run."""
    try:
        path = kernels.default_kernel()
    except UserError as error:
        return Check("kernel", False, str(error), "fakefs kernel use PATH")
    return Check("kernel", path is not None, str(path or "none yet"), "" if path else "fakefs kernel fetch")


def cache() -> Check:
    """The directory of kernels and snapshots can be written."""
    directory = kernels.cache_dir()
    existing = _nearest(directory)
    ok = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    detail = f"{directory}" if ok else f"{directory} cannot be written"
    return Check("cache", ok, detail, "" if ok else "export FAKEFS_CACHE=DIRECTORY  (one that you can write to)")


def disk() -> Check:
    """Space for kernels and snapshots."""
    directory = _nearest(kernels.cache_dir())
    free = shutil.disk_usage(directory).free
    remedy = f"rm -r {kernels.cache_dir()}  (or export FAKEFS_CACHE=DIRECTORY on a larger disk)"
    return _enough("disk", free, DISK_NEEDED, f"free in {directory}", remedy)


def memory(meminfo: Path = Path("/proc/meminfo")) -> Check:
    """Memory that programs can have without swapping (MemAvailable of proc(5))."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
            return _enough("memory", available, MEMORY_NEEDED, "available", "end other programs or add memory")
    return Check("memory", False, f"{meminfo} does not say", f"mount -t proc proc {meminfo.parent}")


def user_namespaces(sysctls: Path = Path("/proc/sys")) -> Check:
    """`fakefs run` makes user namespaces, also for root: the sysctls that may forbid them."""
    name = "user namespaces"
    for sysctl, forbids, allow in SYSCTLS:
        if os.geteuid() == 0 and not sysctl.startswith("user/"):
            continue  # these forbid them to ordinary users
        dotted = sysctl.replace("/", ".")
        try:
            value = (sysctls / sysctl).read_text().strip()
        except OSError:
            continue  # not every kernel has it
        if value == forbids:
            return Check(name, False, f"forbidden by {dotted} = {value}", f"sudo sysctl {dotted}={allow}")
    return Check(name, True, "allowed")


_CHECKS: list[Callable[[], Check]] = [
    python_version,
    unicorn_version,
    native_parts,
    pyfuse3_module,
    fuse_device,
    fusermount,
    user_namespaces,
    cache,
    disk,
    memory,
    kernel,
]


def _enough(name: str, have: int, need: int, what: str, remedy: str) -> Check:
    ok = have >= need
    detail = f"{have // _MIB} MiB {what}" + ("" if ok else f", {need // _MIB} MiB are needed")
    return Check(name, ok, detail, "" if ok else remedy)


def _nearest(path: Path) -> Path:
    """The nearest directory on the way up from `path` that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
