"""What a program of the host needs, as its own loader and ldd(1) have it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from fakefs.errors import UserError
from fakefs.hostfiles.program import HostProgram, _loader, host_program

ELF = Path(sys.executable).resolve().read_bytes()[:4096]


def names(program: HostProgram) -> list[str]:
    return [os.path.basename(os.fsdecode(path)) for path in program.files]


def compile_c(path: Path, source: str, *options: str) -> Path:
    code = path.with_suffix(".c")
    code.write_text(source)
    subprocess.run(["gcc", "-o", path, code, *options], check=True)
    return path


def script(path: Path, first: str) -> Path:
    path.write_text(f"{first}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", ["ls", "bash", "gcc", "apt-get"])
def test_libraries_are_those_that_ldd_finds(name: str) -> None:
    path = shutil.which(name)
    assert path is not None
    listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    libraries = set(re.findall(r"(/\S+) \(0x", listed))
    program = host_program(name)
    assert program.path == os.fsencode(path)
    assert program.files[0] == program.path
    cache = {"/etc/ld.so.cache"} if os.path.exists("/etc/ld.so.cache") else set()
    assert {os.fsdecode(file) for file in program.files[1:]} == libraries | cache


def test_a_static_program_needs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compile_c(tmp_path / "static", "int main(void) { return 0; }", "-static")
    monkeypatch.chdir(tmp_path)
    program = host_program("./static")
    assert (program.path, program.files) == (os.fsencode(path), (os.fsencode(path),))
    assert program.directory == os.fsencode(tmp_path)


def test_libraries_beside_the_program(tmp_path: Path) -> None:
    library = compile_c(tmp_path / "libmine one.so", "int f(void) { return 0; }", "-shared", "-fPIC")
    path = compile_c(
        tmp_path / "program", "int f(void); int main(void) { return f(); }", str(library), "-Wl,-rpath,$ORIGIN"
    )
    assert os.fsencode(library) in host_program(str(path)).files
    library.unlink()
    with pytest.raises(UserError, match="libmine one"):
        host_program(str(path))


def test_scripts_need_their_interpreters(tmp_path: Path) -> None:
    inner = script(tmp_path / "inner", "#!/bin/sh -e")
    outer = script(tmp_path / "outer", f"#! {inner}")
    assert names(host_program(str(outer)))[:3] == ["outer", "inner", "sh"]
    found = script(tmp_path / "found", "#!/usr/bin/env -S A=b bash -e")
    assert {"found", "env", "bash"} <= set(names(host_program(str(found))))


def test_what_cannot_be_run(tmp_path: Path) -> None:
    loop = script(tmp_path / "loop", f"#!{tmp_path}/loop")
    text = script(tmp_path / "text", "text")
    other = tmp_path / "arm"
    other.write_bytes(ELF[:18] + b"\xb7\0" + ELF[20:])
    other.chmod(0o755)
    plain = tmp_path / "plain"
    plain.touch()
    for path, says, status in (
        (loop, "too many interpreters", 126),
        (text, "neither a program for x86-64 nor a script", 126),
        (other, "neither a program for x86-64 nor a script", 126),
        (script(tmp_path / "lost", "#!/nowhere/sh"), "/nowhere/sh: No such file", 126),
        (script(tmp_path / "env", "#!/usr/bin/env no-such-program"), "no-such-program: no such program", 127),
        (plain, "no such program", 127),
        (tmp_path, "no such program", 127),
    ):
        with pytest.raises(UserError, match=says) as caught:
            host_program(str(path))
        assert caught.value.exit_status == status
        assert "\n" not in str(caught.value)


@given(some.binary(max_size=300), some.integers(0, 4096), some.binary(max_size=8))
@example(b"", 54, b"\x38\0\xff\xff")
@example(b"", 32, b"\xff" * 8)
def test_any_elf_header_is_read(start: bytes, at: int, patch: bytes) -> None:
    """One that is damaged anywhere, too, and one that is none."""
    damaged = bytearray(ELF)
    damaged[at : at + len(patch)] = patch
    fd = os.memfd_create("elf")
    try:
        for text in (start, bytes(damaged)):
            os.pwrite(fd, text, 0)
            loader = _loader(text[:256], fd)
            assert loader is None or loader in text
    finally:
        os.close(fd)
