"""What is looked up in a guest once, when it has booted, and kept with its snapshot for every mount to come."""

from __future__ import annotations

from typing import Any

from emulator.guest import Guest
from fakefs.mirror.inodes import inode_facts
from fakefs.mirror.sleepers import sleeper_facts
from fakefs.static import static_events
from fakefs.wprobe.carrier import carrier_facts
from fakefs.wprobe.off_limits import off_limits
from fakefs.wprobe.table import table_facts


def look(guest: Guest) -> dict[str, Any]:
    """Return the notes for a snapshot of a just booted guest. Raises EmulatorError when its kernel is of no use."""
    carrier, table, inodes = carrier_facts(guest), table_facts(guest), inode_facts(guest)
    sleepers = sleeper_facts(guest)
    return {
        "events": static_events(guest),
        "carrier": carrier.to_json() if carrier else None,
        "table": table.to_json() if table else None,
        "inodes": inodes.to_json() if inodes else None,
        "sleepers": sleepers.to_json() if sleepers else None,
        "off_limits": off_limits(guest),
    }


def noted(guest: Guest, what: str) -> object:
    """Return one of the notes of a guest's snapshot; None when it has none."""
    return guest.notes.get(what) if isinstance(guest.notes, dict) else None
