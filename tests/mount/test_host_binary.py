"""`fakefs exec --host-binary`: programs of the host in the guest, and uprobes on them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from fakefs.testbed import Tracefs
from tests.mounted import FAKEFS
from tests.uprobes import Program, c_library, hits


def run_here(mount: Tracefs, *argv: str, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program of the host in the guest."""
    return subprocess.run(
        [*FAKEFS, "exec", "--host-binary", str(mount.path), "--", *argv],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        check=False,
    )


def test_a_dynamic_program_and_its_libraries_hit(tracefs: Tracefs, dynamic: Program) -> None:
    tracefs.write("uprobe_events", f"p:adds {dynamic.at('add')} a=%di b=%si\n")
    tracefs.write("uprobe_events", f"r:sums {dynamic.at('add')} sum=$retval\n", append=True)
    tracefs.write("uprobe_events", f"p:prints {c_library('printf')} format=+0(%di):string\n", append=True)
    tracefs.write("events/uprobes/enable", "1")
    done = run_here(tracefs, "./measure", "a", "bcd", cwd=dynamic.path.parent)
    assert (done.stdout, done.stderr, done.returncode) == ("4\n", "", 4)
    done = run_here(tracefs, str(dynamic.path), "abcde")
    tracefs.write("events/uprobes/enable", "0")
    assert hits(tracefs, "adds") == ["measure a=0x0 b=0x1", "measure a=0x1 b=0x3", "measure a=0x0 b=0x5"]
    assert hits(tracefs, "sums") == ["measure sum=0x1", "measure sum=0x4", "measure sum=0x5"]
    assert len(hits(tracefs, "prints")) == 2  # the format has a newline in it, and so has the hit
    assert [line for line in tracefs.lines("trace") if line == '"'] == ['"', '"']


def test_two_programs_with_one_library(tracefs: Tracefs) -> None:
    tracefs.write("uprobe_events", f"p:exits {c_library('exit')} status=%di:s32\n")
    tracefs.write("events/uprobes/exits/enable", "1")
    for argv in (["ls", "/"], ["sleep", "0"]):  # brings them, and what they need
        assert run_here(tracefs, *argv).returncode == 0
    tracefs.write("trace", "")
    done = run_here(tracefs, "bash", "-c", "sleep 0.2 & ls / >/dev/null; wait")
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    tracefs.write("events/uprobes/exits/enable", "0")
    assert sorted(hits(tracefs, "exits")) == ["bash status=0", "ls status=0", "sleep status=0"]


def test_input_output_status_and_environment_are_the_hosts(
    tracefs: Tracefs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_here(tracefs, "tr", "a-z", "A-Z", stdin="hello\n")
    assert (done.stdout, done.stderr, done.returncode) == ("HELLO\n", "", 0)
    monkeypatch.setenv("SET_BY_THE_TEST", "set")
    done = run_here(tracefs, "bash", "-c", 'echo "$SET_BY_THE_TEST $0 $PWD"; echo wrong >&2; exit 7', cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == (f"set bash {tmp_path}\n", "wrong\n", 7)
    done = run_here(tracefs, "bash", "-c", "kill -TERM $$")
    assert done.returncode == 128 + signal.SIGTERM
    script = tmp_path / "script"
    script.write_text('#!/usr/bin/env bash\necho "$0 $1"\n')
    script.chmod(0o755)
    assert run_here(tracefs, str(script), "argument").stdout == f"{script} argument\n"


def test_random_numbers_need_not_be_waited_for(tracefs: Tracefs) -> None:
    """The guest's kernel, left to itself, takes seconds to gather a seed, in the first getrandom(2)."""
    assert "random: crng init done" in tracefs.guest("dmesg").stdout


def test_programs_that_cannot_be_run(tracefs: Tracefs, tmp_path: Path) -> None:
    done = run_here(tracefs, "no-such-program")
    assert (done.stdout, done.returncode) == ("", 127)
    assert done.stderr == "fakefs: no-such-program: no such program on this machine\n"
    big = tmp_path / "big"
    big.write_bytes(Path("/bin/busybox").read_bytes())
    big.chmod(0o755)
    os.truncate(big, 1 << 40)
    done = run_here(tracefs, str(big))
    assert done.returncode == 1
    assert done.stderr == f"fakefs: {big}: File too large; it is to fit the guest's memory: --memory\n"
    source = tmp_path / "avx.c"
    source.write_text('int main(void) { __asm__("vpxor %ymm0, %ymm0, %ymm0"); return 0; }')
    subprocess.run(["gcc", "-o", tmp_path / "avx", source], check=True)
    done = run_here(tracefs, str(tmp_path / "avx"))
    assert done.returncode == 128 + signal.SIGILL
    assert "an instruction that the guest's processor does not have" in done.stderr


def test_in_a_private_view(environment: dict[str, str], kernel_path: Path, dynamic: Program) -> None:
    script = f"""
        cd /sys/kernel/tracing
        echo 'p:adds {dynamic.at("add")} b=%si' > uprobe_events
        echo 1 > events/uprobes/adds/enable
        {shlex.join(FAKEFS)} exec --host-binary -- {dynamic.path} abc
        grep -c 'measure-.*adds: .* b=0x3' trace
    """
    done = subprocess.run(
        [*FAKEFS, "run", "--kernel", str(kernel_path), "--", "bash", "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("3\n1\n", "")
