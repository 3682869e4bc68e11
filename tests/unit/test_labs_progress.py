"""A student's progress: what is written is read, and what makes no sense is a new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.errors import UserError
from fakefs.labs import progress
from fakefs.labs.progress import Progress

COUNTS = st.integers(0, 1 << 40)
PROGRESS = st.builds(Progress, COUNTS, COUNTS, st.booleans(), st.text(max_size=30))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where progress is kept."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "fakefs/labs"


@given(PROGRESS, PROGRESS)
def test_what_is_written_is_read(first: Progress, second: Progress) -> None:
    with tempfile.TemporaryDirectory() as base:
        directory = Path(base, "lab")
        assert progress.change(directory, **asdict(first)) == first == progress.load(directory)
        wanted = {"hints": second.hints, "passed_at": second.passed_at}
        assert progress.change(directory, **wanted) == progress.load(directory)
        assert asdict(progress.load(directory)) == asdict(first) | wanted
        assert [path.name for path in directory.iterdir()] == ["progress.json"]


@given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as base:
        Path(base, "progress.json").write_bytes(data)
        assert isinstance(progress.load(Path(base)), Progress)


@given(st.dictionaries(st.sampled_from(["hints", "checks", "solution_seen", "passed_at", "other"]), JSON))
def test_any_values(values: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as base:
        Path(base, "progress.json").write_text(json.dumps(values))
        found = asdict(progress.load(Path(base)))
    for name, value in asdict(Progress()).items():
        given = values.get(name)
        sensible = type(given) is type(value) and not (type(given) is int and given < 0)
        assert found[name] == (given if sensible else value)


def test_a_deep_one(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text("[" * 100_000)
    assert progress.load(tmp_path) == Progress()


def test_two_labs_run_at_once_and_one_does_not_twice(state: Path) -> None:
    with progress.running("one"), progress.running("two"):
        assert progress.all_running() == ["one", "two"]
        assert progress.runner("one") == os.getpid()
        with pytest.raises(UserError, match=f"lab one is running already, as process {os.getpid()}: leave it first"):
            progress.running("one").__enter__()
    assert progress.all_running() == []
    assert progress.runner("one") is None
    assert progress.runner("none") is None


def test_a_lab_that_was_killed_is_not_running(state: Path) -> None:
    script = "from fakefs.labs import progress; import os\nwith progress.running('x'): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script], check=False)
    assert (state / "x/lock").exists()
    assert progress.all_running() == []


@pytest.mark.parametrize("text", ["", "0", "-1", "many", "\xff"])
def test_a_lock_that_tells_no_process(state: Path, text: str) -> None:
    with progress.running("x"):
        (state / "x/lock").write_text(text)
        assert progress.runner("x") is None


def test_a_reset_is_asked_for_once(state: Path) -> None:
    with progress.running("x"):
        progress.ask_reset("x")
        assert progress.take_reset("x")
        assert not progress.take_reset("x")
        progress.ask_reset("x")
    with progress.running("x"):
        assert not progress.take_reset("x")


def test_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    with pytest.raises(UserError, match="set XDG_STATE_HOME to a directory you can write to"):
        progress.running("x").__enter__()
    with pytest.raises(UserError, match="cannot keep your progress"):
        progress.change(progress.place("x"), hints=1)
