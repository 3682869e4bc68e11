"""A booted guest in files: RAM, CPU state and a manifest, written atomically and checked before use.

A snapshot is a directory: `ram` (sparse; mapped MAP_PRIVATE, so a restore reads only what it touches and instances
share pages), `cpu` (Unicorn's context), `manifest.json` (devices, agent, identity, and what the files must look
like). Hashing the RAM would cost more than restoring it, so the manifest seals each file by size, modification time
and inode, as git's index does; when a seal is broken (copied, restored from a backup) the hash decides.

A new one makes old ones go: those of other kernels, options and versions of fakefs that have not been used for long.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emulator.errors import EmulatorError
from emulator.memory import Memory

FORMAT = 15
_MANIFEST_MAX = 1 << 20
_FILES = ("ram", "cpu", "symbols", "btf")
KEPT = 16
"""How many snapshots are left alone, the last used first; about 60 MB each."""
_RECENT = 3600.0  # seconds: what was used within them stays too, or tests of many kernels would boot each every time


class DamagedSnapshot(EmulatorError):
    """The snapshot is not what was written, or belongs to something else: boot again."""


@dataclass(frozen=True)
class Snapshot:
    """A verified snapshot on disk. `manifest` holds what `save()` was given."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def ram(self) -> Path:
        """The RAM file, `memory_size` bytes long."""
        return self.directory / "ram"

    def cpu_state(self) -> bytes:
        """Return the CPU's saved state."""
        return (self.directory / "cpu").read_bytes()

    def symbols(self) -> bytes:
        """Return the kernel's symbols in their cached form."""
        return (self.directory / "symbols").read_bytes()

    def btf(self) -> bytes:
        """Return the kernel's BTF."""
        return (self.directory / "btf").read_bytes()


def _seal(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ino": status.st_ino}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(
    directory: Path, memory: Memory, cpu_state: bytes, symbols: bytes, btf: bytes, manifest: Mapping[str, Any]
) -> Snapshot:
    """Write a snapshot to `directory`, which appears complete or not at all; an older one there is replaced.

    Raises EmulatorError when the disk is full or not writable; nothing is left behind then.
    """
    parent = directory.parent
    try:
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    except OSError as error:
        raise EmulatorError(f"cannot write the snapshot to {parent}: {error.strerror}; set FAKEFS_CACHE") from error
    try:
        memory.save(fresh / "ram")
        (fresh / "cpu").write_bytes(cpu_state)
        (fresh / "symbols").write_bytes(symbols)
        (fresh / "btf").write_bytes(btf)
        files = {name: {"seal": _seal(fresh / name), "sha256": _sha256(fresh / name)} for name in _FILES}
        whole = {"format": FORMAT, "memory_size": memory.size, "files": files, **manifest}
        (fresh / "manifest.json").write_text(json.dumps(whole))
        _replace(fresh, directory)
        _prune(parent)
    except OSError as error:
        raise EmulatorError(
            f"cannot write the snapshot to {parent}: {error.strerror}; free some space there or set FAKEFS_CACHE"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Snapshot(directory, whole)


def _replace(fresh: Path, directory: Path) -> None:
    old = directory.with_name(f".old-{os.getpid()}-{directory.name}")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    try:
        fresh.rename(directory)
    except OSError:
        if not (directory / "manifest.json").exists():  # not a rival that was quicker with the same content
            raise
    shutil.rmtree(old, ignore_errors=True)


def _prune(parent: Path) -> None:
    """Remove what was not used for long: snapshots beyond the first `KEPT`, and what killed processes have left."""
    used: list[tuple[float, Path]] = []
    for path in parent.iterdir():
        with suppress(OSError):  # another process has removed it
            used.append((path.stat().st_mtime, path))
    used.sort(reverse=True)
    snapshots = [(mtime, path) for mtime, path in used if not path.name.startswith(".")]
    left = [(mtime, path) for mtime, path in used if path.name.startswith(".")]
    before = time.time() - _RECENT
    for mtime, path in [*snapshots[KEPT:], *left]:
        if mtime < before:
            with suppress(OSError):  # it is in use, or another process removes it too
                _remove(path)


def _remove(directory: Path) -> None:
    """Remove a directory and what is in it, in one step for others. Raises BlockingIOError when its RAM is mapped."""
    with ExitStack() as stack:
        with suppress(FileNotFoundError):
            ram = stack.enter_context((directory / "ram").open("rb"))
            fcntl.flock(ram, fcntl.LOCK_EX | fcntl.LOCK_NB)
        old = directory.with_name(f".old-{os.getpid()}-{directory.name.lstrip('.')}")
        directory.rename(old)
        shutil.rmtree(old)


def open_snapshot(directory: Path) -> Snapshot | None:
    """Return the snapshot in `directory` after checking its files; None when there is none.

    Raises DamagedSnapshot when there is one that cannot be trusted.
    """
    path = directory / "manifest.json"
    try:
        if path.stat().st_uid != os.geteuid():
            raise DamagedSnapshot(f"{directory} belongs to another user")
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedSnapshot(f"{path}: {error.strerror}") from error
    try:
        manifest = json.loads(text) if len(text) <= _MANIFEST_MAX else None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedSnapshot(f"{path} is damaged or of another version")
    for name in _FILES:
        _check_file(directory / name, manifest, name)
    if manifest["files"]["ram"]["seal"]["size"] != manifest.get("memory_size"):
        raise DamagedSnapshot(f"{path}: the RAM file has another size")
    with suppress(OSError):
        os.utime(directory)  # when it was used last: see _prune()
    return Snapshot(directory, manifest)


def _check_file(path: Path, manifest: dict[str, Any], name: str) -> None:
    try:
        expected = manifest["files"][name]
        seal, digest = expected["seal"], expected["sha256"]
        if _seal(path) == seal:
            return
        if path.stat().st_size == seal["size"] and _sha256(path) == digest:
            return
    except (KeyError, TypeError, OSError) as error:
        raise DamagedSnapshot(f"{path} is missing or its manifest is damaged") from error
    raise DamagedSnapshot(f"{path} is not what was written")
