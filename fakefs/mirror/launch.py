"""Sets mirroring up around a program that `fakefs run` starts: filter, recorder, and who steps in when that ends.

Three processes take part: the *program* installs the filter and hands its listener to the *first* process, which forks
the recorder and keeps the listener too. Calls that wait when the recorder is killed, and all later ones, are then
answered by the first process: the program goes on, unmirrored.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Queue
from typing import NamedTuple

from fakefs import mountpoint, namespace
from fakefs.mirror import calls, sigframe
from fakefs.mirror.calls import Level
from fakefs.mirror.notes import Notes, Progress, load, next_note
from fakefs.mirror.records import PACKET_MAX
from fakefs.mirror.seccomp import Listener, Notification, install, program

_RECORDS_SIZE = PACKET_MAX // 2 + 1024  # bytes, of which the kernel gives twice as many: room for the largest packet
_NOTES_SIZE = 1 << 15  # a hundred notes


class Recording(NamedTuple):
    """What the daemon is given: its end of the socket from the recorder, and how far that is."""

    records: socket.socket
    progress: Progress
    level: Level


class Launch:
    """What is made before daemon and program are forked, and what each of the three does with it."""

    def __init__(self, level: Level) -> None:
        """Raises UserError when the package was not built."""
        self._level = level
        self._daemon, self._recorder = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._first, self._program = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._notes = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # What lies in these when the guest is behind is waited for by each request to the mount.
        self._recorder.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _RECORDS_SIZE)
        self._notes[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _NOTES_SIZE)
        self._progress = Progress()
        self._library = load()
        self._listener: Listener | None = None
        self._pid = 0

    def recording(self) -> Recording:
        """In the daemon: return what it needs."""
        self._keep(self._daemon)
        return Recording(self._daemon, self._progress, self._level)

    def _keep(self, *kept: socket.socket) -> None:
        for end in (self._daemon, self._recorder, self._first, self._program, *self._notes):
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
            listener = install(program(calls.rules(self._level)))
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

    def supervise(self, child: int, tracing: Path, tracefs: Path) -> None:
        """Fork the recorder for a program that is being started; nothing happens if it cannot be.

        The program sees the guest's tracefs at `tracing`; this process, and the recorder, has it at `tracefs`.
        """
        self._keep(self._first, self._recorder, *self._notes)
        _, descriptors, _, _ = socket.recv_fds(self._first, 1, 1)
        if not descriptors:
            return
        self._listener = Listener(descriptors[0])
        self._pid = os.fork()
        if self._pid == 0:
            try:
                namespace.die_with_parent()
                os.setpgid(0, 0)  # away from the terminal's signals
                self._record(self._listener, child, tracing, tracefs)
            finally:
                os._exit(1)
        self._keep(self._first, self._notes[1])

    def _record(self, listener: Listener, child: int, tracing: Path, tracefs: Path) -> None:
        from fakefs.mirror.hostpaths import HostPaths
        from fakefs.mirror.recorder import Recorder
        from fakefs.mirror.uprobes import Uprobes

        root = os.open(f"/proc/{child}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        guest_device = os.stat(tracefs).st_dev
        mounts = mountpoint.parse_mountinfo(Path(f"/proc/{child}/mountinfo").read_bytes())
        shown = [os.fsdecode(mount.directory) for mount in mounts if mount.fstype == mountpoint.FSTYPE]
        paths, uprobes = HostPaths(root, guest_device, [str(tracing.parent), *shown]), Uprobes(guest_device)
        self._progress.begin()
        notes = Notes(self._library, listener, self._notes, self._progress, self._level)
        Recorder(notes, self._recorder, self._progress, paths, uprobes, tracefs, os.getppid(), self._level).run()

    def ended(self, pid: int) -> bool:
        """A child of the first process has ended: if it is the recorder, step in."""
        if pid != self._pid or self._listener is None:
            return False
        threading.Thread(target=self._proceed, args=(self._listener,), daemon=True).start()
        return True

    def _proceed(self, listener: Listener) -> None:
        """Answer the calls the recorder left, and all others."""
        for identity in self._progress.unanswered:
            listener.proceed(identity)
        for identity in self._progress.held:
            listener.refuse(identity, errno.EIO)
        with suppress(BlockingIOError, EOFError):
            while True:
                _let_go_on(listener, next_note(self._notes[1]).call)
        with suppress(OSError):
            while True:
                notification = listener.receive()
                if notification is not None:
                    _let_go_on(listener, notification)


def _let_go_on(listener: Listener, call: Notification) -> None:
    if call.number == sigframe.RT_SIGRETURN:
        sigframe.leave(call.tid, partial(listener.is_valid, call.id))
    if call.number == calls.NUMBER["perf_event_open"]:  # by the guest's numbers it would be about other tracepoints
        listener.refuse(call.id, errno.EIO)
    else:
        listener.proceed(call.id)
