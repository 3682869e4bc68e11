"""Which uprobes are registered, by what the traps in the guest's functions see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fakefs.mirror.enabled import Enabled

_OLD = ("uprobe_register", "uprobe_register_refctr", "uprobe_unregister")
_NEW = ("uprobe_register", "uprobe_unregister_nosync")


class Kernel:
    """Has functions of some names, which can be called; stands for a guest."""

    def __init__(self, *names: str) -> None:
        self.symbols = {name: 0x1000 + number for number, name in enumerate(names)}
        self.registers: dict[str, int] = {}
        self.traps: dict[int, Any] = {}
        cpu = SimpleNamespace(read=self.registers.__getitem__)
        self.machine = SimpleNamespace(cpu=cpu, trap=self.traps.__setitem__)

    def call(self, name: str, *arguments: int) -> None:
        self.registers.update(zip(("rdi", "rsi", "rdx", "rcx"), (*arguments, 0, 0), strict=False))
        assert self.traps[self.symbols[name]]() is False


def enabled(kernel: Any) -> Enabled:
    return Enabled(kernel)


@pytest.mark.parametrize("old", [True, False])
def test_what_is_registered(old: bool) -> None:
    kernel = Kernel(*(_OLD if old else _NEW))
    seen = enabled(kernel)
    assert (seen.changed, seen.has(0x100)) == (False, False)

    def register(offset: int, consumer: int) -> None:
        kernel.call("uprobe_register", 1, offset, *((consumer,) if old else (0, consumer)))

    def unregister(offset: int, consumer: int) -> None:
        if old:
            kernel.call("uprobe_unregister", 1, offset, consumer)
        else:
            kernel.call("uprobe_unregister_nosync", 77, consumer)

    register(0x100, 5)
    register(0x100, 6)
    register(0x200, 7)
    assert (seen.changed, seen.has(0x100), seen.has(0x200), seen.has(0x300)) == (True, True, True, False)
    seen.changed = False
    unregister(0x100, 5)
    assert (seen.changed, seen.has(0x100)) == (True, True)
    unregister(0x100, 6)
    unregister(0x100, 8)  # of which nothing is known
    assert (seen.has(0x100), seen.has(0x200)) == (False, True)
    if old:
        kernel.call("uprobe_register_refctr", 1, 0x400, 0x8, 9)
        assert seen.has(0x400)


def test_of_a_kernel_that_is_not_known_all_may_be() -> None:
    seen = enabled(Kernel("other"))
    assert not seen.known
    assert seen.has(0x100)
