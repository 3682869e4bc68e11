"""Reading a lab's directory: whatever is in it, it is a lab or there is one line that says why not."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.errors import UserError
from fakefs.labs import catalog

FILES = {"README.md": "# A lab\n", "hints.md": "look\n---\nlook again\n", "check": "true\n", "solution": "true\n"}


def make(directory: Path, toml: str = 'title = "A lab"\n', **files: str) -> Path:
    """A lab's directory."""
    directory.mkdir(exist_ok=True)
    for name, text in {**FILES, "lab.toml": toml, **files}.items():
        (directory / name).write_text(text)
    return directory


def test_what_is_left_out_has_a_value(tmp_path: Path) -> None:
    lab = catalog.read(make(tmp_path / "small"))
    assert lab == catalog.Lab("small", tmp_path / "small", "A lab", 1, 10, (), "", (), "")
    assert lab.hints == ["look", "look again"]
    assert lab.text("workload") == ""


def test_all_that_can_be_said(tmp_path: Path) -> None:
    toml = """
    title = "Everything"
    level = 5
    minutes = 40
    modules = ["a.c", "b.c"]
    parameters = "leaky=$SECRET"
    secret = ["one", "two"]
    answer = "which it is"
    """
    lab = catalog.read(make(tmp_path / "whole", toml, **{"a.c": "", "b.c": ""}))
    assert (lab.level, lab.minutes, lab.modules, lab.secret) == (5, 40, ("a.c", "b.c"), ("one", "two"))
    assert (lab.parameters, lab.answer) == ("leaky=$SECRET", "which it is")


@pytest.mark.parametrize(
    ("toml", "reason"),
    [
        ("", "there is no title"),
        ('title = " "', "the title is not one line"),
        ('title = "a\\nb"', "the title is not one line"),
        ('title = "x"\nlevel = 6', "level is a number from 1 to 5"),
        ('title = "x"\nlevel = true', "level is a number"),
        ('title = "x"\nminutes = 0', "minutes is a number from 1 to 999"),
        ('title = "x"\nsecret = [1]', "secret is a list of texts"),
        ('title = "x"\nsecret = "a"', "secret is a list of texts"),
        ('title = "x"\nmodules = ["none.c"]', "there is no none.c"),
        ('title = "x"\nmodules = ["a\\u0000.c"]', "there is no a\0.c"),
        ('title = "x"\nhard = 1', "unknown 'hard'"),
        ('title = "x"\nminute = 1', "unknown 'minute'; did you mean 'minutes'?"),
        ('title = "x"\ntitle = "y"', "lab.toml: Cannot overwrite a value"),
        ("title = " + "[" * 5000, "lab.toml: "),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, toml: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        catalog.read(make(tmp_path / "wrong", toml))
    assert str(caught.value).startswith("lab wrong: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", [*FILES, "lab.toml"])
def test_a_file_is_missing(tmp_path: Path, missing: str) -> None:
    (make(tmp_path / "lab") / missing).unlink()
    with pytest.raises(UserError, match=f"has no {missing}; start with: fakefs lab new NAME"):
        catalog.read(tmp_path / "lab")


VALUES = st.recursive(
    st.booleans() | st.integers(-9, 2000) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
KEYS = st.sampled_from(["title", "level", "minutes", "modules", "parameters", "secret", "answer", "levels"])


def lab_or_why_not(directory: Path) -> catalog.Lab | str:
    try:
        return catalog.read(directory)
    except UserError as error:
        return str(error)


def toml_of(values: dict[str, object]) -> str:
    """The values as TOML, whose texts, numbers and lists are those of JSON but for DEL and surrogates."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()).replace("\x7f", "\\u007f")


@given(st.dictionaries(KEYS, VALUES), st.binary(max_size=30))
def test_any_values(values: dict[str, object], hints: bytes) -> None:
    with tempfile.TemporaryDirectory() as base:
        directory = make(Path(base, "lab"), toml_of(values))
        (directory / "hints.md").write_bytes(hints)
        lab = lab_or_why_not(directory)
        if isinstance(lab, str):
            assert lab.startswith("lab lab: ")
            return
        assert lab.title == values["title"]
        assert (lab.level, lab.minutes) == (values.get("level", 1), values.get("minutes", 10))
        assert 1 <= lab.level <= 5
        assert not lab.modules
        assert math.isfinite(lab.minutes)
        try:
            assert all(hint.strip() == hint != "" for hint in lab.hints)
        except UserError:
            with pytest.raises(UnicodeDecodeError):
                hints.decode()


@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as base:
        directory = make(Path(base, "lab"))
        (directory / "lab.toml").write_bytes(data)
        lab = lab_or_why_not(directory)
        assert not isinstance(lab, str) or lab.startswith("lab lab: lab.toml: ")


@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters="-\r\f\v\x1c\x1d\x1e\x1f"), max_size=20)))
def test_hints_are_divided_by_dashes(hints: list[str]) -> None:
    with tempfile.TemporaryDirectory() as base:
        text = "\n---\n".join(hints)
        lab = catalog.read(make(Path(base, "lab"), **{"hints.md": text}))
        assert lab.hints == [hint.strip() for hint in hints if hint.strip()]


def test_labs_that_come_along_can_be_read() -> None:
    for name in catalog.names():
        lab = catalog.find(name)
        assert lab.name == name
        assert 2 <= len(lab.hints) <= 6, name
