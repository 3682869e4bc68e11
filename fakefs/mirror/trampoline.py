"""Machine code that makes a process of the host tell when it comes to an instruction, and when a function returns.

A *trampoline* stands for the instruction that was replaced by a jump to it, and for those behind it that the jump
covers: it saves all registers on the stack, makes a system call that no kernel has, by which the recorder is told,
restores them, executes what was replaced and jumps back. Without a listener the call does nothing.

A *return stub* is where a function returns to whose return address the recorder has replaced: it puts the true one
back, which is in a table behind it, and tells. It needs nobody for that.

Not here: where there is room for them and when it is safe to write them (`fakefs.mirror.patches`). Instructions are
those of the Intel SDM, volume 2; capstone decodes them, which takes 35 ms to import.
"""

from __future__ import annotations

import importlib
import struct
from functools import cache
from typing import Any, NamedTuple

NUMBER = 0x0FA4EF5
"""The system call: (probe, address of the saved registers, address of the probed instruction or return address)."""
RETURN = 0
"""Stands for the probe when a function returns."""
SAVED = ("r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8", "di", "si", "bp", "bx", "dx", "cx", "ax", "flags")
"""The saved registers, 8 bytes each, from the lowest address on."""
SAVED_SIZE = 8 * len(SAVED)
BELOW_STACK = SAVED_SIZE + 128
"""Bytes from the saved registers to where the stack pointer was: behind them is the ABI's red zone."""
JUMP_SIZE = 5
CODE_MAX = 40
"""Bytes of code from an instruction on that are enough to build its trampoline."""
ROOM = 192
"""Bytes that a trampoline has at most."""

_SAVE = bytes.fromhex("488d642480 9c 50 51 52 53 55 56 57 4150 4151 4152 4153 4154 4155 4156 4157")
_RESTORE = bytes.fromhex("415f 415e 415d 415c 415b 415a 4159 4158 5f 5e 5d 5b 5a 59 58 9d 488da42480000000")
# mov %rsp,%rsi; 1: mov $NUMBER,%eax; syscall; cmp $-EINTR,%eax; je 1b: a signal may come before anybody is told.
_SYSCALL = b"\x48\x89\xe6\xb8" + struct.pack("<I", NUMBER) + b"\x0f\x05\x83\xf8\xfc\x74\xf4"
_END = b"\xcc"  # room behind something that does not end in 0 is known to be free


class NotMovable(Exception):
    """Instructions that cannot be executed elsewhere, or that something may jump into the middle of."""


class Patch(NamedTuple):
    """A trampoline, the jump to it, and how many bytes the jump replaces: whole instructions."""

    trampoline: bytes
    jump: bytes
    replaced: int


@cache
def disassembler() -> Any:
    """Return capstone's decoder with details."""
    capstone = importlib.import_module("capstone")
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    return decoder


def build(probe: int, site: int, code: bytes, at: int) -> Patch:
    """Return what makes the instruction at address `site` tell, with `code` from there on, and a trampoline at `at`.

    Raises NotMovable.
    """
    moved = bytearray(_SAVE)
    moved += b"\xbf" + struct.pack("<I", probe)  # mov $probe,%edi
    moved += b"\x48\x8d\x15" + _relative(site, at + len(moved) + 7)  # lea site(%rip),%rdx
    moved += _SYSCALL + _RESTORE
    replaced, left = 0, False
    for instruction in disassembler().disasm(code[:CODE_MAX], site):
        replaced += instruction.size
        if not left:
            left = _leaves(instruction)
            moved += _moved(instruction, at + len(moved), last=left or replaced >= JUMP_SIZE)
        elif instruction.mnemonic not in ("nop", "int3"):
            raise NotMovable("too short")  # else what is behind the end of a function is not executed
        if replaced >= JUMP_SIZE:
            break
    else:
        raise NotMovable("no instructions")
    moved += b"\xe9" + _relative(site + replaced, at + len(moved) + 5)
    return Patch(bytes(moved) + _END, b"\xe9" + _relative(at, site + JUMP_SIZE), replaced)


def is_one(code: bytes, probe: int) -> bool:
    """Is this the trampoline of a probe?"""
    return code.startswith(_SAVE + b"\xbf" + struct.pack("<I", probe))


def window(code: bytes) -> int:
    """Return how many bytes a jump at the beginning of `code` replaces. Raises NotMovable."""
    return build(1, 1 << 32, code, (1 << 32) + 4096).replaced


def _leaves(instruction: Any) -> bool:
    """Does control never come to what is behind an instruction?"""
    return instruction.mnemonic.split()[-1] in ("ret", "jmp")


def _moved(instruction: Any, at: int, *, last: bool) -> bytes:
    """Return an instruction as it has to be at another address. Only the `last` may lead elsewhere for good."""
    x86 = importlib.import_module("capstone.x86_const")
    code = bytes(instruction.bytes)
    groups = set(instruction.groups)
    if groups & {x86.X86_GRP_INT, x86.X86_GRP_IRET, x86.X86_GRP_PRIVILEGE} or code[:2] in (b"\x0f\x05", b"\x0f\x34"):
        raise NotMovable(instruction.mnemonic)
    direct = instruction.operands[0].imm if instruction.operands and x86.X86_GRP_BRANCH_RELATIVE in groups else None
    if x86.X86_GRP_CALL in groups:
        if not last or direct is None:
            raise NotMovable("call")
        back = instruction.address + instruction.size
        low, high = back & 0xFFFFFFFF, back >> 32
        push = b"\x68" + struct.pack("<I", low) + b"\xc7\x44\x24\x04" + struct.pack("<I", high)  # push, movl to 4(%rsp)
        return push + b"\xe9" + _relative(direct, at + len(push) + 5)
    if direct is not None:
        opcode = code.lstrip(b"\xf2\x3e\x2e")  # hints
        if opcode[0] in (0xE9, 0xEB) and last:
            return b"\xe9" + _relative(direct, at + 5)
        if 0x70 <= opcode[0] < 0x80 or (opcode[0] == 0x0F and 0x80 <= opcode[1] < 0x90):
            condition = (opcode[0] if opcode[0] != 0x0F else opcode[1]) & 0xF
            return bytes((0x0F, 0x80 | condition)) + _relative(direct, at + 6)
        raise NotMovable(instruction.mnemonic)
    if not last and groups & {x86.X86_GRP_JUMP, x86.X86_GRP_RET}:
        raise NotMovable(instruction.mnemonic)
    for operand in instruction.operands:
        if operand.type == x86.X86_OP_MEM and operand.mem.base in (x86.X86_REG_RIP, x86.X86_REG_EIP):
            there = instruction.encoding.disp_offset
            if operand.mem.base != x86.X86_REG_RIP or not there:
                raise NotMovable(instruction.mnemonic)
            target = instruction.address + instruction.size + operand.mem.disp
            return code[:there] + _relative(target, at + instruction.size) + code[there + 4 :]
    return code


def _relative(target: int, behind: int) -> bytes:
    """Return the 32 bits of an address relative to the end of an instruction. Raises NotMovable when it is too far."""
    try:
        return struct.pack("<i", target - behind)
    except struct.error:
        raise NotMovable("too far") from None


# ---- returns

SIGNATURE = b"fakefs\0\1"
"""A stub begins with it and the number of entries in its table, 8 bytes each, and ends with it."""
ENTRY = struct.Struct("<QQ")
"""Where on the stack a return address was, and that. The first is 0 when the entry is free."""
STUB_CODE, STUB_TABLE = 16, 160
"""Offsets of what a function returns to, and of the table."""


def return_stub(entries: int) -> bytes:
    """Return a stub with a table of free entries. It can be anywhere, at a multiple of 16."""
    code = b"\x50" + _SAVE  # push %rax: room for the address
    code += b"\x48\x8d\xbc\x24" + struct.pack("<I", BELOW_STACK)  # lea BELOW_STACK(%rsp),%rdi
    code += b"\x48\x8d\x35" + struct.pack("<i", STUB_TABLE - STUB_CODE - len(code) - 7)  # lea table(%rip),%rsi
    code += b"\xb9" + struct.pack("<I", entries)  # mov $entries,%ecx
    code += bytes.fromhex("483b3e 740a 4883c610 ffc9 75f3 0f0b")  # 1: cmp (%rsi),%rdi; je 2f; add; dec; jne 1b; ud2
    code += bytes.fromhex("488b5608 488917 31ff")  # 2: mov 8(%rsi),%rdx; mov %rdx,(%rdi); xor %edi,%edi
    code += _SYSCALL + _RESTORE + b"\xc3"
    assert len(code) <= STUB_TABLE - STUB_CODE
    head = SIGNATURE + struct.pack("<Q", entries) + code
    return head.ljust(STUB_TABLE, _END) + bytes(entries * ENTRY.size) + SIGNATURE
