"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulator.cpu.native import NativeCPU
from emulator.cpu.pure import PureCPU
from tests.cpu_bench import (
    Bench,
)


@pytest.fixture(params=[NativeCPU, PureCPU], ids=["native", "pure"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A CPU of each kind, set up for a program."""
    bench = Bench(request.param)
    yield bench
    bench.cpu.close()
    bench.memory.close()
