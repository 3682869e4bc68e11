"""The CPU's registers inside a saved `uc_context`: the public way to what reg_write cannot set.

`uc_context_save()` copies the CPU's state out and `uc_context_restore()` copies it back; in between, the hidden parts
(cached descriptors, privilege level, the exception being raised) can be read and changed. Their offsets are those of
Unicorn 2.1.4. `verify()` proves each on a scratch engine, by writing known values through the public API or letting
the CPU raise exceptions, and looking for the result. No pointer into the engine is used.
"""

from __future__ import annotations

import ctypes
import struct

from emulator.cpu.layout import LayoutError
from emulator.cpu.libunicorn import HOOK_INTR, Engine
from emulator.cpu.unicorn_cpu import CONTEXT_HEADER

RSP = CONTEXT_HEADER + 8 * 4
RCX = CONTEXT_HEADER + 8 * 1
R11 = CONTEXT_HEADER + 8 * 11
RIP = CONTEXT_HEADER + 128
EFLAGS = CONTEXT_HEADER + 136
HFLAGS = CONTEXT_HEADER + 176
SEGMENTS = CONTEXT_HEADER + 184
TR = CONTEXT_HEADER + 352
GDTR = CONTEXT_HEADER + 376
IDTR = CONTEXT_HEADER + 400
CR2 = CONTEXT_HEADER + 440
CR3 = CONTEXT_HEADER + 448
STAR = CONTEXT_HEADER + 4824
LSTAR = CONTEXT_HEADER + 4840
FMASK = CONTEXT_HEADER + 4856
ERROR_CODE = CONTEXT_HEADER + 5384
IS_SOFTWARE = CONTEXT_HEADER + 5388  # raised by INT n, INT3 or INTO
OLD_EXCEPTION = CONTEXT_HEADER + 5496

# A segment register: selector (4 bytes, 4 of padding), base (8), limit (4), the second word of its descriptor (4).
SEGMENT = struct.Struct("<I4xQII")
ES, CS, SS, DS, FS, GS = range(6)
BASE, LIMIT = 8, 16  # in GDTR, IDTR and TR, which have the same shape
NONE = 0xFFFFFFFF  # no exception being raised

# hflags (QEMU's target/i386/cpu.h): what code is translated for.
HF_CPL = 3
HF_INHIBIT_IRQ = 1 << 3
HF_CS32 = 1 << 4
HF_SS32 = 1 << 5
HF_ADDSEG = 1 << 6
HF_TS = 1 << 11
HF_LMA = 1 << 14
HF_CS64 = 1 << 15

_CR0_TS = 1 << 3
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class Context:
    """One uc_context of an engine, and its bytes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._handle = engine.context_alloc()
        assert self._handle.value is not None
        size = engine.context_size()
        self.bytes = memoryview((ctypes.c_char * size).from_address(self._handle.value)).cast("B")
        if size < OLD_EXCEPTION + 4:
            raise LayoutError("the saved registers")

    def save(self) -> None:
        """Copy the CPU's state here."""
        self.engine.context_save(self._handle)

    def restore(self) -> None:
        """Make this the CPU's state."""
        self.engine.context_restore(self._handle)

    def u32(self, offset: int) -> int:
        """Return a 32-bit field."""
        return int(_U32.unpack_from(self.bytes, offset)[0])

    def u64(self, offset: int) -> int:
        """Return a 64-bit field."""
        return int(_U64.unpack_from(self.bytes, offset)[0])

    def set_u32(self, offset: int, value: int) -> None:
        """Set a 32-bit field."""
        _U32.pack_into(self.bytes, offset, value)

    def set_u64(self, offset: int, value: int) -> None:
        """Set a 64-bit field."""
        _U64.pack_into(self.bytes, offset, value)

    def set_segment(self, number: int, selector: int, limit: int, flags: int) -> None:
        """Load a segment register, hidden part included, with base 0. CPL is HFLAGS' business."""
        SEGMENT.pack_into(self.bytes, SEGMENTS + SEGMENT.size * number, selector, 0, limit, flags)

    def selector(self, number: int) -> int:
        """Return the selector in a segment register."""
        return self.u32(SEGMENTS + SEGMENT.size * number) & 0xFFFF

    def close(self) -> None:
        """Free the context."""
        self.bytes.release()
        self.engine.lib.uc_context_free(self._handle)


def verify(engine: Engine, code: memoryview, code_at: int) -> None:
    """Prove every offset above, on an engine nobody needs whose RAM holds `code` at a physical address.

    Raises LayoutError naming the first thing that is elsewhere.
    """
    context, fresh = Context(engine), Context(engine)
    fresh.save()
    try:
        _check_registers(engine, context)
        fresh.restore()
        _check_flags(engine, context, code, code_at)
        fresh.restore()
        _check_exceptions(engine, context, fresh, code, code_at)
    finally:
        fresh.restore()
        context.close()
        fresh.close()


def _expect(context: Context, what: str, offset: int, value: int, mask: int = (1 << 64) - 1) -> None:
    if context.u64(offset) & mask != value:
        raise LayoutError(what)


def _check_registers(engine: Engine, context: Context) -> None:
    """Each register gets a value of its own, which must be found where the register is thought to be."""
    word = 0x1234_5678_9000
    fields = {"rsp": RSP, "rcx": RCX, "r11": R11, "rip": RIP, "cr2": CR2}
    bases = {f"{name}_base": SEGMENTS + SEGMENT.size * number + BASE for number, name in ((FS, "fs"), (GS, "gs"))}
    numbered = [(name, offset, word + number) for number, (name, offset) in enumerate((fields | bases).items())]
    for name, _, value in numbered:
        engine.write(name, value)
    engine.write("cr3", 0x0065_4000)
    engine.write("cs", 0x1008)
    engine.write("ss", 0x1010)
    tables = (("tr", TR, 0x167), ("gdtr", GDTR, 0x267), ("idtr", IDTR, 0x367))
    for name, _, limit in tables:
        engine.write_table(name, word + limit, limit)
    msrs = ((0xC0000081, STAR), (0xC0000082, LSTAR), (0xC0000084, FMASK))
    for msr, _ in msrs:
        engine.write_msr(msr, 0x0055_0000 | msr & 0xFF)
    context.save()
    for name, offset, value in numbered:
        _expect(context, name.upper(), offset, value)
    _expect(context, "CR3", CR3, 0x0065_4000)
    if context.selector(CS) != 0x1008 or context.selector(SS) != 0x1010:
        raise LayoutError("the segment registers")
    for name, offset, limit in tables:
        _expect(context, name.upper(), offset + BASE, word + limit)
        _expect(context, name.upper(), offset + LIMIT, limit, 0xFFFF)
    for msr, offset in msrs:
        _expect(context, f"MSR {msr:#x}", offset, 0x0055_0000 | msr & 0xFF)


def _check_flags(engine: Engine, context: Context, code: memoryview, code_at: int) -> None:
    for interrupts in (0, 0x200):
        engine.write("rflags", 2 | interrupts)
        context.save()
        _expect(context, "RFLAGS", EFLAGS, interrupts, 0x200)
    cr0 = engine.read("cr0")
    for task_switched in (HF_TS, 0):
        engine.write("cr0", cr0 | _CR0_TS if task_switched else cr0 & ~_CR0_TS)
        context.save()
        wanted = HF_LMA | HF_CS64 | task_switched
        _expect(context, "hflags", HFLAGS, wanted, HF_LMA | HF_CS64 | HF_TS | HF_INHIBIT_IRQ | HF_CPL)
    engine.write("rflags", 2)
    code[:2] = b"\xfb\x90"  # sti; nop
    engine.flush_translations()
    if engine.start(code_at, 1):
        raise LayoutError("hflags")
    context.save()
    _expect(context, "hflags", HFLAGS, HF_INHIBIT_IRQ, HF_INHIBIT_IRQ)
    engine.start(code_at + 1, 1)
    context.save()
    _expect(context, "hflags", HFLAGS, 0, HF_INHIBIT_IRQ)


def _check_exceptions(engine: Engine, context: Context, fresh: Context, code: memoryview, code_at: int) -> None:
    """#GP with an error code of our choice, and an INT: neither is delivered, as nothing here delivers."""
    seen: list[tuple[int, int, int, int]] = []

    def on_interrupt(_uc: int, vector: int, _data: int) -> None:
        context.save()
        seen.append((vector, context.u32(ERROR_CODE), context.u32(IS_SOFTWARE), context.u32(OLD_EXCEPTION)))
        engine.stop()

    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)(on_interrupt)
    engine.hook(HOOK_INTR, callback)
    if fresh.u32(OLD_EXCEPTION) != NONE:
        raise LayoutError("the exception being raised")
    fresh.restore()
    engine.write_table("gdtr", code_at, 0)
    engine.write("rax", 0x1230)
    code[:2] = b"\x8e\xd8"  # mov ds, ax: outside the GDT
    engine.flush_translations()
    engine.start(code_at, 2)
    fresh.restore()
    code[:2] = b"\xcd\x80"  # int 0x80
    engine.flush_translations()
    engine.start(code_at, 2)
    if len(seen) != 2 or seen[0] != (13, 0x1230, 0, 13) or (seen[1][0], seen[1][2:]) != (0x80, (1, NONE)):
        raise LayoutError("the exception being raised")
