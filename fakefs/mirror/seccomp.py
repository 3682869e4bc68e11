"""Seccomp's user notification, as much of it as mirroring needs: a filter, its listener, and the answer "go on".

Structures, numbers and rules are those of <linux/seccomp.h>, <linux/filter.h> and seccomp_unotify(2). Not here: which
calls are notified (`fakefs.mirror.calls`), and what is made of them (`fakefs.mirror.recorder`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_AUDIT_ARCH_X86_64 = 0xC000003E
_RET_ALLOW, _RET_USER_NOTIF = 0x7FFF0000, 0x7FC00000
# struct seccomp_data
_DATA_NUMBER, _DATA_ARCH, _DATA_ARGUMENTS = 0, 4, 16
# BPF: load a word, and it, jump, jump if equal, jump if any bit is set, return
_LOAD, _AND, _JUMP, _JUMP_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x54, 0x05, 0x15, 0x45, 0x06
_INSTRUCTION = struct.Struct("<HBBI")
_FAR = 255  # a jump goes over this many instructions at the most

_SYS_SECCOMP = 317
_SET_MODE_FILTER = 1
_NEW_LISTENER, _WAIT_KILLABLE_RECV = 1 << 3, 1 << 5
_FLAG_SETS = (_NEW_LISTENER | _WAIT_KILLABLE_RECV, _NEW_LISTENER)  # the second before Linux 5.19
_PR_SET_NO_NEW_PRIVS = 38

_NOTIF_RECV, _NOTIF_SEND, _NOTIF_ID_VALID, _NOTIF_SET_FLAGS = 0xC0502100, 0xC0182101, 0x40082102, 0x40082104
_NOTIF_ADDFD, _ADDFD, _ADDFD_SEND = 0x40182103, struct.Struct("<QIIII"), 2
_FD_SYNC_WAKE_UP = 1
_FLAG_CONTINUE = 1
_NOTIFICATION = struct.Struct("<QIIiIQ6Q")
_RESPONSE = struct.Struct("<QqiI")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_PAGE = 4096
_STRING = 256


class Rule(NamedTuple):
    """Notify a system call; with `argument`, only if that has a bit of `mask`, or (no mask) is `value`.

    With both, only if the bits of `mask` are those of `value`. Of an argument the lower 32 bits are looked at.
    """

    number: int
    argument: int | None = None
    mask: int = 0
    value: int = 0

    def matches(self, arguments: Sequence[int]) -> bool:
        """Does it notify a call of its number with these arguments?"""
        if self.argument is None:
            return True
        word = arguments[self.argument] & 0xFFFFFFFF
        if self.mask and self.value:
            return word & self.mask == self.value
        return bool(word & self.mask) if self.mask else word == self.value


class Notification(NamedTuple):
    """A call that waits for an answer. `tid` is its thread in the reader's PID namespace; 0 if it is not in there."""

    id: int
    tid: int
    number: int
    arguments: tuple[int, ...]  # six, unsigned


def program(rules: Iterable[Rule]) -> bytes:
    """Return the BPF program that notifies what `rules` say and allows all else, calls of other ABIs included.

    Raises ValueError when there are more than a filter of this simple form can hold.
    """
    always: list[Rule] = []
    conditional: dict[int, list[Rule]] = {}
    for rule in rules:
        (always if rule.argument is None else conditional.setdefault(rule.number, [])).append(rule)
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _DATA_ARCH),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _RET_ALLOW),
        (_LOAD, 0, 0, _DATA_NUMBER),
    ]
    if len(always) > _FAR:
        raise ValueError(f"more than {_FAR} rules")
    code += [(_JUMP_EQUAL, len(always) - index, 0, rule.number) for index, rule in enumerate(always)]
    code += [(_JUMP, 0, 0, 1), (_RETURN, 0, 0, _RET_USER_NOTIF)]
    for number, group in conditional.items():
        tests: list[tuple[int, int, int, int]] = []
        for rule in group:
            tests.append((_LOAD, 0, 0, _DATA_ARGUMENTS + 8 * (rule.argument or 0)))
            if rule.mask and rule.value:
                tests.append((_AND, 0, 0, rule.mask))
            any_of = rule.mask and not rule.value
            tests.append((_JUMP_SET if any_of else _JUMP_EQUAL, 0, 1, rule.mask if any_of else rule.value))
            tests.append((_RETURN, 0, 0, _RET_USER_NOTIF))
        if len(tests) >= _FAR:
            raise ValueError(f"more than {_FAR // 3} rules for a call")
        code += [(_JUMP_EQUAL, 0, len(tests) + 1, number), *tests, (_RETURN, 0, 0, _RET_ALLOW)]
    code.append((_RETURN, 0, 0, _RET_ALLOW))
    return b"".join(_INSTRUCTION.pack(*each) for each in code)


def install(filter_program: bytes) -> int:
    """Put this thread and all its descendants under a filter; return the descriptor of its listener.

    Without CAP_SYS_ADMIN in its user namespace the thread gives up new privileges by exec first. Raises OSError: EBUSY
    when there is a listener already.
    """
    buffer = ctypes.create_string_buffer(filter_program, len(filter_program))
    header = struct.pack("<H6xQ", len(filter_program) // _INSTRUCTION.size, ctypes.addressof(buffer))
    fprog = ctypes.create_string_buffer(header, len(header))
    for attempt in (False, True):
        if attempt:
            _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        for flags in _FLAG_SETS:
            fd = _libc.syscall(_SYS_SECCOMP, _SET_MODE_FILTER, ctypes.c_ulong(flags), fprog)
            if fd >= 0:
                return int(fd)
            number = ctypes.get_errno()
            if number != errno.EINVAL:
                break
        if number != errno.EACCES:
            break
    raise OSError(number, os.strerror(number))


class Listener:
    """The other end of a filter: receives its notifications."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._notification = ctypes.create_string_buffer(_NOTIFICATION.size)
        self._response = ctypes.create_string_buffer(_RESPONSE.size)
        self._id = ctypes.create_string_buffer(8)
        self._ioctl = _libc.ioctl
        # The notified thread runs on this CPU as soon as we wait again: Linux 6.6, and only faster.
        self._ioctl(fd, ctypes.c_ulong(_NOTIF_SET_FLAGS), ctypes.c_ulong(_FD_SYNC_WAKE_UP))

    def receive(self) -> Notification | None:
        """Wait for a notification; None when the one that was there has gone. Raises OSError, EINTR included."""
        ctypes.memset(self._notification, 0, _NOTIFICATION.size)  # the kernel insists
        if self._ioctl(self.fd, ctypes.c_ulong(_NOTIF_RECV), self._notification) < 0:
            number = ctypes.get_errno()
            if number == errno.ENOENT:
                return None
            raise OSError(number, os.strerror(number))
        identity, tid, _, number, _, _, *arguments = _NOTIFICATION.unpack(self._notification)
        return Notification(identity, tid, number, tuple(arguments))

    def proceed(self, identity: int) -> bool:
        """Let a call go on as if nothing was; False when its thread is gone."""
        _RESPONSE.pack_into(self._response, 0, identity, 0, 0, _FLAG_CONTINUE)
        return bool(self._ioctl(self.fd, ctypes.c_ulong(_NOTIF_SEND), self._response) == 0)

    def refuse(self, identity: int, error: int) -> bool:
        """Have a call fail with an error number instead of being made; False when its thread is gone."""
        _RESPONSE.pack_into(self._response, 0, identity, 0, -error, 0)
        return bool(self._ioctl(self.fd, ctypes.c_ulong(_NOTIF_SEND), self._response) == 0)

    def complete(self, identity: int, result: int) -> bool:
        """Have a call return `result` instead of being made; False when its thread is gone."""
        _RESPONSE.pack_into(self._response, 0, identity, result, 0, 0)
        return bool(self._ioctl(self.fd, ctypes.c_ulong(_NOTIF_SEND), self._response) == 0)

    def give(self, identity: int, fd: int, flags: int) -> None:
        """Have a call return a descriptor of its process for our `fd`; `flags` may have O_CLOEXEC. Linux 5.14.

        Raises OSError: the call still waits then, unless its thread is gone (ENOENT).
        """
        packed = ctypes.create_string_buffer(_ADDFD.pack(identity, _ADDFD_SEND, fd, 0, flags), _ADDFD.size)
        if self._ioctl(self.fd, ctypes.c_ulong(_NOTIF_ADDFD), packed) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def is_valid(self, identity: int) -> bool:
        """Is the call still waiting, so that its thread's id is not another's by now?"""
        struct.pack_into("<Q", self._id, 0, identity)
        return bool(self._ioctl(self.fd, ctypes.c_ulong(_NOTIF_ID_VALID), self._id) == 0)


def read_memory(tid: int, address: int, size: int) -> bytes:
    """Return what is mapped of `size` bytes (up to a page's worth) at an address of a process; b"" when nothing is."""
    if not 0 < size <= _PAGE or not 0 < address < 1 << 47:
        return b""
    first = min(size, _PAGE - address % _PAGE)  # each page by itself: the second may not be there
    buffer = ctypes.create_string_buffer(size)
    local = ctypes.create_string_buffer(struct.pack("<QQ", ctypes.addressof(buffer), size), 16)
    remote = ctypes.create_string_buffer(struct.pack("<QQQQ", address, first, address + first, size - first), 32)
    got = _libc.process_vm_readv(tid, local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1 + (size > first)), 0)
    return buffer.raw[:got] if got > 0 else b""


def read_string(tid: int, address: int, limit: int = _PAGE) -> bytes | None:
    """Return the NUL-terminated string at an address of a process; None when there is none, or a longer one."""
    for size in (_STRING, limit):  # nearly all are short, and a page takes longer than all else about them
        data = read_memory(tid, address, min(size, limit))
        if (end := data.find(b"\0")) >= 0:
            return data[:end]
    return None
