"""A FUSE session from mount to unmount.

Not here: whether the directory may be mounted on (`fakefs.mountpoint`), the daemon around it. pyfuse3 keeps its session
in globals, so there is one per process.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fakefs.errors import UserError
from fakefs.files import Files
from fakefs.fuse import request
from fakefs.fuse.operations import MAX_BLOCKED_READS, GuestOperations
from fakefs.fuse.options import MountOptions
from fakefs.mountpoint import SUBTYPE, discard_stale, fusermount
from fakefs.pump import Turn

# isort: split
import pyfuse3

ROOT = b"/sys/kernel/tracing"

_SPARE_TASKS = 1000
"""Workers beyond those that blocked reads hold: interrupts and everything else must always find one."""


async def serve(
    files: Files,
    mountpoint: Path,
    *,
    root: bytes = ROOT,
    options: MountOptions | None = None,
    auto_unmount: bool = True,
    turn: Turn | None = None,
    max_blocked_reads: int = MAX_BLOCKED_READS,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Mount `files` from guest path `root` on at `mountpoint` and serve until unmounted or cancelled.

    Of `options` it is `ro` that matters here; the others are the guest's.
    `auto_unmount`: fusermount3 unmounts when this process is killed.
    `turn`: requests are made one after the other.
    `ready` is called when the mount answers. A cancelled session is unmounted; readers that wait get ECONNABORTED.
    Files that are still open then are not closed in the guest. Raises UserError.
    """
    options = options or MountOptions()
    owner = (os.geteuid(), os.getegid()) if os.geteuid() else (0, 0)  # who mounts is the guest's root
    operations = GuestOperations(files, root, owner, turn=turn, max_blocked_reads=max_blocked_reads, ready=ready)
    discard_stale(mountpoint)
    _mount(operations, mountpoint, libfuse_options(options, auto_unmount=auto_unmount))
    try:
        await pyfuse3.main(min_tasks=2, max_tasks=2 * max_blocked_reads + _SPARE_TASKS)
    finally:
        operations.stop()
        pyfuse3.close()


def _mount(operations: GuestOperations, mountpoint: Path, options: set[str]) -> None:
    try:
        first = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        remedy = "modprobe fuse" if isinstance(error, FileNotFoundError) else "make it readable and writable"
        raise UserError(f"cannot open /dev/fuse: {error.strerror}; {remedy}") from None
    before = _sockets()
    try:
        pyfuse3.init(operations, str(mountpoint), options)
    except RuntimeError as error:
        raise UserError(f"cannot mount on {mountpoint}: {error}") from None
    finally:
        os.close(first)
    # By a socket, which libfuse only keeps open, fusermount3 hears of our end. The kernel closes the files of a process
    # that was killed from the highest number down, and a mount whose /dev/fuse is open is left alone. So the socket
    # gets a number below that: the one just closed, or a lower one.
    for number in _sockets() - before:
        os.dup(number)
        os.close(number)
    if not request.in_use():
        pyfuse3.close()
        raise UserError("pyfuse3 has its own libfuse3; build it with the system's: pip install --no-binary pyfuse3 .")


def _sockets() -> set[int]:
    found = set()
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # that of the listing
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                found.add(number)
    return found


def libfuse_options(options: MountOptions, *, auto_unmount: bool = True) -> set[str]:
    """What libfuse and fusermount3 are told. `fsname=tracefs` is what tools look for in /proc/mounts."""
    words = {"fsname=tracefs", f"subtype={SUBTYPE}", "nosuid", "nodev", "noexec"}
    if options.ro:
        words.add("ro")
    if auto_unmount and fusermount():
        words.add("auto_unmount")
    if _may_allow_other():
        # Together: with the first alone, everybody could do everything.
        words |= {"allow_other", "default_permissions"}
    return words


def _may_allow_other(conf: str = "/etc/fuse.conf") -> bool:
    """Only root, or with `user_allow_other`. Without, only the user that mounts has access, and is the guest's root."""
    if os.geteuid() == 0:
        return True
    try:
        with open(conf, encoding="utf-8", errors="replace") as lines:
            return any(line.strip() == "user_allow_other" for line in lines)
    except OSError:
        return False
