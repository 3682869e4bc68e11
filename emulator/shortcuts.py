"""Has the CPU do some of the work of the guest's kernel, where that takes long and its result is certain.

Enabling a probe makes the kernel look twice at each of the 40,000 functions it can trace; printing a symbol makes it
walk 128 compressed names on average. What is done instead, and when not: native/shortcuts.c.
"""

from __future__ import annotations

from contextlib import suppress

from emulator.errors import EmulatorError
from emulator.kernel.facts import RecordFacts, SymbolNameFacts
from emulator.machine import Machine


def install(machine: Machine, records: RecordFacts | None, names: SymbolNameFacts | None) -> None:
    """Add the shortcuts this kernel's facts and this CPU allow. Before the guest runs."""
    shortcuts = getattr(machine.cpu, "shortcuts", None)
    if shortcuts is None:
        return
    if records is not None:
        functions = [
            (records.next, records.next_end),
            (records.replace, records.replace_end),
            (records.record, records.record_end),
            (records.test, records.test_end),
            (records.check, records.check_end),
        ]
        with suppress(EmulatorError):  # slower is good enough
            shortcuts.skip_records(
                functions,
                iter_page=records.iter_page,
                iter_index=records.iter_index,
                page_next=records.page_next,
                page_records=records.page_records,
                page_used=records.page_used,
                record_size=records.record_size,
                record_flags=records.record_flags,
                busy=records.busy,
            )
    if names is not None:
        with suppress(EmulatorError):
            shortcuts.find_symbol_offset(
                (names.function, names.function_end), names=(names.names, names.markers), markers=names.markers
            )
