"""The kernel's own ftracetest, unmodified, from Debian's source package, in the view of `fakefs run`.

All tests are run in one view where the guest sees nothing but the mount (`--mirror off`), and those that a real kernel
passes and that did not pass there once more, each with a kernel of its own and `--mirror files`: slower, as everything
they do is done in the guest too.

Writes ftracetest.tsv: each test, its result here and on a real kernel (ftracetest-real-kernel.tsv), and the reason for
a difference (ftracetest-reasons.tsv). Tests that are named, by their paths in test.d, replace their rows alone.

    python -m tests.clients.ftracetest [TEST...]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import which

from fakefs import kernels
from fakefs.debian import Apt, AptError, system_source

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "ftracetest"
SUITE = "sid"
"""The Debian suite of kernel and source: that of the kernel that the real results are of."""

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
# Inside, in a network of its own, where ping(1) may be used; and nothing is traced but a guest.
_INSIDE = """[ "$(stat -f -c %t /sys/kernel/tracing)" = 65735546 ] || exit 99
ip link set lo up
exec ./ftracetest -k -l "$@"
"""


def source(suite: str, version: str, place: Path) -> Path:
    """Return the directory of ftracetest, fetching it. Raises AptError."""
    directory = place / f"linux-source-{version}" / "tools/testing/selftests/ftrace"
    if not directory.exists():
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            apt = Apt(Path(scratch, "apt"), system_source(), suite)
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


def in_order(directory: Path, tests: list[str]) -> list[str]:
    """The names of tests as ftracetest runs them: those that can be are run once more in an instance."""
    again = [test for test in tests if re.search(r"^#[ \t]*flags:.*instance", (directory / test).read_text(), re.M)]
    return [*tests, *(test + _INSTANCE for test in again)]


def run(directory: Path, kernel: Path, tests: list[str], mirror: str) -> Iterator[tuple[str, str, str]]:
    """Run tests in one view; yield name, description and result of each, and of those that are run in an instance."""
    names = in_order(directory / "test.d", tests)
    argv = [sys.executable, "-m", "fakefs.cli", "run", "--mirror", mirror, "--kernel", str(kernel), "--"]
    argv += ["unshare", "-n", "sh", "-c", _INSIDE, "sh", str(BUILD / "logs"), *(f"test.d/{test}" for test in tests)]
    seen = 0
    with subprocess.Popen(
        argv, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := _RESULT.match(line):
                seen = int(match[1])
                yield names[seen - 1], match[2].removeprefix("(instance)").strip(), match[3]
    for name in names[seen:]:
        print(f"{name}: no result; fakefs run ended with {process.returncode}", file=sys.stderr)


def table(path: Path) -> dict[str, list[str]]:
    """The rows of a table by their first column."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {row[0]: row[1:] for row in rows[1:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("tests", metavar="TEST", nargs="*", help="00basic/basic1.tc, a directory of them ...")
    arguments = parser.parse_args()
    missing = [package for program, package in PROGRAMS.items() if not which(program)]
    if missing:
        print(f"ftracetest: as root: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 1
    try:
        kernel = kernels.fetch(SUITE)
        version = ".".join(kernel.parent.name.split(".")[:2])
        directory = source(SUITE, version, BUILD)
    except AptError as error:
        print(f"ftracetest: {error}", file=sys.stderr)
        return 1
    known = sorted(str(path.relative_to(directory / "test.d")) for path in (directory / "test.d").rglob("*.tc"))
    chosen = [test for test in known if not arguments.tests or any(test.startswith(name) for name in arguments.tests)]
    begun = time.monotonic()
    rows = table(HERE / "ftracetest.tsv") if arguments.tests else {}
    real = table(HERE / "ftracetest-real-kernel.tsv")
    again: dict[str, None] = {}
    for name, description, result in run(directory, kernel, chosen, "off"):
        rows[name] = [description, result, "no"]
        print(f"{time.monotonic() - begun:6.0f} s  {result:12} {name}", file=sys.stderr)
        if result != "PASS" and real[name][0] == "PASS":
            again[name.removesuffix(_INSTANCE)] = None
    for test in again:
        for name, description, result in run(directory, kernel, [test], "files"):
            print(f"{time.monotonic() - begun:6.0f} s  {result:12} {name}, mirrored", file=sys.stderr)
            if rows[name][1] != "PASS":
                rows[name] = [description, result, "yes"]
    _write(rows, [name for name in in_order(directory / "test.d", known) if name in rows])
    return 0


def _write(rows: dict[str, list[str]], names: list[str]) -> None:
    """Write the table and say what it comes to."""
    real, reasons = table(HERE / "ftracetest-real-kernel.tsv"), table(HERE / "ftracetest-reasons.tsv")
    lines = ["testcase\tdescription\there\tmirrored\treal kernel\treason"]
    passed = wanted = apart = 0
    for name in names:
        description, result, mirrored = rows[name][:3]
        there = real.get(name, [""])[0]
        reason = reasons.get(name, [""])[0] if result != there else ""
        lines.append("\t".join([name, description, result, mirrored, there, reason]))
        if there == "PASS":
            wanted, passed = wanted + 1, passed + (result == "PASS")
            apart += result != "PASS" and bool(reason)
    (HERE / "ftracetest.tsv").write_text("\n".join(lines) + "\n")
    print(f"{len(names)} tests; {wanted} of them pass on a real kernel, {passed} of these here; {apart} have a reason")


if __name__ == "__main__":
    sys.exit(main())
