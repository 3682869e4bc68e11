"""Saving and restoring a device's registers: JSON values in, JSON values out, everything checked on the way in.

A device lists its registers in `STATE` (attribute name -> check) and, when it is made of smaller ones, names those in
`parts()`. A snapshot comes from a file, so `load` trusts nothing: a missing, unknown, mistyped or out-of-range
register is an `EmulatorError`, and then no register has changed.

Interrupt lines are not driven by `load`: their levels are part of the interrupt controller's own state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from emulator.errors import EmulatorError

Check = Callable[[object], bool]
Registers = Mapping[str, Check]

#: Any virtual time in ns, or count of a clock of at most a few GHz, that a machine can reach.
TIME_MAX = (1 << 80) - 1


def integer(high: int, low: int = 0) -> Check:
    """Accept an int from `low` to `high`, both included."""
    return lambda value: type(value) is int and low <= value <= high


def flag(value: object) -> bool:
    """Accept a bool."""
    return type(value) is bool


def optional(check: Check) -> Check:
    """Accept None or what `check` accepts."""
    return lambda value: value is None or check(value)


def integers(high: int, longest: int, shortest: int = 0) -> Check:
    """Accept a list of `shortest` to `longest` ints, each from 0 to `high`."""
    item = integer(high)
    return lambda value: type(value) is list and shortest <= len(value) <= longest and all(map(item, value))


class Stateful:
    """A device whose registers are plain int, bool, None or list-of-int attributes."""

    STATE: ClassVar[Registers] = {}

    def parts(self) -> dict[str, Stateful]:
        """Name the devices inside this one that hold state of their own."""
        return {}

    def state(self) -> dict[str, Any]:
        """Copy all registers into a dict that survives JSON unchanged."""
        own = {name: getattr(self, name) for name in self.STATE}
        copied = {name: list(value) if isinstance(value, list) else value for name, value in own.items()}
        return copied | {name: part.state() for name, part in self.parts().items()}

    def load(self, state: Mapping[str, object]) -> None:
        """Replace all registers by those of `state()`; EmulatorError, and no change, when anything in it is wrong."""
        self._verify(state)
        self._apply(state)

    def _verify(self, state: object) -> None:
        device, parts = type(self).__name__, self.parts()
        if not isinstance(state, Mapping) or set(state) != set(self.STATE) | set(parts):
            raise EmulatorError(f"snapshot: the registers of {device} are not those of this version; make it anew")
        for name, check in self.STATE.items():
            if not check(state[name]):
                raise EmulatorError(f"snapshot: {device}.{name} is not a value it can have; make the snapshot anew")
        for name, part in parts.items():
            part._verify(state[name])

    def _apply(self, state: Mapping[str, Any]) -> None:
        for name in self.STATE:
            value = state[name]
            setattr(self, name, list(value) if isinstance(value, list) else value)
        for name, part in self.parts().items():
            part._apply(state[name])
