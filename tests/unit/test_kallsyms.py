from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.kernel.image import KernelImage
from emulator.kernel.kallsyms import NoSymbols, Symbol, Symbols, from_elf, from_image, from_tables, parse
from tests.tiny_kernel import BANNER, BASE, Row, elf, kallsyms_tables

PROC = b"""\
0000000000000000 A fixed_percpu_data
0000000000035000 A pcpu_hot
ffffffff81000000 T _text
ffffffff81000000 T _stext
ffffffff81001000 T vfs_read
ffffffff81001200 t show
ffffffff81001300 T __irq_work_run
ffffffff81001300 t irq_work_run
ffffffff82001300 D jiffies
ffffffffc0001000 t show\t[ext4]
ffffffffc0002000 T ext4_sync_file\t[ext4]
"""
LAYOUTS = ["5.15", "6.2", "6.4", "6.15", "7.0"]


def test_names_to_addresses() -> None:
    symbols = parse(PROC)
    assert len(symbols) == 11
    assert symbols["vfs_read"] == 0xFFFFFFFF81001000
    assert symbols["pcpu_hot"] == 0x35000
    assert symbols.find("show") == [
        Symbol(0xFFFFFFFF81001200, "t", "show", ""),
        Symbol(0xFFFFFFFFC0001000, "t", "show", "ext4"),
    ]
    assert str(symbols.find("ext4_sync_file")[0]) == "ext4_sync_file [ext4]"
    assert "irq_work_run" in symbols
    for absent in ("vfs_rea", "fs_read", "ext4", "", "show\t[ext4]", "vfs_read\n", "[ext4]"):
        assert absent not in symbols
    with pytest.raises(KeyError):
        symbols["vfs"]


def test_the_kernels_own_symbol_comes_before_a_modules() -> None:
    symbols = parse(b"ffffffff81000000 t show\t[a]\nffffffff82000000 t show\n")
    assert symbols["show"] == 0xFFFFFFFF82000000


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (0xFFFFFFFF81001010, "vfs_read+0x10"),
        (0xFFFFFFFF81001000, "vfs_read+0x0"),
        (0xFFFFFFFF81000FFF, "_text+0xfff"),  # of several names the first, as the kernel has it
        (0xFFFFFFFF81001304, "__irq_work_run+0x4"),
        (0xFFFFFFFFC0002010, "ext4_sync_file+0x10 [ext4]"),
        (0xFFFFFFFF80FFFFFF, "0xffffffff80ffffff"),  # before the kernel
        (0xFFFFFFFFA0000000, "0xffffffffa0000000"),  # far behind any symbol
        (0xFFFF888000000000, "0xffff888000000000"),
        (0x35010, "0x35010"),  # a user's address, not a per-CPU variable
        (0, "0x0"),
        ((1 << 64) - 1, "0xffffffffffffffff"),
    ],
)
def test_addresses_to_names(address: int, text: str) -> None:
    assert parse(PROC).symbolize(address) == text


def test_sorted_by_address_and_stable() -> None:
    symbols = list(parse(b"ffffffff82000000 T b\nffffffff81000000 T z\nffffffff81000000 T a\n"))
    assert [symbol.name for symbol in symbols] == ["z", "a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no symbol in it"),
        (b"0000000000000000 T _text\n0000000000000000 T vfs_read\n", "kptr_restrict"),
        (b"ffffffffffffffff B The real System.map is in the -dbg package\n", "line 1 is not a line"),
        (b"ffffffff81000000 T _text\nzz T x\n", "line 2 is not"),
        (b"ffffffff810000001 T too_long\n", "line 1 is not"),
        (b"ffffffff81000000 T \xff\n", "line 1 is not"),
    ],
)
def test_other_text_is_told(text: bytes, message: str) -> None:
    with pytest.raises(NoSymbols, match=message):
        parse(text)


def test_cache_form() -> None:
    symbols = parse(PROC)
    cached = symbols.to_bytes()
    again = Symbols.from_bytes(cached)
    assert list(again) == list(symbols)
    assert again["vfs_read"] == symbols["vfs_read"]
    assert again.to_bytes() == cached


@given(st.data())
def test_a_damaged_cache_is_refused(data: st.DataObject) -> None:
    cached = bytearray(parse(PROC).to_bytes())
    position = data.draw(st.integers(0, len(cached) - 1))
    cached[position] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(cached), bytes(cached[:position]), data.draw(st.binary(max_size=100))):
        with pytest.raises(NoSymbols, match="delete it"):
            Symbols.from_bytes(damaged)


NAMES = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ_.$0123456789", min_size=1, max_size=40)
MODULES = st.one_of(st.just(""), st.sampled_from(["ext4", "bpf", "__builtin__ftrace"]))


@given(st.lists(st.tuples(st.integers(1, (1 << 64) - 1), st.sampled_from("tTdDbBrRaAwW"), NAMES, MODULES), min_size=1))
def test_text_and_cache_keep_everything(rows: list[tuple[int, str, str, str]]) -> None:
    text = "".join(f"{a:016x} {t} {n}" + (f"\t[{m}]" if m else "") + "\n" for a, t, n, m in rows)
    symbols = parse(text.encode())
    assert list(symbols) == sorted((Symbol(*row) for row in rows), key=lambda symbol: symbol.address)
    assert list(Symbols.from_bytes(symbols.to_bytes())) == list(symbols)
    for _, _, name, _ in rows:
        assert symbols.find(name) == [symbol for symbol in symbols if symbol.name == name]


@given(st.binary(max_size=200))
def test_any_text(text: bytes) -> None:
    with suppress(NoSymbols):
        parse(text)


def kernel_rows(count: int, *, percpu: bool = False) -> list[Row]:
    rows: list[Row] = [(0, "A", "fixed_percpu_data"), (0x35000, "A", "pcpu_hot")] if percpu else []
    rows += [(BASE, "T", "_text"), (BASE, "T", "_stext"), (BASE + 16, "T", "vfs_read")]
    rows += [(BASE + 32 + 16 * i, "t", f"irq_function_number_{i:05}.part.0") for i in range(count - len(rows) - 1)]
    return [*rows, (BASE + 32 + 16 * count, "D", "a_long_rust_name_" * 9)]


def kernel_with(tables: bytes) -> KernelImage:
    content = elf([(b"\xcc" * 64 + BANNER).ljust(256, b"\xcc") + tables + b"\xcc" * 64])
    return image_of(content)


def image_of(content: bytes) -> KernelImage:
    import emulator.kernel.image as module

    entry, segments = module._parse_elf(content, Path("vmlinux"))
    version, release = module._banner(segments, Path("vmlinux"))
    return KernelImage(Path("vmlinux"), "", entry, segments, version, release, content)


@pytest.mark.parametrize("count", [513, 768, 1500, 1792])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_of_every_layout(layout: str, count: int) -> None:
    rows = kernel_rows(count, percpu=layout in ("5.15", "6.2", "6.4"))
    symbols = from_image(kernel_with(kallsyms_tables(rows, layout, BASE + 256)))
    assert [(symbol.address, symbol.type, symbol.name) for symbol in symbols] == rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_tables_are_refused_or_differ_only_in_names(layout: str) -> None:
    tables = bytearray(kallsyms_tables(kernel_rows(600), layout, BASE + 256))
    assert len(from_tables(kernel_with(bytes(tables)))) == 600
    for position in range(0, len(tables), 701):
        damaged = tables.copy()
        damaged[position] ^= 0x55
        try:
            symbols = from_tables(kernel_with(bytes(damaged)))
        except NoSymbols:
            continue
        assert len(symbols) == 600
        assert symbols["_text"] == BASE


def test_no_tables_is_told() -> None:
    with pytest.raises(NoSymbols, match="CONFIG_KALLSYMS=y"):
        from_image(kernel_with(b""))


def test_tables_that_are_not_sorted_are_refused() -> None:
    rows = kernel_rows(600)
    rows[300], rows[400] = (rows[400][0], *rows[300][1:]), (rows[300][0], *rows[400][1:])
    with pytest.raises(NoSymbols):
        from_tables(kernel_with(kallsyms_tables(rows, "6.15", BASE + 256)))


def symtab(*symbols: tuple[str, int, int, int]) -> bytes:
    """An ELF with a .symtab of (name, info, section, value); sections 1 to 4 are text, data, bss and read-only."""
    strings, entries = b"\0", bytes(24)
    for name, info, section, value in symbols:
        entries += struct.pack("<IBBHQQ", len(strings), info, 0, section, value, 0)
        strings += name.encode() + b"\0"
    sections = [(1, 6, 0, 0, 0), (1, 3, 0, 0, 0), (8, 3, 0, 0, 0), (1, 2, 0, 0, 0)]
    sections += [(2, 0, 0, len(entries), 6), (3, 0, len(entries), len(strings), 0)]
    return elf([BANNER], sections=sections, tail=entries + strings)


def test_elf_symbols() -> None:
    content = symtab(
        ("_text", 0x10, 1, BASE),
        ("local", 0x02, 1, BASE + 1),
        ("data", 0x11, 2, BASE + 2),
        ("bss", 0x01, 3, BASE + 3),
        ("constant", 0x11, 4, BASE + 4),
        ("weak", 0x22, 1, BASE + 5),
        ("absolute", 0x10, 0xFFF1, 0x1000),
        ("undefined", 0x10, 0, 0),
        ("file.c", 0x04, 0xFFF1, 0),
        ("section", 0x03, 1, BASE),
        (".Ltmp", 0x00, 1, BASE),
    )
    expected = [
        ("absolute", "A"),
        ("_text", "T"),
        ("local", "t"),
        ("data", "D"),
        ("bss", "b"),
        ("constant", "R"),
        ("weak", "W"),
    ]
    assert [(symbol.name, symbol.type) for symbol in from_elf(content)] == expected
    assert from_image(image_of(content))["data"] == BASE + 2


def test_stripped_elf_is_told() -> None:
    with pytest.raises(NoSymbols, match="stripped"):
        from_elf(elf([BANNER]))


@given(st.data())
def test_damaged_elf(data: st.DataObject) -> None:
    content = bytearray(symtab(("_text", 0x10, 1, BASE), ("local", 0x02, 1, BASE + 1)))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(64, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(NoSymbols):
        from_elf(bytes(content[: data.draw(st.integers(0, len(content)))]))
