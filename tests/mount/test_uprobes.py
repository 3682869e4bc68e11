"""uprobes on files of the host, by programs that run in the guest: what the hits say."""

from __future__ import annotations

import re

import pytest

from fakefs.testbed import Tracefs
from tests.uprobes import Program, hits


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("static") / "measure", "-static")


def test_a_program_of_the_host_hits_in_the_guest(tracefs: Tracefs, static: Program) -> None:
    tracefs.write("uprobe_events", f"p:adds {static.at('add')} a=%di b=%si:s32\n")
    tracefs.write("dynamic_events", f"r:sums {static.at('add')} sum=$retval\n", append=True)
    tracefs.write("dynamic_events", f"p:texts {static.at('measure')} text=+0(%di):string\n", append=True)
    assert tracefs.read("uprobe_events").splitlines() == [
        f"p:uprobes/adds {static.path}:0x{static.offset('add'):016x} a=%di b=%si:s32",
        f"r:uprobes/sums {static.path}:0x{static.offset('add'):016x} sum=$retval",
        f"p:uprobes/texts {static.path}:0x{static.offset('measure'):016x} text=+0(%di):string",
    ]
    tracefs.write("events/uprobes/enable", "1")
    assert tracefs.guest([str(static.path), "a", "bcd"], check=False).returncode == 4
    tracefs.write("events/uprobes/enable", "0")
    assert hits(tracefs, "adds") == ["measure a=0x0 b=1", "measure a=0x1 b=3"]
    assert hits(tracefs, "sums") == ["measure sum=0x1", "measure sum=0x4"]
    assert hits(tracefs, "texts") == ['measure text="a"', 'measure text="bcd"']
    assert re.search(r"measure adds +2\n", tracefs.read("uprobe_profile"))


def test_return_probes_and_memory_of_the_file(tracefs: Tracefs, static: Program) -> None:
    tracefs.write(
        "uprobe_events",
        f"p:sums {static.at('add')}%return sum=$retval\n"
        f"p:answers {static.at('add')} answer=@+{static.offset('answer'):#x}:s64 comm=$comm here=$stack0:x64\n",
    )
    tracefs.write("events/uprobes/enable", "1")
    tracefs.guest([str(static.path), "abc"], check=False)
    tracefs.write("events/uprobes/enable", "0")
    assert hits(tracefs, "sums") == ["measure sum=0x3"]
    [hit] = hits(tracefs, "answers")
    answer = 0 if tracefs.status()["kernel"].startswith("6.1.") else 42  # that one adds the offset twice
    assert hit.startswith(f'measure answer={answer} comm="measure" here=0x')


def test_filters_triggers_and_pids(tracefs: Tracefs, static: Program) -> None:
    tracefs.write("uprobe_events", f"p:adds {static.at('add')} a=%di b=%si\n")
    tracefs.write("events/uprobes/adds/filter", "b > 1")
    tracefs.write("events/uprobes/adds/trigger", "hist:keys=b")
    tracefs.write("events/uprobes/adds/enable", "1")
    tracefs.guest([str(static.path), "a", "bcd"], check=False)
    tracefs.write("events/uprobes/adds/filter", "0")
    assert hits(tracefs, "adds") == ["measure a=0x1 b=0x3"]
    counts = re.findall(r"\{ b: +(\d+) \} hitcount: +(\d+)", tracefs.read("events/uprobes/adds/hist"))
    assert sorted(counts) == [("1", "1"), ("3", "1")]
    tracefs.write("trace", "")
    tracefs.guest(["sh", "-c", f"echo $$ > /sys/kernel/tracing/set_event_pid; exec {static.path} abcd"], check=False)
    tracefs.guest([str(static.path), "abcde"], check=False)
    assert hits(tracefs, "adds") == ["measure a=0x0 b=0x4"]
    tracefs.write("set_event_pid", "")
    tracefs.write("events/uprobes/adds/trigger", "!hist:keys=b")


def test_a_reference_counter_is_raised_while_the_event_is_enabled(tracefs: Tracefs, static: Program) -> None:
    answer = f"{static.offset('answer'):#x}"
    distance = static.addresses["answer"] - static.addresses["add"]
    tracefs.write("uprobe_events", f"p:answers {static.at('add')}({answer}) answer=+{distance}(%ip):s64\n")
    assert f"({answer})" in tracefs.read("uprobe_events")
    tracefs.write("events/uprobes/answers/enable", "1")
    tracefs.guest([str(static.path), "a"], check=False)
    tracefs.write("events/uprobes/answers/enable", "0")
    assert hits(tracefs, "answers") == ["measure answer=43"]
