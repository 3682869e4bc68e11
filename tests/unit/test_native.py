"""The C parts under AddressSanitizer and UBSan: builds and runs tests/native/*.c."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HARNESSES = sorted((ROOT / "tests/native").glob("*.c"))
FLAGS = [
    *("-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
]
# The sanitizers' own leak checker needs ptrace, which containers may forbid.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


@pytest.mark.parametrize("harness", HARNESSES, ids=lambda path: path.name)
def test_sanitized(harness: Path, tmp_path: Path) -> None:
    program = tmp_path / harness.stem
    sources = [harness, *sorted((ROOT / "emulator/native").glob("*.c"))]
    fuse = subprocess.run(["pkg-config", "--cflags", "fuse3"], capture_output=True, text=True, check=True).stdout
    compiler = shlex.split(os.environ.get("CC", "cc"))
    include = [f"-I{ROOT / 'emulator/native'}", *shlex.split(fuse)]
    command = [*compiler, *FLAGS, *include, "-o", str(program), *map(str, sources)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=60)
    print(ran.stdout, end="")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_there_are_harnesses() -> None:
    assert HARNESSES
