"""The command line's end of the control socket (see `fakefs.control`): plain sockets, no trio."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fakefs import runtime
from fakefs.errors import UserError
from fakefs.frames import ERROR, EXIT, FRAME, FRAME_MAX, SIGNAL, STDERR, STDIN, STDOUT

if TYPE_CHECKING:
    from fakefs.hostfiles.program import HostProgram


def find_mount(directory: Path | None) -> Path:
    """Return the control socket of the mount at `directory`, or of the only one there is. Raises UserError."""
    if directory is not None:
        path = runtime.socket_path(directory)
        if not path.exists():
            raise UserError(f"{directory}: no running mount; start one: fakefs mount {directory}", exit_status=2)
        return path
    found = sorted(runtime.directory().glob("*.sock"))
    if not found:
        raise UserError("no running mount; start one: fakefs mount DIR")
    if len(found) > 1:
        raise UserError("several mounts are running; name one: fakefs exec DIR -- CMD", exit_status=2)
    return found[0]


_ILLEGAL = "died of an instruction that the guest's processor does not have (it has SSE4.2, but no AVX)"


class Channel:
    """A connection to a daemon that was sent one request."""

    def __init__(self, path: Path, request: Mapping[str, Any]) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            raise UserError("the mount's daemon is gone; mount again") from None
        self._buffer = b""
        self._socket.sendall(json.dumps(request).encode() + b"\n")

    def fileno(self) -> int:
        """For select(2)."""
        return self._socket.fileno()

    def send(self, channel: int, data: bytes) -> None:
        """Send a frame."""
        self._socket.sendall(FRAME.pack(channel, len(data)) + data)

    def receive(self) -> tuple[int, bytes] | None:
        """Return the next frame, waiting for it; None at the end."""
        while True:
            if len(self._buffer) >= FRAME.size:
                channel, size = FRAME.unpack_from(self._buffer)
                if len(self._buffer) >= FRAME.size + size:
                    data = self._buffer[FRAME.size : FRAME.size + size]
                    self._buffer = self._buffer[FRAME.size + size :]
                    return channel, data
            more = self._socket.recv(FRAME_MAX)
            if not more:
                return None
            self._buffer += more

    def close(self) -> None:
        """Hang up: what the request started is ended."""
        self._socket.close()

    @property
    def waiting(self) -> bool:
        """Is a whole frame in the buffer already?"""
        if len(self._buffer) < FRAME.size:
            return False
        _, size = FRAME.unpack_from(self._buffer)
        return len(self._buffer) >= FRAME.size + int(size)


def ask(path: Path, request: Mapping[str, Any]) -> str:
    """Return the text a daemon answers a simple request with. Raises UserError."""
    parts = []
    with closing(Channel(path, request)) as channel:
        while (frame := channel.receive()) is not None:
            if frame[0] == ERROR:
                raise UserError(frame[1].decode("utf-8", "replace"))
            parts.append(frame[1])
    return b"".join(parts).decode("utf-8", "replace")


def stop(directory: Path) -> bool:
    """Have the daemon of a directory end; False when there is none."""
    try:
        ask(find_mount(directory), {"do": "stop"})
    except UserError:
        return False
    return True


def run_program(path: Path, argv: list[str], env: Mapping[str, str], host: HostProgram | None = None) -> int:
    """Run a program in the guest with our stdin, stdout and stderr; return its exit status. Raises UserError.

    It is one of the guest's, or of the host's. Signals that end us are sent to it instead.
    """
    what = None if host is None else host.request()
    request = {"do": "exec", "argv": argv, "env": dict(env), "host": what, "input_ends": _input_ends()}
    channel = Channel(path, request)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, lambda received, _frame: channel.send(SIGNAL, bytes([received])))
    inputs = [channel.fileno(), 0]
    while True:
        ready = [channel.fileno()] if channel.waiting else select.select(inputs, [], [])[0]
        if 0 in ready:
            data = os.read(0, FRAME_MAX)
            channel.send(STDIN, data)
            if not data:
                inputs.remove(0)
        if channel.fileno() in ready:
            frame = channel.receive()
            if frame is None:
                raise UserError("the mount's daemon is gone; mount again")
            kind, data = frame
            if kind == EXIT:
                if host is not None and data[0] == 128 + signal.SIGILL:
                    os.write(2, f"fakefs exec: {argv[0]}: {_ILLEGAL}\n".encode())
                return data[0]
            if kind == ERROR:
                raise UserError(data.decode("utf-8", "replace"))
            os.write(1 if kind == STDOUT else 2 if kind == STDERR else sys.stderr.fileno(), data)


_INPUT_MAX = 16 << 20


def _input_ends() -> bool:
    """Whether standard input is nothing, or a file of no more than 16 MiB: it may be waited for."""
    try:
        status = os.fstat(0)
    except OSError:
        return False
    nothing = stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3)
    return nothing or (stat.S_ISREG(status.st_mode) and status.st_size <= _INPUT_MAX)
