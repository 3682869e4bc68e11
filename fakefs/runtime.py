"""Where a running mount is found: its control socket, in a directory of the user's."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def directory() -> Path:
    """Return the user's directory for sockets, made if need be and for nobody else."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / "fakefs" if base else Path(tempfile.gettempdir()) / f"fakefs-{os.geteuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PermissionError(13, "not a private directory of yours", str(path))
    return path


def socket_path(mountpoint: Path) -> Path:
    """Return the control socket of the mount at `mountpoint`."""
    key = hashlib.blake2b(os.fsencode(os.path.realpath(mountpoint)), digest_size=10).hexdigest()
    return directory() / f"{key}.sock"
