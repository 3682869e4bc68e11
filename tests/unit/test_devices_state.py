"""Saving and restoring registers: what is wrong in a snapshot is an error and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.devices.lapic import Lapic
from emulator.devices.pic8259 import PicPair
from emulator.devices.pit8254 import Pit8254
from emulator.devices.port61 import Port61
from emulator.devices.rtc import Rtc
from emulator.devices.state import Stateful
from emulator.devices.uart8250 import Uart8250
from emulator.errors import EmulatorError


def devices() -> list[Stateful]:
    def now() -> int:
        return 0

    def nothing(value: int) -> None:
        pass

    pit = Pit8254(now, nothing)
    return [PicPair(), pit, Port61(now, pit), Uart8250(nothing, nothing), Rtc(now, 0), Lapic(now)]


EACH_DEVICE = pytest.mark.parametrize("device", devices(), ids=lambda device: type(device).__name__)


def leaves(state: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """List every register of a nested state as (the dict that holds it, its name)."""
    found = []
    for name, value in state.items():
        found += leaves(value) if isinstance(value, dict) else [(state, name)]
    return found


@EACH_DEVICE
@pytest.mark.parametrize("wrong", ["text", 1.5, -(1 << 90), 1 << 300, {}, [None], [1 << 90], [0] * 10_000])
def test_a_wrong_register_is_refused_and_nothing_changes(device: Stateful, wrong: object) -> None:
    before = device.state()
    for index in range(len(leaves(before))):
        state = device.state()
        holder, name = leaves(state)[index]
        holder[name] = wrong
        with pytest.raises(EmulatorError, match=r"^snapshot: .* anew$"):
            device.load(state)
    assert device.state() == before


@EACH_DEVICE
def test_bool_and_int_are_not_the_same(device: Stateful) -> None:
    for index in range(len(leaves(device.state()))):
        state = device.state()
        holder, name = leaves(state)[index]
        value = holder[name]
        if type(value) is bool or type(value) is int:
            holder[name] = int(value) if type(value) is bool else bool(value)
            with pytest.raises(EmulatorError):
                device.load(state)


@EACH_DEVICE
def test_missing_and_unknown_registers_are_refused(device: Stateful) -> None:
    for index in range(len(leaves(device.state()))):
        state = device.state()
        holder, name = leaves(state)[index]
        holder[name + "_"] = holder.pop(name)
        with pytest.raises(EmulatorError, match="not those of this version"):
            device.load(state)
    with pytest.raises(EmulatorError):
        device.load(device.state() | {"more": 1})


def test_a_part_must_be_a_mapping() -> None:
    pair = PicPair()
    with pytest.raises(EmulatorError):
        pair.load(pair.state() | {"slave": 5})


def test_lists_are_copied_both_ways() -> None:
    rtc = Rtc(lambda: 0, 0)
    state = rtc.state()
    rtc.load(state)
    state["memory"][0x40] = 0x55
    assert rtc.memory[0x40] == 0
    rtc.state()["memory"][0x40] = 0x55
    assert rtc.memory[0x40] == 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@EACH_DEVICE
@given(json_values)
def test_any_json_loads_or_is_refused(device: Stateful, value: Any) -> None:
    with pytest.raises(EmulatorError):
        device.load(value)


CANDIDATES = [None, False, True, 0, 1, 2, 3, 5, 11, 255, 0xFFFF, 0x10000, 0xFFFFFFFF, 1 << 63, (1 << 80) - 1]
LISTS = [[], [1], [255] * 6, [0x200EC] * 6, [0x400EC] * 6, [7] * 16, [0xFF] * 128, [9] * 4096]


def scramble(device: Stateful, choose: Callable[[list[Any]], Any]) -> None:
    """Load registers that are each in range but need not make sense together."""

    def state_of(part: Stateful) -> dict[str, Any]:
        own = {name: choose([v for v in CANDIDATES + LISTS if check(v)]) for name, check in part.STATE.items()}
        return own | {name: state_of(inner) for name, inner in part.parts().items()}

    device.load(state_of(device))


@EACH_DEVICE
@given(st.integers(0, 1 << 32))
def test_registers_that_make_no_sense_together_do_no_harm(device: Stateful, seed: int) -> None:
    random = Random(seed)
    scramble(device, random.choice)
    if isinstance(device, Lapic):
        for offset in range(0, 0x400, 0x10):
            assert 0 <= device.read(offset) <= 0xFFFFFFFF
            device.write(offset, random.getrandbits(32))
    elif isinstance(device, PicPair | Pit8254 | Port61 | Uart8250 | Rtc):
        for port in device.PORTS:
            device.port_write(port, 1, random.getrandbits(8))
            assert 0 <= device.port_read(port, 1) <= 0xFF
    if isinstance(device, Lapic | Pit8254):
        device.next_event()
        device.advance(1 << 40)
