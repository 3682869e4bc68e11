"""Modules built from C for the kernel in use, loaded into running guests by the commands."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from fakefs import kernels
from fakefs.errors import UserError
from fakefs.modules import build, headers
from fakefs.testbed import FreshTracefs, Tracefs
from tests.mounted import FAKEFS, PATIENCE

CLOCK = """
#include <linux/module.h>
#include <linux/moduleparam.h>
#define CREATE_TRACE_POINTS
#include "clock-event.h"

static int hands = 2;
noinline int clock_tick(int n);
noinline int clock_tick(int n)
{
	trace_clock_struck(n * hands);
	return n * hands;
}
static int tick(const char *value, const struct kernel_param *param) { return clock_tick(21) == 42 ? 0 : -EDOM; }
static const struct kernel_param_ops ops = { .set = tick };
module_param_cb(tick, &ops, NULL, 0200);
module_param(hands, int, 0644);
static int __init clock_init(void) { return 0; }
static void __exit clock_exit(void) { }
module_init(clock_init);
module_exit(clock_exit);
MODULE_LICENSE("GPL");
"""
EVENT = """
#undef TRACE_SYSTEM
#define TRACE_SYSTEM clock
#if !defined(CLOCK_EVENT_H) || defined(TRACE_HEADER_MULTI_READ)
#define CLOCK_EVENT_H
#include <linux/tracepoint.h>
TRACE_EVENT(clock_struck, TP_PROTO(int hour), TP_ARGS(hour),
	TP_STRUCT__entry(__field(int, hour)), TP_fast_assign(__entry->hour = hour;), TP_printk("hour=%d", __entry->hour));
#endif
#undef TRACE_INCLUDE_PATH
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_PATH .
#define TRACE_INCLUDE_FILE clock-event
#include <trace/define_trace.h>
"""
PARTS = {
    "first.c": """
#include <linux/module.h>
#include "both.h"
static int here = 1;
module_param(here, int, 0444);
static int __init first_init(void) { return second(41) == 42 ? 0 : -EDOM; }
static void __exit first_exit(void) { }
module_init(first_init);
module_exit(first_exit);
MODULE_LICENSE("GPL");
""",
    "second.c": """
#include <linux/module.h>
#include "both.h"
static int here = 1;
module_param_named(there, here, int, 0444);
noinline int second(int n) { return n + here; }
""",
    "both.h": "int second(int n);\n",
}
CRASH = """
#include <linux/module.h>
static int __init crash_init(void) { *(volatile int *)8 = 1; return 0; }
module_init(crash_init);
MODULE_LICENSE("GPL");
"""
UNKNOWN = '#include <linux/module.h>\nint nowhere(void); int f(void) { return nowhere(); } MODULE_LICENSE("GPL");\n'

SPIN = """
#include <linux/module.h>
#include <linux/kthread.h>
static int spin(void *data) { for (;;) cpu_relax(); return 0; }
static int __init spin_init(void) { kthread_run(spin, NULL, "spinner"); return 0; }
module_init(spin_init);
MODULE_LICENSE("GPL");
"""

Command = Callable[..., subprocess.CompletedProcess[str]]


def release_of(kernel: Path) -> str:
    from emulator.kernel.image import KernelImage

    return KernelImage.load(kernel).version


@pytest.fixture(scope="session")
def release(kernel_path: Path) -> str:
    """The kernel's release, once its headers are there."""
    name = release_of(kernel_path)
    try:
        headers.find(name)
    except UserError as error:
        pytest.skip(str(error))
    return name


@pytest.fixture
def clock(release: str, tmp_path: Path) -> Path:
    """The C file of a module with an event, a function and parameters."""
    (tmp_path / "clock-event.h").write_text(EVENT)
    source = tmp_path / "clock.c"
    source.write_text(CLOCK)
    return source


@pytest.fixture
def fakefs() -> Command:
    """Run the command where the mounts of the plugin are found; both outputs together."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [*FAKEFS, *map(str, words)]
        return subprocess.run(
            command, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
        )

    return run


def test_probe_and_event_of_a_module(tracefs: Tracefs, clock: Path, fakefs: Command) -> None:
    with pytest.raises(OSError, match="No such file"):
        tracefs.write("events/clock/enable", "1")
    done = fakefs("insmod", clock, tracefs.path, "hands=2")
    assert (done.returncode, done.stdout) == (0, "")
    assert tracefs.guest("cat /proc/modules").stdout.startswith("clock ")
    assert "clock_tick [clock]" in tracefs.read("available_filter_functions")
    tracefs.write("dynamic_events", "p:tick clock:clock_tick n=$arg1:s32")
    tracefs.write("events/kprobes/tick/enable", "1")
    tracefs.write("events/clock/enable", "1")
    tracefs.guest("echo 1 >/sys/module/clock/parameters/tick")
    assert [hit.fields["n"] for hit in tracefs.hits("kprobes/tick")] == [21]
    assert [hit.fields["hour"] for hit in tracefs.hits("clock_struck")] == [42]

    # A probe does not hold the module, and comes back with it. Its event goes, and the trace, which nobody could read.
    assert fakefs("rmmod", "clock", tracefs.path).returncode == 0
    assert not (tracefs.path / "events/clock").exists()
    assert "clock:clock_tick" in tracefs.read("dynamic_events")
    assert fakefs("insmod", clock, tracefs.path).returncode == 0
    tracefs.guest("echo 1 >/sys/module/clock/parameters/tick")
    assert len(tracefs.hits("kprobes/tick")) == 1


def test_function_tracer_and_stack(tracefs: Tracefs, clock: Path, fakefs: Command) -> None:
    fakefs("insmod", clock, tracefs.path)
    tracefs.write("set_ftrace_filter", "clock_tick")
    tracefs.write("current_tracer", "function")
    tracefs.write("options/func_stack_trace", "1")
    tracefs.guest("echo 1 >/sys/module/clock/parameters/tick")
    trace = tracefs.read("trace")
    assert "clock_tick <-tick" in trace
    assert " => clock_tick\n => param_attr_store" in trace
    assert " => ksys_write" in trace


def test_what_is_refused(
    tracefs: Tracefs, clock: Path, fakefs: Command, tmp_path: Path, release: str, kernel_path: Path
) -> None:
    def refusal(*words: str | Path) -> str:
        done = fakefs("insmod", *words)
        assert done.returncode != 0
        assert done.stdout.startswith("fakefs: ")
        assert done.stdout.count("\n") == 1
        return done.stdout

    for name, text in (("crash", CRASH), ("bad", "int x = ;\n"), ("unknown", UNKNOWN)):
        (tmp_path / f"{name}.c").write_text(text)
    module = build.build(clock, release)
    other = tmp_path / "other.ko"
    other.write_bytes(module.read_bytes().replace(b" mod_unload ", b" mod_upload "))
    assert f"clock: version magic '{release} " in refusal(other, tracefs.path)
    assert "not a module for this kernel" in refusal("/bin/true", tracefs.path)
    assert "not a kernel module" in refusal(clock.with_name("clock-event.h"), tracefs.path)
    assert "No such file" in refusal(tmp_path / "none.ko", tracefs.path)
    assert "bad.c:1:9: error: " in refusal(tmp_path / "bad.c", tracefs.path)
    assert "exports no nowhere" in refusal(tmp_path / "unknown.c", tracefs.path)
    assert "`x' invalid for parameter `hands'" in refusal(module, tracefs.path, "hands=x")
    assert "a parameter is NAME=VALUE" in refusal(module, tracefs.path, "hands")
    assert "the module has crashed" in refusal(tmp_path / "crash.c", tracefs.path)
    assert fakefs("insmod", module, tracefs.path).returncode == 0
    assert "loaded already" in refusal(module, tracefs.path)
    assert fakefs("rmmod", "nosuch", tracefs.path).stdout == "fakefs: nosuch: no such module is loaded\n"
    assert "no running mount" in refusal(module, tmp_path)
    assert "not found" in fakefs("modprobe", "nosuch", tracefs.path).stdout


def test_a_module_is_built_once(clock: Path, release: str) -> None:
    first = build.build(clock, release)
    stamp = first.stat().st_mtime_ns
    assert build.build(clock, release) == first
    assert first.stat().st_mtime_ns == stamp
    clock.with_name("clock-event.h").write_text(EVENT + "\n")
    assert build.build(clock, release) != first
    assert [path.name for path in first.parent.iterdir()] == ["clock.ko"]


def test_a_module_of_two_files(tracefs: Tracefs, release: str, fakefs: Command, tmp_path: Path) -> None:
    for name, text in PARTS.items():
        (tmp_path / name).write_text(text)
    first, second = tmp_path / "first.c", tmp_path / "second.c"
    assert f"Linux {release} exports no second to modules" in fakefs("insmod", first, tracefs.path).stdout
    built = build.build(first, release, more=[second])
    assert built == build.build(first, release, more=[second])
    assert fakefs("insmod", built, tracefs.path).stdout == ""
    assert tracefs.guest("ls /sys/module/first/parameters").stdout == "here\nthere\n"
    assert "second [first]" in tracefs.read("available_filter_functions")
    second.write_text(PARTS["second.c"] + "int x = ;\n")
    with pytest.raises(UserError, match=r"second\.c:7:9: error: "):
        build.build(first, release, more=[second])


def test_in_the_view_of_run(clock: Path, environment: dict[str, str], kernel_path: Path) -> None:
    script = f"insmod {clock} hands=3 && lsmod && rmmod clock && lsmod && modprobe -q nosuch"
    done = subprocess.run(
        [*FAKEFS, "run", "--kernel", str(kernel_path), "--", "sh", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["Module", "clock", "Module"], done
    assert done.stderr == "fakefs: module nosuch not found; those there are: fakefs module samples\n"


@pytest.mark.slow
def test_a_module_that_loops_for_ever(tracefs: Tracefs, release: str, fakefs: Command, tmp_path: Path) -> None:
    """The guest's watchdog ends the guest, so that those who wait hear of it."""
    tracefs.guest("echo 1 >/proc/sys/kernel/watchdog_thresh")
    (tmp_path / "spin.c").write_text(SPIN)
    fakefs("insmod", tmp_path / "spin.c", tracefs.path)
    with pytest.raises(OSError, match="Input/output error"):
        tracefs.read("tracing_on")
    assert "softlockup: hung tasks" in tracefs.console()
    assert "[spinner:" in tracefs.console()


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["bookworm", "stable", "sid"])
def test_with_other_kernels(suite: str, new_tracefs: Callable[..., FreshTracefs], clock: Path, fakefs: Command) -> None:
    tracefs = new_tracefs(kernel=kernels.fetch(suite))
    done = fakefs("insmod", clock, tracefs.path)
    assert (done.returncode, done.stdout) == (0, "")
    tracefs.write("events/clock/enable", "1")
    tracefs.guest("echo 1 >/sys/module/clock/parameters/tick")
    assert [hit.fields["hour"] for hit in tracefs.hits("clock_struck")] == [42]


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["bookworm", "stable", "sid"])
def test_the_kernels_samples(suite: str, new_tracefs: Callable[..., FreshTracefs], fakefs: Command) -> None:
    """They are compiled as they are, and do what they are there to show."""
    kernel = kernels.fetch(suite)
    built = {Path(line).stem for line in fakefs("module", "samples", "--kernel", kernel).stdout.splitlines()}
    assert {"trace-events-sample", "trace-printk", "kprobe_example", "kretprobe_example", "ftrace-direct"} <= built
    with closing(new_tracefs(kernel=kernel)) as tracefs:
        for name in ("trace-events-sample", "trace-printk", "kprobe_example", "kretprobe_example", "ftrace-direct"):
            done = fakefs("modprobe", name, tracefs.path)
            assert (done.returncode, done.stdout) == (0, ""), name
        for name in ("trace_printk", "trace_bprintk()", "trace_puts", "trace_bputs"):
            assert any(f"string that will use {name}" in line for line in tracefs.lines("trace")), name
        tracefs.write("events/sample-trace/foo_bar/enable", "1")
        [hit, *_] = tracefs.wait_for("foo_bar", timeout=PATIENCE)
        assert hit.task.startswith("event-sample")
        tracefs.write("dynamic_events", "p:called trace_events_sample:foo_bar_unreg")
        tracefs.write("events/kprobes/called/enable", "1")
        tracefs.write("events/sample-trace/foo_bar_with_fn/enable", "1")
        tracefs.write("events/sample-trace/foo_bar_with_fn/enable", "0")
        assert tracefs.hits("called")
        log = tracefs.guest("dmesg").stdout
        assert "handler_pre: <kernel_clone>" in log
        assert "kernel_clone returned" in log
        assert any("waking up" in line for line in tracefs.lines("trace"))
