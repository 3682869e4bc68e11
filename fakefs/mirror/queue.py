"""The records that wait to be made, in the order they came, with a thread's looks at files put together.

A dynamic program opens files by the dozen when it starts, and having another task of the guest make a call costs
several times the call. So when the guest is behind, what a thread looks at next is added to the look of its that waits
already, past other threads' records in between. That differs from the host's order by no more than the guest is
behind, and records that could make a difference are not passed. A signal that a thread handles again before the guest
has come to it, while nobody does anything else, is one signal there, as it is while it is pending.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from fakefs.mirror.mirrored import Mirrored
from fakefs.mirror.records import Birth, Entry, Files, Handled, Program, Record, Signal, Transfer, looks

_MOST = 32
"""Looks made in one go; a slot has room for four calls of each."""
_ENTRIES_MAX = 4096
_OF_A_THREAD_MAX = 384
"""Records. A shell that starts programs has some of each that wait; one that goes round in a loop has all of them."""


@dataclass(slots=True)
class Looks:
    """Calls of one thread that look at files and change nothing.

    `above` are directories and links that waiting records have told of: as they are told once, those that are passed
    have to be made before.
    """

    tid: int
    above: list[Entry]
    records: list[Files] = field(default_factory=list)
    seen: dict[str, Entry] = field(default_factory=dict)

    def add(self, record: Files) -> bool:
        """Add a record of this thread; False when there are enough, or something has changed since the first."""
        entries = [entry for path in record.paths for entry in path.entries]
        if len(self.records) == _MOST or any(self.seen.get(entry.path, entry) != entry for entry in entries):
            return False
        self.seen.update((entry.path, entry) for entry in entries)
        self.records.append(record)
        return True


class Died(NamedTuple):
    """A process was killed: it did not tell of its end by a call."""

    shadow: Mirrored
    status: int | None


class Queue:
    """Puts looks and signals together unless `in_order`."""

    def __init__(self, *, in_order: bool = False) -> None:
        self._waiting: deque[Record | Looks | Died] = deque()
        self._in_order = in_order
        self._open: dict[int, Looks] = {}  # the last ones of each thread, that more can be added to
        self._above: list[Entry] = []
        self._handled: set[tuple[int, int]] = set()  # threads and signals: nobody has done anything since
        self._of: Counter[int] = Counter()  # records by thread
        self._ahead: set[int] = set()  # threads with more than their share

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Is the guest, or what it does for some thread, so far behind that no more should be taken in?"""
        return len(self._waiting) > _ENTRIES_MAX or bool(self._ahead)

    def put(self, record: Record | Died) -> bool:
        """Take in what comes last; False when that became part of what waits already."""
        if isinstance(record, Handled):
            if (record.tid, record.number) in self._handled:
                return False
            if not self._in_order:
                self._handled.add((record.tid, record.number))
        else:
            self._handled.clear()
        if isinstance(record, Died):
            self._open.pop(record.shadow.tid, None)
            self._waiting.append(record)
            return True
        self._of[record.tid] += 1
        if self._of[record.tid] > _OF_A_THREAD_MAX:
            self._ahead.add(record.tid)
        if looks(record):
            assert isinstance(record, Files)
            return self._put_look(record)
        if isinstance(record, Files):
            self._open.clear()
            self._above = []
        else:
            self._open.pop(record.tid, None)
            match record:
                case Birth(parent=parent):
                    self._open.pop(parent, None)
                case Program(file=file):
                    self._above += file.entries[:-1]
                case Transfer(files=files, needed=needed):
                    for entries in (needed, *(used.file.entries for used in files)):
                        self._above += entries[:-1]
        self._waiting.append(record)
        return True

    def _put_look(self, record: Files) -> bool:
        for path in record.paths:
            self._above += path.entries[:-1]
        waiting = self._open.get(record.tid)
        if waiting is not None and waiting.add(record):
            return False
        new = Looks(record.tid, self._above)
        new.add(record)
        if not self._in_order:
            self._open[record.tid] = new
        self._waiting.append(new)
        return True

    def is_about(self, tgid: int) -> bool:
        """Does anything wait that a process has done, or a signal that was sent to it?"""
        return any(
            record.tid == tgid or (isinstance(record, Signal) and tgid in record.to)
            for record in self._waiting
            if not isinstance(record, Died)
        )

    def take(self) -> Record | Looks | Died:
        """Return what is first. Raises IndexError when nothing waits."""
        first = self._waiting.popleft()
        if not isinstance(first, Died):
            self._count_taken(first.tid, len(first.records) if isinstance(first, Looks) else 1)
        if isinstance(first, Looks) and self._open.get(first.tid) is first:
            del self._open[first.tid]
        elif isinstance(first, Handled):
            self._handled.discard((first.tid, first.number))
        return first

    def _count_taken(self, tid: int, records: int) -> None:
        self._of[tid] -= records
        if self._of[tid] <= _OF_A_THREAD_MAX:
            self._ahead.discard(tid)
        if not self._of[tid]:
            del self._of[tid]
