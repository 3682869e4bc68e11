"""The private view of the machine that `fakefs run` gives a program: the guest's kernel files at their usual paths.

It is made in two steps, in two user namespaces, one inside the other:

1. `protect()` and `show_tracefs()`, in the outer one, make the host's /sys and kernel settings read-only, cover every
   tracefs and debugfs of the host's, and put the guest's tracefs in their place.
2. `show_guest()`, in the inner one, shows the guest's other files and mounts the tracefs once more.

The program lives in the inner one. What was mounted outside of it is locked there, so it can unmount what the second
step made, and mount it again, but never uncover what is the host's (mount_namespaces(7), "Restrictions").

Not here: namespaces and processes (`fakefs.namespace`, `fakefs.run_command`).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fakefs import mountpoint, namespace
from fakefs.errors import UserError
from fakefs.modules import tools

TRACING = Path("/sys/kernel/tracing")
_KERNEL = Path("/sys/kernel")
_CPUS = Path("/sys/devices/system/cpu")
_MOUNTS = Path("/proc/mounts")

_HOST_CONTROLS = ("acpi", "bus", "fs", "irq", "scsi", "sys", "sysrq-trigger")
"""What of /proc changes the host when root writes to it, though in a user namespace: the files belong to root."""

_GUEST_KERNEL = ("btf", "debug", "mm", "security", "slab")
"""Directories of the guest's /sys/kernel that are shown; tracing comes by itself."""

_GUEST_PROC = ("cpuinfo", "kallsyms", "modules", "version", "sys")

_NO_FLAGS = "rw,nosuid,nodev,noexec,relatime"

_MOUNT_HELPER = """#!/bin/sh
# mount(8) calls this for -t tracefs: SOURCE DIRECTORY [-sfnv] [-o OPTIONS]
set -e
[ "$(stat -f -c %t -- "$2")" = 65735546 ] && [ -e "$2/trace_marker" ] || mount -i --bind '{tracefs}' "$2"
# Then /proc/mounts, which is a file here, has to say so.
grep -q "^tracefs $2 " '{mounts}' || echo "tracefs $2 tracefs {flags} 0 0" >>'{mounts}'
"""


class View:
    """`private` is a directory that is the view's own, on a filesystem that goes with it."""

    def __init__(self, private: Path) -> None:
        self.private = private
        self.guest = private / "guest"
        """The guest's root directory, unless only its tracefs is shown."""
        self._mounts = private / "mounts"

    # ---- the outer namespace

    def protect(self, *, new_pids: bool) -> None:
        """Cover what is the host's. Raises UserError when this machine does not let us, NoProc for want of a /proc."""
        namespace.stop_propagation()
        if new_pids:
            _first_pid(_FIRST_PID)
            try:
                flags = namespace.MS_NOSUID | namespace.MS_NODEV | namespace.MS_NOEXEC
                namespace.mount("proc", Path("/proc"), flags=flags)
            except OSError as error:
                raise NoProc from error
        try:
            namespace.make_read_only(Path("/sys"))
            for name in _HOST_CONTROLS:
                with suppress(FileNotFoundError):
                    namespace.bind(Path("/proc", name), Path("/proc", name))
                    namespace.make_read_only(Path("/proc", name))
            namespace.mount("tmpfs", self.private, "mode=700")
            (self.private / "empty").mkdir()
            self._cover_tracing()
            namespace.mount("tmpfs", _KERNEL, "mode=755")
        except OSError as error:
            raise UserError(f"cannot make a private view of the machine: {error.filename}: {error.strerror}") from None
        for name in ("tracing", *_GUEST_KERNEL):
            (_KERNEL / name).mkdir()
        self.guest.mkdir()

    def _cover_tracing(self) -> None:
        """Cover each tracefs and debugfs that is mounted anywhere; /sys/kernel is covered as a whole."""
        with open("/proc/self/mountinfo", "rb") as file:
            mounts = mountpoint.parse_mountinfo(file.read())
        for mounted in mounts:
            if mounted.fstype in namespace.HOST_TRACING.values() and not mounted.directory.startswith(b"/sys/kernel/"):
                with suppress(FileNotFoundError):  # covered already, by what is mounted above it
                    namespace.bind(self.private / "empty", Path(os.fsdecode(mounted.directory)))

    def show_tracefs(self, mounted: Path, *, whole: bool) -> None:
        """Put the guest's tracefs in place. `mounted` is where it is, or (`whole`) where the guest's root is."""
        if whole:
            namespace.bind(mounted, self.guest)
        namespace.bind(self.guest / "sys/kernel/tracing" if whole else mounted, TRACING)
        if namespace.HOST_TRACING.get(_magic(TRACING)):
            raise UserError(f"{mounted}: this is the host's own tracing directory, which fakefs does not touch")

    # ---- the inner namespace

    def show_guest(self, *, whole: bool) -> None:
        """Put all else in place, in mounts that may be unmounted. Raises OSError."""
        if whole:
            for name in _GUEST_KERNEL:
                self._show(_KERNEL / name)
            self._show(_CPUS)
            for name in _GUEST_PROC:
                self._show(Path("/proc", name))
        debug = _KERNEL / "debug/tracing"
        debug.mkdir(exist_ok=True)
        # From what is mounted at TRACING already: the tracefs, and no way to the rest of the guest.
        namespace.bind(TRACING, debug)
        namespace.bind(TRACING, TRACING)
        self._mounts.write_text(_mounts_table())
        namespace.bind_on_link(self._mounts, _MOUNTS)
        self._add_helper(whole=whole)

    def _show(self, path: Path) -> None:
        """Show the guest's file at its path, if both the guest and the host have one."""
        with suppress(FileNotFoundError, NotADirectoryError):
            namespace.bind(Path(f"{self.guest}{path}"), path)

    def _add_helper(self, *, whole: bool) -> None:
        """Give mount(8) a program that knows what a tracefs is here, which Linux before 5.11 does not let us; and PATH
        those that ask for the kernel's modules."""
        helpers, sbin = self.private / "sbin", Path(os.path.realpath("/sbin"))
        helpers.mkdir()
        tracefs = self.guest / "sys/kernel/tracing" if whole else _KERNEL / "debug/tracing"
        helper = helpers / "mount.tracefs"
        helper.write_text(_MOUNT_HELPER.format(tracefs=tracefs, mounts=self._mounts, flags=_NO_FLAGS))
        helper.chmod(0o755)
        tools.write(helpers, self.guest / "proc" if whole else Path("/proc"))
        os.environ["PATH"] = f"{helpers}:{os.environ.get('PATH', os.defpath)}"
        with suppress(OSError):
            namespace.mount("overlay", sbin, f"lowerdir={helpers}:{sbin}")


class NoProc(Exception):
    """A /proc of its own is not allowed here, as in most containers: do without new process ids."""


_FIRST_PID = 1000
"""Lower ids are taken in the guest, by its kernel threads: a shadow there has its host process's id."""


def _first_pid(pid: int) -> None:
    """Number this namespace's processes from `pid` on, if the kernel can (CONFIG_CHECKPOINT_RESTORE)."""
    with suppress(OSError):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))


def _magic(directory: Path) -> int:
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return namespace.filesystem_magic(fd)
    finally:
        os.close(fd)


def _mounts_table() -> str:
    """What /proc/mounts is to say: a tracefs is one, and other pieces of the guest are not mounts of their own."""
    lines: dict[str, str] = {}
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as table:
        for number, line in enumerate(table):
            _, directory, kind, _ = line.split(" ", 3)
            if kind != mountpoint.FSTYPE:
                lines[f"{number}"] = line
            elif directory in (str(TRACING), str(_KERNEL / "debug/tracing")):
                lines[directory] = f"tracefs {directory} tracefs {_NO_FLAGS} 0 0\n"
    return "".join(lines.values())


def check_inherited() -> None:
    """Raise UserError when a descriptor that the program would inherit leads to the host's tracing."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if kind := namespace.HOST_TRACING.get(namespace.filesystem_magic(int(name))):
                raise UserError(f"descriptor {name} is open in the host's {kind}; close it: {name}>&-")
