"""What is read from a real kernel's image, without running it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from emulator.kernel.image import START_KERNEL_MAP, KernelImage
from emulator.kernel.kallsyms import Symbols, from_image

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def images() -> dict[Path, tuple[KernelImage, Symbols]]:
    return {}


@pytest.fixture
def image(kernel_path: Path, images: dict[Path, tuple[KernelImage, Symbols]]) -> KernelImage:
    if kernel_path not in images:
        loaded = KernelImage.load(kernel_path)
        images[kernel_path] = loaded, from_image(loaded)
    return images[kernel_path][0]


@pytest.fixture
def symbols(kernel_path: Path, image: KernelImage, images: dict[Path, tuple[KernelImage, Symbols]]) -> Symbols:
    return images[kernel_path][1]


def test_image(image: KernelImage) -> None:
    assert image.version.startswith(".".join(map(str, image.release)))
    assert image.segments[0].paddr == 0x100_0000  # CONFIG_PHYSICAL_START of every distribution
    paddrs = [segment.paddr for segment in image.segments]
    assert paddrs == sorted(paddrs)


def test_symbols_are_where_the_image_says(image: KernelImage, symbols: Symbols) -> None:
    assert symbols["_text"] == START_KERNEL_MAP + image.segments[0].paddr == 0xFFFF_FFFF_8100_0000
    assert symbols["startup_64"] - START_KERNEL_MAP == image.entry
    banner = f"Linux version {image.version} (".encode()
    assert image.read(symbols["linux_banner"], len(banner)) == banner
    assert START_KERNEL_MAP + image.end >= symbols["_end"] - (1 << 20)


def test_symbols_are_all_there_and_sorted(symbols: Symbols) -> None:
    assert len(symbols) > 50_000
    addresses = [symbol.address for symbol in symbols]
    assert addresses == sorted(addresses)
    for name in ("vfs_read", "jiffies", "irq_work_queue", "init_task", "sys_call_table", "do_exit", "_etext", "_end"):
        assert symbols[name] > symbols["_text"], name
    assert symbols.find("vfs_read")[0].type == "T"
    assert symbols["_stext"] <= symbols["vfs_read"] < symbols["_etext"] < symbols["_end"]
    assert symbols.symbolize(symbols["vfs_read"] + 0x10) == "vfs_read+0x10"


def test_the_syscall_table_points_at_functions(image: KernelImage, symbols: Symbols) -> None:
    (read,) = struct.unpack("<Q", image.read(symbols["sys_call_table"], 8))
    assert symbols.symbolize(read) == "__x64_sys_read+0x0"


def test_symbols_cache(symbols: Symbols) -> None:
    again = Symbols.from_bytes(symbols.to_bytes())
    assert list(again) == list(symbols)


def test_btf_lies_between_its_symbols(image: KernelImage, symbols: Symbols) -> None:
    blob = image.btf()
    start, stop = symbols["__start_BTF"], symbols["__stop_BTF"]
    assert image.read(start, stop - start) == blob
