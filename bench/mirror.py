"""What mirroring costs the programs of `fakefs run`, and how long the guest takes to follow them."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from pathlib import Path
from statistics import median

from bench.clock import NotMeasured
from bench.figures import FAKEFS, Bench, Figure, Measurement

_CONFIGURE = Path(__file__).parent / "configure.sh"
_OPEN = """
import os, statistics, time
def once():
    start = time.perf_counter()
    fd = os.open("file", os.O_WRONLY | os.O_CREAT)
    taken = time.perf_counter() - start
    os.close(fd)
    return taken
print(statistics.median(once() for _ in range(500)) * 1000)
"""
_NOT_MIRRORED = """
import os, time
def once():
    start = time.perf_counter()
    for _ in range(20000):
        os.getppid()
    return (time.perf_counter() - start) / 20000
print(min(once() for _ in range(50)) * 1e6)
"""
_AT_ONCE = 'for i in $(seq "$1"); do /bin/true & done; wait'
_COUNT = """
cd /sys/kernel/tracing/events/sched/sched_process_exit
echo hist:keys=comm > trigger
{ %s; } > /dev/null
awk '/comm: true/ {print $NF}' hist
"""
_TRUE = 'for i in $(seq "$1"); do /bin/true; done'
_NOW = "date +%s.%N"
_DAEMON = f"""
daemon=$({shlex.join(FAKEFS)} status | sed 's/.*"pid": \\([0-9]*\\).*/\\1/')
waited() {{ cat /proc/$daemon/task/*/schedstat | awk '{{ns += $2}} END {{print ns / 1e9}}'; }}
"""
"""`waited` tells for how many seconds the daemon had no processor, of which another machine has more: `bench.clock`."""


def _run(bench: Bench, mirror: str, script: str, *arguments: str) -> list[float]:
    """Run a bash script in a directory of its own; return the numbers in its output."""
    argv = [*FAKEFS, "run", "--kernel", str(bench.kernel), "--mirror", mirror, "--", "bash", "-c", script, "bash"]
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run([*argv, *arguments], cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotMeasured(done.stderr.strip() or f"exit status {done.returncode}")
    return [float(word) for word in done.stdout.split()]


def _timed(script: str) -> str:
    """The script, and before and behind it, and when the guest has followed, the time."""
    return f"{_NOW}; {{ {script}; }} >/dev/null; {_NOW}; cat /sys/kernel/tracing/tracing_on >/dev/null; {_NOW}"


def _followed(bench: Bench, script: str, *arguments: str, before: str = ":") -> tuple[float, float]:
    """Run a script in a mirrored shell; return how long it takes, and until the guest has followed, s."""
    numbers = _run(bench, "files", f"{_DAEMON}{before}; waited; {_timed(script)}; waited", *arguments)
    waited, begin, end, followed, waited_then = numbers
    return end - begin, followed - begin - (waited_then - waited)


def open_for_writing(bench: Bench) -> tuple[float, ...]:
    """One open(2) of a file for writing, ms."""
    return (_run(bench, "files", f"python3 -c '{_OPEN}'")[0],)


def programs(bench: Bench) -> tuple[float, ...]:
    """200 small programs: how long their shell takes, s; and one of them until the guest has followed, ms."""
    count = 50 if bench.quick else 200
    taken, followed = _followed(bench, _TRUE, str(count))
    return taken * 200 / count, followed * 1000 / count


def _times_as_long(bench: Bench, mirror: str, locale: str) -> float:
    """How many times as long as without mirroring a script like configure takes. It is short: the median of five."""
    script = _timed(f"{_CONFIGURE} {locale} || true")

    def once() -> float:
        without, mirrored = (_run(bench, level, script) for level in ("off", mirror))
        return (mirrored[1] - mirrored[0]) / (without[1] - without[0])

    return median(once() for _ in range(5))


def configure(bench: Bench) -> tuple[float, ...]:
    """As configure runs; with a locale whose files each program opens; and with all calls mirrored."""
    return (
        _times_as_long(bench, "files", "C"),
        _times_as_long(bench, "files", "C.UTF-8"),
        _times_as_long(bench, "all", "C"),
    )


def at_once(bench: Bench) -> tuple[float, ...]:
    """500 small programs at once: until the guest has followed, s; and of how many it has not seen the exit."""
    count = 100 if bench.quick else 500
    _, followed = _followed(bench, _AT_ONCE, str(count))
    seen = _run(bench, "files", _COUNT % _AT_ONCE, str(count))
    return followed * 500 / count, count - sum(seen)


def listing(bench: Bench) -> tuple[float, ...]:
    """ls -lR of a directory of 10,000 files, and until the guest has followed, s."""
    files = "mkdir files; (cd files; seq 10000 | xargs touch); cat /sys/kernel/tracing/tracing_on > files/1"
    return (_followed(bench, "ls -lR files", before=files)[1],)


def not_mirrored(bench: Bench) -> tuple[float, ...]:
    """What a call that nobody is told of takes more than without mirroring, us."""
    without, mirrored = (_run(bench, mirror, f"python3 -c '{_NOT_MIRRORED}'")[0] for mirror in ("off", "files"))
    return (mirrored - without,)


MEASUREMENTS = (
    Measurement(open_for_writing, (Figure("mirror_open", "mirrored open(2), p50", "ms", 0.5),)),
    Measurement(
        programs,
        (
            Figure("mirror_true", "200 x true, mirrored", "s", 1),
            Figure("mirror_spawn", "fork+exec+exit, until the guest has followed", "ms", 4),
        ),
    ),
    Measurement(
        at_once,
        (
            Figure("mirror_at_once", "500 x true at once, until the guest has followed", "s", 6),
            Figure("mirror_lost", "of these, not seen by the guest", "programs", 0),
        ),
    ),
    Measurement(listing, (Figure("mirror_listing", "ls -lR of 10,000 files, mirrored", "s", 10),)),
    Measurement(not_mirrored, (Figure("mirror_not", "more for a call that is not mirrored", "us", 0.1),)),
    Measurement(
        configure,
        (
            Figure("mirror_configure", "a script like configure, mirrored", "x", 2.5),
            Figure("mirror_configure_utf8", "the same with LC_ALL=C.UTF-8", "x", 2.5),
            Figure("mirror_configure_all", "the same with --mirror=all", "x", 6),
        ),
    ),
)
