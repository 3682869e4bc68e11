"""Commands of well-known tutorials, typed as they are there: `tutorial.tsv` has a row for each.

All are run in one view of `fakefs run`, at the paths that are written into them; a reset comes between them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mounted import FAKEFS

pytestmark = pytest.mark.slow


class Row(NamedTuple):
    """What is expected of a command: `given` is what other commands have done before it."""

    id: str
    expectation: str
    what: str
    given: str
    command: str


_LINES = Path(__file__).with_name("tutorial.tsv").read_text().splitlines()
ROWS = [Row(*line.split("\t")) for line in _LINES if not line.startswith("#")][1:]

# Runs inside: commands from standard input, results to standard output.
_INSIDE = r"""
import json, os, subprocess, sys
os.chdir("/sys/kernel/tracing")
reset = '''
echo 0 > events/enable; echo nop > current_tracer; echo > set_event; echo 0 > tracing_on; echo 0 > max_graph_depth
for file in set_event_pid set_ftrace_pid set_ftrace_filter set_graph_function dynamic_events error_log trace
do echo > $file; done; echo 1408 > buffer_size_kb; echo 1 > tracing_on'''
results = {}
for id, command in json.load(sys.stdin).items():
    subprocess.run(["bash", "-c", reset], check=True)
    argv = ["timeout", "-k", "1", "40", "bash", "-c", command]
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    with open("tracing_on", "w") as file:
        file.write("0")
    with open("trace", errors="replace") as file:
        results[id] = done.stdout, done.stderr, file.read(), done.returncode
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def results(environment: dict[str, str], kernel_path: Path) -> dict[str, tuple[str, str, str, int]]:
    """By id: output, errors, trace and exit status."""
    commands = {row.id: f"{row.given}\n{row.command}" for row in ROWS}
    done = subprocess.run(
        [*FAKEFS, "run", "--kernel", str(kernel_path), "--", sys.executable, "-c", _INSIDE],
        env=environment,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, tuple[str, str, str, int]] = json.loads(done.stdout)
    return answers


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_command(row: Row, results: dict[str, tuple[str, str, str, int]]) -> None:
    out, err, trace, status = results[row.id]
    match row.expectation:
        case "prints":
            assert re.search(row.what, out, re.MULTILINE), _end(out + err)
        case "traces":
            assert re.search(row.what, trace, re.MULTILINE), _end(trace + err)
        case "lacks":
            assert out.strip(), err
            assert not re.search(row.what, out, re.MULTILINE), _end(out)
        case "fails":
            assert re.search(row.what, err), _end(out + err)
        case "ends":
            assert str(status) == row.what, err
        case other:
            pytest.fail(f"{other} is no expectation")


def _end(text: str) -> str:
    """The last lines; a trace can be long."""
    return "\n".join(text.splitlines()[-20:])


def test_ids_are_unique() -> None:
    assert len({row.id for row in ROWS}) == len(ROWS)
