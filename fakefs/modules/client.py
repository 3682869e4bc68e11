"""Modules from the command line's side: files are read, or built, here and go to the daemon of a running mount."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from fakefs import client, kernels
from fakefs.errors import UserError
from fakefs.frames import ERROR, FRAME_MAX, STDIN
from fakefs.modules.load import IMAGE_MAX


def release(mount: Path) -> str:
    """The release of the kernel that runs behind a control socket."""
    return str(json.loads(client.ask(mount, {"do": "status"}))["kernel"])


def insert(mount: Path, file: Path, parameters: Sequence[str]) -> None:
    """Load a module file, or one built now from a C file, into a running kernel. Raises UserError."""
    if file.suffix == ".c":
        from fakefs.modules.build import build

        file = build(file, release(mount))
    try:
        with file.open("rb") as stream:
            image = stream.read(IMAGE_MAX + 1)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}", exit_status=2) from None
    if not image.startswith(b"\x7fELF") or len(image) > IMAGE_MAX:
        raise UserError(f"{file}: not a kernel module, which is an ELF file", exit_status=2)
    request = {"do": "insmod", "name": file.name, "parameters": " ".join(parameters)}
    with closing(client.Channel(mount, request)) as channel:
        for at in range(0, len(image), FRAME_MAX):
            channel.send(STDIN, image[at : at + FRAME_MAX])
        channel.send(STDIN, b"")
        frame = channel.receive()
        if frame is not None and frame[0] == ERROR:
            raise UserError(frame[1].decode("utf-8", "replace"))


def remove(mount: Path, name: str) -> None:
    """Remove a module from a running kernel. Raises UserError."""
    client.ask(mount, {"do": "rmmod", "name": name})


def probe(mount: Path, name: str, parameters: Sequence[str]) -> None:
    """Load a module by its name: one that `fakefs module samples` has built for this kernel. Raises UserError."""
    plain = name.replace("-", "_")
    directory = kernels.cache_dir() / "modules" / release(mount) / "samples"
    found = [file for file in sorted(directory.glob("*.ko")) if file.stem.replace("-", "_") == plain]
    if not found:
        raise UserError(f"module {name} not found; those there are: fakefs module samples")
    insert(mount, found[0], parameters)
