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

import pytest

from fakefs.testbed import Tracefs
from tests.mount.golden_cases import RELEASE, Case, alike, load, same

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


@pytest.mark.fakefs(wprobe="off")  # the kernel that was asked had none: its list of triggers is shorter
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_answers_as_a_real_kernel(tracefs: Tracefs, case: Case) -> None:
    release = str(tracefs.status()["kernel"])
    for version, differences in OTHERWISE.items():
        for reason, names in differences.items():
            if release.startswith(version) and case.name.startswith(tuple(names.split())):
                pytest.skip(f"Linux {release}: {reason}")
    got = tracefs.sh(case.cmd, merge=True)
    difference = (same if release.startswith(RELEASE) else alike)(case, got.stdout, got.returncode)
    assert difference is None, f"{difference}\nscript:\n{case.cmd}"


def test_there_are_enough_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 120
