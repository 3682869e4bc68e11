"""Gives long listings of the guest's kernel a buffer of 64 KiB instead of 4 KiB.

A read of a seq_file (Documentation/filesystems/seq_file.rst) starts over by walking to where the last one ended. The
functions of ftrace are walked one by one: 200 reads of a page each for available_filter_functions visit four million of
them. The kernel doubles a file's buffer when a record does not fit. So at the entry of ftrace's start function, from
the second read on, the empty buffer is declared full; nothing is lost: the kernel drops its content and asks again.
"""

from __future__ import annotations

from contextlib import suppress

from emulator.kernel.facts import SeqFileFacts
from emulator.machine import Machine
from emulator.memory import PAGE, BadAddress

_BUFFER = 64 << 10


def install(machine: Machine, facts: SeqFileFacts) -> None:
    """Trap the start functions. Before the guest runs."""

    def enlarge() -> bool:
        with suppress(BadAddress):  # then it is no seq_file
            _enlarge(machine, facts)
        return False

    for address in facts.starts:
        machine.trap(address, enlarge)


def _enlarge(machine: Machine, facts: SeqFileFacts) -> None:
    """At the entry of start(seq_file, position): double the buffer unless it is large enough."""
    cpu, memory = machine.cpu, machine.memory
    cr3, file = cpu.read("cr3"), cpu.read("rdi")

    def word(virtual: int) -> int:
        return memory.read_u64(memory.translate(virtual, cr3))

    if word(word(file + facts.op)) != cpu.read("rip"):
        return  # start is the first member of seq_operations: this is somebody else's function of the name
    # At position 0 the caller may be traverse(), which does not forget the count when there is no record at all.
    if word(cpu.read("rsi")) and word(file + facts.count) == 0 and PAGE <= (size := word(file + facts.size)) < _BUFFER:
        memory.write_u64(memory.translate(file + facts.count, cr3), size)
