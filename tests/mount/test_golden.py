"""Scripts that a real kernel's tracefs answered once (`golden/`), asked again of the mount.

On the kernel the transcripts are of, the answer must be the same in every character that does not differ from run to
run; on another, exit status, errors and statuses must be. Only what was stable on the real machine is here, and of it
not the cases that need

- its second CPU: directories `per_cpu/cpu1`, `tracing_cpumask` 3, sums over CPUs, `taskset 2`;
- things of that machine: helper programs made for the capture, files in its /tmp, loaded modules, its debugfs;
- activity of the shell in the kernel that is traced: our scripts fork and run programs on the host, so counts of
  triggers and histograms fed by sched or syscall events differ (a trigger's `count=4` is still 5 here);
- pointers printed hashed: the guest has no entropy for the hash and prints `(____ptrval____)`;
- a working directory that is removed: the host's `ls` in it gets ENOENT, which tracefs gives as an empty listing.

Of the many nearly equal kprobe definitions every second one is here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.mount.conftest import MakeMount
from tests.mount.golden_cases import RELEASE, Case, alike, load, same
from tests.mounted import Mounted, Resetter

JUST_BOOTED = "a-files/"
"""These read what a kernel comes up with: first, and without a reset."""

OTHERWISE = {
    "6.12.": {
        "syscall_user_buf_size came with 6.19": "a-files/074-cat-syscall_user_buf_size",
        "fprobes had a maxactive": "c-fprobe/018-maxactive-ret",
        "an fprobe event had one function": "c-fprobe/038-multiprobe",
        "hist took .stacktrace on any field": "e-trigger/052-hist-mod-stacktrace",
        "tracing_max_latency is there for osnoise and hwlat too": "f-control/022-tracing_thresh-max",
    },
    "6.1.": {
        "files it has not": "a-files/024 a-files/074 a-files/086 f-control/022 e-filter/060",
        "no fprobe and tracepoint events": "c-fprobe/ c-tprobe/ h-extra/019",
        "no BTF arguments, fewer types": "b-kprobe/1 b-kprobe/217",
        "other errors and names of odd definitions": "b-kprobe/026 b-kprobe/043 b-kprobe/234 b-kprobe/247 c-eprobe/007 "
        "c-eprobe/014 c-eprobe/016 c-eprobe/017 c-eprobe/029 h-extra/009 e-trigger/071",
    },
}
"""By a prefix of the kernel's version: how that kernel differs, and how the names of cases that show it begin."""

CASES = load()


class Asked:
    """The mount that is asked, reset before each case."""

    def __init__(self, mount: Mounted) -> None:
        self.mount = mount
        self.release = str(mount.status()["kernel"])
        self._resetter = Resetter(mount)
        self._before = ""

    def ask(self, case: Case) -> str | None:
        """Run a case's script; return what is different, None when nothing is."""
        if not case.name.startswith(JUST_BOOTED):
            self._resetter.reset(self._before)
        self._before = case.cmd
        got = self.mount.sh(case.cmd, merge=True)
        compare = same if self.release.startswith(RELEASE) else alike
        return compare(case, got.stdout, got.returncode)


@pytest.fixture(scope="module")
def asked(new_mount: MakeMount) -> Iterator[Asked]:
    mount = new_mount("--wprobe=off")  # the kernel that was asked had none: its list of triggers is shorter
    yield Asked(mount)
    mount.stop()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_answers_as_a_real_kernel(asked: Asked, case: Case) -> None:
    for version, differences in OTHERWISE.items():
        for reason, names in differences.items():
            if asked.release.startswith(version) and case.name.startswith(tuple(names.split())):
                pytest.skip(f"Linux {asked.release}: {reason}")
    difference = asked.ask(case)
    assert difference is None, f"{difference}\nscript:\n{case.cmd}"


def test_there_are_enough_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 120
