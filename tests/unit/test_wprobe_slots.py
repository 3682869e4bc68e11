"""What set and clear triggers do to the slots of a wprobe, against a model: with any slots, timeouts and users."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.cpu.watchpoints import Access
from fakefs.wprobe.definition import parse
from fakefs.wprobe.table import Table, TableFacts
from fakefs.wprobe.trigger import Trigger
from fakefs.wprobe.wprobe import Attached, Wprobe
from tests.unit.test_wprobe_definition import Kernel

OBJECTS = [0xFFFF888000001000 + 64 * number for number in range(5)]
OFF_LIMITS = 0xFFFF888000009000
FACTS = TableFacts(**{item.name: 0 for item in fields(TableFacts)})


class Machine:
    """A clock with alarms, and watchpoints that are only counted."""

    def __init__(self) -> None:
        self.cpu = self
        self.now = 0
        self.alarms: list[tuple[int, Callable[[], None]]] = []
        self.armed: dict[int, int] = {}
        self._numbers = 0

    def trap(self, *_: object, **__: object) -> None:
        """Nothing runs here."""

    def alarm(self, at: int, call: Callable[[], None]) -> None:
        self.alarms.append((at, call))

    def advance(self, ns: int) -> None:
        end = self.now + ns
        while due := [each for each in self.alarms if each[0] <= end]:
            first = min(due, key=lambda each: each[0])
            self.alarms.remove(first)
            self.now = max(self.now, first[0])
            first[1]()
        self.now = end

    # As Carriers and Watchpoints.

    @property
    def watchpoints(self) -> Machine:
        return self

    def arm(self, kprobe: int, address: int, length: int, access: Access) -> int:
        self._numbers += 1
        self.armed[self._numbers] = address
        return self._numbers

    def remove(self, number: int) -> None:
        del self.armed[number]


class Bench(NamedTuple):
    machine: Machine
    table: Table
    wprobe: Wprobe

    @property
    def watched(self) -> list[int]:
        return sorted(self.machine.armed.values())

    def act(self, kind: str, value: int | None, timeout: int = 0) -> str:
        trigger: Any = Trigger(kind, "watch", None if value is None else "f", timeout=timeout)  # type: ignore[arg-type]  # a word
        return self.table._switch(trigger, self.wprobe, value).name


def bench(head: str, users: int = 1) -> Bench:
    machine: Any = Machine()
    guest: Any = SimpleNamespace(machine=machine)
    table = Table(guest, FACTS, machine, lambda address, length: address == OFF_LIMITS)  # type: ignore[arg-type]  # all that is asked
    wprobe = Wprobe(parse(f"{head}:watch rw@-1:8", Kernel(), extended=True), 0, 0, users=users)
    table.wprobes.append(wprobe)
    return Bench(machine, table, wprobe)


def test_without_slots_the_first_wins() -> None:
    b = bench("w")
    assert [b.act("set", each) for each in OBJECTS[:2]] == ["ALL", "NOT"]
    assert b.watched == [OBJECTS[0]]
    assert b.act("clear", OBJECTS[1]) == "NOT"
    assert b.act("clear", None) == "ALL"
    assert b.act("clear", None) == "NOT"
    assert b.watched == []


@pytest.mark.parametrize("value", [0, 0x1000, 0x7FFFFFFFF000, OFF_LIMITS, (1 << 64) - 4])
def test_what_cannot_be_watched_is_missed(value: int) -> None:
    b = bench("w4")
    assert b.act("set", value) == "NOT"
    assert b.wprobe.slots == []


def test_the_oldest_goes_and_what_is_set_again_is_new() -> None:
    b = bench("w2")
    one, two, three = OBJECTS[:3]
    for each in (one, two, one, three):
        assert b.act("set", each) == "ALL"
    assert b.watched == sorted((one, three))
    assert b.wprobe.evicted == 1
    assert b.wprobe.address == three
    assert b.act("clear", one) == "SOME"
    assert b.act("clear", three) == "ALL"


def test_a_timeout_is_its_own_objects() -> None:
    b = bench("w4")
    one, two, three = OBJECTS[:3]
    b.act("set", one, timeout=100)
    b.act("set", two, timeout=50)
    b.act("set", three)
    b.machine.advance(49)
    b.act("set", two, timeout=50)  # its time begins anew
    b.machine.advance(49)
    assert b.watched == sorted((one, two, three))
    b.machine.advance(3)
    assert b.watched == [three]
    assert (b.wprobe.expired, b.wprobe.show_slots()) == (2, "slots: 1/4 expired: 2")
    b.machine.advance(10_000)
    assert b.watched == [three]


def test_a_shorter_timeout_after_a_longer_one() -> None:
    b = bench("w2")
    b.act("set", OBJECTS[0], timeout=30)
    b.act("set", OBJECTS[0], timeout=10)
    b.act("set", OBJECTS[1], timeout=5)
    b.machine.advance(5)
    assert b.watched == [OBJECTS[0]]
    b.machine.advance(5)
    assert b.watched == []
    b.machine.advance(100)
    assert b.wprobe.expired == 2


def test_disabled_nothing_is_armed() -> None:
    b = bench("w2", users=0)
    b.act("set", OBJECTS[0])
    assert b.watched == []
    b.wprobe.users = 1
    b.table._arm(b.wprobe)
    assert b.watched == [OBJECTS[0]]
    b.table.park(b.wprobe)
    assert (b.watched, b.wprobe.slots) == ([], [])


STEPS = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(OBJECTS), st.sampled_from([0, 0, 10, 30])),
    st.tuples(st.just("clear"), st.one_of(st.none(), st.sampled_from(OBJECTS)), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 20), st.just(0)),
)


@given(st.sampled_from([0, 1, 2, 4]), st.lists(STEPS, max_size=40))
def test_against_a_model(slots: int, steps: list[tuple[str, int | None, int]]) -> None:
    b = bench(f"w{slots or ''}")
    model: dict[int, int | None] = {}  # what is watched, oldest first, and until when
    now = 0
    for kind, value, timeout in steps:
        if kind == "wait":
            assert value is not None
            now += value
            b.machine.advance(value)
            model = {each: until for each, until in model.items() if until is None or until > now}
        elif kind == "set":
            assert value is not None
            if model and not slots:
                assert b.act(kind, value, timeout) == "NOT"
                continue
            assert b.act(kind, value, timeout) == "ALL"
            if value not in model and len(model) == (slots or 1):
                del model[next(iter(model))]
            model.pop(value, None)
            model[value] = now + timeout if timeout else None
        else:
            gone = list(model) if value is None else [value] if value in model else []
            model = {each: until for each, until in model.items() if each not in gone}
            expected = "NOT" if not gone else "SOME" if model else "ALL"
            assert b.act(kind, value) == expected
        assert [slot.address for slot in b.wprobe.slots] == list(model)
        assert b.watched == sorted(model)


def test_attached_triggers_are_counted() -> None:
    b = bench("w2")
    attached = [Attached(b"/t", Trigger(kind, "watch", "f"), b.wprobe, 1, 16) for kind in ("set", "clear")]
    for each in attached:
        b.table.attach(each)
    assert (b.wprobe.triggers, b.wprobe.setters, b.wprobe.in_use) == (2, 1, False)
    for each in attached:
        b.table.detach(each)
    assert (b.wprobe.triggers, b.wprobe.setters, b.wprobe.in_use) == (0, 0, True)
