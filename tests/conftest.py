"""Fixtures of all tiers, and the marks that go with the directories `guest` and `mount`."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from fakefs import kernels

_TIERS = ("guest", "mount")

settings.register_profile("noisy machine", deadline=None)  # a slow example says something about the machine
settings.load_profile("noisy machine")


def pytest_configure(config: pytest.Config) -> None:
    """Have the plugin use the kernel to test with, and not skip what needs one.

    Signals from the keyboard are ignored in what a shell starts in the background, and in all children of that.
    """
    config.option.fakefs_kernel = config.option.fakefs_kernel or os.environ.get("FAKEFS_TEST_KERNEL")
    config.option.fakefs_required = True
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the directory it lies in."""
    for item in items:
        for tier in _TIERS:
            if item.path.parent.name == tier:
                item.add_marker(tier)


@pytest.fixture(scope="session")
def kernel_path() -> Path:
    """The kernel to test with: $FAKEFS_TEST_KERNEL, else fakefs's default one, fetched if need be."""
    named = os.environ.get("FAKEFS_TEST_KERNEL")
    if named:
        path = Path(named).absolute()
        assert path.is_file(), f"FAKEFS_TEST_KERNEL: {path}: no such file"
        return path
    return kernels.default_kernel() or kernels.fetch()
