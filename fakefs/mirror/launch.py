"""Sets mirroring up around a program that `fakefs run` starts: filter, recorder, and who steps in when that ends.

Three processes take part: the *program* installs the filter and hands its listener to the *first* process, which forks
the recorder and keeps the listener too. Calls that wait when the recorder is killed, and all later ones, are then
answered by the first process: the program goes on, unmirrored.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Queue

from fakefs import mountpoint, namespace
from fakefs.mirror import calls, sigframe
from fakefs.mirror.calls import Level
from fakefs.mirror.seccomp import Listener, install, program


class Launch:
    """What is made before daemon and program are forked, and what each of the three does with it."""

    def __init__(self, level: Level) -> None:
        self.level = level
        self._daemon, self._recorder = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._first, self._program = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._in_flight = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the recorder
        self._listener: Listener | None = None
        self._pid = 0

    def records(self) -> socket.socket:
        """In the daemon: return its end of the socket from the recorder."""
        self._keep(self._daemon)
        return self._daemon

    def _keep(self, *kept: socket.socket) -> None:
        for end in (self._daemon, self._recorder, self._first, self._program):
            if end not in kept:
                end.close()

    # ---- the program

    def enter(self) -> None:
        """Put this process and its descendants under the filter.

        Raises OSError: EBUSY if one of its kind is there, as in another `fakefs run`.
        """
        installed: Queue[int] = Queue()
        sender = threading.Thread(
            target=self._send, args=(installed,)
        )  # not under the filter: that has sendmsg(2) wait
        sender.start()
        listener = -1
        try:
            listener = install(program(calls.rules(self.level)))
        finally:
            installed.put(listener)
            sender.join()
            self._keep()

    def _send(self, installed: Queue[int]) -> None:
        listener = installed.get()
        if listener >= 0:
            socket.send_fds(self._program, [b"l"], [listener])
            os.close(listener)

    # ---- the first process

    def supervise(self, child: int, tracing: Path) -> None:
        """Fork the recorder for a program that is being started; nothing happens if it cannot be."""
        self._keep(self._first, self._recorder)
        _, descriptors, _, _ = socket.recv_fds(self._first, 1, 1)
        if not descriptors:
            return
        self._listener = Listener(descriptors[0])
        self._pid = os.fork()
        if self._pid == 0:
            try:
                namespace.die_with_parent()
                os.setpgid(0, 0)  # away from the terminal's signals
                _record(self._listener, self._recorder, child, tracing, self._in_flight, self.level)
            finally:
                os._exit(1)
        self._recorder.close()

    def ended(self, pid: int) -> bool:
        """A child of the first process has ended: if it is the recorder, step in."""
        if pid != self._pid or self._listener is None:
            return False
        threading.Thread(target=_proceed, args=(self._listener, self._in_flight), daemon=True).start()
        return True


def _record(
    listener: Listener, daemon: socket.socket, child: int, tracing: Path, in_flight: mmap.mmap, level: Level
) -> None:
    from fakefs.mirror.hostpaths import HostPaths
    from fakefs.mirror.recorder import Recorder
    from fakefs.mirror.uprobes import Uprobes

    def note(identity: int) -> None:
        struct.pack_into("<Q", in_flight, 0, identity)

    root = os.open(f"/proc/{child}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    guest_device = os.stat(tracing).st_dev
    mounts = mountpoint.parse_mountinfo(Path(f"/proc/{child}/mountinfo").read_bytes())
    shown = [os.fsdecode(mount.directory) for mount in mounts if mount.fstype == mountpoint.FSTYPE]
    paths = HostPaths(root, guest_device, [str(tracing.parent), *shown])
    Recorder(listener, daemon, paths, Uprobes(guest_device), os.getppid(), level, note).run()


def _proceed(listener: Listener, in_flight: mmap.mmap) -> None:
    """Answer the call the recorder left, and all others."""
    [identity] = struct.unpack_from("<Q", in_flight, 0)
    listener.proceed(identity)
    with suppress(OSError):
        while True:
            notification = listener.receive()
            if notification is not None:
                if notification.number == sigframe.RT_SIGRETURN:
                    sigframe.leave(notification.tid, partial(listener.is_valid, notification.id))
                listener.proceed(notification.id)
