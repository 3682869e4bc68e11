"""The ctypes mirror of the native part: `struct core` and what is in it (native/core.h and what that includes)."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_int, c_int32, c_int64, c_short, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from emulator.cpu.unicorn_cpu import MAX_WATCHED
from emulator.errors import EmulatorError

OFFSETS = (
    "eip", "eflags", "hflags", "segs", "star", "lstar", "fmask", "tsc_aux", "cpu_halted", "cpu_interrupt_request",
)  # fmt: skip
WATCH_OFFSETS = ("cpu_cflags_next_tb", "cpu_icount", "env_dr", "env_watchpoint", "env_cr")
REDIRECT_VALUES = 5  # of enum redirect_value
_SHORTCUT_KINDS, _SHORTCUT_BODIES = 2, 5
TRANSLATE = {
    "emit_check": "check_exit_request_x86_64",
    "emit_call": "tcg_gen_callN_x86_64",
    "make_block": "tb_gen_code_x86_64",
    "check": "helper_check_exit_request_x86_64",
    "hook_helper": "helper_uc_tracecode",
    "constant": "tcg_const_i64_x86_64",
    "new_temp": "tcg_temp_new_internal_x86_64",
    "free_temp": "tcg_temp_free_internal_x86_64",
    "new_label": "gen_new_label_x86_64",
    "op1": "tcg_gen_op1_x86_64",
    "op3": "tcg_gen_op3_x86_64",
    "go_on": "tcg_gen_lookup_and_goto_ptr_x86_64",
    "branch": "tcg_gen_brcondi_i64_x86_64",
}


class PollFd(ctypes.Structure):
    """struct pollfd of poll(2)."""

    _fields_ = (("fd", c_int), ("events", c_short), ("revents", c_short))


class LayoutOffsets(ctypes.Structure):
    """struct core_layout."""

    _fields_ = tuple((name, c_uint32) for name in OFFSETS)


class WatchOffsets(ctypes.Structure):
    """struct watch_offsets."""

    _fields_ = (*((name, c_uint32) for name in WATCH_OFFSETS), ("pad", c_uint32))


class WatchHit(ctypes.Structure):
    """struct watch_hit."""

    _fields_ = (
        ("token", c_uint64),
        ("address", c_uint64),
        ("length", c_uint64),
        ("ip", c_uint64),
        ("next_ip", c_uint64),
        ("watched", c_uint64),
        ("old", c_uint64),
        ("access", c_uint32),
        ("kind", c_uint32),
    )


class Watch(ctypes.Structure):
    """struct watch."""

    _fields_ = (
        ("restore_state", c_void_p),
        ("loop_exit", c_void_p),
        ("flush_tlb", c_void_p),
        ("at", WatchOffsets),
        ("ram", c_void_p),
        ("ram_size", c_uint64),
        ("handler_low", c_uint64),
        ("handler_high", c_uint64),
        ("hits", POINTER(WatchHit)),
        ("nhits", c_uint32),
        ("nstops", c_uint32),
        ("checks", c_uint64),
        ("matches", c_uint64),
        ("delivered", c_uint64),
        ("dropped", c_uint64),
    )


class Redirect(ctypes.Structure):
    """struct redirect."""

    _fields_ = (
        ("notifier", c_uint64),
        ("dispatcher", c_uint64),
        ("back", c_uint64),
        ("access_names", c_uint64),
        ("die_args_regs", c_uint32),
        ("kprobe_addr", c_uint32),
        ("lent", c_uint32 * REDIRECT_VALUES),
        ("active", c_uint32),
        ("next", c_uint32),
        ("pad", c_uint32),
        ("rdi", c_uint64),
        ("rsi", c_uint64),
        ("rdx", c_uint64),
        ("regs", c_uint64),
        ("own", c_uint64 * REDIRECT_VALUES),
        ("probe", c_uint64),
        ("probe_addr", c_uint64),
        ("calls", c_uint64),
        ("lost", c_uint64),
    )


class Smc(ctypes.Structure):
    """struct smc."""

    _fields_ = (
        ("protect_code", c_void_p),
        ("set_dirty", c_void_p),
        ("reset_dirty", c_void_p),
        ("invalidate", c_void_p),
        ("code_address", c_void_p),
        ("ram_base", c_uint64),
        ("rewritten", c_uint64),
    )


class Translate(ctypes.Structure):
    """struct translate; the pointers are those to Unicorn's functions in TRANSLATE."""

    _fields_ = (
        *((name, c_void_p) for name in TRANSLATE),
        ("block_hook", c_void_p),
        ("exit_request", c_void_p),
        ("left_out", c_uint64),
    )


class ShortcutBody(ctypes.Structure):
    """struct shortcut_body."""

    _fields_ = (("now", c_void_p), ("first", c_void_p), ("size", c_uint64))


class Shortcut(ctypes.Structure):
    """struct shortcut."""

    _fields_ = (
        ("address", c_uint64),
        ("taken", c_uint64),
        ("declined", c_uint64),
        ("bodies", c_uint64),
        ("body", ShortcutBody * _SHORTCUT_BODIES),
    )


class ShortcutValues(ctypes.Structure):
    """struct shortcuts."""

    _fields_ = (
        ("list", Shortcut * _SHORTCUT_KINDS),
        *((name, c_uint64) for name in ("caller_low", "caller_high", "names", "names_end", "markers")),
        *((name, c_uint32) for name in ("iter_page", "iter_index", "page_next", "page_records")),
        *((name, c_uint32) for name in ("page_used", "record_size", "record_flags", "busy")),
        ("names_at", c_void_p),
        ("returned", c_int32),
        ("blocked", c_int32),
    )


class Core(ctypes.Structure):
    """struct core."""

    _fields_ = (
        ("uc", c_void_p),
        ("cpu", c_void_p),
        ("env", c_void_p),
        ("emu_start", c_void_p),
        ("emu_stop", c_void_p),
        ("set_rip", c_void_p),
        ("hook_add", c_void_p),
        ("do_interrupt", c_void_p),
        ("hardirq", c_void_p),
        ("read_eflags", c_void_p),
        ("write_eflags", c_void_p),
        ("at", LayoutOffsets),
        ("hypercall_leaf", c_uint32),
        ("pad", c_uint32),
        ("base_ns", c_int64),
        ("granted", c_int64),
        ("budget", c_int64),
        ("deadline_ns", c_int64),
        ("vector", c_int32),
        ("window", c_int32),
        ("stop_word", c_int32),
        ("reason", c_int32),
        ("error", c_int32),
        ("nfds", c_int32),
        ("fds", PollFd * MAX_WATCHED),
        ("exceptions", c_uint64),
        ("syscalls", c_uint64),
        ("interrupts", c_uint64),
        ("hypercalls", c_uint64),
        ("runs", c_uint64),
        ("watch", Watch),
        ("redirect", Redirect),
        ("smc", Smc),
        ("translate", Translate),
        ("shortcuts", ShortcutValues),
    )


@cache
def library() -> ctypes.CDLL:
    """Load the native part. Raises EmulatorError when it is not built, or not of this version."""
    found = sorted(Path(__file__).parent.parent.glob("_core*.so"))
    if not found:
        raise EmulatorError("the native part of the emulator is not built: make setup")
    lib = ctypes.CDLL(str(found[0]))
    lib.core_size.restype = c_uint64
    if lib.core_size() != ctypes.sizeof(Core):
        raise EmulatorError("the native part of the emulator is of another version: make setup")
    lib.core_attach.argtypes = lib.core_run.argtypes = lib.core_now.argtypes = [POINTER(Core)]
    lib.core_shorten.argtypes = [POINTER(Core), c_int64]
    lib.core_shorten.restype = None
    lib.core_now.restype = c_int64
    lib.core_interrupt_callback.restype = c_void_p
    lib.watch_install.argtypes = [POINTER(Core), c_void_p * 5]
    lib.watch_add.argtypes = [POINTER(Core), c_uint64, c_uint64, c_uint32, c_uint32, c_uint64]
    lib.watch_move.argtypes = [POINTER(Core), c_int, c_uint64]
    lib.watch_remove.argtypes = [POINTER(Core), c_int]
    lib.watch_again.argtypes = [POINTER(Core), c_uint64]
    lib.watch_again.restype = c_bool
    lib.watch_detach.argtypes = [POINTER(Core)]
    lib.watch_detach.restype = None
    lib.smc_install.argtypes = lib.smc_detach.argtypes = [POINTER(Core)]
    lib.smc_detach.restype = None
    lib.redirect_install.argtypes = [POINTER(Core)]
    lib.core_translate.argtypes = [POINTER(Core), c_void_p]
    lib.translate_detach.argtypes = [POINTER(Core)]
    lib.translate_detach.restype = None
    lib.shortcuts_install.argtypes = [POINTER(Core), c_int, c_uint64, POINTER(c_uint64), c_int]
    lib.shortcuts_detach.argtypes = [POINTER(Core)]
    lib.shortcuts_detach.restype = None
    return lib
