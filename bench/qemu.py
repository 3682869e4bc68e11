"""The same figures on QEMU TCG, for comparison: the same kernel, one CPU, as much RAM, and busybox as its userland.

A script runs the commands as the guest's init and writes a marker before and after each on the serial port; times are
the host's at which the markers arrive. What QEMU has nothing like (a snapshot, a mount) has no figure here.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.clock import NotMeasured, cpu_seconds
from bench.figures import private_memory, smaps_rollup
from emulator.initramfs import Initramfs

BINARY = "qemu-system-x86_64"
_BUSYBOX = Path("/bin/busybox")
_MEMORY_MB = 128
_LIMIT = 600  # host seconds for all of it
_LINE_MAX = 4096
_APPEND = "console=ttyS0 quiet noapic nokaslr panic=-1 mitigations=off nopti tsc=reliable random.trust_cpu=off"
_MARKER = re.compile(r"@bench (begin|end) ([a-z_]+)(?: (\d+))?\s*$")

# Only shell builtins between the markers where starting a program would be most of the time.
_INIT = """#!/bin/sh
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t tracefs tracefs /sys/kernel/tracing
cd /sys/kernel/tracing
begin() { echo "@bench begin $1"; }
end() { echo "@bench end $1 $2"; }
end boot 1

begin small_read
i=0; while [ $i -lt @READS@ ]; do read -r _ <tracing_on; i=$((i + 1)); done
end small_read $i

begin kprobe_cycle
i=0
while [ $i -lt 20 ]; do
    echo p:bench/probe vfs_read >>kprobe_events
    echo 1 >events/bench/probe/enable
    echo 0 >events/bench/probe/enable
    echo -:bench/probe >>kprobe_events
    i=$((i + 1))
done
end kprobe_cycle $i

begin walk; busybox ls -lR . >/dev/null; end walk 1
begin functions; busybox cat available_filter_functions >/dev/null; end functions 1

echo 32768 >buffer_size_kb
echo p:bench/read vfs_read >>kprobe_events
echo p:bench/write vfs_write >>kprobe_events
echo 1 >events/bench/enable
begin kprobe_hits
busybox dd if=/dev/zero of=/dev/null bs=1 count=@BYTES@ 2>/dev/null
hits=0; while read -r _ hit _; do hits=$((hits + hit)); done <kprobe_profile
end kprobe_hits $hits

echo 0 >tracing_on
read -r _ lines <per_cpu/cpu0/stats
begin drain
busybox cat trace_pipe >/dev/null &
while read -r _ left <per_cpu/cpu0/stats && [ "$left" -gt 0 ]; do busybox usleep 10000; done
end drain $lines
kill $!
echo 0 >events/bench/enable
echo >kprobe_events
echo 1408 >buffer_size_kb
echo 1 >tracing_on

for tracer in function function_graph nop; do
    begin $tracer; echo $tracer >current_tracer; end $tracer 1
done

busybox sleep 1
begin idle; busybox sleep @IDLE@; end idle 1
busybox sleep 1000
"""


@dataclass(frozen=True)
class Stamp:
    """When something was seen: host seconds, and CPU seconds QEMU had used by then."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Span:
    """What lies between a pair of markers; `count` is the number behind the second one."""

    wall: float
    cpu: float
    count: int


def parse_markers(lines: Iterable[tuple[Stamp, str]]) -> dict[str, Span]:
    """Return the spans that are complete in what came out of the serial port. Other lines are the kernel's."""
    begun: dict[str, Stamp] = {}
    spans = {}
    for stamp, line in lines:
        marker = _MARKER.search(line)
        if marker is None:
            continue
        kind, name, count = marker.groups()
        if kind == "begin":
            begun[name] = stamp
        elif (start := begun.pop(name, None)) is not None:
            spans[name] = Span(stamp.wall - start.wall, stamp.cpu - start.cpu, int(count or 1))
    return spans


def values(spans: dict[str, Span]) -> dict[str, float]:
    """Return the figures, by their key and in their unit (see `bench.figures`), that the spans give."""
    found: dict[str, float] = {}
    for name, span in spans.items():
        if name == "boot":
            found[name] = span.cpu
        elif span.wall <= 0 or not span.count:
            continue
        elif name == "idle":
            found[name] = span.cpu / span.wall * 100
        elif name in ("kprobe_hits", "drain"):
            found[name] = span.count / span.wall
        elif name in ("small_read", "kprobe_cycle"):
            found[name] = span.wall / span.count * 1000
        else:
            found[name] = span.wall
    return found


def available() -> bool:
    """Is there what it takes?"""
    return shutil.which(BINARY) is not None and _BUSYBOX.exists()


def script(*, quick: bool) -> str:
    """Return the guest's init."""
    numbers = {"READS": 200, "BYTES": 20_000, "IDLE": 3} if quick else {"READS": 2000, "BYTES": 200_000, "IDLE": 10}
    text = _INIT
    for name, number in numbers.items():
        text = text.replace(f"@{name}@", str(number))
    return text


def measure(kernel: Path, scratch: Path, *, quick: bool = False) -> dict[str, float]:
    """Boot QEMU, let it work, end it; return figures by their key. Raises NotMeasured when it does not get through."""
    archive = Initramfs()
    archive.add_file("/init", script(quick=quick).encode(), 0o755)
    for directory in ("/dev", "/proc", "/sys"):
        archive.add_dir(directory)
    archive.add_node("/dev/console", 0o020600, 5, 1)
    archive.add_node("/dev/null", 0o020666, 1, 3)
    archive.add_node("/dev/zero", 0o020666, 1, 5)
    archive.add_file("/bin/busybox", _BUSYBOX.read_bytes(), 0o755)
    archive.add_symlink("/bin/sh", "busybox")
    initrd = scratch / "qemu-initrd"
    initrd.write_bytes(archive.to_bytes())
    with started(kernel, initrd, _MEMORY_MB) as process:
        lines = [(Stamp(time.perf_counter(), 0.0), "@bench begin boot")]
        for stamp, line in console(process, _LIMIT):
            lines.append((stamp, line))
            if "@bench end idle" in line:
                memory = smaps_rollup(process.pid)
                used = {"rss": memory["Rss"] / 1e6, "private": private_memory(memory) / 1e6}
                return {**values(parse_markers(lines)), **used}
    tail = next((line for _, line in reversed(lines) if line.strip()), "nothing on its console")
    raise NotMeasured(f"QEMU did not get through: {tail.strip()[:100]}")


@contextmanager
def started(kernel: Path, initrd: Path, memory_mb: int) -> Iterator[subprocess.Popen[bytes]]:
    """A running QEMU, killed at the end."""
    machine = f"-accel tcg -smp 1 -m {memory_mb} -nodefaults -no-reboot -display none -serial stdio".split()
    argv = [BINARY, *machine, "-kernel", str(kernel), "-initrd", str(initrd), "-append", _APPEND]
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def console(process: subprocess.Popen[bytes], limit: float) -> Iterator[tuple[Stamp, str]]:
    """Yield what QEMU's guest prints, line by line with the times, until it ends or `limit` host seconds are over."""
    assert process.stdout is not None
    end, rest = time.monotonic() + limit, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(end - time.monotonic(), 0)):
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                return
            stamp = Stamp(time.perf_counter(), cpu_seconds(process.pid))
            *whole, rest = (rest + data).split(b"\n")
            rest = rest[-_LINE_MAX:]
            for line in whole:
                yield stamp, line.decode("utf-8", "replace")
