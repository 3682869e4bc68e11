"""The directory to mount on: may it be, who has it, and taking a mount away.

No FUSE library here: `status`, `unmount` and error messages need none. Follows proc_pid_mountinfo(5), umount(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fakefs.errors import UserError

SUBTYPE = "fakefs"
FSTYPE = f"fuse.{SUBTYPE}"
"""The type our mounts have in /proc/mounts."""

_MNT_DETACH = 2
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
"""What statfs(2) gives at a FUSE mount without a daemon. The attributes stat(2) gives may be kept by the kernel."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of mountinfo. `number` is the mount's own, as in /proc/PID/fdinfo; 0 for none.

    `root` is the directory of the filesystem (`device`, major:minor) that is mounted.
    """

    directory: bytes
    fstype: str
    source: bytes
    number: int = 0
    device: bytes = b""
    root: bytes = b"/"
    options: bytes = b"rw"
    super_options: bytes = b"rw"

    def __bytes__(self) -> bytes:
        """The line of /proc/mounts, as in proc_pid_mounts(5)."""
        words = [*self.options.split(b","), *self.super_options.split(b",")]
        read = b"ro" if b"ro" in words else b"rw"
        options = b",".join([read, *(word for word in words if word not in (b"ro", b"rw"))])
        fields = (_escape(self.source), _escape(self.directory), self.fstype.encode(), options)
        return b" ".join(fields) + b" 0 0\n"


def parse_mountinfo(text: bytes) -> list[Mount]:
    """The mounts of /proc/PID/mountinfo, in order: the last one on a directory is the visible one."""
    mounts = []
    for line in text.split(b"\n"):
        fields = line.split(b" ")
        # A varying number of optional fields, ended by "-", lies between the sixth field and the type.
        kind = fields[fields.index(b"-", 6) + 1 :] if b"-" in fields[6:] else []
        if len(kind) >= 2:
            number = int(fields[0]) if fields[0].isdigit() else 0
            directory, source, root = _unescape(fields[4]), _unescape(kind[1]), _unescape(fields[3])
            options, super_options = fields[5], kind[2] if len(kind) > 2 else b"rw"
            fstype = kind[0].decode("ascii", "replace")
            mounts.append(Mount(directory, fstype, source, number, fields[2], root, options, super_options))
    return mounts


def _escape(field: bytes) -> bytes:
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in field)


def _unescape(field: bytes) -> bytes:
    """Blank, tab, newline and backslash are written as a backslash and three octal digits."""
    first, *rest = field.split(b"\\")
    for part in rest:
        digits = part[:3]
        if len(digits) == 3 and digits[:1] in b"0123" and not digits.strip(b"01234567"):
            first += bytes([int(digits, 8)]) + part[3:]
        else:
            first += b"\\" + part
    return first


def mount_at(directory: Path) -> Mount | None:
    """The mount that is visible on `directory`, if it is a mount point."""
    real = os.fsencode(os.path.realpath(directory))
    with open("/proc/self/mountinfo", "rb") as file:
        return next((mount for mount in reversed(parse_mountinfo(file.read())) if mount.directory == real), None)


def is_stale(directory: Path) -> bool:
    """Whether `directory` is a FUSE mount whose daemon is gone."""
    try:
        os.statvfs(directory)
    except OSError as error:
        return error.errno in _DEAD
    return False


def discard_stale(directory: Path) -> None:
    """Lazily unmount what a killed daemon of ours has left on `directory`. Raises UserError if it is not ours."""
    while is_stale(directory):
        mount = mount_at(directory)
        if mount is None or mount.fstype != FSTYPE:
            what = mount.fstype if mount else "FUSE"
            raise UserError(f"{directory}: a dead {what} mount is here; remove it: fusermount3 -uz {directory}")
        _umount(directory, lazy=True)


def check(directory: Path) -> None:
    """Raise UserError, with exit status 2, unless `directory` is an empty directory and nothing is mounted on it.

    What a killed daemon of ours has left mounted there is removed first.
    """
    discard_stale(directory)
    mount = mount_at(directory)
    if mount is not None and mount.fstype == FSTYPE:
        raise _wrong(f"{directory}: already mounted; unmount it first: fakefs umount {directory}")
    if mount is not None:
        raise _wrong(f"{directory}: is a mount point ({mount.fstype}); give an empty directory")
    try:
        with os.scandir(directory) as entries:
            if next(entries, None) is not None:
                raise _wrong(f"{directory}: not empty; give an empty directory")
    except FileNotFoundError:
        raise _wrong(f"{directory}: no such directory; make it: mkdir -p {directory}") from None
    except NotADirectoryError:
        raise _wrong(f"{directory}: not a directory; give an empty directory") from None
    except OSError as error:
        raise _wrong(f"{directory}: {error.strerror}; give a directory of your own") from None


@contextmanager
def lock(directory: Path) -> Iterator[int]:
    """Hold `directory` against other daemons of this user. Take it before `check`, keep it while mounted.

    The lock file lies in the user's cache and stays there, empty of meaning when nobody holds it; it dies with its
    holder, however that ends. Raises UserError when another process has it.
    """
    path = _lock_path(directory)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise UserError(f"cannot make the lock file {path}: {error.strerror}; set XDG_CACHE_HOME") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
            holder = f"process {pid}" if pid.isdigit() else "another process"
            remedy = f"unmount it first: fakefs umount {directory}"
            raise UserError(f"{directory}: already served by {holder}; {remedy}") from None
        sign(fd)
        yield fd
    finally:
        os.close(fd)


def sign(lock_file: int) -> None:
    """Tell others who holds the lock that `lock()` gave: this process, maybe a fork of the one that took it."""
    os.truncate(lock_file, 0)
    os.pwrite(lock_file, b"%d\n" % os.getpid(), 0)


def _lock_path(directory: Path) -> Path:
    from hashlib import blake2b

    cache = os.environ.get("XDG_CACHE_HOME")
    base = Path(cache) if cache and os.path.isabs(cache) else Path.home() / ".cache"
    key = blake2b(os.fsencode(os.path.realpath(directory)), digest_size=16).hexdigest()
    return base / SUBTYPE / "locks" / key


def unmount(directory: Path, *, lazy: bool = False) -> None:
    """Unmount ours from `directory`; its daemon then ends. `lazy`: also while files are open. Raises UserError."""
    mount = mount_at(directory)
    if mount is None or mount.fstype != FSTYPE:
        what = "nothing is mounted here" if mount is None else f"the mount here is {mount.fstype}, not ours"
        raise _wrong(f"{directory}: {what}; see: findmnt -t {FSTYPE}")
    _umount(directory, lazy=lazy or is_stale(directory))


def _umount(directory: Path, *, lazy: bool) -> None:
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(os.path.realpath(directory)), _MNT_DETACH if lazy else 0) == 0:
            return
        number = ctypes.get_errno()
        message = os.strerror(number)
        busy = number == errno.EBUSY
    else:
        program = fusermount()
        if program is None:
            raise UserError("cannot unmount: fusermount3 is missing; install the package fuse3")
        from subprocess import DEVNULL, PIPE, run

        argv = [program, "-u", *(["-z"] if lazy else []), "--", os.fspath(directory)]
        done = run(argv, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, check=False)
        if done.returncode == 0:
            return
        message = done.stderr.decode("utf-8", "replace").strip().replace("\n", "; ") or "fusermount3 failed"
        busy = "busy" in message
    remedy = "; close what is open in it, or: fakefs umount --lazy" if busy else ""
    raise UserError(f"{directory}: cannot unmount: {message}{remedy}")


def fusermount() -> str | None:
    """The path of fusermount3, the setuid program of libfuse."""
    paths = (os.path.join(directory, "fusermount3") for directory in os.get_exec_path())
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def _wrong(message: str) -> UserError:
    return UserError(message, exit_status=2)


def wait_for_daemon(directory: Path, seconds: float) -> bool:
    """Wait for the end of an unmounted directory's daemon, which lets go of its lock then; return whether it came."""
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with lock(directory):
                return True
        except UserError:
            time.sleep(0.01)
    return False
