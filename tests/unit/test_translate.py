"""The numbers of code generator operations in native/translate.c are those of the installed Unicorn."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from emulator.cpu import libunicorn

SOURCE = Path(__file__).resolve().parents[2] / "emulator/native/translate.c"
_SHT_RELA = 4
_RELATIVE = 8  # R_X86_64_RELATIVE
_TCG_OP_DEF = 32  # bytes; the name comes first


def _sections(elf: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield type, virtual address and content of each section (System V ABI, ELF-64)."""
    [table] = struct.unpack_from("<Q", elf, 40)
    size, count = struct.unpack_from("<HH", elf, 58)
    for number in range(count):
        _, kind, _, address, offset, length = struct.unpack_from("<IIQQQQ", elf, table + size * number)
        yield kind, address, elf[offset : offset + length]


def _operation_tables(elf: bytes) -> Iterator[list[str]]:
    """Find Unicorn's tcg_op_defs_org[], one for each architecture: they begin with "discard", "set_label"."""
    sections = list(_sections(elf))
    start, text = next((address, content) for _, address, content in sections if b"\0discard\0set_label\0" in content)
    relocations = next(content for kind, _, content in sections if kind == _SHT_RELA)
    pointers = {
        at: addend - start
        for at, info, addend in struct.iter_unpack("<QQq", relocations)
        if info == _RELATIVE and 0 <= addend - start < len(text)
    }

    def name(at: int) -> str:
        offset = pointers.get(at)
        return "" if offset is None else text[offset : text.index(b"\0", offset)].decode("latin-1")

    first = text.index(b"\0discard\0set_label\0") + 1
    for at, offset in pointers.items():
        if offset == first and name(at + _TCG_OP_DEF) == "set_label":
            yield [name(at + _TCG_OP_DEF * number) for number in range(128)]


def test_operations() -> None:
    ours = {name.lower(): int(number) for name, number in re.findall(r"\bOP_(\w+) = (\d+)", SOURCE.read_text())}
    assert len(ours) == 6
    tables = list(_operation_tables(Path(libunicorn.library()._name).read_bytes()))
    assert tables
    for table in tables:
        assert {name: table[number] for name, number in ours.items()} == {name: name for name in ours}
