"""A private offset of Unicorn's that does not hold is an error that says so, never a crash or a wrong guess."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from emulator.cpu import context, layout, libunicorn
from emulator.cpu.layout import LayoutError
from emulator.cpu.libunicorn import Engine
from emulator.errors import EmulatorError

NATIVE_OFFSETS = (
    "_UC_CPU", "_CPU_ENV", "_CPU_INTERRUPT_REQUEST", "_CPU_HALTED", "_CPU_ICOUNT", "_EIP", "_EFLAGS", "_HFLAGS",
    "_SEGS", "_STAR", "_LSTAR", "_FMASK", "_TSC_AUX", "_FEATURES",
)  # fmt: skip
CONTEXT_OFFSETS = (
    "RSP", "RCX", "R11", "RIP", "EFLAGS", "HFLAGS", "SEGMENTS", "TR", "GDTR", "IDTR", "CR2", "CR3",
    "STAR", "LSTAR", "FMASK", "ERROR_CODE", "IS_SOFTWARE", "OLD_EXCEPTION", "CONTEXT_HEADER",
)  # fmt: skip


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


def verify_context(engine: Engine) -> None:
    page = ctypes.create_string_buffer(8192)
    start = -ctypes.addressof(page) % 4096
    engine.map_host_memory(4096, 4096, ctypes.addressof(page) + start)
    context.verify(engine, memoryview(page)[start : start + 4096].cast("B"), 4096)


def test_the_installed_unicorn_holds(engine: Engine) -> None:
    found = layout.find(engine)
    assert layout.find(engine) == found, "the engine is left as it was"
    verify_context(engine)


# Each in a process of its own, as a crash is what must not happen.
CHECK = """
import sys
from emulator.cpu import layout
from emulator.cpu.libunicorn import Engine
name, off = sys.argv[1], int(sys.argv[2])
if name.startswith("FEATURE:"):
    words, key = layout.FEATURE_WORDS, name[8:]
    words[key] = (words[key][0] + off, *words[key][1:])
else:
    setattr(layout, name, getattr(layout, name) + off)
    field = name[1:].lower()
    defaults = dict(zip(layout.Layout.__init__.__code__.co_varnames[5:], layout.Layout.__init__.__defaults__))
    if field in defaults:
        defaults[field] += off
        layout.Layout.__init__.__defaults__ = tuple(defaults.values())
try:
    layout.find(Engine())
except layout.LayoutError as error:
    print(error)
    sys.exit(3)
"""


def find_with(name: str, off: int) -> subprocess.CompletedProcess[str]:
    root = Path(layout.__file__).parents[2]
    command = [sys.executable, "-c", CHECK, name, str(off)]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)


@pytest.mark.parametrize("off", [8, -8, 16, 4096])
@pytest.mark.parametrize("name", [*NATIVE_OFFSETS, *(f"FEATURE:{word}" for word in layout.FEATURE_WORDS)])
def test_wrong_native_offset(name: str, off: int) -> None:
    if name.startswith("FEATURE:"):
        off = off // 8 if off != 4096 else 24
        if layout.FEATURE_WORDS[name[8:]][0] + off < 0:
            pytest.skip("there is no word before the first")
    done = find_with(name, off)
    assert done.returncode == 3, f"{done.returncode} {done.stderr[-2000:]}"
    assert "keeps" in done.stdout
    assert "pip install" in done.stdout


def test_every_native_offset_is_tested() -> None:
    ours = {name for name, value in vars(layout).items() if name.startswith("_") and type(value) is int}
    constants = {"_HF_LMA_CS64", "_HF_TS", "_CR0_TS", "_INTERRUPT_HARD", "_SCRATCH", "_ICOUNT_WITHIN"}
    assert {name for name in ours if not name.startswith("_MSR")} - constants == set(NATIVE_OFFSETS)


@pytest.mark.parametrize("off", [8, -8, 16, 32])
@pytest.mark.parametrize("name", CONTEXT_OFFSETS)
def test_wrong_context_offset(name: str, off: int, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for moved in CONTEXT_OFFSETS if name == "CONTEXT_HEADER" else (name,):
        monkeypatch.setattr(context, moved, getattr(context, moved) + off)
    with pytest.raises(LayoutError, match=r"keeps .* elsewhere"):
        verify_context(engine)


def test_saved_registers_too_small(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "context_size", lambda: 1000)
    with pytest.raises(LayoutError, match="saved registers"):
        verify_context(engine)


class OtherUnicorn:
    """A libunicorn that says it is 2.0.1."""

    @staticmethod
    def uc_version(major: Any, minor: Any) -> int:  # what ctypes.byref() returns: _obj is what it refers to
        major._obj.value, minor._obj.value = 2, 0
        return 2 << 24 | 0 << 16 | 1 << 8


@pytest.fixture
def no_library() -> Iterator[None]:
    libunicorn.library.cache_clear()
    yield
    libunicorn.library.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_wrong_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda path: OtherUnicorn())
    with pytest.raises(EmulatorError, match=r"Unicorn 2\.0\.1 found, 2\.1\.4 wanted.*pip install unicorn==2\.1\.4"):
        libunicorn.library()


@pytest.mark.usefixtures("no_library")
def test_no_unicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmulatorError, match="pip install unicorn"):
        libunicorn.library()


@pytest.mark.usefixtures("no_library")
def test_no_shared_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = ModuleSpec("unicorn", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(EmulatorError, match=r"cannot load .*libunicorn"):
        libunicorn.library()


def test_missing_symbol() -> None:
    with pytest.raises(EmulatorError, match="does not export no_such_routine"):
        libunicorn.address("no_such_routine")
