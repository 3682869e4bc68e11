"""The ACPI tables the guest finds: RSDP, RSDT and MADT, after the ACPI specification 6.5, chapter 5.

They only tell how many processors there are and that each has a local APIC, which is what makes Linux use its timer.
There is no I/O APIC, and on purpose neither FADT nor DSDT: without them Linux gives up the rest of ACPI and keeps
the local APICs.
"""

from __future__ import annotations

import struct

from emulator.errors import EmulatorError

#: Where the tables are (physical): the BIOS area, which is searched for the RSDP on 16-byte boundaries.
RSDP_ADDRESS = 0xF0000
RSDT_ADDRESS = 0xF0040
MADT_ADDRESS = 0xF0080

LAPIC_ADDRESS = 0xFEE00000
#: 8-bit APIC ids; 255 is the broadcast.
CPUS_MAX = 255
OEM_ID = b"EMULTR"
OEM_TABLE_ID = b"EMULATOR"
CREATOR_ID = b"EMUL"

PCAT_COMPATIBLE = 1  # MADT flag: two 8259s are there as well
PROCESSOR_LOCAL_APIC = 0
ENABLED = 1


def tables(cpus: int = 1) -> dict[int, bytes]:
    """Build the tables for `cpus` processors with APIC ids from 0 up; return physical address -> bytes."""
    if not 1 <= cpus <= CPUS_MAX:
        raise EmulatorError(f"{cpus} processors cannot be described: ask for 1 to {CPUS_MAX}")
    lapics = b"".join(struct.pack("<BBBBI", PROCESSOR_LOCAL_APIC, 8, cpu, cpu, ENABLED) for cpu in range(cpus))
    madt = _table(b"APIC", 3, struct.pack("<II", LAPIC_ADDRESS, PCAT_COMPATIBLE) + lapics)
    rsdt = _table(b"RSDT", 1, struct.pack("<I", MADT_ADDRESS))
    rsdp = struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM_ID, 0, RSDT_ADDRESS)
    return {RSDP_ADDRESS: _with_checksum(rsdp, 8), RSDT_ADDRESS: rsdt, MADT_ADDRESS: madt}


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Put the 36-byte system description table header before `body`."""
    header = struct.pack(
        "<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1
    )
    return _with_checksum(header + body, 9)


def _with_checksum(table: bytes, offset: int) -> bytes:
    """Set the byte at `offset`, 0 so far, so that all bytes add up to 0 modulo 256."""
    return table[:offset] + bytes([-sum(table) & 0xFF]) + table[offset + 1 :]
