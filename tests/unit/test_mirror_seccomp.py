"""The filter of mirroring, held against an interpreter of BPF; then the real one, in a child process."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs.mirror import calls, trampoline
from fakefs.mirror.calls import Call, Level
from fakefs.mirror.seccomp import Listener, Rule, install, program, read_memory, read_string

_X86_64, _I386 = 0xC000003E, 0x40000003
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_READ = 0
_EVENTFD2 = 290  # a call that Python itself does not make


def run(code: bytes, number: int, arch: int = _X86_64, arguments: Iterable[int] = ()) -> int:
    """Interpret a classic BPF program over a struct seccomp_data."""
    padded = [*arguments, *(0,) * 6][:6]
    data = struct.pack("<IIQ6Q", number, arch, 0, *padded)
    at = accumulator = 0
    instructions = list(struct.iter_unpack("<HBBI", code))
    while True:
        operation, true, false, k = instructions[at]
        at += 1
        match operation:
            case 0x20:
                [accumulator] = struct.unpack_from("<I", data, k)
            case 0x05:
                at += k
            case 0x15:
                at += true if accumulator == k else false
            case 0x45:
                at += true if accumulator & k else false
            case 0x54:
                accumulator &= k
            case 0x06:
                return int(k)
            case other:
                raise AssertionError(f"operation {other:#x}")


_NUMBERS = st.integers(0, 600)
_RULES = st.lists(
    st.builds(Rule, _NUMBERS, st.none(), st.just(0), st.just(0))
    | st.builds(Rule, _NUMBERS, st.integers(0, 5), st.integers(1, 0xFFFFFFFF), st.just(0))
    | st.builds(Rule, _NUMBERS, st.integers(0, 5), st.just(0), st.integers(0, 0xFFFFFFFF))
    | st.builds(Rule, _NUMBERS, st.integers(0, 5), st.just(0xFF00), st.integers(1, 255).map(lambda byte: byte << 8)),
    max_size=40,
)


@given(_RULES, _NUMBERS, st.lists(st.integers(0, (1 << 64) - 1), min_size=6, max_size=6))
def test_a_filter_does_what_its_rules_say(rules: list[Rule], number: int, arguments: list[int]) -> None:
    code = program(rules)
    expected = any(rule.number == number and rule.matches(arguments) for rule in rules)
    assert run(code, number, arguments=arguments) == (_NOTIFY if expected else _ALLOW)
    assert run(code, number, _I386, arguments) == _ALLOW
    for rule in rules:
        expected = any(each.number == rule.number and each.matches(arguments) for each in rules)
        assert run(code, rule.number, arguments=arguments) == (_NOTIFY if expected else _ALLOW)


def test_too_many_rules_are_refused() -> None:
    assert run(program(map(Rule, range(255))), 254) == _NOTIFY
    with pytest.raises(ValueError, match="255"):
        program(map(Rule, range(256)))
    with pytest.raises(ValueError, match="85"):
        program(Rule(1, 0, value=value) for value in range(85))


def test_rules_say_what_they_match() -> None:
    arguments = [1 << 40 | 6, 0, 0, 0, 0, 0]
    assert Rule(1).matches(arguments)
    assert Rule(1, 0, value=6).matches(arguments)
    assert not Rule(1, 0, value=4).matches(arguments)
    assert Rule(1, 0, mask=4).matches(arguments)
    assert not Rule(1, 0, mask=1).matches(arguments)
    assert Rule(1, 0, mask=12, value=4).matches(arguments)
    assert not Rule(1, 0, mask=6, value=4).matches(arguments)
    fcntl = calls.NUMBER["fcntl"]
    assert [calls.find(fcntl, [3, command]).arguments for command in (0, 1030, 6)] == ["Oii", "Oii", "OiB"]


def test_levels() -> None:
    known = calls.BY_NUMBER | {trampoline.NUMBER: Call(trampoline.NUMBER, "trampoline", Level.PROCESS)}
    names = {level: {known[rule.number].name for rule in calls.rules(level)} for level in Level}
    assert names[Level.OFF] == set()
    assert "trampoline" in names[Level.PROCESS]
    assert {"execve", "exit_group", "nanosleep"} <= names[Level.PROCESS] < names[Level.FILES]
    assert {"openat", "unlinkat", "renameat2"} <= names[Level.FILES] - names[Level.PROCESS]
    code = program(calls.rules(Level.FILES))
    assert run(code, calls.NUMBER["openat"], arguments=[0, 0, os.O_RDONLY | os.O_CLOEXEC]) == _NOTIFY
    set_name, get_name = 15, 16
    assert run(code, calls.NUMBER["prctl"], arguments=[set_name]) == _NOTIFY
    assert run(code, calls.NUMBER["prctl"], arguments=[get_name]) == _ALLOW
    assert run(code, _READ) == _ALLOW


def test_a_notified_call_goes_on() -> None:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            socket.send_fds(theirs, [b"l"], [install(program([Rule(_EVENTFD2, 1, mask=os.EFD_SEMAPHORE)]))])
            os.close(os.eventfd(3))  # not notified
            fd = os.eventfd(3, os.EFD_SEMAPHORE)
            status = os.eventfd_read(fd)
        finally:
            os._exit(status)
    theirs.close()
    _, [fd], _, _ = socket.recv_fds(ours, 1, 1)
    listener = Listener(fd)
    notification = listener.receive()
    assert notification is not None
    assert (notification.tid, notification.number, notification.arguments[:2]) == (child, _EVENTFD2, (3, 1))
    assert listener.is_valid(notification.id)
    assert not listener.is_valid(notification.id ^ 1)
    assert listener.proceed(notification.id)
    assert not listener.proceed(notification.id)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    os.close(fd)
    ours.close()


def test_memory_is_read_as_far_as_it_is_there() -> None:
    import ctypes
    import mmap

    size = mmap.PAGESIZE
    area = mmap.mmap(-1, 2 * size)
    at = ctypes.addressof(ctypes.c_char.from_buffer(area))
    area[size - 6 : size] = b"hello\0"
    area[2 * size - 5 :] = b"world"
    pid = os.getpid()
    assert read_string(pid, at + size - 6) == b"hello"
    assert read_memory(pid, at + size - 6, 4096)[:6] == b"hello\0"
    assert read_memory(pid, at + 2 * size - 5, 4096)[:5] == b"world"
    for address in (0, 1, (1 << 47) - 1, 1 << 47, (1 << 64) - 1):
        assert read_memory(pid, address, 16) == b""
        assert read_string(pid, address) is None
    assert read_memory(pid, at, 0) == read_memory(pid, at, 4097) == b""
    with pytest.raises(OSError, match=os.strerror(errno.ESRCH)):
        os.kill(0x3FFFFFFF, 0)
    assert read_memory(0x3FFFFFFF, at, 16) == b""
