"""The frame that a signal's handler leaves by rt_sigreturn(2): struct rt_sigframe of x86-64, signal(7), sigreturn(2).

A notified rt_sigreturn has a danger that no other call has: a signal that comes before it has been received interrupts
it, and where no call may return, "interrupted" is returned to. But the handler of that signal returns too, by a frame
that says so: it is made to say that the first return is to be made again.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from fakefs.mirror.seccomp import read_memory

RT_SIGRETURN = 15
_SYSCALL_SIZE = 2  # of the instruction
_CONTEXT = 40  # struct ucontext begins at the stack pointer; there begins its struct sigcontext
_AX, _IP = _CONTEXT + 13 * 8, _CONTEXT + 16 * 8
_MASK, _INFO, _SIZE = 296, 304, 304 + 32
_LINE_MAX = 256  # /proc/TID/syscall
_RUNNING = b"running\n"  # what that says of one that is not asleep yet


class Frame(NamedTuple):
    """Where a thread goes back to. Addresses are those of its process.

    `stack` is where the frame lies, `ip` is that of the call for leaving the handler; `saved_ip`, `saved_ax` and `mask`
    are what is restored. `info` is the beginning of the siginfo_t, if the handler has asked for one, `first` what the
    register holds in which a handler is given its signal: both may be anything.
    """

    stack: int
    ip: int
    first: int
    saved_ip: int
    saved_ax: int
    mask: int
    info: bytes

    @property
    def interrupts(self) -> bool:
        """Has the signal come while the thread was leaving another handler?"""
        return self.saved_ip == self.ip and self.saved_ax == -errno.EINTR


def leave(tid: int, waits: Callable[[], bool]) -> Frame | None:
    """Return the frame of a thread that leaves a handler, after setting right what the notification has made wrong.

    None when it cannot be read: the thread has been killed, or hides its memory.
    """
    with suppress(OSError, ValueError, struct.error):
        frame = _read(tid, waits)
        if frame is not None and frame.interrupts and waits():
            _repeat(tid, frame)
        return frame
    return None


def _read(tid: int, waits: Callable[[], bool]) -> Frame | None:
    with open(f"/proc/{tid}/syscall", "rb", buffering=0) as file:
        line = file.read(_LINE_MAX)
        while line == _RUNNING and waits():  # it has been woken by a signal, and goes to sleep again
            file.seek(0)
            line = file.read(_LINE_MAX)
    return parse(line, lambda stack: read_memory(tid, stack, _SIZE))


def parse(line: bytes, read: Callable[[int], bytes]) -> Frame | None:
    """Parse /proc/TID/syscall, proc_pid_syscall(5), and what is read at the stack pointer it has.

    Raises ValueError or struct.error.
    """
    words = [int(word, 0) for word in line.split()]
    if len(words) != 9 or words[0] != RT_SIGRETURN:
        return None
    stack, ip = words[-2:]
    data = read(stack)
    [ax], [saved_ip] = struct.unpack_from("<q", data, _AX), struct.unpack_from("<Q", data, _IP)
    [mask] = struct.unpack_from("<Q", data, _MASK)
    return Frame(stack, ip, words[1], saved_ip, ax, mask, data[_INFO:_SIZE])


def _repeat(tid: int, frame: Frame) -> None:
    """Have a thread make its call once more where it goes back to."""
    memory = os.open(f"/proc/{tid}/mem", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(memory, struct.pack("<Q", RT_SIGRETURN), frame.stack + _AX)
        os.pwrite(memory, struct.pack("<Q", frame.ip - _SYSCALL_SIZE), frame.stack + _IP)
    finally:
        os.close(memory)
