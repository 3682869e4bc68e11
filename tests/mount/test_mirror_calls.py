"""Each call that is mirrored, as a tracer sees it in the guest: by whom it is made, with what, and what it returns.

A script makes them on the host by `tests/mount/caller.py`, which tells what they were there.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from fakefs.mirror.calls import BY_NUMBER, NUMBER, TABLE
from fakefs.records import Record, parse
from tests.mount.conftest import Run
from tests.mount.mirrored import SETUP, SHOW, hits
from tests.mounted import FAKEFS

_CALLER = Path(__file__).parent / "caller.py"


_EVENTS = {"stat": "newstat", "lstat": "newlstat", "fstat": "newfstat", "sendfile": "sendfile64"}
_CALLS = {event: call for call, event in _EVENTS.items()}


_OF_THE_GUEST = "DF"
"""Descriptors: names are made absolute, and what is named by one is opened for the call."""


_RETURN_DESCRIPTORS = {"openat2", "creat", "dup", *(call.name for call in TABLE if call.returns)} - {"socketpair"}
"""The guest's may be others."""


class Made(NamedTuple):
    """A call: `words` are its arguments, None for an address."""

    pid: int
    name: str
    words: list[int | None]
    result: int


def _entered(hit: Record) -> list[int]:
    return [int(word, 16) for word in re.findall(r"\w+: (?:0x)?([0-9a-f]+)", hit.text)]


def _in_guest(hits: list[Record]) -> list[tuple[Made, str]]:
    """The calls in a trace that have returned, and the names of who has made them."""
    under_way: dict[int, list[int]] = {}
    made = []
    for hit in hits:
        kind, _, name = hit.event.removeprefix("sys_").partition("_")
        if kind == "enter":
            under_way[hit.pid] = _entered(hit)
        elif hit.pid in under_way:
            result = int(hit.text.split()[-1], 16)
            words: list[int | None] = list(under_way.pop(hit.pid))
            made.append((Made(hit.pid, _CALLS.get(name, name), words, result - (result >> 63 << 64)), hit.task))
    return made


def _alike(host: Made, guest: Made) -> bool:
    """Are they the same, as far as numbers go?"""
    pairs = list(zip(host.words, guest.words, strict=False))
    letters = "D" if host.name == "pidfd_send_signal" else BY_NUMBER[NUMBER[host.name]].arguments
    pairs = [pair for pair, letter in zip(pairs, letters.ljust(6), strict=False) if letter not in _OF_THE_GUEST]
    results = (host.result, guest.result)
    if host.name in _RETURN_DESCRIPTORS and min(results) >= 0:
        results = (0, 0)
    return (host.pid, host.name, results[0]) == (guest.pid, guest.name, results[1]) and all(
        one is None or other is None or one & 0xFFFFFFFF == other & 0xFFFFFFFF for one, other in pairs
    )


def check(mirrored: Run, script: str, *names: str, mirror: str = "all") -> list[Made]:
    """Run a script; fail if the guest's calls of some names do not have the host's among them, in their order.

    Return the host's.
    """
    switches = " ".join(f"syscalls/sys_{end}_{_EVENTS.get(name, name)}" for name in names for end in ("enter", "exit"))
    done = mirrored(
        SETUP
        + f"""
        echo 0 > tracing_on
        for event in {switches}; do
            if [ -e events/$event ]; then on $event; else echo "no $event"; fi
        done
        cd "$OLDPWD"
        {FAKEFS[0]} {_CALLER} '{json.dumps(NUMBER)}' {shlex.quote(script)}
        """
        + SHOW,
        mirror,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    lines = done.stdout.splitlines()
    told = next(line for line in lines if line.startswith("[["))
    missing = {line.rpartition("sys_exit_")[2] for line in lines if line.startswith("no ")}  # in an older kernel
    host = [Made(*each) for each in json.loads(told) if each[1] in names and each[1] not in missing]
    guest = _in_guest([hit for hit in parse(done.stdout) if hit.event])
    assert {each.name for each in host} == set(names) - missing
    for pid in {each.pid for each in host}:
        left = iter(guest)
        for wanted in (each for each in host if each.pid == pid):
            assert any(_alike(wanted, each) for each, _ in left), f"{wanted} is not among\n{done.stdout}"
    assert {comm for each, comm in guest if each.pid in {made.pid for made in host}} == {"python"}
    return host


def test_vectors(mirrored: Run) -> None:
    check(
        mirrored,
        r"""
fd = os.open("file", os.O_RDWR | os.O_CREAT)
call("writev", fd, vector(room(b"one"), room(b"three")), 2)
call("pwritev", fd, vector(room(b"at"), room(b"end")), 2, 100, 0)
call("pwritev2", fd, vector(room(b"x")), 1, 50, 0, 0)
call("lseek", fd, 1, os.SEEK_SET)
call("readv", fd, vector(room(2), room(3), room(200)), 3)
call("readv", fd, vector(room(2)), 1)
call("preadv", fd, vector(room(40), room(40)), 2, 10, 0)
call("preadv2", fd, vector(room(40)), 1, 100, 0, 0)
call("lseek", fd, -5, os.SEEK_CUR)
call("lseek", fd, 0, os.SEEK_END)
many = [room(10) for _ in range(100)]
call("writev", fd, vector(*many[:32]), 32)
        """,
        *("writev", "pwritev", "pwritev2", "readv", "preadv", "preadv2", "lseek"),
    )


def test_copies(mirrored: Run) -> None:
    """From file to file, through pipes and to a socket; of a large file all, as it is no more than the host's pipe."""
    check(
        mirrored,
        r"""
from socket import socketpair
source, target = os.open("source", os.O_RDWR | os.O_CREAT), os.open("target", os.O_RDWR | os.O_CREAT)
os.write(source, b"x" * 5000)
call("lseek", source, 0, 0)
call("sendfile", target, source, None, 1000)
call("sendfile", target, source, room((4000).to_bytes(8, "little")), 3000)
call("copy_file_range", source, None, target, None, 100, 0)
call("copy_file_range", source, room(bytes(8)), target, room(bytes(8)), 1 << 19, 0)
call("lseek", source, 0, 1)
call("lseek", target, 0, 1)
(reading, writing), (other, end) = os.pipe(), os.pipe()
call("splice", source, room(bytes(8)), writing, None, 3000, 0)
call("tee", reading, end, 2000, 0)
call("splice", reading, None, target, None, 1500, 0)
call("read", reading, room(5000), 5000)
call("read", other, room(5000), 5000)
        """,
        *("sendfile", "copy_file_range", "splice", "tee", "lseek", "read"),
    )


def test_open_files(mirrored: Run) -> None:
    """What is asked and told of them, and locks that two processes want."""
    check(
        mirrored,
        r"""
import fcntl
fd = os.open("file", os.O_RDWR | os.O_CREAT)
call("fallocate", fd, 0, 0, 10000)
call("fallocate", fd, 1, 0, 20000)
call("lseek", fd, 0, 2)
call("fsync", fd), call("fdatasync", fd), call("syncfs", fd), call("fadvise64", fd, 0, 100, 2)
call("fstat", fd, room(144)), call("newfstatat", fd, b"", room(144), 0x1000)
call("statx", fd, b"", 0x1000, 0xFFF, room(256)), call("fstatfs", fd, room(120))
call("fcntl", fd, 4, os.O_APPEND), call("fcntl", fd, 2, 1), call("fcntl", fd, 1, 0)
call("fcntl", fd, 1030, 40), call("fcntl", fd, 0, 45)
whole = struct.pack("<hhxxxxqqixxxx", 1, 0, 0, 0, 0)
call("fcntl", fd, 6, whole), call("fcntl", fd, 5, room(whole)), call("flock", fd, 2)
child = os.fork()
if child == 0:
    again = os.open("file", os.O_RDWR)
    call("fcntl", again, 6, whole), call("flock", again, 2 | 4)
    finish()
os.waitpid(child, 0)
call("flock", fd, 8)
call("ioctl", fd, 0x5401, room(36)), call("ioctl", fd, 0x541B, room(4))
directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
call("getdents", fd, room(100), 100), call("getdents64", fd, room(100), 100)
call("dup3", fd, 41, os.O_CLOEXEC), call("dup2", fd, 42), call("dup", fd)
call("write", 41, b"text", 4), call("write", 42, b"text", 4)
call("close_range", 41, 42, 0), call("close", fd)
        """,
        *("fallocate", "lseek", "fsync", "fdatasync", "syncfs", "fadvise64", "fstat", "newfstatat", "statx", "fstatfs"),
        *("fcntl", "flock", "ioctl", "getdents", "getdents64", "dup3", "dup2", "dup", "write", "close_range", "close"),
    )


def test_names(mirrored: Run) -> None:
    """Calls on files by their names that some programs use in place of the usual ones."""
    check(
        mirrored,
        r"""
os.mkdir("d")
d = os.open("d", os.O_PATH | os.O_DIRECTORY)
times = struct.pack("<4q", 100, 0, 200, 0)
call("openat2", d, b"f", struct.pack("<QQQ", os.O_CREAT | os.O_WRONLY, 0o600, 0), 24)
call("mknodat", d, b"fifo", 0o10644, 0), call("mknod", b"other", 0o10644, 0), call("creat", b"made", 0o600)
call("mkdirat", d, b"sub", 0o700), call("symlinkat", b"f", d, b"link"), call("linkat", d, b"f", d, b"hard", 0)
call("renameat2", d, b"hard", d, b"harder", 1), call("renameat", d, b"harder", d, b"hardest")
call("fchmodat", d, b"f", 0o640), call("fchmodat2", d, b"f", 0o600, 0)
call("fchownat", d, b"link", 0, 0, 0x100), call("lchown", b"d/link", 0, 0), call("chown", b"d/f", 0, 0)
call("utimensat", d, b"f", times, 0), call("utimes", b"d/f", times), call("utime", b"d/f", times)
call("futimesat", d, b"f", times)
call("faccessat", d, b"f", 4), call("faccessat2", d, b"f", 4, 0x100), call("access", b"d/none", 0)
call("readlinkat", d, b"link", room(100), 100), call("readlink", b"d/link", room(100), 100)
call("stat", b"d/f", room(144)), call("lstat", b"d/link", room(144)), call("statfs", b"d", room(120))
call("getcwd", room(4096), 4096), call("getcwd", room(2), 2), call("umask", 0o22)
call("unlinkat", d, b"f", 0), call("unlinkat", d, b"sub", 0x200)
        """,
        *(
            "openat2",
            "mknodat",
            "mknod",
            "creat",
            "mkdirat",
            "symlinkat",
            "linkat",
            "renameat2",
            "renameat",
            "fchmodat",
        ),
        *("fchmodat2", "fchownat", "lchown", "chown", "utimensat", "utimes", "utime", "futimesat", "faccessat"),
        *("faccessat2", "access", "readlinkat", "readlink", "stat", "lstat", "statfs", "getcwd", "umask", "unlinkat"),
    )


def test_attributes(mirrored: Run) -> None:
    """Of files: those of the user are no part of all kernels' tmpfs, those that there are not are none anywhere."""
    check(
        mirrored,
        r"""
fd = os.open("file", os.O_RDWR | os.O_CREAT)
call("setxattr", b"file", b"wrong", b"value", 5, 0), call("lsetxattr", b"file", b"wrong", b"value", 5, 0)
call("fsetxattr", fd, b"wrong", b"value", 5, 0)
call("getxattr", b"file", b"wrong", room(10), 10), call("lgetxattr", b"file", b"wrong", room(10), 10)
call("fgetxattr", fd, b"wrong", room(10), 10)
call("listxattr", b"file", room(100), 100), call("llistxattr", b"file", room(100), 100)
call("flistxattr", fd, room(100), 100)
call("removexattr", b"file", b"wrong"), call("lremovexattr", b"file", b"wrong"), call("fremovexattr", fd, b"wrong")
        """,
        *("setxattr", "lsetxattr", "fsetxattr", "getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr"),
        *("flistxattr", "removexattr", "lremovexattr", "fremovexattr"),
    )


def test_messages(mirrored: Run) -> None:
    """On a pair of sockets, which child and parent share, and to an address."""
    check(
        mirrored,
        r"""
pair = room(8)
call("socketpair", 1, 2, 0, pair)
one, two = struct.unpack("<ii", pair.raw)
call("sendmsg", one, message(room(b"ab"), room(b"cde")), 0)
call("sendmmsg", one, message(room(b"fgh")).ljust(64, b"\0") + message(room(b"i")).ljust(64, b"\0"), 2, 0)
call("recvmsg", two, message(room(100)), 0)
several = room(message(room(10)).ljust(64, b"\0") + message(room(10)).ljust(64, b"\0"))
call("recvmmsg", two, several, 2, 0, None)
call("getsockname", one, room(128), room((128).to_bytes(4, "little")))
call("getpeername", one, room(128), room((128).to_bytes(4, "little")))
call("setsockopt", one, 1, 7, room((9999).to_bytes(4, "little")), 4)
call("getsockopt", one, 1, 3, room(4), room((4).to_bytes(4, "little")))
call("getsockopt", one, 1, 4, room(4), room((4).to_bytes(4, "little")))
child = os.fork()
if child == 0:
    call("sendto", two, b"from the child", 14, 0, None, 0)
    finish()
os.waitpid(child, 0)
call("recvfrom", one, room(100), 100, 0, None, None)
call("shutdown", one, 1)
call("recvfrom", two, room(100), 100, 0x40, None, None)
named = call("socket", 1, 2 | 0o2000000, 0)
address = b"\1\0\0name"
call("bind", named, address, 7)
call("sendmsg", call("socket", 1, 2, 0), message(room(b"to a name"), name=address), 0)
call("recvmsg", named, message(room(100), name=bytes(110)), 0)
        """,
        *("socketpair", "sendmsg", "sendmmsg", "recvmsg", "recvmmsg", "getsockname", "getpeername", "setsockopt"),
        *("getsockopt", "sendto", "recvfrom", "shutdown", "socket", "bind"),
    )


def test_waiting_for_files(mirrored: Run) -> None:
    check(
        mirrored,
        r"""
pair = room(8)
call("socketpair", 1, 1, 0, pair)
one, two = struct.unpack("<ii", pair.raw)
pipe, end = os.pipe()
polled = room(struct.pack("<iIiI", one, 5, pipe, 1))
call("poll", polled, 2, 1000), call("poll", room(struct.pack("<iI", pipe, 1)), 1, 0), call("poll", None, 0, 1)
sets = [room((1 << fd).to_bytes(128, "little")) for fd in (pipe, one)]
call("select", max(pipe, one) + 1, *sets, None, room(struct.pack("<qq", 1, 0)))
os.write(end, b"x")
call("ppoll", polled, 2, room(struct.pack("<qq", 1, 0)), None, 8)
call("pselect6", pipe + 1, room((1 << pipe).to_bytes(128, "little")), None, None, room(struct.pack("<qq", 1, 0)), None)
events = call("epoll_create1", 0)
call("epoll_ctl", events, 1, two, struct.pack("<IQ", 1, 8))
count = call("eventfd2", 0, 0)
call("epoll_ctl", events, 1, count, struct.pack("<IQ", 1, 7))
call("epoll_wait", events, room(12 * 8), 8, 0)
call("write", count, (3).to_bytes(8, "little"), 8)
call("epoll_wait", events, room(12 * 8), 8, 1000)
os.write(one, b"x")
call("epoll_pwait", events, room(12 * 8), 8, 1000, None, 8)
call("epoll_pwait2", events, room(12 * 8), 8, struct.pack("<qq", 0, 0), None, 8)
call("read", count, room(8), 8)
call("epoll_ctl", events, 2, two, None)
timer = call("timerfd_create", 1, 0)
call("timerfd_settime", timer, 0, struct.pack("<4q", 0, 0, 0, 1000000), None)
call("read", timer, room(8), 8)
call("timerfd_gettime", timer, room(32))
        """,
        *("poll", "ppoll", "select", "pselect6", "epoll_create1", "eventfd2", "epoll_ctl", "epoll_wait", "epoll_pwait"),
        *("epoll_pwait2", "write", "read", "timerfd_create", "timerfd_settime", "timerfd_gettime"),
    )


def test_processes(mirrored: Run) -> None:
    """Less usual ways to make them, to wait for them and to send them signals."""
    check(
        mirrored,
        r"""
import signal
signal.signal(signal.SIGUSR1, lambda *_: None)
me = os.getpid()
info = struct.pack("<iii4xiiQ", signal.SIGUSR1, 0, -1, me, 0, 5).ljust(128, b"\0")
call("rt_sigqueueinfo", me, signal.SIGUSR1, info)
call("rt_tgsigqueueinfo", me, me, signal.SIGUSR1, info)
call("tgkill", me, me, signal.SIGUSR1), call("tkill", me, signal.SIGUSR1), call("kill", me, signal.SIGUSR1)
child = os.fork()
if child == 0:
    signal.pause()
pidfd = call("pidfd_open", child, 0)
call("pidfd_send_signal", pidfd, 0, None, 0)
call("pidfd_send_signal", pidfd, signal.SIGKILL, None, 0)
call("waitid", 1, child, room(128), 4, None)
child = os.posix_spawn("/bin/true", ["/bin/true"], {})
call("wait4", child, room(4), 0, None)
        """,
        *("rt_sigqueueinfo", "rt_tgsigqueueinfo", "tgkill", "tkill", "kill", "pidfd_open", "pidfd_send_signal"),
        *("waitid", "wait4"),
    )


def test_a_program_by_its_descriptor(mirrored: Run) -> None:
    program = """
import os
if os.fork() == 0:
    os.execve(os.open("/bin/true", os.O_RDONLY), ["true"], {})
os.wait()
"""
    done = mirrored(SETUP + f"on sched/sched_process_exec\n{FAKEFS[0]} -c '{program}'" + SHOW, "process")
    executed = [hit for hit in hits(done) if hit.event == "sched_process_exec"]
    assert [(hit.task, hit.fields["filename"]) for hit in executed][1:2] == [("true", "/usr/bin/true")]


def test_a_file_is_opened_once(mirrored: Run) -> None:
    """It has the number that it has on the host, is closed when it is closed there, and one that is missing is not."""
    done = mirrored(
        SETUP
        + """
        for event in sys_enter_openat sys_exit_openat sys_enter_read sys_enter_close sys_exit_close; do
            echo 'comm == "cat"' > events/syscalls/$event/filter
            on syscalls/$event
        done
        cd "$OLDPWD"
        echo text > file
        cat file > copy
        cat missing 2> /dev/null
        """
        + SHOW,
        "all",
    )
    seen = [hit for hit in hits(done) if hit.task == "cat"]
    opened = [int(hit.text.split()[-1], 16) for hit in seen if hit.event == "sys_exit_openat"]
    closed = [int(hit.text.split()[-1], 16) for hit in seen if hit.event == "sys_exit_close"]
    assert {number for number in opened if number < 1 << 63} == {3}
    assert len([number for number in opened if number < 1 << 63]) <= len(closed)
    assert set(closed) == {0}
    assert "sys_read(fd: 3," in done.stdout
