"""Namespaces and mounts of Linux, as little of them as `fakefs run` needs.

Not here: what the private view of the machine shows (`fakefs.view`), who lives in it (`fakefs.run_command`). Every
mount made here is seen by this process and its children alone, for `fork_into()` comes first. Follows
user_namespaces(7), mount_namespaces(7), pid_namespaces(7), mount_setattr(2), open_tree(2) and move_mount(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fakefs.errors import UserError

NEW_MOUNTS, NEW_USER, NEW_PIDS = 0x00020000, 0x10000000, 0x20000000
"""CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID of <linux/sched.h>."""

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 1 << 18
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC, _MOVE_MOUNT_F_EMPTY_PATH = 1, os.O_CLOEXEC, 4
_ATTR_RDONLY = 1
_MNT_DETACH = 2
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442  # x86-64
_PR_SET_PDEATHSIG = 1

HOST_TRACING = {0x74726163: "tracefs", 0x64626720: "debugfs"}
"""What statfs(2) says of the filesystems that must not be reached: TRACEFS_MAGIC, DEBUGFS_MAGIC of <linux/magic.h>."""

SYSCTLS = (
    ("kernel/unprivileged_userns_clone", "0", "1"),  # Debian's
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),  # Ubuntu's
    ("user/max_user_namespaces", "0", "15000"),
)
"""The sysctls that may forbid user namespaces, the value that does, and one that allows them."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def fork_into(flags: int, child: Callable[[], int]) -> int:
    """Fork a child into new namespaces, of which one is a user namespace; return its pid.

    The child's ids are ours as far as they may be: all that we have if we are root, else ours alone, as 0. `child`
    returns its exit status. It has every capability in its namespaces. Raises UserError when they are not allowed.
    """
    asked, telling = os.pipe()
    waiting, answering = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(asked)
            os.close(answering)
            os.write(telling, b"%d" % _unshare(flags))
            os.close(telling)
            if os.read(waiting, 1):
                os.close(waiting)
                status = child()
        finally:
            os._exit(status)
    os.close(telling)
    os.close(waiting)
    try:
        answer = os.read(asked, 16)
        if answer != b"0":
            raise _forbidden(int(answer or b"1"))
        _map_ids(pid)
        os.write(answering, b"m")
    except BaseException:
        os.close(answering)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(asked)
    os.close(answering)
    return pid


def _unshare(flags: int) -> int:
    return 0 if _libc.unshare(ctypes.c_int(flags)) == 0 else ctypes.get_errno()


def _map_ids(pid: int) -> None:
    """Write the id maps of a child that is alone in its user namespace."""
    for name, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        if os.geteuid() == 0:
            lines = [line.split() for line in Path(f"/proc/self/{name}_map").read_text().splitlines()]
            text = "".join(f"{inside} {inside} {count}\n" for inside, _, count in lines)
        else:
            text = f"0 {own} 1\n"
            if name == "gid":  # or it could drop a group that forbids it a file
                Path(f"/proc/{pid}/setgroups").write_text("deny")
        try:
            Path(f"/proc/{pid}/{name}_map").write_text(text)
        except OSError as error:
            raise _forbidden(error.errno or 1) from None


def _forbidden(number: int) -> UserError:
    for sysctl, forbids, allow in SYSCTLS:
        if os.geteuid() == 0 and not sysctl.startswith("user/"):
            continue  # root may
        with suppress(OSError):
            if Path("/proc/sys", sysctl).read_text().strip() == forbids:
                dotted = sysctl.replace("/", ".")
                return UserError(f"user namespaces are forbidden by {dotted} = {forbids}: sudo sysctl {dotted}={allow}")
    if number == errno.ENOSPC:
        return UserError("no more user namespaces: raise the sysctl user.max_user_namespaces")
    why = os.strerror(number)
    return UserError(
        f"user namespaces are not allowed here ({why}); a container needs --security-opt seccomp=unconfined"
    )


def die_with_parent() -> None:
    """Have this process killed when its parent ends, however that comes."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def filesystem_magic(fd: int) -> int:
    """The type of the filesystem of an open file, as fstatfs(2) has it."""
    buffer = (ctypes.c_long * 32)()
    _check(_libc.fstatfs(fd, buffer))
    return int(buffer[0])


# ---- mounts


def mount(kind: str, target: Path, options: str = "", flags: int = 0) -> None:
    """Mount a new filesystem. Raises OSError."""
    data = options.encode() or None
    _check(
        _libc.mount(kind.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data), os.fspath(target)
    )


def stop_propagation() -> None:
    """Neither do mounts made here show outside, nor those made outside from now on here. Raises OSError."""
    _check(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "/")


def bind(source: Path, target: Path) -> None:
    """Show a file or directory, with all that is mounted in it, in place of another. Raises OSError."""
    _check(
        _libc.mount(os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(_MS_BIND | _MS_REC), None),
        os.fspath(target),
    )


def bind_on_link(source: Path, link: Path) -> None:
    """Show a file in place of a symbolic link, which bind() would follow. Raises OSError."""
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC)
    tree = _check(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), flags), os.fspath(source))
    try:
        _check(
            _libc.syscall(
                _SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(link), ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
            ),
            os.fspath(link),
        )
    finally:
        os.close(tree)


def unmount(directory: Path, *, lazy: bool = False) -> None:
    """Unmount what is on a directory. Raises OSError."""
    _check(_libc.umount2(os.fsencode(directory), ctypes.c_int(_MNT_DETACH if lazy else 0)), os.fspath(directory))


def make_read_only(mountpoint: Path) -> None:
    """Make a mount and all mounts below it read-only: as seen from here. Raises OSError; needs Linux 5.12."""
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY, 0, 0, 0)  # struct mount_attr
    _check(
        _libc.syscall(
            _SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(mountpoint), _AT_RECURSIVE, attributes, ctypes.sizeof(attributes)
        ),
        os.fspath(mountpoint),
    )
