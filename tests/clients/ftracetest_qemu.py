"""The same ftracetest on QEMU TCG, to have a time to compare with: the same kernel, one CPU, this machine's programs.

Everything is in the initramfs: ftracetest, the programs of a small Debian system and their libraries. Prints each
result when it is there, with the host's time since QEMU was started, and how many tests had which result.

    python -m tests.clients.ftracetest_qemu [TEST...]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from shutil import which

from bench import qemu
from bench.clock import cpu_seconds
from emulator.initramfs import Initramfs
from fakefs.debian import AptError
from tests.clients.ftracetest import Suite, results

_PACKAGES = (
    *("bash", "binutils", "coreutils", "dash", "debianutils", "diffutils", "findutils", "gawk", "grep", "iproute2"),
    *("iputils-ping", "mount", "procps", "sed", "util-linux"),
)
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")
_MEMORY_MB = 1024
_LIMIT = 7200  # host seconds
_INIT = """#!/bin/bash
export PATH=/usr/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
ip link set lo up
cd /ftrace
./ftracetest -k -l /logs @TESTS@ </dev/null
echo @end
sleep 1000
"""


def programs() -> dict[str, Path]:
    """The programs of the packages, by name."""
    listed = subprocess.run(["dpkg", "-L", *_PACKAGES], capture_output=True, text=True, check=True).stdout.split("\n")
    paths = [Path(line) for line in listed if re.fullmatch(r"(/usr)?/s?bin/[^/]+", line)]
    paths += [Path("/bin/awk"), Path("/bin/which")]  # alternatives
    return {path.name: path for path in paths if path.is_file()}


def libraries(program: Path) -> set[Path]:
    """The libraries that a program is loaded with, its loader included; none for a script."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return {Path(path) for path in _LIBRARY.findall(listed)}


def initramfs(directory: Path, tests: list[str]) -> bytes:
    """ftracetest with all it needs, and an init that runs it."""
    archive = Initramfs()
    archive.add_file("/init", _INIT.replace("@TESTS@", " ".join(f"test.d/{test}" for test in tests)).encode(), 0o755)
    for name in ("dev", "proc", "sys", "tmp", "usr/bin", "usr/lib"):
        archive.add_dir(f"/{name}")
    for name, target in {"bin": "usr/bin", "sbin": "usr/bin", "usr/sbin": "bin", "lib": "usr/lib"}.items():
        archive.add_symlink(f"/{name}", target)
    archive.add_node("/dev/console", 0o020600, 5, 1)
    needed: dict[str, Path] = {}
    for name, path in programs().items():
        archive.add_file(f"/usr/bin/{name}", path.read_bytes(), 0o755)
        needed |= {library.name: library for library in libraries(path)}
    archive.add_symlink("/lib64", "usr/lib")
    for name, path in needed.items():
        archive.add_file(f"/usr/lib/{name}", path.read_bytes(), 0o755)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            archive.add_file(f"/ftrace/{path.relative_to(directory)}", path.read_bytes(), mode)
    return archive.to_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("tests", metavar="TEST", nargs="*", help="00basic/basic1.tc, a directory of them ...")
    arguments = parser.parse_args()
    if not which(qemu.BINARY):
        print("ftracetest: as root: apt-get install qemu-system-x86", file=sys.stderr)
        return 1
    try:
        suite = Suite.fetch()
    except AptError as error:
        print(f"ftracetest: {error}", file=sys.stderr)
        return 1
    tests = suite.tests(arguments.tests)
    with tempfile.TemporaryDirectory() as scratch:
        initrd = Path(scratch, "initrd")
        initrd.write_bytes(initramfs(suite.directory, tests))
        begun, counts = time.monotonic(), Counter[str]()
        with qemu.started(suite.kernel, initrd, _MEMORY_MB) as process:
            for name, _, result in results(_output(process), suite.in_order(tests)):
                print(f"{time.monotonic() - begun:6.0f} s  {result:12} {name}", flush=True)
                counts[result] += 1
            print(f"{time.monotonic() - begun:6.0f} s, {cpu_seconds(process.pid):.0f} of the CPU: {dict(counts)}")
    return 0


def _output(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """What is printed until the tests are done."""
    for _, line in qemu.console(process, _LIMIT):
        if line.startswith("@end"):
            return
        yield line


if __name__ == "__main__":
    sys.exit(main())
