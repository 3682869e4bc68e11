"""Makes the code patches the guest's kernel is about to make, in its stead.

Linux patches its own text by writing a breakpoint, interrupting all CPUs, writing the rest, interrupting them again,
each through a temporary page-table mapping: on an emulated CPU this is seconds for the 40,000 functions of the
function tracer. Here the CPU stops at the entry of the function that does it (x86's text_poke_bp_batch() or
smp_text_poke_batch_finish(), arch/x86/kernel/alternative.c), the bytes are written into RAM, translated code in their
range is forgotten, and the function returns. With one CPU that is stopped nobody can see a half-written instruction.
"""

from __future__ import annotations

import struct

from emulator.kernel.facts import TextPokeFacts
from emulator.machine import Machine
from emulator.memory import PAGE, BadAddress

_PATCHES_MAX = 4096
_CALL = 0xE8
_ENDBR_SIZE = 4
_KERNEL_MAP = 0xFFFF_FFFF_8000_0000  # where the kernel's image is mapped, without KASLR
_TEXT_MAX = 5
_JCC32 = 6  # a conditional jump: its first byte, 0x0f, stays and is not in the text
# Patches further apart than this are cheaper to forget by dropping all translations.
_SPAN_MAX = 4 << 20


def install(machine: Machine, facts: TextPokeFacts) -> None:
    """Trap the kernel's patching functions. Before the guest runs."""
    poker = _Poker(machine, facts)
    machine.trap(facts.entry, poker.finish)
    machine.trap(facts.queue, poker.queue, when=poker.decoder_is_traced)


class _Poker:
    def __init__(self, machine: Machine, facts: TextPokeFacts) -> None:
        self._machine = machine
        self._facts = facts
        self._stale = False  # code was changed by queue() and its translations are still there
        self._decoder = [facts.decoder + offset - _KERNEL_MAP for offset in (0, _ENDBR_SIZE)]

    def decoder_is_traced(self) -> bool:
        """Is a tracer attached to the instruction decoder? Then queueing a patch costs 80 us, most of it tracing."""
        view = self._machine.memory.view
        return any(view[at] == _CALL for at in self._decoder)

    def queue(self) -> bool:
        """At the entry of the function that queues a patch: make it at once; finish() makes it known to the CPU."""
        cpu = self._machine.cpu
        address, text_at, length = cpu.read("rdi"), cpu.read("rsi"), cpu.read("rdx")
        if not 0 < length <= _TEXT_MAX:
            return False
        try:
            cr3 = cpu.read("cr3")
            self._write(address, self._machine.memory.read_virtual(text_at, length, cr3), cr3)
            self._machine.return_from_call()
        except BadAddress:
            return False
        self._stale = True
        return True

    def finish(self) -> bool:
        """At the entry of the function that makes the queued patches."""
        cpu, cr3 = self._machine.cpu, self._machine.cpu.read("cr3")
        stale, self._stale = self._stale, False
        if stale:
            cpu.flush_translations()
        try:
            patches = self._queued(cr3)
            if patches is None or not (patches or stale):
                return False
            for address, text in patches:
                self._write(address, text, cr3)
            self._clear_queue(cr3)
            self._machine.return_from_call()
        except BadAddress:
            return False  # let the kernel find out for itself
        if patches:
            start = min(address for address, _ in patches)
            end = max(address + len(text) for address, text in patches)
            if end - start > _SPAN_MAX:
                cpu.flush_translations()
            else:
                cpu.forget_code(start, end)
        return True

    def _queued(self, cr3: int) -> list[tuple[int, bytes]] | None:
        """Return address and bytes of the queued patches; None when they are not understood."""
        facts, memory = self._facts, self._machine.memory
        if facts.array:
            at, count = facts.array, memory.read_u32(memory.translate(facts.count, cr3))
        else:
            at, count = self._machine.cpu.read("rdi"), self._machine.cpu.read("rsi") & 0xFFFF_FFFF
        if count > _PATCHES_MAX:
            return None
        data = memory.read_virtual(at, count * facts.size, cr3)
        patches = [_parse(data, index * facts.size, facts) for index in range(count)]
        return None if None in patches else [patch for patch in patches if patch is not None]

    def _clear_queue(self, cr3: int) -> None:
        if self._facts.array:
            memory = self._machine.memory
            memory.write_u32(memory.translate(self._facts.count, cr3), 0)

    def _write(self, address: int, text: bytes, cr3: int) -> None:
        memory = self._machine.memory
        physical = memory.translate(address, cr3)
        room = PAGE - physical % PAGE
        memory.write(physical, text[:room])
        if len(text) > room:
            memory.write(memory.translate(address + room, cr3), text[room:])


def _parse(data: bytes, at: int, facts: TextPokeFacts) -> tuple[int, bytes] | None:
    """Return address and bytes of a patch; None when it is of a form not known here."""
    [relative] = struct.unpack_from("<i", data, at + facts.rel_addr)
    length = data[at + facts.length]
    text = data[at + facts.text : at + facts.text + min(length, _TEXT_MAX)]
    address = facts.stext + relative & (1 << 64) - 1
    if length == _JCC32:
        return address + 1, text
    return (address, text) if 0 < length <= _TEXT_MAX else None
