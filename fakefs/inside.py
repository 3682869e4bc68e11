"""What mount(8) and umount(8) do in the private view of `fakefs run` with a tracefs, a debugfs and the like.

For a filesystem of type T they run /sbin/mount.T and /sbin/umount.T where there are such programs. The view has those
of `HELPERS`, which all run this module. To mount is to bind what the guest has mounted; mount options go to the guest.
/proc/mounts is a file in the view, and written anew each time.

Follows mount(8) and umount(8), "External helpers".
"""

from __future__ import annotations

import getopt
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from fakefs import mountpoint, namespace
from fakefs.errors import UserError

HELPERS = ("mount.tracefs", "mount.debugfs", f"mount.{mountpoint.FSTYPE}", f"umount.{mountpoint.FSTYPE}", "umount.fuse")
_OPTIONS = b"rw,nosuid,nodev,noexec,relatime"
_FAILED = 32
"""mount(8)'s exit status: it could not be mounted."""


@dataclass(frozen=True)
class Inside:
    """Where things are in a view: `directory` is its own, `socket` the control socket of its daemon."""

    directory: Path
    socket: Path

    @property
    def table(self) -> Path:
        """What is shown as /proc/mounts."""
        return self.directory / "mounts"

    def source(self, kind: str) -> Path:
        """Where the guest's filesystem of this kind, "tracefs" or "debugfs", is to be bound from."""
        return self.directory / kind

    def filesystems(self, mounts: list[mountpoint.Mount]) -> list[mountpoint.Mount]:
        """The mounts that a program inside is to see: the guest's as what they are there, and nothing of the view."""
        own = os.fsencode(self.directory)
        ours = {mount.device for mount in mounts if mount.directory == own}
        kinds = {
            (mount.device, mount.root): kind
            for kind in ("tracefs", "debugfs")
            for mount in mounts
            if mount.directory == os.fsencode(self.source(kind))
        }
        seen: dict[mountpoint.Mount, None] = {}
        for mount in mounts:
            if mount.device in ours or mount.directory.startswith(own + b"/"):
                continue
            if mount.fstype != mountpoint.FSTYPE:
                seen[mount] = None
            elif kind := kinds.get((mount.device, mount.root)):
                here = mountpoint.Mount(mount.directory, kind, kind.encode(), options=_OPTIONS)
                seen[here] = None
        return list(seen)

    def write_table(self) -> None:
        """Write /proc/mounts anew. In place: it is the file that is mounted there."""
        self.table.write_bytes(b"".join(map(bytes, self.filesystems(_mounts()))))

    def mount(self, kind: str, directory: Path, options: str) -> None:
        """mount(8), or mount -o remount. Raises UserError, OSError."""
        from fakefs.client import ask

        mounts = self.filesystems(_mounts())
        there = next((mount.fstype for mount in reversed(mounts) if mount.directory == os.fsencode(directory)), None)
        if "remount" in options.split(","):
            if there not in ("tracefs", "debugfs"):
                raise UserError(f"{directory}: not mounted")
            kind = there
        elif there == kind:
            raise UserError(f"{kind} already mounted on {directory}")
        else:
            namespace.bind(self.source(kind), directory)
            self.write_table()
        if kind == "tracefs":
            ask(self.socket, {"do": "remount", "options": options})

    def umount(self, directory: Path, *, lazy: bool) -> None:
        """umount(8). Raises OSError."""
        namespace.unmount(directory, lazy=lazy)
        self.write_table()


def _mounts() -> list[mountpoint.Mount]:
    with open("/proc/self/mountinfo", "rb") as file:
        return mountpoint.parse_mountinfo(file.read())


def main(argv: list[str]) -> int:
    """Arguments: the view's directory, the socket, then as mount(8) has it: HELPER [SOURCE] DIRECTORY OPTIONS."""
    inside, helper = Inside(Path(argv[0]), Path(argv[1])), argv[2]
    kind = helper.partition(".")[2]
    try:
        given, operands = getopt.gnu_getopt(argv[3:], "sfnvlrN:t:o:")
        directory = Path(os.path.realpath(operands[-1]))
        flags = dict(given)
        if helper.startswith("umount"):
            inside.umount(directory, lazy="-l" in flags)
        elif "-f" not in flags:
            inside.mount("tracefs" if kind == mountpoint.FSTYPE else kind, directory, flags.get("-o", ""))
    except (getopt.GetoptError, IndexError):
        print(f"usage: {helper} [-o OPTIONS] SOURCE DIRECTORY", file=sys.stderr)
        return 1
    except (UserError, OSError) as error:
        what = f"{operands[-1]}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print(f"{helper}: {what}", file=sys.stderr)
        return _FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
