"""The recorder's end of the socket to the daemon: what it is told of, a packet at a time, and how far that is."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from fakefs.mirror.notes import Progress
from fakefs.mirror.records import PACKET_MAX, Mark, Message, decode, encode, packet


class Daemon:
    """Messages are gathered until `flush()`. `handled`: calls that they are of; `listens`: it has not gone."""

    def __init__(self, connection: socket.socket, progress: Progress) -> None:
        self._connection = connection
        self._progress = progress
        self._gathered: list[bytes] = []
        self._size = 0  # bytes
        self._marks: list[Mark] = []
        self.handled = 0
        self.listens = True

    def fileno(self) -> int:
        """The socket's."""
        return self._connection.fileno()

    def take(self) -> Sequence[Message] | None:
        """Return what it tells; None when it is gone."""
        try:
            received = self._connection.recv(PACKET_MAX)
        except OSError:
            received = b""
        return list(decode(received)) if received else None

    def mark(self, mark: Mark) -> None:
        """Send this back when it has been told of as many calls as were noted then."""
        self._marks.append(mark)

    def tell(self, message: Message) -> None:
        """Have it told, with what comes next. What is longer than a packet is left out."""
        encoded = encode(message)
        if self._size + len(encoded) > PACKET_MAX - 2:
            self._send()
        if len(encoded) <= PACKET_MAX - 2:
            self._gathered.append(encoded)
            self._size += len(encoded) + 1

    def flush(self) -> None:
        """Tell it of all that was handled. Waits for room in the socket."""
        self._send()
        self._progress.count(self.handled)
        self.handled = 0
        while self._marks and self._marks[0].noted <= self._progress.done:
            self.tell(self._marks.pop(0))
        self._send()

    def _send(self) -> None:
        if self._gathered and self.listens:
            try:
                self._connection.send(packet(self._gathered))
            except OSError:
                self.listens = False
        self._gathered.clear()
        self._size = 0
