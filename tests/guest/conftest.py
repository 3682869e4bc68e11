"""Fixtures for tests on a guest in this process. A process can have one CPU at a time, so guests are per test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from emulator.guest import Guest, Recipe
from fakefs import kernels
from fakefs.mounting import Order, get_guest


@pytest.fixture(scope="session")
def recipe(kernel_path: Path) -> Recipe:
    """What `fakefs mount` makes of the kernel; its snapshot is there."""
    get_guest(Order(Path(), kernel_path)).close()
    return Recipe(kernel_path.absolute())


@pytest.fixture(scope="session")
def snapshot_dir(recipe: Recipe) -> Path:
    """The snapshot all guests and mounts of this session share. Not to be written to."""
    return kernels.cache_dir() / "snapshots" / recipe.key


@pytest.fixture
def guest(recipe: Recipe, kernel_path: Path) -> Iterator[Guest]:
    """A guest restored from the shared snapshot."""
    with closing(get_guest(Order(Path(), kernel_path))) as guest:
        yield guest
