"""Imports go one way: fakefs uses emulator; pyfuse3 and Unicorn each have one place that knows them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path.relative_to(ROOT) for each in ("emulator", "fakefs") for path in (ROOT / each).rglob("*.py"))

# The one thing about Unicorn that may be named elsewhere: a snapshot belongs to a version of it.
UNICORN_VERSION = "emulator.cpu.libunicorn.WANTED_VERSION"


def imported(source: str, package: list[str]) -> Iterator[str]:
    """Dotted names of all that a module in `package` imports, wherever in it and under whatever condition.

    `from a import b` is `a.b`, as b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = [*(package[: len(package) - level + 1] if level else []), *filter(None, [module])]
                yield from (".".join([*base, alias.name]) for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module" | "find_spec"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def importers(*targets: str) -> set[Path]:
    """Modules that import one of `targets` or something inside it."""
    return {
        path
        for path in MODULES
        for name in imported((ROOT / path).read_text(), list(path.parent.parts))
        if name != UNICORN_VERSION and any(name == target or name.startswith(target + ".") for target in targets)
    }


def outside(paths: set[Path], *directories: str) -> list[str]:
    return sorted(str(path) for path in paths if not any(path.is_relative_to(each) for each in directories))


def test_the_search_finds_something() -> None:
    for target in ("fakefs", "pyfuse3", "unicorn", "emulator"):
        assert importers(target) != set()


def test_emulator_does_not_know_fakefs() -> None:
    assert outside(importers("fakefs"), "fakefs") == []


def test_only_the_fuse_layer_knows_pyfuse3() -> None:
    # `doctor` tries whether it can be imported at all.
    assert outside(importers("pyfuse3"), "fakefs/fuse", "fakefs/doctor.py") == []


def test_only_the_cpu_knows_unicorn() -> None:
    assert outside(importers("unicorn", "emulator.cpu.libunicorn", "emulator.cpu.layout"), "emulator/cpu") == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b as c, d", ["a.b", "d"]),
        ("from a import b", ["a.b"]),
        ("from . import b", ["p.q.b"]),
        ("from ..r import b", ["p.r.b"]),
        ("def f():\n    if x:\n        import a", ["a"]),
        ("importlib.import_module('a')", ["a"]),
        ("import_module('a')", ["a"]),
    ],
)
def test_imported(source: str, names: list[str]) -> None:
    assert list(imported(source, ["p", "q"])) == names
