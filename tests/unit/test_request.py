"""Interrupt callbacks, with libfuse's registration replaced by a list."""

from __future__ import annotations

from pathlib import Path

import pytest

import fakefs.fuse

if not list(Path(fakefs.fuse.__file__).parent.glob("_shim*.so")):
    pytest.skip("the shim is not compiled", allow_module_level=True)

from fakefs.files import Caller
from fakefs.fuse import request
from fakefs.fuse.request import Request


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    tokens: list[int] = []
    monkeypatch.setattr(request, "_on_interrupt", lambda _req, _function, token: tokens.append(token))
    return tokens


def make() -> Request:
    return Request(0x1000, Caller(5, 6, 7), 0o4000, 1)


def test_fields() -> None:
    one = make()
    assert (one.tid, one.uid, one.gid, one.flags, one.poll_events) == (5, 6, 7, 0o4000, 1)


def test_called_once(registered: list[int]) -> None:
    calls: list[str] = []
    with make() as one:
        one.on_interrupt(lambda: calls.append("signal"))
        request._interrupted(None, registered[0])
        request._interrupted(None, registered[0])
    assert calls == ["signal"]


def test_not_called_after_the_request(registered: list[int]) -> None:
    calls: list[str] = []
    with make() as one:
        one.on_interrupt(lambda: calls.append("signal"))
    request._interrupted(None, registered[0])
    one.on_interrupt(lambda: calls.append("late"))
    assert (calls, len(registered), request._callbacks) == ([], 1, {})


def test_the_later_callback_takes_the_place(registered: list[int]) -> None:
    calls: list[str] = []
    with make() as one:
        one.on_interrupt(lambda: calls.append("first"))
        one.on_interrupt(lambda: calls.append("second"))
        for token in registered:
            request._interrupted(None, token)
    assert calls == ["second"]
    assert request._callbacks == {}


def test_nothing_is_raised_into_c(registered: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with make() as one:
        one.on_interrupt(fail)
        request._interrupted(None, registered[0])
    request._interrupted(None, None)
    assert capsys.readouterr().err == "fakefs: interrupting a request failed: ZeroDivisionError()\n"
