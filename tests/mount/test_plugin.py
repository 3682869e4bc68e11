"""The pytest plugin: pytest runs in a process of its own, on small test files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from fakefs import mountpoint
from tests.mount.conftest import User
from tests.mounted import PATIENCE, until

RunPytest = Callable[..., str]
# What changes the report of the inner pytest: with CI it shortens nothing, so that messages show in the summary too.
_REPORTING = {"CI", "BUILD_NUMBER", "COLUMNS", "NO_COLOR", "FORCE_COLOR", "PY_COLORS"}
_REGISTERED = any(point.name == "fakefs" for point in metadata.entry_points(group="pytest11"))


@pytest.fixture
def run_pytest(environment: dict[str, str], kernel_path: Path, tmp_path: Path) -> RunPytest:
    """Run pytest on a file with this text; return what it prints. Its mounts are gone then."""

    plain = {
        name: value for name, value in environment.items() if name not in _REPORTING and not name.startswith("PYTEST_")
    }

    def run(text: str, *options: str) -> str:
        file = tmp_path / "test_it.py"
        file.write_text(f"import pytest\n{text}")
        plugin = [] if _REGISTERED else ["-p", "fakefs.pytest_plugin"]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *plugin, "-c", os.devnull),
                *("-W", "error", "--rootdir", str(tmp_path), f"--basetemp={tmp_path / 'base'}"),
                *("--fakefs-kernel", str(kernel_path), *options, str(file)),
            ],
            env=plain,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        with open("/proc/self/mountinfo", "rb") as mounts:
            directories = [mount.directory for mount in mountpoint.parse_mountinfo(mounts.read())]
        assert not [each for each in directories if each.startswith(os.fsencode(tmp_path))]
        return done.stdout

    return run


def summary(output: str) -> str:
    """The counts in pytest's last line."""
    return re.sub(r" in .*|=+ ?| ?=+$", "", output.rstrip().splitlines()[-1]).strip()


def test_a_probe_and_isolation(run_pytest: RunPytest) -> None:
    output = run_pytest("""
def test_probe(tracefs):
    tracefs.write("dynamic_events", "p:reads vfs_read count=$arg3:s64")
    tracefs.write("dynamic_events", "r:back vfs_read", append=True)
    assert len(tracefs.lines("dynamic_events")) == 2
    tracefs.write("events/kprobes/reads/enable", "1")
    assert tracefs.guest("dd if=/proc/version bs=13 count=1").stdout == "Linux version"
    [hit] = [hit for hit in tracefs.hits("kprobes/reads") if hit.fields["count"] == 13]
    assert (hit.func, hit.task) == ("vfs_read", "dd")

def test_fresh(tracefs):
    assert tracefs.read("dynamic_events") == ""
    assert tracefs.lines("trace") == []

def test_guest(tracefs):
    assert tracefs.guest(["tr", "a-z", "A-Z"], stdin="hello").stdout == "HELLO"
    assert tracefs.guest("exit 3", check=False).returncode == 3
    with pytest.raises(Exception, match="exit status 3"):
        tracefs.guest("exit 3")
""")
    assert summary(output) == "3 passed", output


def test_scripts_of_this_machine(run_pytest: RunPytest) -> None:
    output = run_pytest("""
def test_script(tracefs):
    done = tracefs.sh('pwd; echo "$TRACEFS $1"; cat current_tracer; echo error >&2; exit 3', "argument")
    assert done.stdout == f"{tracefs.path}\\n{tracefs.path} argument\\nnop\\n"
    assert (done.stderr, done.returncode) == ("error\\n", 3)
    assert tracefs.sh("echo one; echo two >&2", merge=True).stdout == "one\\ntwo\\n"
    assert tracefs.sh("sleep 20", timeout=0.2).returncode == 124
    assert tracefs.status()["kernel"] == tracefs.guest("uname -r").stdout.strip()
""")
    assert summary(output) == "1 passed", output


def test_further_kernels(run_pytest: RunPytest) -> None:
    output = run_pytest("""
@pytest.fixture(scope="module")
def shared(new_tracefs):
    return new_tracefs(wprobe="off")

def test_one(shared):
    shared.write("dynamic_events", "p:kept vfs_read")
    assert "wprobe" not in shared.read("README")

def test_two(shared, tracefs, new_tracefs):
    assert "kept" in shared.read("dynamic_events")
    assert tracefs.read("dynamic_events") == ""
    assert "wprobe" in tracefs.read("README")
    other = new_tracefs(root="/proc")
    assert other.read("sys/kernel/ostype") == "Linux\\n"
    other.close()
    assert not other.path.joinpath("sys").exists()
    other.close()

def test_fails(shared):
    assert False

def test_unknown(new_tracefs):
    new_tracefs(colour="red")
""")
    assert summary(output) == "2 failed, 2 passed", output
    assert output.count(" new_tracefs: dynamic_events -") == 2
    assert "p:kprobes/kept vfs_read" in output
    assert "not ['colour']" in output


def test_waiting(run_pytest: RunPytest) -> None:
    output = run_pytest("""
def test_wait(tracefs):
    tracefs.write("events/sched/sched_process_exec/enable", "1")
    tracefs.guest("(while :; do /bin/busybox sleep 0.05; done) </dev/null >/dev/null 2>&1 &")
    found = tracefs.wait_for("sched_process_exec", 4)
    assert len(found) >= 4
    assert tracefs.hits("sched:sched_process_exec")[:4] == found[:4]
    with pytest.raises(TimeoutError, match="sched_wakeup_new: 0 of 1 hits"):
        tracefs.wait_for("sched_wakeup_new", timeout=0.2)
""")
    assert summary(output) == "1 passed", output


def test_a_failure_is_reported_with_what_the_kernel_says(run_pytest: RunPytest) -> None:
    output = run_pytest("""
def test_fails(tracefs):
    tracefs.write("trace_marker", "before the failure")
    tracefs.write("dynamic_events", "p:kept vfs_read")
    tracefs.write("dynamic_events", "p:wrong no_such_function", append=True)
""")
    assert summary(output) == "1 failed"
    for text in ("trace (last 60 lines)", "error_log", "dynamic_events", "console"):
        assert f" tracefs: {text} -" in output
    for text in ("tracing_mark_write: before the failure", "p:kprobes/kept vfs_read", "agent: ready"):
        assert text in output
    reason = "Invalid probed address or symbol"
    raised = [line for line in output.splitlines() if line.startswith("E ") and reason in line]
    assert len(raised) == 1, "the error_log's entry is part of the exception"
    assert reason in output.partition(" tracefs: error_log -")[2].partition(" tracefs: ")[0]


def test_marks(run_pytest: RunPytest) -> None:
    output = run_pytest("""
@pytest.mark.fakefs(wprobe="off", memory="192M", append="fakefs.test=1")
def test_marked(tracefs):
    assert "fakefs.test=1" in tracefs.guest("cat /proc/cmdline").stdout
    total = int(tracefs.guest("cat /proc/meminfo").stdout.split()[1])
    assert 140 << 10 < total < 192 << 10
    with pytest.raises(OSError):
        tracefs.write("dynamic_events", "w:w w@jiffies")

@pytest.mark.fakefs(kernel="/no/such/kernel")
def test_no_kernel(tracefs): pass

@pytest.mark.fakefs(colour="red")
def test_unknown(tracefs): pass
""")
    assert summary(output) == "1 passed, 2 errors", output
    assert "fakefs: /no/such/kernel: no such kernel" in output
    assert "not ['colour']" in output


def test_deterministic_traces_are_the_same(run_pytest: RunPytest, tmp_path: Path) -> None:
    traces = []
    for name in ("one", "two", "three"):
        path = tmp_path / name
        output = run_pytest(f"""
@pytest.mark.fakefs(deterministic=True)
def test_trace(fakefs_run):
    done = fakefs_run('''
        cd /sys/kernel/tracing
        echo function > current_tracer; echo nop > current_tracer
        echo 'p:reads vfs_read count=$arg3' > dynamic_events
        echo 'comm == "cat"' > events/kprobes/reads/filter
        echo 1 > events/sched/enable; echo 1 > events/timer/enable
        echo 1 > events/kprobes/reads/enable
        for i in 1 2 3; do cat current_tracer; ls events/kprobes; done
        mkdir instances/one; rmdir instances/one
        echo 0 > tracing_on
    ''')
    assert done.status == 0, done.stderr
    __import__("pathlib").Path({str(path)!r}).write_text(done.trace)
""")
        assert summary(output) == "1 passed", output
        traces.append(path.read_text())
    assert "reads: (vfs_read" in traces[0]
    assert traces == [traces[0]] * 3


def test_deterministic_programs_in_the_guest(run_pytest: RunPytest) -> None:
    output = run_pytest("""
def trace(tracefs):
    tracefs.write("events/sched/enable", "1")
    tracefs.write("events/syscalls/sys_enter_read/enable", "1")
    tracefs.guest("tr a-z A-Z; ls /proc; sleep 0.1; (sleep 0.05; echo x) & wait; echo y >&2", stdin="hello\\n" * 20000)
    tracefs.write("tracing_on", "0")
    return tracefs.read("trace")

def test_same(new_tracefs):
    traces = [trace(new_tracefs(deterministic=True)) for _ in range(3)]
    assert "comm=tr" in traces[0]
    assert traces == [traces[0]] * 3
""")
    assert summary(output) == "1 passed", output


def test_runs_at_the_real_paths(run_pytest: RunPytest) -> None:
    output = run_pytest("""
def test_passes(fakefs_run):
    done = fakefs_run("cd $TRACEFS; pwd; echo hello > trace_marker; echo $1; exit 3", "argument")
    assert (done.stdout, done.status) == ("/sys/kernel/tracing\\nargument\\n", 3)
    assert done.hits("tracing_mark_write")[0].text == "hello"

def test_takes_too_long(fakefs_run):
    assert fakefs_run("sleep 20", timeout=0.5).status == 124

def test_fails(fakefs_run):
    done = fakefs_run("echo p:wrong no_such_function > /sys/kernel/tracing/dynamic_events")
    assert done.status == 0
""")
    assert summary(output) == "1 failed, 2 passed", output
    assert "Invalid probed address or symbol" in output
    assert "fakefs_run: console" in output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_as_an_ordinary_user(user: User, environment: dict[str, str]) -> None:
    """In his home, as pytest's directories here are for root alone."""
    home = user.kernel.parent
    text = """
def test_mount(tracefs):
    tracefs.write("dynamic_events", "p:reads vfs_read")
    assert tracefs.sh("cat dynamic_events").stdout == "p:kprobes/reads vfs_read\\n"

def test_run(fakefs_run):
    assert fakefs_run("id -u; cat /sys/kernel/tracing/current_tracer").stdout == "0\\nnop\\n"
"""
    (home / "test_user.py").write_text(text)
    plugin = [] if _REGISTERED else ["-p", "fakefs.pytest_plugin"]
    options = ["-q", "-p", "no:cacheprovider", *plugin, "-c", os.devnull, "--rootdir", str(home), "--fakefs-required"]
    command = [sys.executable, "-m", "pytest", *options, f"--basetemp={home}/base", "--fakefs-kernel", str(user.kernel)]
    done = subprocess.run(
        [*user.before, *command, str(home / "test_user.py")],
        env={name: value for name, value in environment.items() if name not in _REPORTING},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert summary(done.stdout) == "2 passed", done.stdout + done.stderr


_WITHOUT_FUSE = """
import builtins, os
real = os.open
def without(path, *rest, **named):
    if path == "/dev/fuse":
        raise PermissionError(13, "Permission denied")
    return real(path, *rest, **named)

@pytest.fixture(scope="session", autouse=True)
def no_fuse():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", without)
        yield

def test_it(tracefs): pass
"""


def test_without_fuse_tests_are_skipped_or_fail(run_pytest: RunPytest) -> None:
    output = run_pytest(_WITHOUT_FUSE, "-rs")
    assert summary(output) == "1 skipped"
    assert "cannot open /dev/fuse: Permission denied; see: fakefs doctor" in output
    assert summary(run_pytest(_WITHOUT_FUSE, "--fakefs-required")) == "1 error"


def test_others_do_not_pay(run_pytest: RunPytest) -> None:
    output = run_pytest("""
import sys
def test_it():
    assert [name for name in sys.modules if name.startswith("fakefs.")] == ["fakefs.pytest_plugin"]
    assert not {"trio", "pyfuse3", "unicorn"} & set(sys.modules)
""")
    assert summary(output) == "1 passed", output


def test_the_example_of_the_guide_and_the_readme(run_pytest: RunPytest) -> None:
    root = Path(__file__).resolve().parents[2]
    guide = (root / "docs/testing.md").read_text().split("```python\n")[1].partition("```")[0]
    output = run_pytest(guide)
    assert summary(output) == "2 passed", output
    example = guide.partition("\n\n")[0]
    assert example in (root / "README.md").read_text()


@pytest.mark.parametrize("victim", ["client", "server"])
def test_a_killed_runner_leaves_no_mount(
    environment: dict[str, str], kernel_path: Path, tmp_path: Path, victim: str
) -> None:
    directory = tmp_path / "tracing"
    directory.mkdir()
    script = f"""
import os, signal
from pathlib import Path
from fakefs.forkserver import ForkServer, Order
server = ForkServer()
server.mount(Path({str(directory)!r}), Path({str(tmp_path / "log")!r}), Order({str(kernel_path)!r}))
assert os.path.ismount({str(directory)!r})
os.kill(os.getpid() if {victim!r} == "client" else server._process.pid, signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], env=environment, check=False, timeout=60, capture_output=True)
    until(lambda: mountpoint.mount_at(directory) is None, PATIENCE, "the mount's end")


def test_with_xdist(run_pytest: RunPytest) -> None:
    output = run_pytest(
        """
@pytest.mark.parametrize("i", range(6))
def test_it(tracefs, i):
    tracefs.write("dynamic_events", f"p:probe{i} vfs_read")
    assert tracefs.read("dynamic_events") == f"p:kprobes/probe{i} vfs_read\\n"
""",
        *("-n", "2", "-q"),
    )
    assert summary(output) == "6 passed", output
