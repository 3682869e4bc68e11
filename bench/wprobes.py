"""What wprobes cost: hits, watchpoints that are not hit, and triggers that move one."""

from __future__ import annotations

import os
from statistics import median

from bench.clock import NotMeasured
from bench.figures import Bench, Figure, Measurement, Mount, copy_bytes

# Read once for each read of /dev/urandom: the generation of the kernel's random generator, behind its 32-byte key.
_SOURCE = "/dev/urandom"
_HOT = "r@base_crng+32:16"
# Nothing in the loop touches the kernel's log.
_COLD = "__log_buf"
_COUNTS = (1, 100, 1000)


def _entries(mount: Mount) -> int:
    stats = dict(line.split(": ") for line in mount.read("per_cpu/cpu0/stats").splitlines())
    if int(stats["overrun"]):
        raise NotMeasured(f"{stats['overrun']} events overwritten")
    return int(stats["entries"])


def hits(bench: Bench) -> tuple[float, ...]:
    """Hits of a wprobe on a variable read all the time, a second of CPU time; and what one adds to the loop, us."""
    count = 10_000 if bench.quick else 50_000
    with bench.mounted() as mount:
        mount.write("buffer_size_kb", "32768")
        mount.write("dynamic_events", f"w:hot {_HOT}")
        copy_bytes(mount, count, _SOURCE)
        without = median(copy_bytes(mount, count, _SOURCE) for _ in range(3))
        mount.write("events/wprobes/hot/enable", "1")
        before = _entries(mount)
        armed = copy_bytes(mount, count, _SOURCE)
        seen = _entries(mount) - before
    if seen < count:
        raise NotMeasured(f"{count - seen} of {count} accesses not hit")
    return seen / armed, (armed - without) / seen * 1e6


def armed(bench: Bench) -> tuple[float, ...]:
    """How many times as long a loop takes while 1, 100, 1,000 watchpoints wait that it does not hit."""
    count = 20_000 if bench.quick else 100_000
    ratios = []
    with bench.mounted() as mount:
        copy_bytes(mount, count)
        have = 0
        for wanted in _COUNTS:
            lines = [f"w:cold{number} w@{_COLD}+{16 * number}:8" for number in range(have, wanted)]
            have = wanted
            for start in range(0, len(lines), 50):
                mount.write("dynamic_events", "\n".join(lines[start : start + 50]))
            pairs = []
            for _ in range(3):
                mount.write("events/wprobes/enable", "0")
                without = copy_bytes(mount, count)
                mount.write("events/wprobes/enable", "1")
                pairs.append(copy_bytes(mount, count) / without)
            ratios.append(median(pairs))
    return tuple(ratios)


def set_wprobe(bench: Bench) -> tuple[float, ...]:
    """What a set_wprobe trigger adds to each hit of its event, us of CPU time."""
    count = 10_000 if bench.quick else 50_000
    with bench.mounted() as mount:
        mount.write("buffer_size_kb", "32768")
        mount.write("dynamic_events", "w:moved w@-1:8")
        mount.write("dynamic_events", "p:probes/mover vfs_read file=$arg1")
        mount.write("events/probes/mover/enable", "1")
        copy_bytes(mount, count)
        without = median(copy_bytes(mount, count) for _ in range(3))
        fd = os.open(mount.directory / "events/probes/mover/trigger", os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"set_wprobe:moved:file+8\n")
        os.close(fd)
        return ((median(copy_bytes(mount, count) for _ in range(3)) - without) / count * 1e6,)


MEASUREMENTS = (
    Measurement(
        hits,
        (
            Figure("wprobe_hits", "wprobe hits on a hot variable", "/s", 50_000, True),
            Figure("redirect", "cost of a wprobe hit", "us", 10),
        ),
    ),
    Measurement(
        armed,
        tuple(
            Figure(f"armed{count}", f"slowdown with {count:,} wprobes not hit", "x", target)
            for count, target in zip(_COUNTS, (1.1, 1.2, 1.3), strict=True)
        ),
        runs=1,
    ),
    Measurement(set_wprobe, (Figure("set_wprobe", "cost of a set_wprobe", "us", 50),)),
)
