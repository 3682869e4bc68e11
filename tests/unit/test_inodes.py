"""The inode table against a model of what the kernel may rely on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from fakefs.files import Stat
from fakefs.fuse.inodes import ROOT, Inodes

DIRECTORY = Stat(0o40755, 2, 0, 0, 0, 7, 4096, 0, 0, 0)
FILE = Stat(0o100644, 1, 0, 0, 0, 7, 4096, 0, 0, 0)


def test_paths_of_children() -> None:
    inodes = Inodes(b"/t")
    assert inodes.path(ROOT) == b"/t"
    number = inodes.hold(inodes.child(ROOT, b"events"), DIRECTORY)
    assert inodes.child(number, b"enable") == b"/t/events/enable"
    assert Inodes(b"/").child(ROOT, b"proc") == b"/proc"


def test_lengths_are_bounded() -> None:
    inodes = Inodes(b"/t")
    assert len(inodes.child(ROOT, b"n" * 255)) == 258
    with pytest.raises(OSError, match="too long"):
        inodes.child(ROOT, b"n" * 256)
    deep = inodes.hold(b"/t" + b"/" + b"d" * 4000, DIRECTORY)
    with pytest.raises(OSError, match="too long"):
        inodes.child(deep, b"n" * 255)


def test_forgotten_after_as_many_forgets_as_holds() -> None:
    inodes = Inodes(b"/t")
    number = inodes.hold(b"/t/a", FILE)
    assert inodes.hold(b"/t/a", FILE) == number
    inodes.forget(number, 1)
    assert inodes.path(number) == b"/t/a"
    inodes.forget(number, 1)
    with pytest.raises(FileNotFoundError):
        inodes.path(number)
    assert inodes.hold(b"/t/a", FILE) == number  # stable
    assert Inodes(b"/t").hold(b"/t/a", FILE) == number  # and in the next run


def test_the_root_is_never_forgotten() -> None:
    inodes = Inodes(b"/t")
    inodes.forget(ROOT, 100)
    inodes.remove(b"/t")
    assert inodes.path(ROOT) == b"/t"


def test_removed_with_all_below() -> None:
    inodes = Inodes(b"/t")
    directory, below, beside = (inodes.hold(b"/t/" + name, DIRECTORY) for name in (b"d", b"d/x/y", b"dd"))
    inodes.remove(b"/t/d")
    for number in (directory, below):
        with pytest.raises(FileNotFoundError):
            inodes.path(number)
    assert inodes.path(beside) == b"/t/dd"
    assert inodes.last_stat(directory).nlink == 0
    assert inodes.hold(b"/t/d", DIRECTORY) != directory  # while the kernel holds the old one
    inodes.forget(directory, 1)
    with pytest.raises(FileNotFoundError):
        inodes.last_stat(directory)


def test_another_type_is_another_inode() -> None:
    inodes = Inodes(b"/t")
    assert inodes.hold(b"/t/x", FILE) != inodes.hold(b"/t/x", DIRECTORY)


def test_rename_moves_what_is_below_and_replaces() -> None:
    inodes = Inodes(b"/t")
    old, below, replaced = (inodes.hold(b"/t/" + name, DIRECTORY) for name in (b"old", b"old/x", b"new"))
    inodes.rename(b"/t/old", b"/t/new")
    assert (inodes.path(old), inodes.path(below)) == (b"/t/new", b"/t/new/x")
    with pytest.raises(FileNotFoundError):
        inodes.path(replaced)
    inodes.rename(b"/t/new", b"/t/new")
    assert inodes.path(old) == b"/t/new"
    inodes.rename(b"/t/unknown", b"/t/new")
    with pytest.raises(FileNotFoundError):
        inodes.path(old)


NAMES = some.sampled_from([b"/t/" + name for name in (b"a", b"a/b", b"a/b/c", b"ab", b"b")])
STEPS = some.lists(
    some.one_of(
        some.tuples(some.just("hold"), NAMES, some.sampled_from([FILE, DIRECTORY])),
        some.tuples(some.just("forget"), some.integers(0, 20), some.integers(1, 2)),
        some.tuples(some.just("remove"), NAMES, some.none()),
        some.tuples(some.just("rename"), NAMES, NAMES),
    )
)


@given(STEPS)
def test_numbers_are_unique_and_held_ones_stay(steps: list[tuple[str, object, object]]) -> None:
    inodes = Inodes(b"/t")
    held: dict[int, int] = {}
    for step, first, second in steps:
        if step == "hold":
            assert isinstance(first, bytes)
            assert isinstance(second, Stat)
            number = inodes.hold(first, second)
            assert inodes.path(number) == first
            assert inodes.number(first) == number
            held[number] = held.get(number, 0) + 1
        elif step == "forget" and held:
            assert isinstance(first, int)
            assert isinstance(second, int)
            number = sorted(held)[first % len(held)]
            lookups = min(second, held[number])
            inodes.forget(number, lookups)
            held[number] -= lookups
            if not held[number]:
                del held[number]
        elif step == "remove":
            assert isinstance(first, bytes)
            inodes.remove(first)
        elif step == "rename":
            assert isinstance(first, bytes)
            assert isinstance(second, bytes)
            if not second.startswith(first + b"/") and not first.startswith(second + b"/"):  # the kernel refuses these
                inodes.rename(first, second)
        assert len(inodes) == len(held) + 1
        for number in held:
            inodes.last_stat(number)
