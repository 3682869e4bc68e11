"""What programs that open perf events in the view have in common: source that is put in front of theirs."""

from __future__ import annotations

import sys

_PRELUDE = """
import ctypes, errno, fcntl, mmap, os, select, signal, struct, sys
DISABLED, INHERIT, COMM, TASK, WATERMARK = 1, 2, 1 << 9, 1 << 13, 1 << 14
ENABLED, RUNNING, ID = 1, 2, 4
TID, RAW = 2, 1 << 10
ENABLE, DISABLE, RESET, SET_OUTPUT, SET_FILTER, GET_ID = 0x2400, 0x2401, 0x2403, 0x2405, 0x40082406, 0x80082407
PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)

def attributes(event, bits=0, read_format=0, sample_type=0, period=1, wakeup=1, size=64):
    with open(f"/sys/kernel/tracing/events/{event}/id") as file:
        number = int(file.read())
    return struct.pack("<IIQQQQQI12x", 2, size, number, period, sample_type, read_format, bits, wakeup)

def open_event(attributes, pid=0, cpu=-1, group=-1, flags=8):
    fd = libc.syscall(298, ctypes.create_string_buffer(attributes, len(attributes)), pid, cpu, group, flags)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd

def opened(event, pid=0, cpu=-1, group=-1, flags=8, **kind):
    return open_event(attributes(event, **kind), pid, cpu, group, flags)

def error_of(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "none"

def child(*argv):
    pid = os.fork()
    if pid == 0:
        if argv:
            os.execv(argv[0], argv)
        os._exit(0)
    os.waitpid(pid, 0)
    return pid

def count(fd):
    return struct.unpack("<Q", os.read(fd, 8))[0]

class Ring:
    def __init__(self, fd, pages):
        self.map = mmap.mmap(fd, (1 + pages) * PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.words = memoryview(self.map).cast("Q")
        self.size = pages * PAGE

    def records(self):
        head, tail, found = self.words[128], self.words[129], []
        data = bytes(self.map[PAGE + at % self.size] for at in range(tail, head))
        at = 0
        while at < len(data):
            kind, _, size = struct.unpack_from("<IHH", data, at)
            found.append((kind, data[at + 8 : at + size]))
            at += size
        self.words[129] = head
        return found
"""


def client(source: str, *, name: str = "client.py") -> str:
    """Return a shell script that runs a Python program with the above in front of it."""
    return f"cat > {name} <<'END'\n{_PRELUDE}\n{source}\nEND\n{sys.executable} -I {name}\n"
