"""The process that is told of each call: notes what is needed to make it in the guest, lets it go on, passes it on.

It never waits for the guest, but for room in the socket to the daemon when that falls behind. What it reads of a
process was put there by that process: it is looked at with bounds, and used only if the call still waits afterwards.
When the daemon is gone it goes on letting calls go on.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fakefs.mirror import credentials, openfiles, sigframe, trampoline
from fakefs.mirror.arguments import AT_FDCWD, Arguments, NoPath, argv_at, room, signed, string_at
from fakefs.mirror.births import Image, read_birth, read_image
from fakefs.mirror.calls import NUMBER, Call, Level, find
from fakefs.mirror.endpoints import FAMILIES, Endpoints
from fakefs.mirror.hostpaths import HostPaths, NotMirrored
from fakefs.mirror.notes import Note, Notes, Progress, State
from fakefs.mirror.outcomes import Outcomes
from fakefs.mirror.records import (
    Birth,
    Descriptors,
    EventAnswer,
    Exit,
    Files,
    Mark,
    Name,
    Plain,
    Program,
    Record,
    Sleep,
    Transfer,
    Wait,
)
from fakefs.mirror.seccomp import Notification, read_memory
from fakefs.mirror.sigframe import Frame
from fakefs.mirror.signals import Signals, asked, pid_behind
from fakefs.mirror.todaemon import Daemon
from fakefs.mirror.uprobes import Uprobes
from fakefs.perf.requests import EventCalls, Held, Refused

_AT_EMPTY_PATH = 0x1000
_TIMER_ABSTIME = 1
_P_PID, _P_PIDFD = 1, 3
_TIMESPEC = struct.Struct("<qq")
_CLOCKS = (time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME)
_GENERATIONS = 64
_AT_ONCE = 16  # calls taken before the daemon is listened to again
_SET_ROBUST_LIST = NUMBER["set_robust_list"]
_SIGNALLING = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal")


class Thread(NamedTuple):
    """What is known of a thread of the host's."""

    tgid: int
    parent: int


class _Execve(NamedTuple):
    """What a thread has asked execve(2) for, and what its memory was like then."""

    program: Program
    image: Image | None


class Recorder:
    """Takes `notes`, and sends records through `daemon`, a socket of packets.

    `tracefs` is a directory of our mount, `outside` the process that is the parent of the first one that is mirrored.
    """

    def __init__(
        self,
        notes: Notes,
        daemon: socket.socket,
        progress: Progress,
        paths: HostPaths,
        uprobes: Uprobes,
        tracefs: Path,
        outside: int,
        level: Level,
    ) -> None:
        self._notes = notes
        self._listener = notes.listener
        self._progress = progress
        self._daemon = Daemon(daemon, progress)
        self._paths = paths
        self._uprobes = uprobes
        self._endpoints = Endpoints()
        self._outcomes = Outcomes(paths, self._endpoints)
        self._signals = Signals()
        self._arguments = Arguments(paths)
        self._outside = outside
        self._level = level
        self._threads: dict[int, Thread] = {}
        self._programs: dict[int, _Execve] = {}  # what a thread has asked execve(2) for
        self._events = EventCalls(self._listener, tracefs, self._unseen, progress.hold)
        self._special: dict[str, Callable[[Notification, Call], Iterable[Record]]] = {
            "set_robust_list": lambda notification, call: (),
            "execve": self._execve,
            "execveat": self._execve,
            "arch_prctl": self._new_program,
            "exit": self._exit,
            "exit_group": self._exit,
            "prctl": self._prctl,
            "setsid": self._plain,
            "close_range": self._plain,
            "socket": self._socket,
            "socketpair": self._socket,
            "wait4": self._wait,
            "waitid": self._wait,
            "nanosleep": self._sleep,
            "clock_nanosleep": self._sleep,
            "pidfd_open": self._pidfd,
            **dict.fromkeys(_SIGNALLING, self._signal),
            "perf_event_open": lambda notification, _: self._events.opened(notification),
            "ioctl": lambda notification, _: self._events.controlled(notification),
            "mmap": lambda notification, _: self._events.mapped(notification),
        }

    def run(self) -> None:
        """Serve for ever."""
        ready = select.poll()
        ready.register(self._notes, select.POLLIN)
        ready.register(self._daemon, select.POLLIN)
        while True:
            events = dict(ready.poll())
            if events.get(self._daemon.fileno(), 0) and not self._take():
                ready.unregister(self._daemon)
                self._events.abandon()
            if events.get(self._notes.fileno(), 0):
                try:
                    for _ in range(_AT_ONCE):
                        self._handle(self._notes.take())
                except BlockingIOError:
                    pass
                except EOFError:
                    ready.unregister(self._notes)  # the last program has ended: as with it, nothing is left to do
            self._daemon.flush()

    def _handle(self, note: Note) -> None:
        """Record a call, and let it go on."""
        call = note.call
        if note.state is State.WAITS:
            self._progress.take(call.id)
            refusal: int | None = 0
            try:
                frame = self._leave(call)
                if self._daemon.listens and call.tid > 0:
                    refusal = self._note(note, frame)
                    self._notes.trust(call.tid, trusted=call.tid in self._threads and call.tid not in self._programs)
            finally:
                if refusal:
                    self._listener.refuse(call.id, refusal)
                elif refusal == 0:
                    self._listener.proceed(call.id)
                self._progress.take(0)
        elif note.state is State.GOES_ON and self._daemon.listens:
            self._note(note)
        self._daemon.handled += 1

    def _take(self) -> bool:
        """Take in what the daemon tells; False when it is gone."""
        messages = self._daemon.take()
        for message in messages or ():
            if isinstance(message, Mark):
                self._daemon.mark(message)
            elif isinstance(message, EventAnswer):
                self._events.answer(message)
            elif (placed := self._uprobes.take(message)) is not None:
                self._notes.hold(held=self._uprobes.wanted)
                self._daemon.tell(placed)
        return messages is not None

    def _leave(self, notification: Notification) -> Frame | None:
        if notification.number != sigframe.RT_SIGRETURN:
            return None
        return sigframe.leave(notification.tid, partial(self._listener.is_valid, notification.id))

    def _note(self, note: Note, frame: Frame | None = None) -> int | None:
        """Send the records of a call, unless what they say can be anything: its thread has been killed meanwhile.

        Return the error number of a call that is to be refused, None for one that is held, else 0.
        """
        records: list[Record] = []
        refusal: int | None = 0
        try:
            for record in self._records(note, frame):
                records.append(record)  # those before an error are wanted
        except Refused as error:
            refusal = error.number
        except Held:
            refusal = None
        except (OSError, NotMirrored, ValueError, struct.error):
            pass  # gone, not for the guest, or nonsense
        except Exception as error:  # a fault of ours must not end the record of all that follows
            sys.stderr.write(f"fakefs: a call was not recorded: {error!r}; please report this\n")
        if note.state is State.GOES_ON or self._listener.is_valid(note.call.id):
            if refusal is None:
                self._events.hold(note.call)
            for record in records:
                self._record(record)
        return refusal

    def _record(self, record: Record) -> None:
        self._daemon.tell(record)
        match record:
            case Files(paths=paths):
                for path in paths:
                    self._paths.tell(path.entries)
                    self._uprobes.opened(record.tid, path.text)
            case Program(file=file):
                self._paths.tell(file.entries)
            case Transfer(files=files, needed=needed):
                for entries in (needed, *(used.file.entries for used in files)):
                    self._paths.tell(entries)

    # ---- threads

    def _records(self, note: Note, frame: Frame | None) -> Iterator[Record]:
        notification = note.call
        if notification.tid in self._threads:
            if notification.number == _SET_ROBUST_LIST:
                yield from self._reborn(notification.tid)
        else:
            yield from self._births(notification.tid)
            if notification.tid not in self._threads:
                return  # it has been killed
        yield from self._outcomes.seen(notification.tid)
        tgid = self._threads[notification.tid].tgid
        if frame is not None:
            yield from self._signals.handled(notification.tid, tgid, frame)
        yield from self._signals.arrived(notification.tid, tgid)
        if notification.number == sigframe.RT_SIGRETURN:
            return
        waits = partial(self._listener.is_valid, notification.id)
        if notification.number == trampoline.NUMBER:
            if notification.arguments[0] == trampoline.RETURN:  # those that it has forked return there too
                yield from self._unseen_children(tgid, notification.tid)
            yield from self._uprobes.hit(notification, waits)
            return
        call = find(notification.number, notification.arguments)
        if self._programs and self._is_new_image(notification.tid, call):
            yield from self._new_program(notification, call)
        if note.state is State.WAITS and call.name not in ("execve", "execveat"):
            parent = self._threads[notification.tid].parent
            self._uprobes.visit(notification.tid, parent, waits, loaded=call.name == "arch_prctl")
        special = self._special.get(call.name)
        if call.is_on_open_files:
            yield from self._outcomes.expect(notification, call, tgid, self._transfer(notification, call))
        elif call.arguments.startswith(("U", "G")):
            yield credentials.requested(notification, call)
        elif special is not None:
            yield from special(notification, call)
        elif call.returns:
            yield from self._plain(notification, call)
        else:
            try:
                yield self._arguments.files(note, call)
            except NoPath:
                yield self._transfer(notification, call.without_path)

    def _transfer(self, notification: Notification, call: Call) -> Transfer:
        pid = self._threads[notification.tid].tgid
        return openfiles.transfer(notification, call, pid, self._paths, self._endpoints)

    def _births(self, tid: int) -> Iterator[Record]:
        """The birth of a thread, after those of its ancestors that were not seen either."""
        found: list[Birth] = []
        while tid not in self._threads and tid not in (0, self._outside) and len(found) < _GENERATIONS:
            birth = read_birth(tid)
            if birth is None:
                break
            found.append(birth)
            tid = birth.parent
        for birth in reversed(found):
            self._threads[birth.tid] = Thread(birth.tgid, birth.parent)
            yield from self._outcomes.seen_of(birth.parent)
            yield birth

    def _reborn(self, tid: int) -> Iterator[Record]:
        """A known thread makes the first call of a thread: if its number was another's, that one has been killed."""
        birth = read_birth(tid)
        if birth is not None and self._threads[tid] != Thread(birth.tgid, birth.parent):
            del self._threads[tid]
            yield from self._births(tid)

    def _execve(self, notification: Notification, call: Call) -> Iterable[Record]:
        """Asked for, for each directory in PATH: it has become one when it makes its first call."""
        arguments = notification.arguments
        at = 1 if call.name == "execveat" else 0
        text = string_at(notification.tid, arguments[at])
        directory = signed(arguments[0]) if at else AT_FDCWD
        if at and not text and arguments[4] & _AT_EMPTY_PATH:
            text = os.readlink(f"/proc/{notification.tid}/fd/{directory}")
        file, cwd = self._arguments.path(notification.tid, directory, text, follow=True, kernels=True)
        argv = list(argv_at(notification.tid, arguments[at + 1]))
        program = Program(notification.tid, file, argv, cwd)
        self._programs[notification.tid] = _Execve(program, read_image(notification.tid))
        return ()

    def _is_new_image(self, tid: int, call: Call) -> bool:
        """Has execve(2) succeeded, as the thread's memory tells? One that still has the old one had it refused."""
        asked = self._programs.get(tid)
        if asked is None or call.name in ("execve", "execveat"):
            return False
        image = read_image(tid)
        if image == asked.image and image is not None:
            del self._programs[tid]
        return None not in (image, asked.image) and image != asked.image

    def _new_program(self, notification: Notification, call: Call) -> Iterator[Record]:
        leader = notification.tid
        threads = [tid for tid, thread in self._threads.items() if thread.tgid == leader]
        programs = [self._programs.pop(tid).program for tid in threads if tid in self._programs]
        self._signals.forget(leader)
        if programs:
            for tid in threads:
                if tid != leader:
                    del self._threads[tid]
            yield programs[-1]._replace(tid=leader)
            if self._level >= Level.ALL:
                yield Descriptors(leader, openfiles.descriptors(leader))

    def _exit(self, notification: Notification, call: Call) -> Iterator[Record]:
        tid, group = notification.tid, call.name == "exit_group"
        tgid = self._threads[tid].tgid
        gone = [each for each, thread in self._threads.items() if thread.tgid == tgid] if group else [tid]
        for each in gone:
            yield from self._unseen_children(tgid, each)
        for each in gone:
            del self._threads[each]
            self._programs.pop(each, None)
            self._signals.forget(each)
        yield Exit(tid, notification.arguments[0] & 0xFF, group)

    def _unseen_children(self, tgid: int, tid: int) -> Iterator[Record]:
        """Children that were not seen yet: they are about to lose their parent."""
        with suppress(OSError):
            with open(f"/proc/{tgid}/task/{tid}/children") as file:
                children = [int(word) for word in file.read(4096).split()]
            for child in children:
                if child not in self._threads:
                    yield from self._births(child)

    def _prctl(self, notification: Notification, call: Call) -> Iterator[Record]:
        yield Name(
            notification.tid, os.fsdecode(read_memory(notification.tid, notification.arguments[1], 16).split(b"\0")[0])
        )

    def _plain(self, notification: Notification, call: Call) -> Iterator[Record]:
        yield Plain(
            notification.tid, call.number, [signed(each) for each in notification.arguments[: len(call.arguments)]]
        )

    def _socket(self, notification: Notification, call: Call) -> Iterator[Record]:
        if notification.arguments[0] in FAMILIES:
            for record in self._plain(notification, call):
                yield from self._outcomes.expect(notification, call, self._threads[notification.tid].tgid, record)

    def _signal(self, notification: Notification, call: Call) -> Iterator[Record]:
        *_, target, _ = asked(notification, call)
        yield from self._unseen(target)
        yield self._signals.sent(notification, call, {tid: thread.tgid for tid, thread in self._threads.items()})

    def _unseen(self, tid: int) -> Iterator[Record]:
        """A thread of a mirrored process or a child of one, which was not seen yet."""
        if tid > 0 and tid not in self._threads:
            birth = read_birth(tid)
            if birth is not None and birth.parent in self._threads:
                yield from self._births(tid)

    def _pidfd(self, notification: Notification, call: Call) -> Iterator[Record]:
        yield from self._unseen(signed(notification.arguments[0]))
        yield from self._plain(notification, call)

    def _wait(self, notification: Notification, call: Call) -> Iterator[Record]:
        """A child that nobody has seen yet would not be waited for."""
        tid, values = notification.tid, notification.arguments
        yield from self._unseen_children(self._threads[tid].tgid, tid)
        if call.name == "wait4":
            yield Wait(tid, call.number, [signed(values[0]), room(values[1]), signed(values[2]), room(values[3])])
        else:
            which = signed(values[0]), signed(values[1])
            if which[0] == _P_PIDFD:
                which = _P_PID, pid_behind(tid, which[1])
            numbers = [*which, room(values[2]), signed(values[3]), room(values[4])]
            yield Wait(tid, call.number, numbers)

    def _sleep(self, notification: Notification, call: Call) -> Iterator[Record]:
        clock, flags, at = None, 0, notification.arguments[0]
        if call.name == "clock_nanosleep":
            clock, flags, at = notification.arguments[0], notification.arguments[1], notification.arguments[2]
        seconds, ns = _TIMESPEC.unpack(read_memory(notification.tid, at, _TIMESPEC.size))
        duration = seconds * 10**9 + ns
        if flags & _TIMER_ABSTIME:
            if clock not in _CLOCKS:
                return
            duration -= time.clock_gettime_ns(clock)
        if 0 <= ns < 10**9 and 0 <= duration < 1 << 62:
            yield Sleep(notification.tid, clock if clock in _CLOCKS or clock is None else 1, duration)
