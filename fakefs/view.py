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

import fcntl
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from shutil import which

from fakefs import mountpoint, namespace
from fakefs.errors import UserError
from fakefs.inside import HELPERS, Inside
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

_HELPER = """#!/bin/sh
exec '{python}' -P -m fakefs.inside '{directory}' '{socket}' "${{0##*/}}" "$@"
"""

_STAND_INS = {
    # The guest's release and version, wherever uname(1) says the host's.
    "uname": """#!/bin/sh
said=$('{real}' "$@") || exit
for what in r v; do
	host=$('{real}' -$what)
	case $what in r) read -r guest </proc/sys/kernel/osrelease ;; v) read -r guest </proc/sys/kernel/version ;; esac
	case $said in *"$host"*) said=${{said%%"$host"*}}$guest${{said#*"$host"}} ;; esac
done
printf '%s\\n' "$said"
""",
    # How many processors the guest has; which of the host's a program may use is another matter.
    "nproc": """#!/bin/sh
[ "$1" = --all ] && shift
OMP_NUM_THREADS=$(grep -c '^processor' /proc/cpuinfo) exec '{real}' "$@"
""",
}
"""Programs that ask the host's kernel what in a view the guest is to be asked, and what stands in for them."""


class View:
    """`private` is a directory that is the view's own, on a filesystem that goes with it."""

    def __init__(self, private: Path) -> None:
        self.private = private
        self.guest = private / "guest"
        """The guest's root directory, unless only its tracefs is shown."""
        self.tracefs = private / "tracefs"
        """The guest's tracefs, mounted for as long as the daemon lives."""

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
            (self.private / "nothing").touch()
            self._cover_tracing()
            namespace.mount("tmpfs", _KERNEL, "mode=755")
        except OSError as error:
            raise UserError(f"cannot make a private view of the machine: {error.filename}: {error.strerror}") from None
        for name in ("tracing", *_GUEST_KERNEL):
            (_KERNEL / name).mkdir()
        for directory in (self.guest, self.tracefs, self.private / "debugfs"):
            directory.mkdir()

    def _cover_tracing(self) -> None:
        """Cover each tracefs and debugfs that is mounted anywhere; /sys/kernel is covered as a whole."""
        with open("/proc/self/mountinfo", "rb") as file:
            mounts = mountpoint.parse_mountinfo(file.read())
        for mounted in mounts:
            if mounted.fstype in namespace.HOST_TRACING.values() and not mounted.directory.startswith(b"/sys/kernel/"):
                place = Path(os.fsdecode(mounted.directory))
                with suppress(FileNotFoundError):  # covered already, by what is mounted above it
                    namespace.bind(self.private / ("empty" if place.is_dir() else "nothing"), place)

    def show_tracefs(self, mounted: Path, *, whole: bool) -> None:
        """Have the guest's tracefs at hand. `mounted` is where it is, or (`whole`) where the guest's root is.

        A mount at TRACING is covered: nothing is there until show_guest(), and after it was unmounted from inside.
        """
        if whole:
            namespace.bind(mounted, self.guest)
            namespace.bind(self.guest / "sys/kernel/debug", self.private / "debugfs")
        namespace.bind(self.guest / "sys/kernel/tracing" if whole else mounted, self.tracefs)
        if namespace.HOST_TRACING.get(_magic(self.tracefs)):
            raise UserError(f"{mounted}: this is the host's own tracing directory, which fakefs does not touch")
        if mounted == TRACING:
            namespace.bind(self.private / "empty", TRACING)

    # ---- the inner namespace

    def show_guest(self, socket: Path, *, whole: bool) -> None:
        """Put all in place, in mounts that may be unmounted. `socket` is the daemon's. Raises OSError."""
        if whole:
            for name in _GUEST_KERNEL:
                self._show(_KERNEL / name)
            self._show(_CPUS)
            for name in _GUEST_PROC:
                self._show(Path("/proc", name))
        debug = _KERNEL / "debug/tracing"
        debug.mkdir(exist_ok=True)
        namespace.bind(self.tracefs, TRACING)
        namespace.bind(self.tracefs, debug)
        if whole:
            self._stand_in()
        self._add_helpers(socket, whole=whole)
        inside = Inside(self.private, socket)
        inside.write_table()
        namespace.bind_on_link(inside.table, _MOUNTS)

    def _show(self, path: Path) -> None:
        """Show the guest's file at its path, if both the guest and the host have one."""
        with suppress(FileNotFoundError, NotADirectoryError):
            namespace.bind(Path(f"{self.guest}{path}"), path)

    def _add_helpers(self, socket: Path, *, whole: bool) -> None:
        """Give mount(8) programs that know what a tracefs is here, which Linux before 5.11 does not let us; and PATH
        those that ask for the kernel's modules."""
        helpers, sbin = self.private / "sbin", Path(os.path.realpath("/sbin"))
        helpers.mkdir()
        for name in HELPERS:
            _write_script(helpers / name, _HELPER.format(python=sys.executable, directory=self.private, socket=socket))
        tools.write(helpers, self.guest / "proc" if whole else Path("/proc"))
        os.environ["PATH"] = f"{helpers}:{os.environ.get('PATH', os.defpath)}"
        with suppress(OSError):
            namespace.mount("overlay", sbin, f"lowerdir={helpers}:{sbin}")

    def _stand_in(self) -> None:
        for name, script in _STAND_INS.items():
            if program := which(name):
                real, stand_in = self.private / f"{name}.real", self.private / name
                real.touch()
                namespace.bind(Path(program), real)
                _write_script(stand_in, script.format(real=real))
                namespace.bind(stand_in, Path(program))


def _write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


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


def check_inherited() -> None:
    """Raise UserError when a descriptor that the program would inherit leads to the host's tracing."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if kind := namespace.HOST_TRACING.get(namespace.filesystem_magic(int(name))):
                raise UserError(f"descriptor {name} is open in the host's {kind}; close it: {name}>&-")


def reopen_directories() -> None:
    """Open each inherited directory again, by its path in the view: from the old one `..` leads out of the view."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                continue
            flags = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_PATH | os.O_NONBLOCK)
            new = os.open(os.readlink(f"/proc/self/fd/{fd}"), flags | os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # it is not there in the view, or was listdir's own
            with suppress(OSError):
                os.close(fd)
            continue
        os.dup2(new, fd, os.get_inheritable(fd))
        os.close(new)
