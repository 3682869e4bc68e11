"""The ACPI tables: checksums and fields by hand, and by ACPICA's disassembler where it is installed."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from emulator.acpi import CPUS_MAX, MADT_ADDRESS, RSDP_ADDRESS, RSDT_ADDRESS, tables
from emulator.errors import EmulatorError

CPUS = pytest.mark.parametrize("cpus", [1, 2, CPUS_MAX])


@CPUS
def test_checksums_lengths_and_pointers(cpus: int) -> None:
    built = tables(cpus)
    assert all(sum(table) & 0xFF == 0 for table in built.values())
    rsdp, rsdt, madt = built[RSDP_ADDRESS], built[RSDT_ADDRESS], built[MADT_ADDRESS]
    assert RSDP_ADDRESS % 16 == 0
    assert (len(rsdp), rsdp[:8], rsdp[15]) == (20, b"RSD PTR ", 0)
    assert struct.unpack_from("<I", rsdp, 16) == (RSDT_ADDRESS,)
    for table, signature in ((rsdt, b"RSDT"), (madt, b"APIC")):
        assert struct.unpack_from("<4sI", table) == (signature, len(table))
    assert struct.unpack_from("<I", rsdt, 36) == (MADT_ADDRESS,)
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 1)
    entries = list(struct.iter_unpack("<BBBBI", madt[44:]))
    assert entries == [(0, 8, cpu, cpu, 1) for cpu in range(cpus)]


@CPUS
def test_tables_do_not_overlap_and_stay_in_the_bios_area(cpus: int) -> None:
    end = 0xF0000
    for address, table in sorted(tables(cpus).items()):
        assert address >= end
        end = address + len(table)
    assert end <= 0x100000


def test_acpica_understands_the_madt(tmp_path: Path) -> None:
    iasl = shutil.which("iasl")
    if iasl is None:  # the checks by hand above are all there is then
        return
    (tmp_path / "madt.dat").write_bytes(tables(2)[MADT_ADDRESS])
    run = subprocess.run([iasl, "-d", "madt.dat"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "checksum" not in (run.stdout + run.stderr).lower()
    text = (tmp_path / "madt.dsl").read_text()
    assert "Local Apic Address : FEE00000" in text
    assert text.count("[Processor Local APIC]") == 2
    assert text.count("Processor Enabled : 1") == 2
    assert "PC-AT Compatibility : 1" in text


@pytest.mark.parametrize("cpus", [0, -1, CPUS_MAX + 1])
def test_impossible_numbers_of_processors(cpus: int) -> None:
    with pytest.raises(EmulatorError, match="ask for 1 to 255"):
        tables(cpus)
