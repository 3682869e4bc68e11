"""The kernel's own ftracetest, unmodified, from Debian's source package, in the view of `fakefs run`.

All tests are run in one view where the guest sees nothing but the mount (`--mirror off`). Those that a real kernel
passes and that did not pass there are run again, each with a kernel of its own, with `--mirror files` and then `all`:
slower, as what they do is done in the guest too.

Writes ftracetest.tsv: each test, its result here, at which level of mirroring, and on a real kernel
(ftracetest-real-kernel.tsv), and the reason for a difference (ftracetest-reasons.tsv). Tests that are named, by their
paths in test.d, replace their rows alone.

With --tests, tests of yours are run instead, each .tc file in that directory: such as those of a series of patches,
whose text is in no package. The table stays as it is.

    python -m tests.clients.ftracetest [TEST...]
    python -m tests.clients.ftracetest --tests DIR [--suite SUITE] [--wprobe strict] [TEST...]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from shutil import which
from typing import NamedTuple

from fakefs import kernels
from fakefs.debian import Apt, AptError, system_source

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "ftracetest"
SUITE = "sid"
"""The Debian suite of kernel and source: that of the kernel that the real results are of."""
LEVELS = ("off", "files", "all")
"""What --mirror is tried with, until a test passes that does on a real kernel."""

PROGRAMS = {
    "gawk": "gawk",
    "gcc": "gcc",
    "ip": "iproute2",
    "lscpu": "util-linux",
    "ping": "iputils-ping",
    "readelf": "binutils",
}
"""What the tests call that a small system may lack, and the package it is in."""

_INSTANCE = " (instance)"
_RESULT = re.compile(r"^\[(\d+)\] (.*?)\s*\[(PASS|FAIL|UNRESOLVED|UNTESTED|UNSUPPORTED|XFAIL)\]")
# Inside, in a network of its own, where ping(1) may be used; and nothing is traced but a guest. Without a locale, as
# the real results are: ls(1) opens so many files for one that event-filter-function.tc takes do_sys_openat2() for its
# function, and then finds "openat" in the trace where none may be.
_INSIDE = """[ "$(stat -f -c %t /sys/kernel/tracing)" = 65735546 ] || exit 99
export LC_ALL=C
ip link set lo up
exec ./ftracetest -k -l "$@"
"""


class Suite(NamedTuple):
    """ftracetest: the directory it is in, and the kernel of the same version."""

    directory: Path
    tests_in: Path
    kernel: Path
    wprobe: str = "unlimited"

    @classmethod
    def fetch(cls) -> Suite:
        """Raises AptError."""
        kernel = kernels.fetch(SUITE)
        version = ".".join(kernel.parent.name.split(".")[:2])
        directory = _source(version, BUILD)
        return cls(directory, directory / "test.d", kernel)

    def tests(self, names: list[str]) -> list[str]:
        """The paths of tests in `tests_in`, sorted: those that begin with one of `names`, all if there are none."""
        known = sorted(str(path.relative_to(self.tests_in)) for path in self.tests_in.rglob("*.tc"))
        return [test for test in known if not names or any(test.startswith(name) for name in names)]

    def in_order(self, tests: list[str]) -> list[str]:
        """The names of tests as ftracetest runs them: those that can be are run once more in an instance."""
        texts = {test: (self.tests_in / test).read_text() for test in tests}
        again = [test for test, text in texts.items() if re.search(r"^#[ \t]*flags:.*instance", text, re.M)]
        return [*tests, *(test + _INSTANCE for test in again)]


def _source(version: str, place: Path) -> Path:
    """Return the directory of ftracetest, fetching it."""
    directory = place / f"linux-source-{version}" / "tools/testing/selftests/ftrace"
    if not directory.exists():
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            apt = Apt(Path(scratch, "apt"), system_source(), SUITE)
            apt.update()
            print(f"fetching linux-source-{version}", file=sys.stderr)
            [package] = apt.download([f"linux-source-{version}"])
            _unpack(package, place)
    if not (directory / "poll").exists():  # as its Makefile does, which wants the rest of the source
        subprocess.run(["gcc", "-O2", "-o", directory / "poll", directory / "poll.c"], check=True)
    return directory


def _unpack(package: Path, place: Path) -> None:
    deb = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
    with deb, tarfile.open(fileobj=deb.stdout, mode="r|") as outer:
        for member in outer:
            if member.name.endswith(".tar.xz") and (packed := outer.extractfile(member)):
                with tarfile.open(fileobj=packed, mode="r|xz") as inner:
                    wanted = (each for each in inner if "/tools/testing/selftests/ftrace/" in each.name)
                    inner.extractall(place, wanted, filter="tar")
        assert deb.stdout is not None
        deb.stdout.read()


def results(lines: Iterable[str], names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield name, description and result of each test from what ftracetest prints; says on stderr what has none."""
    seen = 0
    for line in lines:
        if match := _RESULT.search(line):
            seen = int(match[1])
            yield names[seen - 1], match[2].removeprefix("(instance)").strip(), match[3]
    for name in names[seen:]:
        print(f"{name}: no result", file=sys.stderr)


def run(suite: Suite, tests: list[str], mirror: str) -> Iterator[tuple[str, str, str]]:
    """Run tests in one view; yield as `results()` does, those in an instance too."""
    argv = [sys.executable, "-m", "fakefs", "run", "--mirror", mirror, "--wprobe", suite.wprobe]
    argv += ["--kernel", str(suite.kernel), "--", "unshare", "-n", "sh", "-c", _INSIDE, "sh", str(BUILD / "logs")]
    argv += [str(suite.tests_in / test) for test in tests]
    with subprocess.Popen(
        argv, cwd=suite.directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        yield from results(process.stdout, suite.in_order(tests))


def table(path: Path) -> dict[str, list[str]]:
    """The rows of a table by their first column."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {row[0]: row[1:] for row in rows[1:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("names", metavar="TEST", nargs="*", help="00basic/basic1.tc, a directory of them ...")
    parser.add_argument("--tests", metavar="DIR", type=Path, help="run the tests in there, and show their results only")
    parser.add_argument("--suite", metavar="SUITE", help="with --tests: the Debian suite of another kernel for them")
    parser.add_argument("--wprobe", metavar="MODE", default="unlimited", help="with --tests: as of fakefs run")
    arguments = parser.parse_args()
    missing = [package for program, package in PROGRAMS.items() if not which(program)]
    if missing:
        print(f"ftracetest: as root: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 1
    try:
        suite = Suite.fetch()
    except AptError as error:
        print(f"ftracetest: {error}", file=sys.stderr)
        return 1
    begun = time.monotonic()
    if arguments.tests:
        kernel = kernels.fetch(arguments.suite) if arguments.suite else suite.kernel
        theirs = suite._replace(tests_in=arguments.tests.absolute(), kernel=kernel, wprobe=arguments.wprobe)
        for name, description, result in run(theirs, theirs.tests(arguments.names), "files"):
            print(f"{result:12} {name}: {description}")
        return 0
    rows = table(HERE / "ftracetest.tsv") if arguments.names else {}
    real = table(HERE / "ftracetest-real-kernel.tsv")
    views = [(suite.tests(arguments.names), LEVELS[0])]
    while views:
        tests, level = views.pop(0)
        failed: dict[str, None] = {}
        for name, description, result in run(suite, tests, level):
            print(f"{time.monotonic() - begun:6.0f} s  {result:12} {name}, --mirror {level}", file=sys.stderr)
            if level == LEVELS[0] or rows[name][1] != "PASS":
                rows[name] = [description, result, level]
                if result != "PASS" and real[name][0] == "PASS":
                    failed[name.removesuffix(_INSTANCE)] = None
        if level != LEVELS[-1]:
            views += [([test], LEVELS[LEVELS.index(level) + 1]) for test in failed]
    _write(rows, [name for name in suite.in_order(suite.tests([])) if name in rows])
    return 0


def _write(rows: dict[str, list[str]], names: list[str]) -> None:
    """Write the table and say what it comes to."""
    real, reasons = table(HERE / "ftracetest-real-kernel.tsv"), table(HERE / "ftracetest-reasons.tsv")
    lines = ["testcase\tdescription\there\tmirror\treal kernel\treason"]
    passed = wanted = apart = 0
    for name in names:
        description, result, level = rows[name][:3]
        there = real.get(name, [""])[0]
        reason = reasons.get(name, [""])[0] if result != there else ""
        lines.append("\t".join([name, description, result, level, there, reason]))
        if there == "PASS":
            wanted, passed = wanted + 1, passed + (result == "PASS")
            apart += result != "PASS" and bool(reason)
    (HERE / "ftracetest.tsv").write_text("\n".join(lines) + "\n")
    print(f"{len(names)} tests; {wanted} of them pass on a real kernel, {passed} of these here; {apart} have a reason")


if __name__ == "__main__":
    sys.exit(main())
