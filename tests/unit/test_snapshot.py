"""Which snapshots of a cache stay when a new one is written. What is in them is tested with a kernel."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from emulator.memory import PAGE, Memory
from emulator.snapshot import KEPT, open_snapshot, save

DAY = 86_400


@pytest.fixture
def memory() -> Iterator[Memory]:
    with closing(Memory(PAGE)) as memory:
        yield memory


def add(cache: Path, name: str, memory: Memory) -> Path:
    return save(cache / name, memory, b"cpu", b"symbols", b"btf", {}).directory


def fill(cache: Path, memory: Memory) -> list[Path]:
    """As many snapshots as are kept, used one, two, three... days ago."""
    made = [add(cache, f"{number:02}", memory) for number in range(1, KEPT + 1)]
    for days, directory in enumerate(made, 1):
        then = time.time() - days * DAY
        os.utime(directory, (then, then))
    return made


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_the_one_used_longest_ago_goes(tmp_path: Path, memory: Memory) -> None:
    made = fill(tmp_path, memory)
    add(tmp_path, "new", memory)
    assert names(tmp_path) == [*(path.name for path in made[:-1]), "new"]


def test_opening_is_use(tmp_path: Path, memory: Memory) -> None:
    made = fill(tmp_path, memory)
    assert open_snapshot(made[-1]) is not None
    add(tmp_path, "new", memory)
    assert names(tmp_path) == [*(path.name for path in made[:-2]), made[-1].name, "new"]


def test_many_used_within_the_hour_stay(tmp_path: Path, memory: Memory) -> None:
    for number in range(KEPT + 3):
        add(tmp_path, f"{number:02}", memory)
    assert len(names(tmp_path)) == KEPT + 3


def test_one_that_a_process_has_mapped_stays(tmp_path: Path, memory: Memory) -> None:
    made = fill(tmp_path, memory)
    reader, writer = os.pipe()
    mapped = Memory(PAGE, made[-1] / "ram")
    child = os.fork()
    if child == 0:  # has the mapping, as a daemon has that of the command that forked it
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    mapped.close()
    add(tmp_path, "new", memory)
    assert names(tmp_path) == [*(path.name for path in made), "new"]
    os.close(writer)
    os.waitpid(child, 0)
    add(tmp_path, "newer", memory)
    assert names(tmp_path) == [*(path.name for path in made[:-2]), "new", "newer"]


def test_what_killed_processes_left_goes(tmp_path: Path, memory: Memory) -> None:
    for name, age in ((".new-abc", DAY), (".old-1-abc", DAY), (".new-def", 60)):  # the last one is being written
        (tmp_path / name).mkdir()
        (tmp_path / name / "ram").write_bytes(bytes(PAGE))
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    add(tmp_path, "new", memory)
    assert names(tmp_path) == [".new-def", "new"]
