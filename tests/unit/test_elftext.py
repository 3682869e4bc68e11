"""Which instructions of a file a jump may replace: held against the assembler, and the programs of this machine."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror.elftext import ElfText
from fakefs.mirror.trampoline import NotMovable

_SOURCE = """
    .text
    .type straight, @function
straight:                    # 1, 3, 4 and so on
    push %rbp
    mov %rsp, %rbp
middle:
    lea 1(%rdi), %rax
    pop %rbp
    ret

    .type loop, @function
loop:                        # a branch leads to its second instruction
    push %rbx
again:
    sub $1, %rdi
    jnz again
    pop %rbx
    ret

    .type jumps, @function
jumps:
    xor %eax, %eax
    mov %edi, %edi
inside:                      # may be led to by the table
    nop
    nop
    nop
    nop
    nop
    jmp *(%rsi,%rdi,8)

    .type long, @function
long:                        # one long instruction: nothing can lead into it
    mov $0x12345678, %eax
    jmp *(%rsi,%rdi,8)

    .type target, @function
target:
    nop
far:
    mov %rdi, %rax
    nop
    nop
    ret
    .fill 400, 1, 0x90
    .type other, @function
other:
    jmp far

    .type tiny, @function
tiny:
    ret
    .globl _start
_start:
    xor %ebp, %ebp
    mov %rdx, %r9
    call straight
"""


class Assembled:
    """_SOURCE as a program, and where in its file its labels are."""

    def __init__(self, directory: Path, *options: str) -> None:
        source, program = directory / "code.s", directory / "code"
        source.write_text(_SOURCE)
        subprocess.run(["gcc", "-nostdlib", "-static", *options, "-o", program, source], check=True)
        self.data = program.read_bytes()
        table = subprocess.run(["nm", program], capture_output=True, text=True, check=True).stdout
        self.text = ElfText(self.data)
        [segment] = self.text.segments
        self.offsets = {
            name: int(at, 16) - segment.address + segment.offset
            for at, name in re.findall(r"^([0-9a-f]+) t (\w+)$", table.replace(" T ", " t "), re.M)
        }

    def replaceable(self, name: str) -> int:
        return self.text.replaceable(self.offsets[name])


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Assembled:
    return Assembled(tmp_path_factory.mktemp("assembled"))


def test_what_may_be_replaced(assembled: Assembled) -> None:
    assert assembled.replaceable("straight") == 8
    assert assembled.replaceable("middle") == 5
    assert assembled.replaceable("long") == 5
    assert assembled.replaceable("_start") == 5


@pytest.mark.parametrize(
    ("name", "why"),
    [("loop", "a branch"), ("target", "a branch"), ("inside", "by a table"), ("tiny", "ret|short")],
)
def test_what_may_not(assembled: Assembled, name: str, why: str) -> None:
    with pytest.raises(NotMovable, match=why):
        assembled.replaceable(name)


def test_what_is_no_code(assembled: Assembled) -> None:
    for offset in (0, len(assembled.data) - 1, 1 << 40):
        with pytest.raises(NotMovable):
            assembled.text.replaceable(offset)
    with pytest.raises(NotMovable):
        assembled.text.replaceable(assembled.offsets["middle"] + 1)


def test_a_library_of_this_machine() -> None:
    """Its functions are found without symbols, and nearly all can be probed at their beginning."""
    path = next(line.split()[2] for line in _ldd("/bin/bash") if line.strip().startswith("libc.so"))
    data = Path(path).read_bytes()
    text = ElfText(data)
    table = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout
    names = ("malloc", "puts", "exit", "read", "getpid", "printf", "fopen", "qsort", "strtol", "setlocale")
    good = 0
    for name in names:
        found = re.search(rf"^([0-9a-f]+) [TW] {name}@@", table, re.M)
        assert found is not None
        segment = text.segments[0]
        try:
            good += text.replaceable(int(found[1], 16) - segment.address + segment.offset) >= 5
        except NotMovable:
            continue
    assert good >= len(names) - 2


def _ldd(path: str) -> list[str]:
    done = subprocess.run(["ldd", os.path.realpath(path)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@given(st.data())
def test_a_broken_file_is_refused_or_read(assembled: Assembled, data: st.DataObject) -> None:
    broken = bytearray(assembled.data[: data.draw(st.integers(0, 1500) | st.just(len(assembled.data)))])
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, 511))
        broken[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4) | st.just(struct.pack("<I", 0x6474E550)))
    try:
        text = ElfText(bytes(broken))
    except ValueError:
        return
    for name in ("straight", "loop", "long"):
        try:
            assert 5 <= text.replaceable(assembled.offsets[name]) <= 19
        except NotMovable:
            continue
