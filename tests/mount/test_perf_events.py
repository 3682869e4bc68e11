"""perf_event_open(2) in `fakefs run`: tracepoints are the guest's, which counts what programs do there."""

from __future__ import annotations

import pytest

from tests.mount.conftest import Run
from tests.mount.mirrored import GUEST
from tests.mount.perf_client import client
from tests.mounted import PATIENCE
from tests.uprobes import Program

pytestmark = pytest.mark.usefixtures("host_unchanged")


def test_counting(run: Run) -> None:
    """By whoever has the view; of a process with its children, and of all."""
    done = run(
        'cd "$(mktemp -d)"\n'
        + client("""
mine = opened("sched/sched_process_fork", bits=DISABLED | INHERIT)
programs = opened("sched/sched_process_exec", -1, 0, read_format=ENABLED | RUNNING | ID)
fcntl.ioctl(programs, SET_FILTER, b'filename ~ "*/true"\\0')
child()
fcntl.ioctl(mine, ENABLE)
for _ in range(3):
    child("/bin/true")
child("/bin/false")
fcntl.ioctl(mine, DISABLE)
child()
print(count(mine), count(mine))
print(fcntl.fcntl(mine, fcntl.F_GETFD))
value, enabled, running, number = struct.unpack("<4Q", os.read(programs, 4096))
print(value, 0 < running <= enabled, number == struct.unpack("<Q", fcntl.ioctl(programs, GET_ID, bytes(8)))[0])
fcntl.ioctl(programs, RESET)
print(struct.unpack("<4Q", os.read(programs, 32))[0])
""")
    )
    assert (done.stderr, done.stdout) == ("", "4 4\n1\n3 True True\n0\n")


def test_what_is_refused(mirrored: Run) -> None:
    """As the kernel does: its errors are those of the guest's, or the same."""
    done = mirrored(
        client("""
fork = "sched/sched_process_fork"
fd = opened(fork, flags=0)
good = attributes(fork)
print(fcntl.fcntl(fd, fcntl.F_GETFD))
print(error_of(opened, fork, 0x3FFFFFFF), error_of(opened, fork, group=0), error_of(opened, fork, -1, -1))
print(error_of(opened, fork, size=8), error_of(opened, fork, size=8192), error_of(opened, fork, -1, 4095))
print(error_of(open_event, good[:4] + struct.pack("<I", 256) + good[8:] + bytes(191) + b"x"))
print(libc.syscall(298, ctypes.c_void_p(8), 0, -1, -1, 0), errno.errorcode[ctypes.get_errno()])
print(error_of(os.read, fd, 4), error_of(os.write, fd, b"12345678"), error_of(os.truncate, fd, 0))
print(error_of(os.open, f"/proc/self/fd/{fd}", os.O_RDONLY))
print(error_of(fcntl.ioctl, fd, SET_FILTER, b"nothing == 1\\0"), error_of(fcntl.ioctl, fd, SET_OUTPUT, 0))
print(error_of(fcntl.ioctl, fd, 0x24FF), error_of(fcntl.ioctl, fd, SET_OUTPUT, fd))
for length in (1, 3, 4, 0x8001):
    print(error_of(mmap.mmap, opened(fork), length * PAGE), end=" ")
print([name for name in os.listdir("/sys/kernel/tracing") if "perf" in name])
""")
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "0",
        "ESRCH EBADF EINVAL",
        "E2BIG E2BIG EINVAL",
        "E2BIG",
        "-1 EFAULT",
        "ENOSPC EINVAL EINVAL",
        "ENOENT",
        "EINVAL EBADF",
        "ENOTTY EINVAL",
        "EINVAL none EINVAL EPERM []",
    ]


def test_a_uprobe(mirrored: Run, dynamic: Program) -> None:
    """Opening an event of it registers it, with no file written to: programs hit it from then on, and not after."""
    done = mirrored(
        f"echo 'p:add {dynamic.at('add')}' > /sys/kernel/tracing/uprobe_events\n"
        + client(f"""
program = "{dynamic.path}", "abc", "de"
child(*program)
fd = opened("uprobes/add", bits=INHERIT)
child(*program)
print(count(fd), flush=True)
os.close(fd)
child(*program)
""")
    )
    assert (done.stderr, done.stdout) == ("", "5\n5\n2\n5\n")


def test_pages_that_the_host_drops(mirrored: Run) -> None:
    """They are asked for again, with what the program has written there."""
    done = mirrored(
        client("""
fd = opened("sched/sched_process_fork", 0, 0, bits=INHERIT, sample_type=TID | RAW)
ring = Ring(fd, 2)
child()
fcntl.ioctl(fd, DISABLE)
print(len(ring.records()), ring.words[129] == ring.words[128] > 0)
before = bytes(ring.map)
os.sync()
ring.map.madvise(mmap.MADV_DONTNEED)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
print(bytes(ring.map) == before, ring.words[129] > 0)
""")
    )
    assert (done.stderr, done.stdout) == ("", "1 True\nTrue True\n")


def test_records(mirrored: Run) -> None:
    """Samples of what programs do, and what the kernel tells of these, in a ring that is read as it fills."""
    done = mirrored(
        client("""
fd = opened("sched/sched_process_exec", 0, 0, bits=DISABLED | INHERIT | COMM | TASK, sample_type=TID | RAW)
other = opened("syscalls/sys_enter_exit_group", 0, 0, bits=DISABLED | INHERIT, sample_type=TID | RAW)
ring = Ring(fd, 1)
fcntl.ioctl(other, SET_OUTPUT, fd)
for each in fd, other:
    fcntl.ioctl(each, ENABLE)
waiting = select.poll()
waiting.register(fd, select.POLLIN)
print(waiting.poll(0))
children, found = [], []
for _ in range(60):
    children.append(child("/bin/true"))
    assert waiting.poll(60_000)
    found += ring.records()
found += ring.records()
samples = [data for kind, data in found if kind == 9]
executed = [struct.unpack_from("<I", data)[0] for data in samples if b"/bin/true" in data]
print(executed == children, len(samples), sum(map(len, samples)) > ring.size)
print([pid for kind, data in found if kind == 3 for pid in struct.unpack_from("<I", data)] == children)
print({data[8:].rstrip(b"\\0") for kind, data in found if kind == 3}, 2 in [kind for kind, _ in found])
""")
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[]", "True 120 True", "True", "{b'true'} False"]


def test_a_ring_that_is_not_read(mirrored: Run) -> None:
    """What does not fit is lost, and the kernel says how much, once there is room again."""
    done = mirrored(
        client("""
fd = opened("sched/sched_process_fork", 0, 0, bits=INHERIT, sample_type=TID | RAW)
ring = Ring(fd, 1)
for _ in range(100):
    child()
fcntl.ioctl(fd, DISABLE)
before = ring.records()
fcntl.ioctl(fd, ENABLE)
child()
fcntl.ioctl(fd, DISABLE)
after = ring.records()
lost = [struct.unpack_from("<QQ", data)[1] for kind, data in after if kind == 2]
print({kind for kind, _ in before}, [kind for kind, _ in after], len(before) + sum(lost))
""")
    )
    assert (done.stderr, done.stdout) == ("", "{9} [2, 9] 100\n")


def test_a_process_that_ends(mirrored: Run) -> None:
    """Who polls an event of it is told."""
    done = mirrored(
        client("""
reader, writer = os.pipe()
pid = os.fork()
if pid == 0:
    os.read(reader, 1)
    os._exit(0)
fd = opened("sched/sched_process_fork", pid, sample_type=TID)
ring = Ring(fd, 1)
waiting = select.poll()
waiting.register(fd, select.POLLIN)
print(waiting.poll(0))
os.write(writer, b"x")
print(waiting.poll(60_000) == [(fd, select.POLLHUP)])
""")
    )
    assert (done.stderr, done.stdout) == ("", "[]\nTrue\n")


def test_who_is_killed_leaves_nothing(mirrored: Run) -> None:
    """Neither open events in the guest nor a mount that hangs."""
    done = mirrored(
        GUEST
        + client("""
fds = [opened("sched/sched_process_fork", -1, 0, sample_type=TID) for _ in range(20)]
ring = Ring(fds[0], 8)
for fd in fds[1:]:
    fcntl.ioctl(fd, SET_OUTPUT, fds[0])
child()
ring.records()
os.kill(os.getpid(), signal.SIGKILL)
""")
        + f"""
        echo $?
        end=$((SECONDS + {PATIENCE:.0f}))
        while guest ls -l /proc/1/fd | grep -q perf_event; do [ $SECONDS -lt $end ] || exit 9; done
        cat /sys/kernel/tracing/tracing_on
        """
    )
    assert (done.stdout, done.returncode) == ("137\n1\n", 0)
