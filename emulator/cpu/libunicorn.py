"""The few functions of libunicorn the emulator calls, through ctypes.

Not Unicorn's own Python binding: that one takes 40 ms to import, refuses hooks on RDTSC, and turns every hook into a
chain of Python calls. The shared library is the one inside the `unicorn` package (unicorn.h is the specification).
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from emulator.errors import EmulatorError

WANTED_VERSION = "2.1.4"

ARCH_X86 = 4
MODE_64 = 1 << 3
PROT_ALL = 7
HOOK_INTR = 1
HOOK_INSN = 2
HOOK_CODE = 4
HOOK_BLOCK = 8
HOOK_INSN_INVALID = 1 << 14
INS_CPUID = 113
INS_IN = 218
INS_OUT = 500
INS_RDTSC = 608
INS_RDTSCP = 609
INS_SYSCALL = 699

_CTL_WRITE = 1
_CTL_TB_REMOVE_CACHE = 9
_CTL_TB_FLUSH = 10
_CTL_TLB_FLUSH = 11
_CTL_TCG_BUFFER_SIZE = 13
# Room for translations, bytes; a full buffer is flushed and filled anew. Debian's kernel at work needs about 40 MiB.
_TCG_BUFFER = 96 << 20

# uc_x86_reg numbers, by the names the manuals use.
REGISTERS = {
    "rax": 35, "rbp": 36, "rbx": 37, "rcx": 38, "rdi": 39, "rdx": 40, "rip": 41, "rsi": 43, "rsp": 44,
    "r8": 106, "r9": 107, "r10": 108, "r11": 109, "r12": 110, "r13": 111, "r14": 112, "r15": 113,
    "rflags": 253, "cs": 11, "ss": 49, "ds": 17, "es": 28, "fs": 32, "gs": 33, "fs_base": 250, "gs_base": 251,
    "cr0": 50, "cr2": 52, "cr3": 53, "cr4": 54, "dr0": 66, "dr1": 67, "dr2": 68, "dr3": 69, "dr6": 72, "dr7": 73,
}  # fmt: skip
_TABLES = {"idtr": 242, "gdtr": 243, "tr": 245}
_REG_MSR = 248


class _Msr(ctypes.Structure):
    _fields_ = (("rid", c_uint32), ("value", c_uint64))


class _DescriptorTable(ctypes.Structure):
    _fields_ = (("selector", ctypes.c_uint16), ("base", c_uint64), ("limit", c_uint32), ("flags", c_uint32))


class UnicornError(EmulatorError):
    """A call into Unicorn failed; `code` is its uc_err."""

    def __init__(self, what: str, code: int) -> None:
        text = library().uc_strerror(code).decode()
        super().__init__(f"{what}: {text} (uc_err {code})")
        self.code = code


@cache
def library() -> ctypes.CDLL:
    """Load libunicorn and check its version.

    Raises EmulatorError when it is not there or not the version this code was written for.
    """
    spec = importlib.util.find_spec("unicorn")
    if spec is None or not spec.submodule_search_locations:
        raise EmulatorError(f"the Python package unicorn is missing: pip install unicorn=={WANTED_VERSION}")
    path = Path(spec.submodule_search_locations[0]) / "lib" / "libunicorn.so.2"
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise EmulatorError(f"cannot load {path}: {error}; pip install unicorn=={WANTED_VERSION}") from error
    major, minor = c_uint32(), c_uint32()
    packed = lib.uc_version(byref(major), byref(minor))
    found = f"{major.value}.{minor.value}.{packed >> 8 & 0xFF}"
    if found != WANTED_VERSION:
        raise EmulatorError(
            f"Unicorn {found} found, {WANTED_VERSION} wanted (private offsets are tied to it): "
            f"pip install unicorn=={WANTED_VERSION}"
        )
    lib.uc_strerror.restype = c_char_p
    lib.uc_context_size.restype = c_size_t
    lib.uc_context_size.argtypes = [c_void_p]
    return lib


def address(symbol: str) -> int:
    """Return the host address of an exported symbol of libunicorn, or raise EmulatorError naming it."""
    try:
        value = ctypes.cast(getattr(library(), symbol), c_void_p).value
    except AttributeError as error:
        raise EmulatorError(f"Unicorn {WANTED_VERSION} of this build does not export {symbol}") from error
    assert value
    return value


class Engine:
    """One Unicorn x86-64 engine: registers, memory map, hooks. Errors are raised as UnicornError."""

    def __init__(self) -> None:
        self.lib = library()
        self.handle = c_void_p()
        self._check("open", self.lib.uc_open(c_int(ARCH_X86), c_int(MODE_64), byref(self.handle)))
        self._ctl(_CTL_TCG_BUFFER_SIZE, c_uint32(_TCG_BUFFER))
        self._keep: list[Any] = []

    def close(self) -> None:
        """Free the engine; it must not run."""
        if self.handle:
            self.lib.uc_close(self.handle)
            self.handle = c_void_p()

    def _check(self, what: str, code: int) -> None:
        if code:
            raise UnicornError(f"uc_{what}", code)

    def _ctl(self, what: int, *args: Any) -> None:
        control = c_uint32(what | len(args) << 26 | _CTL_WRITE << 30)
        self._check("ctl", self.lib.uc_ctl(self.handle, control, *args))

    # ---- registers

    def read(self, register: str) -> int:
        """Return a register of REGISTERS."""
        value = c_uint64()
        self._check("reg_read", self.lib.uc_reg_read(self.handle, c_int(REGISTERS[register]), byref(value)))
        return value.value

    def write(self, register: str, value: int) -> None:
        """Set a register. Writing CS or SS sets the selector alone, not the cached descriptor."""
        self._check("reg_write", self.lib.uc_reg_write(self.handle, c_int(REGISTERS[register]), byref(c_uint64(value))))

    def read_msr(self, msr: int) -> int:
        """Return a model-specific register."""
        value = _Msr(msr, 0)
        self._check("reg_read", self.lib.uc_reg_read(self.handle, c_int(_REG_MSR), byref(value)))
        return int(value.value)

    def write_msr(self, msr: int, value: int) -> None:
        """Set a model-specific register."""
        self._check("reg_write", self.lib.uc_reg_write(self.handle, c_int(_REG_MSR), byref(_Msr(msr, value))))

    def write_table(self, register: str, base: int, limit: int) -> None:
        """Set gdtr, idtr or tr: a guest virtual base and the limit (bytes - 1)."""
        table = _DescriptorTable(0, base, limit, 0)
        self._check("reg_write", self.lib.uc_reg_write(self.handle, c_int(_TABLES[register]), byref(table)))

    # ---- memory

    def map_host_memory(self, physical: int, size: int, host_address: int) -> None:
        """Make `size` bytes of this process the guest's RAM at a physical address."""
        self._check(
            "mem_map_ptr",
            self.lib.uc_mem_map_ptr(
                self.handle, c_uint64(physical), c_size_t(size), c_uint32(PROT_ALL), c_void_p(host_address)
            ),
        )

    def map_io(
        self, physical: int, size: int, read: Callable[[int, int], int], write: Callable[[int, int, int], None]
    ) -> None:
        """Call `read(offset, size)` and `write(offset, size, value)` for accesses to a physical range."""
        on_read = ctypes.CFUNCTYPE(c_uint64, c_void_p, c_uint64, c_uint32, c_void_p)(
            lambda _uc, offset, width, _data: read(offset, width)
        )
        on_write = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, c_uint32, c_uint64, c_void_p)(
            lambda _uc, offset, width, value, _data: write(offset, width, value)
        )
        self._keep += [on_read, on_write]
        self._check(
            "mmio_map",
            self.lib.uc_mmio_map(self.handle, c_uint64(physical), c_size_t(size), on_read, None, on_write, None),
        )

    def flush_translations(self) -> None:
        """Forget all translated code and cached address translations."""
        self._ctl(_CTL_TB_FLUSH)
        self._ctl(_CTL_TLB_FLUSH)

    def forget_code(self, start: int, end: int) -> None:
        """Forget translations of guest virtual addresses start..end-1."""
        self._ctl(_CTL_TB_REMOVE_CACHE, c_uint64(start), c_uint64(end))

    # ---- hooks

    def hook(self, kind: int, callback: Any, begin: int = 1, end: int = 0, instruction: int | None = None) -> c_size_t:
        """Add a hook; `callback` is a CFUNCTYPE object, kept alive here."""
        handle = c_size_t()
        extra = () if instruction is None else (c_int(instruction),)
        self._keep.append(callback)
        self._check(
            "hook_add",
            self.lib.uc_hook_add(
                self.handle, byref(handle), c_int(kind), callback, None, c_uint64(begin), c_uint64(end), *extra
            ),
        )
        return handle

    def unhook(self, handle: c_size_t) -> None:
        """Delete a hook while the engine is stopped.

        The engine forgets the code it was called from by guest virtual address, so the CPU must be in a mode that may
        read there. The callback is the caller's to keep until the engine has run again.
        """
        self._check("hook_del", self.lib.uc_hook_del(self.handle, handle))

    def hook_ports(self, read: Callable[[int, int], int], write: Callable[[int, int, int], None]) -> None:
        """Call `read(port, size)` for IN and `write(port, size, value)` for OUT."""
        on_in = ctypes.CFUNCTYPE(c_uint32, c_void_p, c_uint32, c_int, c_void_p)(
            lambda _uc, port, size, _data: read(port, size)
        )
        on_out = ctypes.CFUNCTYPE(None, c_void_p, c_uint32, c_int, c_uint32, c_void_p)(
            lambda _uc, port, size, value, _data: write(port, size, value)
        )
        self.hook(HOOK_INSN, on_in, instruction=INS_IN)
        self.hook(HOOK_INSN, on_out, instruction=INS_OUT)

    # ---- running

    def start(self, begin: int, count: int = 0) -> int:
        """Run from guest virtual address `begin`; return uc_err (0 when it stopped of its own)."""
        code: int = self.lib.uc_emu_start(self.handle, c_uint64(begin), c_uint64(0), c_uint64(0), c_size_t(count))
        return code

    def stop(self) -> None:
        """Ask a running engine to come back after the current block. Callable from hooks and from other threads."""
        self.lib.uc_emu_stop(self.handle)

    # ---- CPU state

    def context_alloc(self) -> c_void_p:
        """Return a new uc_context."""
        context = c_void_p()
        self._check("context_alloc", self.lib.uc_context_alloc(self.handle, byref(context)))
        return context

    def context_save(self, context: c_void_p) -> None:
        """Copy the CPU's whole state into a context."""
        self._check("context_save", self.lib.uc_context_save(self.handle, context))

    def context_restore(self, context: c_void_p) -> None:
        """Copy a context back into the CPU."""
        self._check("context_restore", self.lib.uc_context_restore(self.handle, context))

    def context_size(self) -> int:
        """Return the size of a uc_context in bytes."""
        return int(self.lib.uc_context_size(self.handle))
