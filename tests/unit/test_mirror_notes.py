"""Calls of a real process, under a real filter: which go on before they are noted, and what is known of them then."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fakefs.mirror.calls import NUMBER, Level
from fakefs.mirror.notes import Note, Notes, Progress, State, load
from fakefs.mirror.seccomp import Listener, Rule, install, program

_PATIENCE = 20.0


@contextmanager
def watched(
    directory: Path, progress: Progress, *, trusted: bool = True, held: bool = False
) -> Iterator[tuple[int, Notes]]:
    """A child that looks at files of a directory and changes them, once it is told to; its status is 0 then."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(directory)
            here = os.open(".", os.O_RDONLY)
            socket.send_fds(theirs, [b"l"], [install(program(map(Rule, (NUMBER["openat"], NUMBER["unlink"]))))])
            theirs.recv(1)
            os.close(os.open(directory / "file", os.O_RDONLY))
            os.close(os.open("file", os.O_RDONLY))
            os.close(os.open("file", os.O_RDONLY, dir_fd=here))
            os.close(os.open("new", os.O_WRONLY | os.O_CREAT))
            os.unlink("new")
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    _, [fd], _, _ = socket.recv_fds(ours, 1, 1)
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        notes = Notes(load(), Listener(fd), ends, progress, Level.FILES)
        notes.trust(child, trusted=trusted)
        notes.hold(held=held)
        ours.send(b"g")
        yield child, notes
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(EOFError):
            following(notes)
    finally:
        load().notes_hold(False)
        for end in (*ends, ours):
            end.close()
        os.close(fd)


def following(notes: Notes) -> Note:
    assert select.select([notes], [], [], _PATIENCE)[0]
    return notes.take()


def test_looks_go_on_and_changes_wait(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    progress = Progress()
    with watched(tmp_path, progress) as (child, notes):
        here = os.fsencode(tmp_path)
        for path, start in ((here + b"/file", b""), (b"file", here), (b"file", here)):
            note = following(notes)
            assert (note.call.tid, note.call.number) == (child, NUMBER["openat"])
            assert (note.state, note.path, note.start) == (State.GOES_ON, path, start)
        creates = following(notes)
        assert (creates.state, creates.path) == (State.WAITS, b"")
        assert creates.call.arguments[2] & os.O_CREAT
        with pytest.raises(BlockingIOError):
            notes.take()
        assert progress.noted == 4
        assert not (tmp_path / "new").exists()
        assert notes.listener.proceed(creates.call.id)
        assert notes.listener.proceed(following(notes).call.id)
        assert progress.noted == 5


@pytest.mark.parametrize(("trusted", "held"), [(False, False), (True, True)])
def test_others_wait(tmp_path: Path, trusted: bool, held: bool) -> None:
    """Those of a thread that is not trusted, and of all when they are held."""
    (tmp_path / "file").touch()
    with watched(tmp_path, Progress(), trusted=trusted, held=held) as (_, notes):
        for _ in range(5):
            note = following(notes)
            assert note.state is State.WAITS
            assert notes.listener.proceed(note.call.id)


def test_progress_is_shared() -> None:
    progress = Progress()
    child = os.fork()
    if child == 0:
        progress.begin()
        progress.take(1 << 63)
        progress.count(3)
        progress.count(4)
        os._exit(0)
    os.waitpid(child, 0)
    assert (progress.recorder, progress.done, progress.noted) == (child, 7, 0)
    assert progress.unanswered == (1 << 63, 0)
