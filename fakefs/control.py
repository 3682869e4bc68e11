"""The control socket of a mount: how `fakefs exec`, `console` and `umount` reach its daemon.

A connection sends one JSON line {"do": ..., ...} and then speaks frames (`fakefs.frames`) both ways. The socket lies
in a directory only its user may enter.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from fakefs import runtime
from fakefs.errors import UserError, first_of
from fakefs.files import Caller
from fakefs.frames import ERROR, FRAME, FRAME_MAX, STDOUT
from fakefs.fuse.options import MountOptions
from fakefs.pump import Pump
from fakefs.shadow import Shadows

if TYPE_CHECKING:
    from fakefs.guestfiles import GuestFiles

_REQUEST_MAX = 1 << 20
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Connection:
    """One client: frames out, frames in."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._sending = trio.Lock()

    async def send(self, channel: int, data: bytes) -> None:
        """Send data on a channel, in as many frames as it takes."""
        async with self._sending:
            for at in range(0, len(data), FRAME_MAX) or (0,):
                piece = data[at : at + FRAME_MAX]
                await self._stream.send_all(FRAME.pack(channel, len(piece)) + piece)

    async def _read(self, size: int) -> bytes | None:
        while len(self._buffer) < size:
            data = await self._stream.receive_some(FRAME_MAX)
            if not data:
                return None
            self._buffer += data
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    async def receive(self) -> tuple[int, bytes] | None:
        """Return the next frame; None when the client is gone or talks nonsense."""
        header = await self._read(FRAME.size)
        if header is None:
            return None
        channel, size = FRAME.unpack(header)
        data = await self._read(size) if size <= FRAME_MAX else None
        return None if data is None else (channel, data)

    @property
    def caller(self) -> Caller:
        """Who is at the other end, as the kernel tells (SO_PEERCRED of unix(7))."""
        credentials = self._stream.socket.getsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_PEERCRED, _PEER.size)
        return Caller(*_PEER.unpack(credentials))

    async def receive_all(self, limit: int) -> bytes:
        """Return what the client sends up to an empty frame. Raises UserError when it is more than `limit` bytes."""
        whole = bytearray()
        while (frame := await self.receive()) is not None and frame[1]:
            whole += frame[1]
            if len(whole) > limit:
                raise UserError(f"more than {limit >> 20} MiB")
        return bytes(whole)

    async def request(self) -> dict[str, Any] | None:
        """Return the JSON line a client begins with; None when it is not one."""
        while b"\n" not in self._buffer:
            data = await self._stream.receive_some(FRAME_MAX)
            if not data or len(self._buffer) > _REQUEST_MAX:
                return None
            self._buffer += data
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        try:
            request = json.loads(line)
        except ValueError:
            return None
        return request if isinstance(request, dict) else None


class Control:
    """The daemon's end."""

    def __init__(self, mountpoint: Path, pump: Pump, shadows: Shadows, files: GuestFiles, filesystem: bytes) -> None:
        self._path = runtime.socket_path(mountpoint)
        self._pump = pump
        self._shadows = shadows
        self._files = files
        self._filesystem = filesystem

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Listen until cancelled."""
        self._path.unlink(missing_ok=True)
        listening = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        try:
            await listening.bind(str(self._path))
            listening.listen()
            task_status.started()
            await trio.serve_listeners(self._answer, [trio.SocketListener(listening)])
        finally:
            listening.close()
            self._path.unlink(missing_ok=True)

    async def _answer(self, stream: trio.SocketStream) -> None:
        connection = Connection(stream)
        try:
            async with stream:
                request = await connection.request()
                if request is None:
                    return
                if self._shadows.watching is not None:
                    await self._shadows.watching.catch_up(0)
                await self._do(request, connection)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client is gone

    async def _do(self, request: dict[str, Any], connection: Connection) -> None:
        match request:
            case {"do": "console"}:
                await connection.send(STDOUT, self._pump.machine.console.text().encode())
            case {"do": "status"}:
                await connection.send(STDOUT, (json.dumps(self._status()) + "\n").encode())
            case {"do": "stop"}:
                signal.raise_signal(signal.SIGTERM)
            case {"do": "exec", "argv": [str(), *_] as argv, "env": dict() as env}:
                host, input_ends = request.get("host"), request.get("input_ends") is True
                await self._exec(connection, [*map(str, argv)], _texts(env), host, input_ends=input_ends)
            case {"do": "remount", "options": str() as options}:
                await self._remount(options, connection)
            case {"do": "insmod", "name": str(name), "parameters": str(parameters)}:
                await self._change_modules(connection, name, parameters)
            case {"do": "rmmod", "name": str(name)}:
                await self._change_modules(connection, name, None)
            case _:
                await connection.send(ERROR, b"the daemon does not know this request: is it of another version?")

    async def _exec(
        self, connection: Connection, argv: list[str], env: dict[str, str], host: object, *, input_ends: bool
    ) -> None:
        """Run a program; one of the host's is brought into the guest before, with the files it needs."""
        from fakefs.program import Place, run_program

        self._files.forget_attributes()
        try:
            place = None
            match host:
                case {"program": str(program), "files": list(files), "directory": str(directory)}:
                    place = Place(os.fsencode(program), os.fsencode(directory))
                    wanted = [os.fsencode(str(path)) for path in files]
                    await self._files.host_files.bring(connection.caller, wanted, place.directory)
            await run_program(self._pump, self._shadows, argv, env, connection, place, input_ends=input_ends)
        except OSError as error:
            await connection.send(ERROR, _why_not_brought(error).encode())
        finally:
            self._files.forget_attributes()

    async def _change_modules(self, connection: Connection, name: str, parameters: str | None) -> None:
        """Load the module whose file the client sends, or, without parameters, remove it."""
        from fakefs.modules.load import IMAGE_MAX, Modules

        modules = Modules(self._pump, self._shadows)
        try:
            if parameters is None:
                await modules.remove(name)
            else:
                await modules.load(name, await connection.receive_all(IMAGE_MAX), parameters)
        except* UserError as errors:
            await connection.send(ERROR, str(first_of(errors)).encode())
        except* OSError:
            await connection.send(ERROR, b"the guest is dead: fakefs console")
        finally:
            self._files.forget_attributes()

    async def _remount(self, options: str, connection: Connection) -> None:
        try:
            if wanted := MountOptions.parse(options).for_guest():
                await self._files.remount(self._filesystem, wanted)
        except (UserError, OSError) as error:
            await connection.send(ERROR, str(error).encode())

    def _status(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "kernel": self._pump.guest.release,
            "dead": str(self._pump.dead) if self._pump.dead else None,
            "virtual_ns": self._pump.machine.cpu.now,
            "shadows": len(self._shadows),
            "slots": len(self._pump.agent.tasks),
            "counters": getattr(self._pump.machine.cpu, "counters", {}),
        }


def _why_not_brought(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    remedy = "; it is to fit the guest's memory: --memory" if error.errno in (errno.EFBIG, errno.ENOSPC) else ""
    return f"{where}{error.strerror}{remedy}"


def _texts(values: dict[Any, Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in values.items()}
