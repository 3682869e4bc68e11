"""What of `fakefs.fuse.operations` and `session` needs no mount."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

import fakefs.fuse

if not list(Path(fakefs.fuse.__file__).parent.glob("_shim*.so")):
    pytest.skip("the shim is not compiled", allow_module_level=True)

from fakefs.fuse import session
from fakefs.fuse.answers import answer_errno
from fakefs.fuse.operations import _is_name
from fakefs.fuse.options import MountOptions


@given(some.integers(-(1 << 40), 1 << 40) | some.integers(-10, 1100))
def test_the_kernel_takes_every_answer(number: int) -> None:
    """Linux drops answers outside -511..0; ENOSYS would turn the request off."""
    answer = answer_errno(OSError(number, "x"))
    assert 0 < answer < 512
    assert answer != errno.ENOSYS
    if number in errno.errorcode and number != errno.ENOSYS:
        assert answer == number


def test_restarts_are_eintr() -> None:
    assert {answer_errno(OSError(number, "x")) for number in range(512, 517)} == {errno.EINTR}
    assert answer_errno(OSError("no number")) == errno.EIO


def test_names_the_kernel_refuses() -> None:
    assert [name for name in (b"", b".", b"..", b"a/b", b"a\0", b"n" * 256, b"ok", b"...") if _is_name(name)] == [
        b"ok", b"...",
    ]  # fmt: skip


@pytest.mark.parametrize(("conf", "allowed"), [("a\nuser_allow_other\n", True), ("#user_allow_other\n", False)])
def test_allow_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conf: str, allowed: bool) -> None:
    (tmp_path / "fuse.conf").write_text(conf)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert session._may_allow_other(str(tmp_path / "fuse.conf")) is allowed
    assert not session._may_allow_other(str(tmp_path / "none"))


@pytest.mark.parametrize("allowed", [True, False])
def test_allow_other_and_default_permissions_come_together(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_may_allow_other", lambda: allowed)
    words = session.libfuse_options(MountOptions(gid=5, ro=True))
    assert ("allow_other" in words, "default_permissions" in words) == (allowed, allowed)
    assert {"ro", "fsname=tracefs", "subtype=fakefs"} <= words
    assert not any("gid" in word for word in words)
