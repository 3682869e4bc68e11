"""System control port B."""

from __future__ import annotations

import json

from emulator.devices.pit8254 import Pit8254, time_of
from emulator.devices.port61 import GATE2, OUT2, REFRESH_NS, REFRESH_TOGGLE, Port61

LOOPS_MAX = 20_000


class Bench:
    def __init__(self) -> None:
        self.ns = 0
        self.pit = Pit8254(lambda: self.ns, lambda level: None)
        self.port = Port61(lambda: self.ns, self.pit)


def test_only_the_low_four_bits_are_stored() -> None:
    bench = Bench()
    bench.port.port_write(0x61, 1, 0xFE)
    assert bench.port.port_read(0x61, 1) & ~(REFRESH_TOGGLE | OUT2) == 0x0E


def test_the_refresh_bit_toggles_with_time() -> None:
    bench = Bench()
    seen = []
    for step in range(4):
        bench.ns = step * REFRESH_NS
        seen.append(bench.port.port_read(0x61, 1) & REFRESH_TOGGLE)
    assert seen == [0, REFRESH_TOGGLE, 0, REFRESH_TOGGLE]


def test_tsc_calibration_by_counter_2() -> None:
    """What a kernel does: gate on, speaker off, mode 0, wait for OUT2, compare with the TSC."""
    bench = Bench()
    bench.port.port_write(0x61, 1, bench.port.port_read(0x61, 1) & ~0x02 | GATE2)
    bench.pit.port_write(0x43, 1, 0xB0)
    bench.pit.port_write(0x42, 1, 0x9C)
    bench.pit.port_write(0x42, 1, 0x2E)
    for _ in range(LOOPS_MAX):
        if bench.port.port_read(0x61, 1) & OUT2:
            break
        bench.ns += 1000
    assert 0 <= bench.ns - time_of(0x2E9C + 1) < 1000


def test_state_round_trip() -> None:
    bench, copy = Bench(), Bench()
    bench.port.port_write(0x61, 1, 0x03)
    copy.port.load(json.loads(json.dumps(bench.port.state())))
    assert copy.port.control == 0x03
