"""The daemon's side of mirroring: has each thread's shadow make the calls the recorder tells of, in their order.

One record at a time, each when the one before is done, so the guest's order is the host's. Only sleeps are not waited
for. A request to the mount waits until all that was recorded before it is done (`catch_up()`); nothing else waits. What
fails in the guest is nobody's business on the host.
"""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Awaitable

import trio

from fakefs.hostfiles.bring import HostFiles
from fakefs.hostthreads import HostThread
from fakefs.mirror.calls import BY_NUMBER, Level
from fakefs.mirror.delivery import Delivery
from fakefs.mirror.filecalls import FileCalls
from fakefs.mirror.guestpaths import GuestPaths
from fakefs.mirror.hits import Hits
from fakefs.mirror.inodes import InodeFacts, Inodes
from fakefs.mirror.launch import Recording
from fakefs.mirror.mirrored import Mirrored
from fakefs.mirror.probesites import ProbeSites
from fakefs.mirror.processes import Processes
from fakefs.mirror.queue import Died, Looks, Queue
from fakefs.mirror.records import (
    PACKET_MAX,
    Birth,
    Credentials,
    Descriptors,
    EventAnswer,
    EventControl,
    EventMap,
    EventOpen,
    Exit,
    Files,
    Handled,
    Hit,
    Mark,
    Name,
    Opened,
    Placed,
    Plain,
    Program,
    Record,
    Signal,
    Site,
    Sites,
    Sleep,
    Stopped,
    Transfer,
    Wait,
    decode,
    encode,
    packet,
)
from fakefs.mirror.sleepers import SleeperFacts, Sleepers
from fakefs.mirror.transfers import Transfers
from fakefs.perf.events import Events
from fakefs.prepare import noted
from fakefs.shadow import Shadow, Shadows
from fakefs.syscalls import Sys

_PATIENCE = 10.0  # host seconds the guest gets for a record; it may have little of a busy machine


class Mirror:
    """Implements `fakefs.shadow.Watching`."""

    def __init__(
        self, shadows: Shadows, host_files: HostFiles, events: Events, recording: Recording, nursery: trio.Nursery
    ) -> None:
        self._socket, self._progress, level = recording
        self._socket.setblocking(False)
        self._nursery = nursery
        guest, facts = shadows.pump.guest, noted(shadows.pump.guest, "inodes")
        paths = GuestPaths(shadows, Inodes(guest, InodeFacts.from_json(facts) if facts else None))
        self._shadows = shadows
        facts = noted(guest, "sleepers")
        sleepers = Sleepers(guest, SleeperFacts.from_json(facts) if facts else None)
        self._processes = Processes(shadows, paths, nursery, self._note_death, sleepers, reaped=level >= Level.ALL)
        self._delivery = Delivery(shadows, self._processes, sleepers)
        self._files = FileCalls(shadows, self._processes, paths, keeps=level >= Level.ALL)
        self._transfers = Transfers(shadows, self._processes, paths)
        self._queue = Queue(in_order=shadows.pump.deterministic)
        self._sites = ProbeSites(shadows, host_files, self._tell)
        self._events = events
        self._hits = Hits(shadows, self._processes, self._sites)
        self._taken = self._done = 0  # records, since the beginning
        self._heard = 0  # calls that were taken in or came to nothing: `Progress.done` when there was nothing more
        self._dying: list[tuple[int, Died]] = []  # those of which so many calls have to be heard before
        self._asked = 0  # the last of these that the recorder was asked about
        self._telling = trio.Lock()
        self._news = trio.Event()
        self._arrived = trio.Event()
        self._finished = trio.Event()

    # ---- records

    async def receive(self) -> None:
        """Take in records while the host's processes live."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            if not self._drain():
                return
            while self._queue.is_full:  # then those behind wait in the sockets, and the host's programs for room there
                await self._finished.wait()

    def _drain(self) -> bool:
        """Take in what the socket has; False when the recorder is gone."""
        heard, there = self._progress.done, True
        try:
            while received := self._socket.recv(PACKET_MAX):
                for message in decode(received):
                    match message:
                        case Placed(number):
                            self._sites.placed(number)
                        case Mark():
                            pass  # has come behind the records that were waited for
                        case Site() | Sites() | EventAnswer():
                            pass  # are for the recorder
                        case _:
                            self._put(message)
            there = False
        except BlockingIOError:
            pass
        except OSError:
            there = False
        self._heard = heard if there else sys.maxsize
        while self._dying and self._dying[0][0] <= self._heard:
            self._put(self._dying.pop(0)[1])
        if self._dying and self._heard >= self._asked:  # else an answer is on its way
            self._asked = self._dying[-1][0]
            self._nursery.start_soon(self._tell, Mark(self._asked))
        news, self._news = self._news, trio.Event()
        news.set()
        return there

    async def _hear(self, calls: int) -> None:
        """Return when so many calls have been taken in."""
        self._drain()
        if self._heard < calls:
            await self._tell(Mark(calls))
        while self._heard < calls:
            await self._news.wait()

    def _put(self, record: Record | Died) -> None:
        if self._queue.put(record):
            self._taken += 1
            self._arrived.set()

    def _note_death(self, shadow: Mirrored, status: int | None) -> None:
        """What it did before comes before."""
        self._dying.append((self._progress.noted, Died(shadow, status)))
        self._drain()

    async def run(self) -> None:
        """Do what the records say, until cancelled."""
        while True:
            while not self._queue:
                self._arrived = trio.Event()
                await self._arrived.wait()
            record = self._queue.take()
            try:
                with trio.move_on_after(_PATIENCE) as patience:
                    await self._do(record)
                if patience.cancelled_caught:
                    await self._give_up(record)
                await self._processes.blocking.stop_again()
            except (OSError, ValueError):  # the guest is dead, or the call's strings too long
                pass
            except Exception as error:  # a fault of ours must not take the mount away
                sys.stderr.write(f"fakefs: a call was not mirrored: {error!r}; please report this\n")
            self._done += 1
            finished, self._finished = self._finished, trio.Event()
            finished.set()
            await trio.lowlevel.checkpoint()

    async def _do(self, record: Record | Looks | Died) -> None:
        processes = self._processes
        if not isinstance(record, Died):
            told = isinstance(record, Handled) and record.number == signal.SIGCHLD
            for child, status in processes.ended_children(record.tid, told=told):  # one may be why it has gone on
                if not self._queue.is_about(child.tgid) and child not in (died.shadow for _, died in self._dying):
                    await self._delivery.end(child, status)
        match record:
            case Looks():
                await self._files.look(record)
            case Files():
                await self._files.make(record)
            case Transfer():
                await self._transfers.make(record)
            case Opened():
                await self._transfers.name(record)
            case Hit():
                await self._hits.make(record)
            case Descriptors():
                await self._transfers.keep(record)
            case Birth():
                await processes.bear(record)
            case Program():
                await processes.execute(record)
            case Exit():
                await processes.exit(record)
            case Wait():
                await processes.wait(record)
            case Sleep():
                await processes.sleep(record)
            case Credentials():
                await processes.change(record)
            case Name(tid, comm):
                if (shadow := processes.find(tid)) is not None:
                    await processes.settle(shadow)
                    await self._shadows.rename(shadow, comm.encode("utf-8", "surrogateescape"))
            case Plain(number=number) if BY_NUMBER[number].returns:
                await self._transfers.create(record)
            case Plain(number=Sys.CLOSE_RANGE):
                await self._transfers.close_range(record)
            case Plain(tid, number, arguments):
                if (shadow := processes.find(tid)) is not None:
                    await processes.settle(shadow)
                    await processes.call(shadow, (number, *arguments))
            case Handled():
                await self._delivery.handled(record)
            case Stopped():
                await self._delivery.stop(record)
            case Signal():
                await self._delivery.send(record)
            case EventOpen():
                await self._answer(record, self._open(record))
            case EventControl():
                await self._answer(record, self._events.control(record))
            case EventMap():
                await self._answer(record, self._events.map(record))
            case Died(shadow, status):
                await self._delivery.end(shadow, status)

    async def _give_up(self, record: Record | Looks | Died) -> None:
        shadow = record.shadow if isinstance(record, Died) else self._processes.find(record.tid)
        if shadow is not None:
            with trio.move_on_after(_PATIENCE):
                await self._processes.give_up(shadow)

    # ---- what the mount's requests need

    async def uprobes_changed(self, tid: int) -> None:
        """Return when the programs of the host will hit the uprobes that there are now."""
        await self._sites.changed(tid)

    async def _open(self, record: EventOpen) -> EventAnswer:
        """Open an event; one of a uprobe registers that."""
        answer = await self._events.open(record)
        await self._sites.changed(record.tid)
        return answer

    async def _answer(self, record: EventOpen | EventControl | EventMap, made: Awaitable[EventAnswer]) -> None:
        """Have a call end that waits for what it comes to, whatever becomes of that."""
        answer = EventAnswer(record.call, errno.EIO)
        try:
            answer = await made
        except OSError as error:
            answer = EventAnswer(record.call, error.errno or errno.EIO)
        finally:
            with trio.CancelScope(shield=True):
                await self._tell(answer)

    async def _tell(self, message: Mark | Site | Sites | EventAnswer) -> None:
        data = packet([encode(message)])
        async with self._telling:
            while len(data) <= PACKET_MAX:
                try:
                    self._socket.send(data)
                    return
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._socket)
                except OSError:
                    return  # the recorder is gone

    async def catch_up(self, tid: int) -> None:
        """Wait until all that was recorded is done, and the shadow of `tid` waits for nothing."""
        if tid == self._progress.recorder:  # what it waits for cannot wait for it
            self._drain()
        else:
            await self._hear(self._progress.noted)
            self._processes.look_for_ends()
            if self._dying:
                await self._hear(self._dying[-1][0])
        until = self._taken
        while self._done < until:
            await self._finished.wait()
        shadow = self._processes.find(tid)
        if shadow is not None:
            await self._processes.settle(shadow)

    async def bear(self, thread: HostThread) -> Shadow | None:
        """Bear the shadow of a thread that made no mirrored call yet, if it is a mirrored process's child or thread."""
        if self._processes.find(thread.parent) is None:
            return None
        birth = Birth(thread.tid, thread.tgid, thread.parent, thread.comm.decode("utf-8", "surrogateescape"), 0o022)
        return await self._processes.bear(birth)
