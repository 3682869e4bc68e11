"""What set*id(2) will come to: held against this kernel, in user namespaces of this test's."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror.calls import BY_NUMBER, NUMBER
from fakefs.mirror.credentials import NO_ID, Facts, Range, foreseen, parse, translate

_ASKS = """
import os, sys
from fakefs.mirror.calls import BY_NUMBER, NUMBER
from fakefs.mirror.credentials import foreseen, parse
if len(sys.argv) > 1:
    try:
        os.setresgid(77, 78, 79)
        os.setresuid(77, 78, 79)
    except OSError:
        pass  # as far as it goes
for letter, name, changes in (("U", "uid_map", (os.setuid, os.seteuid)), ("G", "gid_map", (os.setgid, os.setegid))):
    for wanted in (0, 1, 77, 1000, 65534, 5000000000 - (1 << 32)):
        for change in changes:
            texts = [open(f"/proc/self/{each}", "rb").read() for each in ("status", name, "setgroups")]
            call = BY_NUMBER[NUMBER["setuid" if letter == "U" else "setgid"]]
            record = foreseen(0, call, [wanted], parse(*texts, letter))
            expected = record.capable and record.ids is not None
            child = os.fork()
            if child == 0:
                try:
                    change(wanted)
                except OSError:
                    os._exit(1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            print(change.__name__, wanted, expected, status == 0)
"""


@pytest.mark.parametrize("changed", [[], ["changed"]])
@pytest.mark.parametrize("before", [[], ["unshare", "-r"], ["unshare", "-U"]])
def test_what_the_kernel_does_is_foreseen(before: list[str], changed: list[str]) -> None:
    if before and subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("not possible here")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*before, sys.executable, "-c", _ASKS, *changed],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [line.split() for line in done.stdout.splitlines()]
    assert len(results) == 24
    assert [result for result in results if result[2] != result[3]] == []


def test_ids_are_translated() -> None:
    ranges = [Range(0, 1000, 1), Range(1, 100000, 65536)]
    assert [translate(inside, ranges) for inside in (0, 1, 65536, 65537)] == [1000, 100000, 165535, None]
    facts = Facts(frozenset((1000,)), False, ranges)
    setreuid, setgroups = (BY_NUMBER[NUMBER[name]] for name in ("setreuid", "setgroups"))
    assert foreseen(1, setreuid, [0, NO_ID], facts)[2:] == ([1000, NO_ID], True)
    assert foreseen(1, setreuid, [0, 1], facts)[2:] == ([1000, 100000], False)
    assert foreseen(1, setreuid, [0, 70000], facts)[2:] == (None, True)
    facts = facts._replace(capable=True)
    assert foreseen(1, setreuid, [0, 1], facts)[2:] == ([1000, 100000], True)
    assert foreseen(1, setgroups, [], facts)[2:] == ([], True)
    assert foreseen(1, setgroups, [], facts._replace(groups=False))[2:] == ([], False)


@given(st.binary(max_size=200), st.binary(max_size=80), st.binary(max_size=8), st.sampled_from("UG"))
def test_any_bytes(status: bytes, id_map: bytes, setgroups: bytes, letter: str) -> None:
    with contextlib.suppress(ValueError):
        parse(b"Uid:\t0 0 0 0\nGid:\t0 0 0 0\nCapEff:\tff\n" + status, id_map, setgroups, letter)
    with contextlib.suppress(ValueError):
        parse(status, id_map, setgroups, letter)
