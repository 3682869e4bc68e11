"""Finding a file of the host as a caller sees it, and with the caller's rights.

The walk is done name by name, in the caller's root directory: the guest is to have the same directories and links, and
a filesystem that is no place for programs is never entered. That goes for our own mounts most of all: the daemon would
wait for itself. Only regular files are opened. Follows path_resolution(7), credentials(7) and proc_pid_mountinfo(5).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from fakefs.files import Caller
from fakefs.hostthreads import read_thread
from fakefs.mountpoint import FSTYPE, parse_mountinfo

_NOT_ENTERED = frozenset(
    (FSTYPE, "proc", "sysfs", "tracefs", "debugfs", "securityfs", "configfs", "cgroup", "cgroup2", "bpf", "pstore")
)
_LINKS_MAX = 40
"""Links followed in one path, as many as the kernel does (MAXSYMLINKS)."""

_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_SYS_SETGROUPS = 116  # x86-64; the C library's function would change all threads
_CHUNK = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class Identity(NamedTuple):
    """Changes when a file does. `size` is in bytes, `mtime` in ns since the epoch."""

    device: int
    inode: int
    size: int
    mtime: int


_NO_FILE = Identity(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Step:
    """What the walk came by: its path without links, its mode with the type, and where it leads if it is a link."""

    path: bytes
    mode: int
    target: bytes = b""


@dataclass(slots=True)
class Found:
    """How far the walk came. If it came to a regular file, that is the last step, and `fd` is open for reading."""

    steps: list[Step] = field(default_factory=list)
    fd: int = -1
    identity: Identity = _NO_FILE

    def read(self) -> bytes:
        """Return what is in the file: as much as it had when it was found, at most. Raises OSError."""
        data = bytearray()
        while piece := os.pread(self.fd, min(_CHUNK, self.identity.size - len(data)), len(data)):
            data += piece
        return bytes(data)

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def directory_of(caller: Caller) -> bytes:
    """Return a caller's working directory; "/" when it cannot be known."""
    try:
        return os.readlink(b"/proc/%d/cwd" % caller.tid)
    except OSError:
        return b"/"


def find(caller: Caller, path: bytes) -> Found:
    """Walk to an absolute path. Nothing is found for a caller unknown. Blocks; other threads may go on meanwhile.

    Raises PermissionError when the caller may not go there, or not read the file, or the daemon cannot know.
    """
    thread = read_thread(caller) if caller.tid > 0 else None
    if thread is None:
        return Found()
    with open(f"/proc/{caller.tid}/mountinfo", "rb") as file:
        mounts = {mount.number: mount.fstype for mount in parse_mountinfo(file.read())}
    root = os.open(b"/proc/%d/root" % caller.tid, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with ExitStack() as opened:
        opened.callback(os.close, root)
        with acting_as(caller, thread.groups):
            return _walk(root, path, mounts, opened)


def _walk(root: int, path: bytes, mounts: dict[int, str], opened: ExitStack) -> Found:
    names, directories = list[bytes](), [root]
    steps = list[Step]()
    links = 0
    pending = deque(path.split(b"/"))
    while pending:
        name = pending.popleft()
        if name in (b"", b"."):
            continue
        if name == b"..":
            if names:
                names.pop()
                directories.pop()
            continue
        try:
            fd = os.open(name, _LOOK, dir_fd=directories[-1])
        except PermissionError:
            raise
        except OSError:
            return Found(steps)  # the guest has no such file either, and says what that means
        opened.callback(os.close, fd)
        if mounts.get(_mount_of(fd), FSTYPE) in _NOT_ENTERED:
            return Found(steps)
        status = os.fstat(fd)
        at = b"/" + b"/".join([*names, name])
        if stat.S_ISLNK(status.st_mode):
            target = os.readlink(b"", dir_fd=fd)
            steps.append(Step(at, status.st_mode, target))
            links += 1
            if links > _LINKS_MAX:
                return Found(steps)
            if target.startswith(b"/"):
                names.clear()
                del directories[1:]
            pending.extendleft(reversed(target.split(b"/")))
            continue
        steps.append(Step(at, status.st_mode))
        if stat.S_ISDIR(status.st_mode):
            names.append(name)
            directories.append(fd)
        elif stat.S_ISREG(status.st_mode):
            return _opened(fd, steps)
        else:
            return Found(steps)
    return Found(steps)


def _opened(fd: int, steps: list[Step]) -> Found:
    """Open what the walk came to, by its descriptor: it is the same file whatever its name leads to now."""
    reading = os.open(b"/proc/self/fd/%d" % fd, _READ)
    status = os.fstat(reading)
    return Found(steps, reading, Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


def _mount_of(fd: int) -> int:
    """Return the number of the mount that a descriptor is in, without asking its filesystem; 0 when not told."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        for line in file:
            if line.startswith(b"mnt_id:"):
                return int(line[7:])
    return 0


@contextmanager
def acting_as(caller: Caller, groups: Sequence[int]) -> Iterator[None]:
    """Let this thread, and no other, use files with the rights of a caller.

    Raises PermissionError when it cannot: a user's daemon can act for that user alone, root's for everybody.
    """
    own = os.geteuid()
    if caller.uid == own:
        yield
        return
    if own != 0:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    before, own_gid = os.getgroups(), os.getegid()
    try:
        _set_groups(groups)
        _libc.setfsgid(caller.gid)
        _libc.setfsuid(caller.uid)
        if _libc.setfsuid(-1) != caller.uid:  # it returns what was in force, and no error
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        yield
    finally:
        _libc.setfsuid(own)
        _libc.setfsgid(own_gid)
        _set_groups(before)


def _set_groups(groups: Sequence[int]) -> None:
    array = (ctypes.c_uint32 * len(groups))(*groups)
    if _libc.syscall(_SYS_SETGROUPS, len(groups), array) < 0:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
