"""uprobes on files of the host, by programs that run in the guest: what the hits say."""

from __future__ import annotations

import re

import pytest

from tests.mounted import Mounted
from tests.uprobes import Program, hits


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("static") / "measure", "-static")


def test_a_program_of_the_host_hits_in_the_guest(m: Mounted, static: Program) -> None:
    m.write("uprobe_events", f"p:adds {static.at('add')} a=%di b=%si:s32\n")
    m.write("dynamic_events", f"r:sums {static.at('add')} sum=$retval\n", append=True)
    m.write("dynamic_events", f"p:texts {static.at('measure')} text=+0(%di):string\n", append=True)
    assert m.read("uprobe_events").splitlines() == [
        f"p:uprobes/adds {static.path}:0x{static.offset('add'):016x} a=%di b=%si:s32",
        f"r:uprobes/sums {static.path}:0x{static.offset('add'):016x} sum=$retval",
        f"p:uprobes/texts {static.path}:0x{static.offset('measure'):016x} text=+0(%di):string",
    ]
    m.write("events/uprobes/enable", "1")
    assert m.exec(str(static.path), "a", "bcd").returncode == 4
    m.write("events/uprobes/enable", "0")
    assert hits(m, "adds") == ["measure a=0x0 b=1", "measure a=0x1 b=3"]
    assert hits(m, "sums") == ["measure sum=0x1", "measure sum=0x4"]
    assert hits(m, "texts") == ['measure text="a"', 'measure text="bcd"']
    assert re.search(r"measure adds +2\n", m.read("uprobe_profile"))


def test_return_probes_and_memory_of_the_file(m: Mounted, static: Program) -> None:
    m.write(
        "uprobe_events",
        f"p:sums {static.at('add')}%return sum=$retval\n"
        f"p:answers {static.at('add')} answer=@+{static.offset('answer'):#x}:s64 comm=$comm here=$stack0:x64\n",
    )
    m.write("events/uprobes/enable", "1")
    m.exec(str(static.path), "abc")
    m.write("events/uprobes/enable", "0")
    assert hits(m, "sums") == ["measure sum=0x3"]
    [hit] = hits(m, "answers")
    answer = 0 if m.status()["kernel"].startswith("6.1.") else 42  # that one adds the offset twice
    assert hit.startswith(f'measure answer={answer} comm="measure" here=0x')


def test_filters_triggers_and_pids(m: Mounted, static: Program) -> None:
    m.write("uprobe_events", f"p:adds {static.at('add')} a=%di b=%si\n")
    m.write("events/uprobes/adds/filter", "b > 1")
    m.write("events/uprobes/adds/trigger", "hist:keys=b")
    m.write("events/uprobes/adds/enable", "1")
    m.exec(str(static.path), "a", "bcd")
    m.write("events/uprobes/adds/filter", "0")
    assert hits(m, "adds") == ["measure a=0x1 b=0x3"]
    counts = re.findall(r"\{ b: +(\d+) \} hitcount: +(\d+)", m.read("events/uprobes/adds/hist"))
    assert sorted(counts) == [("1", "1"), ("3", "1")]
    m.write("trace", "")
    m.exec("sh", "-c", f"echo $$ > /sys/kernel/tracing/set_event_pid; exec {static.path} abcd")
    m.exec(str(static.path), "abcde")
    assert hits(m, "adds") == ["measure a=0x0 b=0x4"]
    m.write("set_event_pid", "")
    m.write("events/uprobes/adds/trigger", "!hist:keys=b")


def test_a_reference_counter_is_raised_while_the_event_is_enabled(m: Mounted, static: Program) -> None:
    answer = f"{static.offset('answer'):#x}"
    distance = static.addresses["answer"] - static.addresses["add"]
    m.write("uprobe_events", f"p:answers {static.at('add')}({answer}) answer=+{distance}(%ip):s64\n")
    assert f"({answer})" in m.read("uprobe_events")
    m.write("events/uprobes/answers/enable", "1")
    m.exec(str(static.path), "a")
    m.write("events/uprobes/answers/enable", "0")
    assert hits(m, "answers") == ["measure answer=43"]
