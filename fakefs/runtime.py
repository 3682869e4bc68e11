"""Where a running mount is found: its control socket, in a directory of the user's."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from fakefs.errors import UserError

_REMEDY = "set XDG_RUNTIME_DIR to a directory of your own"


def directory() -> Path:
    """Return the user's directory for sockets, made if need be and for nobody else. Raises UserError."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / "fakefs" if base else Path(tempfile.gettempdir()) / f"fakefs-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {_REMEDY}") from None
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise UserError(f"{path}: not a private directory of yours; {_REMEDY}")
    return path


def socket_path(mountpoint: Path) -> Path:
    """Return the control socket of the mount at `mountpoint`."""
    key = hashlib.blake2b(os.fsencode(os.path.realpath(mountpoint)), digest_size=10).hexdigest()
    return directory() / f"{key}.sock"
