"""Records that wait: looks are put together, and nothing notices."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror.calls import NUMBER
from fakefs.mirror.queue import Looks, Queue
from fakefs.mirror.records import Birth, Entry, Exit, Files, Handled, Name, PathArgument, Program, Record, looks

_DIRECTORY, _FILE = 0o40755, 0o100644


def entry(path: str, mode: int = _FILE) -> Entry:
    return Entry(path, mode)


def opened(tid: int, *entries: Entry, flags: int = os.O_RDONLY) -> Files:
    return Files(tid, NUMBER["openat"], [-100, None, flags, 0], [PathArgument(entries[-1].path, list(entries))], "")


def test_opens_for_reading_look() -> None:
    assert looks(opened(1, entry("/a"), flags=os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY))
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_CREAT, os.O_RDONLY | os.O_TRUNC, os.O_TMPFILE | os.O_RDWR):
        assert not looks(opened(1, entry("/a"), flags=flags))
    assert looks(Files(1, NUMBER["open"], [None, os.O_RDONLY, 0], [PathArgument("/a", [entry("/a")])], ""))
    assert looks(Files(1, NUMBER["readlink"], [None, -1, 9], [PathArgument("/a", [entry("/a")])], ""))
    assert not looks(Files(1, NUMBER["unlink"], [None], [PathArgument("/a", [entry("/a")])], ""))
    assert not looks(Name(1, "a"))


def test_looks_pass_those_of_other_threads() -> None:
    queue = Queue()
    one, two = opened(1, entry("/d", _DIRECTORY), entry("/d/a")), opened(2, entry("/d/b"))
    three = opened(1, entry("/c"))
    assert [queue.put(each) for each in (one, two, three)] == [True, True, False]
    first, second = queue.take(), queue.take()
    assert isinstance(first, Looks)
    assert isinstance(second, Looks)
    assert (first.records, second.records) == ([one, three], [two])
    assert first.above == [entry("/d", _DIRECTORY)]
    assert queue.put(opened(1, entry("/e")))  # what was taken is complete
    assert len(queue) == 1


def test_what_is_not_passed() -> None:
    for between in (
        opened(2, entry("/b"), flags=os.O_WRONLY),
        Exit(1, 0, False),
        Birth(3, 3, 1, "child", 0),
        Program(1, PathArgument("/p", [entry("/p")]), []),
        Files(2, NUMBER["rename"], [None, None], [PathArgument("/b", []), PathArgument("/c", [])], ""),
    ):
        queue = Queue()
        assert queue.put(opened(1, entry("/a")))
        assert queue.put(between)
        assert queue.put(opened(1, entry("/a"))), between
    queue = Queue(in_order=True)
    assert queue.put(opened(1, entry("/a")))
    assert queue.put(opened(1, entry("/a")))


def test_a_file_that_has_changed_is_looked_at_anew() -> None:
    queue = Queue()
    assert queue.put(opened(1, entry("/a")))
    assert queue.put(opened(1, entry("/a", 0)))
    assert not queue.put(opened(1, entry("/a", 0)))


def test_a_signal_handled_again_is_one() -> None:
    queue = Queue()
    one = Handled(1, 14, [])
    assert [queue.put(each) for each in (one, one, Handled(1, 10, []), Handled(2, 14, []), one)] == [1, 0, 1, 1, 0]
    assert queue.take() == one
    assert queue.put(one)
    assert queue.put(Name(2, "a"))
    assert queue.put(one)
    in_order = Queue(in_order=True)
    assert in_order.put(one)
    assert in_order.put(one)


_NAMES = st.sampled_from(["a", "b", "c"])
_KINDS = st.sampled_from(["look", "change", "name", "birth", "take"])
_STEPS = st.lists(st.tuples(_KINDS, st.integers(1, 3), _NAMES, _NAMES), max_size=60)


@given(_STEPS)
def test_no_call_sees_another_guest(steps: list[tuple[str, int, str, str]]) -> None:
    """Against a queue that keeps the order: each thread does the same, and each call finds the same at its path."""
    host: dict[str, int] = {}
    told: set[str] = set()
    put_together, in_order = Queue(), Queue(in_order=True)
    results: list[dict[int, list[object]]] = [{}, {}]
    guests: list[dict[str, int]] = [{}, {}]

    def take(which: int, queue: Queue) -> None:
        taken = queue.take()
        guest, done = guests[which], results[which]
        if isinstance(taken, Looks):
            guest.update((each.path, each.mode) for each in (*taken.above, *taken.seen.values()))
            taken.above.clear()
            for record in taken.records:
                path = record.paths[0].text
                done.setdefault(record.tid, []).append((path, guest.get(path.rpartition("/")[0]), guest.get(path)))
        else:
            if isinstance(taken, Files):
                guest.update((each.path, each.mode) for each in taken.paths[0].entries)
            assert not hasattr(taken, "shadow")
            done.setdefault(taken.tid, []).append(taken)

    for serial, (kind, tid, directory, name) in enumerate(steps):
        if kind == "take":
            if put_together:
                take(0, put_together)
            continue
        above, path = f"/{directory}", f"/{directory}/{name}"
        entries = [] if above in told else [entry(above, _DIRECTORY)]
        record: Record
        if kind in ("look", "change"):
            told.add(above)
            if kind == "change":
                host[path] = 0 if host.get(path) else _FILE + serial
            entries.append(entry(path, host.get(path, 0)))
            record = opened(tid, *entries, flags=os.O_RDONLY if kind == "look" else os.O_WRONLY)
        else:
            record = Name(tid, str(serial)) if kind == "name" else Birth(tid, tid, tid % 3 + 1, str(serial), 0)
        put_together.put(record)
        in_order.put(record)
    for which, queue in enumerate((put_together, in_order)):
        while queue:
            take(which, queue)
    assert results[0] == results[1]
    assert guests[0] == guests[1]


def test_a_thread_that_is_far_ahead_fills_it() -> None:
    """Others do not, however many there are: they wait for the guest only when that is far behind with all."""
    queue = Queue()
    for tid in range(1, 2001):
        queue.put(opened(tid, entry("/a")))
        queue.put(Name(tid, "name"))
    assert not queue.is_full
    queue = Queue()
    for count in range(384):
        queue.put(opened(1, entry("/a"), flags=os.O_RDWR if count % 2 else os.O_RDONLY))
    assert not queue.is_full
    queue.put(opened(1, entry("/a")))
    assert queue.is_full
    queue.take()
    assert not queue.is_full
    while queue:
        queue.take()
        assert not queue.is_full
    queue = Queue()
    for _ in range(385):  # looks that are put together count too
        queue.put(opened(1, entry("/a")))
    assert len(queue) == 13
    assert queue.is_full
