"""`fakefs test`: TAP, exit statuses, kernels, and that scripts do not see each other's kernel."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounted import FAKEFS

RunTest = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_test(environment: dict[str, str], kernel_path: Path, tmp_path: Path) -> RunTest:
    """Run `fakefs test` on scripts given by their texts."""

    def run(*scripts: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        names = []
        for number, text in enumerate(scripts):
            names.append(f"{number}.sh")
            (tmp_path / names[-1]).write_text(text)
        return subprocess.run(
            [*FAKEFS, "test", "--kernel", str(kernel_path), *options, *names],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def results(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of TAP that are no comments."""
    return [line for line in done.stdout.splitlines() if not line.startswith("#")]


def test_scripts_pass_each_in_its_own_kernel(run_test: RunTest) -> None:
    script = '[ "$PWD" = "$TRACEFS" ] && [ -z "$(cat dynamic_events)" ] && echo p:mine vfs_read > dynamic_events'
    done = run_test(script, script, "exit 77")
    assert results(done) == ["TAP version 13", "1..3", "ok 1 - 0.sh", "ok 2 - 1.sh", "ok 3 - 2.sh # SKIP"]
    assert (done.returncode, done.stderr) == (0, "")


def test_failures_say_why(run_test: RunTest) -> None:
    failing = "echo hello > trace_marker; echo seen; echo p:wrong no_such > dynamic_events; exit 5"
    done = run_test(failing, "true")
    assert results(done)[2:] == ["not ok 1 - 0.sh", "ok 2 - 1.sh"]
    assert done.returncode == 1
    for text in ("# exit status 5", "# seen", "tracing_mark_write: hello"):
        assert text in done.stdout
    assert "trace_kprobe: error: Invalid probed address or symbol\n#   Command: p:wrong no_such\n" in done.stdout


def test_a_script_that_takes_too_long(run_test: RunTest) -> None:
    done = run_test("sleep 100", options=("--timeout", "0.5"))
    assert results(done)[2:] == ["not ok 1 - 0.sh"]
    assert "# timed out after 0.5 s" in done.stdout


def test_a_matrix_of_kernels(run_test: RunTest, kernel_path: Path) -> None:
    done = run_test("exit 0", options=("--kernel", str(kernel_path)))
    assert results(done)[1] == "1..2"
    assert [line.split(" on ")[0] for line in results(done)[2:]] == ["ok 1 - 0.sh", "ok 2 - 0.sh"]


def test_real_paths(run_test: RunTest) -> None:
    same = '[ "$PWD" = /sys/kernel/tracing ] && [ "$(cat current_tracer)" = nop ]'
    done = run_test(same, "echo p:wrong no_such > dynamic_events", options=("--real-paths",))
    assert results(done)[2:] == ["ok 1 - 0.sh", "not ok 2 - 1.sh"]
    assert "Invalid probed address or symbol" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing.sh"], "nothing.sh: no such script"),
        (["--timeout", "0", "x"], "'0' is not a number of seconds up to 86400"),
        (["--kernel", "no-such", "/dev/null"], "no such script"),
        ([], "required: SCRIPT"),
    ],
)
def test_bad_use(arguments: list[str], text: str) -> None:
    done = subprocess.run([*FAKEFS, "test", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
