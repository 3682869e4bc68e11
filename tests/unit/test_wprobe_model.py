from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.wprobe.definition import parse
from fakefs.wprobe.errors import ProbeError
from tests.wprobe_model import DEBUG_REGISTERS, Attachment, Registers, State

HERE = 0xFFFF888002537C00
THERE = 0xFFFF8880007739C0


class Kernel:
    dummy = 0xFFFFFFFF820F8940

    def lookup(self, name: str) -> int | None:
        return 0xFFFFFFFF81C07A00


class Recorded:
    """A wprobe and what its watchpoint was told."""

    def __init__(self, line: str = "w:watch rw@-1:8", registers: Registers | None = None) -> None:
        self.armed: list[int | None] = []
        self.registers = registers or Registers()
        self.state = State(parse(line, Kernel()), self.armed.append, self.registers)


def refused(error: pytest.ExceptionInfo[ProbeError]) -> int:
    assert error.value.entry is None
    return error.value.number


def test_enabling_arms() -> None:
    probe = Recorded("w:j w@jiffies:8")
    assert (probe.state.shown_enable(), probe.state.busy) == ("0", False)
    probe.state.enable(True)
    probe.state.enable(True)
    assert (probe.state.shown_enable(), probe.state.busy) == ("1", True)
    probe.state.enable(False)
    assert (probe.state.shown_enable(), probe.registers.used) == ("0", 0)
    assert probe.armed == [Kernel().lookup("jiffies"), None]


def test_removing_an_enabled_one_is_refused() -> None:
    probe = Recorded()
    probe.state.enable(True)
    with pytest.raises(ProbeError) as caught:
        probe.state.remove()
    assert refused(caught) == errno.EBUSY
    probe.state.enable(False)
    probe.state.remove()


def test_instances_share_one_breakpoint() -> None:
    registers = Registers(strict=True)
    probe = Recorded("w:j w@jiffies", registers)
    probe.state.enable(True, "foo")
    probe.state.enable(True)
    assert registers.used == 1
    probe.state.enable(False)
    assert (probe.state.shown_enable(), probe.state.shown_enable("foo")) == ("0", "1")
    assert (probe.state.records(), probe.state.records("foo")) == (False, True)
    probe.state.drop_instance("foo")
    assert (registers.used, probe.state.busy) == (0, False)


def test_strict_has_four_registers() -> None:
    registers = Registers(strict=True)
    probes = [Recorded(registers=registers).state for _ in range(DEBUG_REGISTERS + 1)]
    for each in probes[:-1]:
        each.enable(True)
    with pytest.raises(ProbeError) as caught:
        probes[-1].enable(True)
    assert refused(caught) == errno.ENOSPC
    assert probes[-1].shown_enable() == "0"
    with pytest.raises(ProbeError) as caught:
        probes[-1].attach_set("te")
    assert refused(caught) == errno.ENOSPC
    assert probes[-1].shown_enable() == "0*"  # so it is on a kernel that has wprobes
    assert not probes[-1].busy
    probes[0].enable(False)
    probes[-1].enable(True)


def test_set_that_fails_leaves_the_address() -> None:
    registers = Registers(strict=True)
    probe = Recorded(f"w:ev r@0x{HERE:x}:8", registers)
    with pytest.raises(ProbeError):
        probe.state.attach_set("te")
    assert probe.state.address == HERE
    assert not probe.state.in_use


def test_without_strictness_there_is_no_limit_and_reads_can_be_watched() -> None:
    registers = Registers()
    for _ in range(DEBUG_REGISTERS + 1):
        Recorded("w:ev r@jiffies:8", registers).state.enable(True)
    assert registers.used == DEBUG_REGISTERS + 1


@pytest.mark.parametrize("line", ["w:ev r@jiffies:8", "w:ev w@jiffies+8:4"])
def test_strict_refuses_what_hardware_cannot_watch(line: str) -> None:
    jiffies = 0xFFFFFFFF81C07A00
    probe = Recorded(line, Registers(strict=True, blocked=[(jiffies + 10, jiffies + 11)]))
    with pytest.raises(ProbeError) as caught:
        probe.state.enable(True)
    assert refused(caught) == errno.EINVAL
    assert (probe.state.shown_enable(), probe.armed) == ("0", [])


def test_set_and_clear() -> None:
    probe = Recorded()
    state = probe.state
    set_trigger = state.attach_set("te")
    clear_trigger = state.attach_clear("tc")
    assert (state.shown_enable(), state.show()) == ("0*", "w:wprobes/watch rw@-1:8")
    assert not state.hit_clear(clear_trigger)
    assert state.hit_set(set_trigger, HERE)
    assert (state.shown_enable(), state.show()) == ("1*", f"w:wprobes/watch rw@0x{HERE:x}:8")
    assert not state.hit_set(set_trigger, THERE)  # the first wins
    assert not state.hit_clear(clear_trigger, THERE)
    assert state.hit_clear(clear_trigger, HERE)
    assert (state.shown_enable(), state.missed, state.parked) == ("0*", 3, True)
    assert probe.armed == [HERE, None]


@pytest.mark.parametrize("value", [HERE + 4, 0, 0x7FFFFFFFE000, -1, Kernel.dummy])
def test_set_takes_aligned_kernel_addresses_only(value: int) -> None:
    probe = Recorded()
    assert not probe.state.hit_set(probe.state.attach_set("te"), value)
    assert (probe.state.missed, probe.state.shown_enable(), probe.armed) == (1, "0*", [])


def test_set_is_busy_with_anything_else() -> None:
    for prepared in ("enabled", "set", "clear"):
        state = Recorded().state
        if prepared == "enabled":
            state.enable(True)
        elif prepared == "set":
            state.attach_set("a")
        else:
            state.attach_clear("a")
        with pytest.raises(ProbeError) as caught:
            state.attach_set("te")
        assert refused(caught) == errno.EBUSY


def test_one_clear_for_each_event() -> None:
    state = Recorded().state
    state.attach_clear("te")
    state.attach_clear("tc")
    state.attach_clear("te", instance="foo")
    with pytest.raises(ProbeError) as caught:
        state.attach_clear("te")
    assert refused(caught) == errno.EEXIST


def test_count_goes_down_on_real_switches_only() -> None:
    state = Recorded().state
    twice = state.attach_set("te", 2)
    clear = state.attach_clear("tc")
    assert not state.hit_set(twice, HERE + 1)
    assert twice.count == 2
    for left in (1, 0):
        assert state.hit_set(twice, HERE)
        assert state.hit_clear(clear)
        assert twice.count == left
    missed = state.missed
    assert not state.hit_set(twice, HERE)
    assert state.missed == missed  # what is used up misses nothing


def test_removing_the_set_trigger_keeps_the_address() -> None:
    probe = Recorded()
    trigger = probe.state.attach_set("te")
    probe.state.hit_set(trigger, HERE)
    with pytest.raises(ProbeError):
        probe.state.remove()
    probe.state.detach(trigger)
    assert (probe.state.shown_enable(), probe.state.address) == ("0", HERE)
    assert probe.armed == [HERE, None]
    assert not probe.state.hit_set(trigger, THERE)
    probe.state.attach_set("te")
    assert probe.state.parked


def test_a_trigger_of_an_instance_is_for_that_instance() -> None:
    state = Recorded().state
    trigger = state.attach_set("te", instance="foo")
    state.hit_set(trigger, HERE)
    assert (state.shown_enable(), state.shown_enable("foo")) == ("0", "1*")
    assert state.attached("set", "te") is None
    assert state.attached("set", "te", "foo") is trigger


operations = st.tuples(
    st.sampled_from(["on", "off", "soft on", "soft off", "set", "clear", "detach", "hit", "drop", "remove"]),
    st.integers(0, 3),
    st.sampled_from(["", "foo"]),
    st.sampled_from([HERE, THERE, HERE + 1, 0, Kernel.dummy]),
)


@given(st.lists(operations, max_size=40), st.booleans())
def test_registers_and_watchpoint_agree_with_the_state(done: list[tuple[str, int, str, int]], strict: bool) -> None:
    registers = Registers(strict=strict)
    probes = [Recorded(registers=registers), Recorded("w:j w@jiffies:8", registers)]
    attached: list[tuple[State, Attachment]] = []
    for what, number, instance, value in done:
        state = probes[number % 2].state
        try:
            if what in ("on", "off"):
                state.enable(what == "on", instance)
            elif what == "soft on":
                state.soft_enable(instance)
            elif what == "soft off":
                state.soft_disable(instance)
            elif what in ("set", "clear"):
                attach = state.attach_set if what == "set" else state.attach_clear
                attached.append((state, attach(number, number or None, instance)))
            elif what == "detach" and attached:
                owner, trigger = attached.pop(number % len(attached))
                if owner.attached(trigger.kind, trigger.source, trigger.instance) is trigger:
                    owner.detach(trigger)
            elif what == "hit" and attached:
                owner, trigger = attached[number % len(attached)]
                if trigger.kind == "set":
                    owner.hit_set(trigger, value)
                else:
                    owner.hit_clear(trigger, value or None)
            elif what == "drop" and instance:
                state.drop_instance(instance)
            else:
                state.remove()
        except ProbeError:
            pass
        assert registers.used == sum(probe.state.registered for probe in probes)
        for probe in probes:
            watched = probe.armed[-1] if probe.armed else None
            assert watched == (probe.state.address if probe.state.registered and not probe.state.parked else None)
            assert probe.state.shown_enable() in ("0", "1", "0*", "1*")
            assert probe.state.records() <= probe.state.registered
