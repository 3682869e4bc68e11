"""The scripts in examples/ against a fresh mount: they end by themselves, and print what a tutorial says they print."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from fakefs import mountpoint
from fakefs.testbed import Tracefs
from tests.mounted import PATIENCE, running

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_HIT = re.compile(r" +(\S+)-(\d+) +\[000\] \S+ +(\d+\.\d+): (\w+): (.*)")
# Guest pids below this may be its kernel's own threads: a host process with such a number is given another.
_FREE_PIDS = 200


def run(name: str, tracefs: Tracefs) -> str:
    done = tracefs.sh(f"exec '{EXAMPLES}/{name}.sh' '{tracefs.path}'", timeout=60, merge=True)
    assert done.returncode == 0, done.stdout
    assert "\x1b" not in done.stdout
    _check_left_nothing(tracefs)
    return done.stdout


def _check_left_nothing(tracefs: Tracefs) -> None:
    assert tracefs.read("dynamic_events") == ""
    assert tracefs.read("tracing_on") == "1\n"
    assert tracefs.lines("trace") == []


def _sections(output: str) -> dict[str, list[str]]:
    """The lines printed by each command, by the command."""
    sections: dict[str, list[str]] = {}
    for line in output.splitlines():
        if line.startswith("$ "):
            lines = sections[line[2:]] = []
        elif sections:
            lines.append(line)
    return sections


def _hits(lines: list[str]) -> list[tuple[str, int, float, str, str]]:
    found = [match for line in lines if (match := _HIT.fullmatch(line))]
    return [(comm, int(pid), float(time), event, text) for comm, pid, time, event, text in (m.groups() for m in found)]


def _by_start(sections: dict[str, list[str]], start: str) -> list[str]:
    [lines] = [lines for command, lines in sections.items() if command.startswith(start)]
    return lines


def test_kprobe(tracefs: Tracefs) -> None:
    sections = _sections(run("kprobe", tracefs))
    assert sections["cat dynamic_events"] == ["p:kprobes/myprobe vfs_read count=$arg3"]
    said, value = _by_start(sections, "sh -c 'echo \"cat will be")
    assert value == "1"
    pid = int(said.split()[-1])
    hits = _hits(sections["cat trace"])
    assert [hit[0] for hit in hits] == ["cat", "cat"]
    assert {hit[1] for hit in hits} == {pid} or pid < _FREE_PIDS


def test_a_stream_of_hits_has_the_callers_names_and_process_ids(tracefs: Tracefs) -> None:
    sections = _sections(run("kprobe", tracefs))
    stream = _hits(_by_start(sections, "sh -c 'echo \"common_pid"))
    assert len(stream) >= 20
    assert {hit[0] for hit in stream} == {"cat"}
    assert len({hit[1] for hit in stream}) >= 10  # two reads each: the text and the end of the file
    assert all(re.fullmatch(r"\(vfs_read\+0x\w+/0x\w+\) count=0x[0-9a-f]+", hit[4]) for hit in stream)
    times = [hit[2] for hit in stream]
    assert times == sorted(times)
    hits = int(sections["cat kprobe_profile"][0].split()[1])
    assert hits >= len(stream)


def test_kretprobe(tracefs: Tracefs) -> None:
    lines = _hits(_sections(run("kretprobe", tracefs))['grep -v "^#" trace'])
    sizes = [int(hit[4].rpartition("got=")[2]) for hit in lines if hit[0] == "cat"]
    assert sizes[:4] == [len("1\n"), 0, len("nop\n"), 0]
    assert len(sizes) == 6
    assert all("<- vfs_read)" in hit[4] for hit in lines)


def test_histogram(tracefs: Tracefs) -> None:
    clocks = len(tracefs.read("trace_clock"))
    lines = _sections(run("histogram", tracefs))["cat events/kprobes/myprobe/hist"]
    counts = {
        int(match[1]): int(match[2])
        for line in lines
        if (match := re.fullmatch(r"\{ count: +(\d+) \} hitcount: +(\d+)", line))
    }
    # One read a block, and one that finds the end; a short block is followed by that one as well.
    assert counts == {size: -(-clocks // size) + 1 for size in (1, 16, 512, 4096)}
    assert f"    Hits: {sum(counts.values())}" in lines
    assert "    Entries: 4" in lines
    assert "    Dropped: 0" in lines


def test_latency(tracefs: Tracefs) -> None:
    sections = _sections(run("latency", tracefs))
    hits = _hits(sections['grep -v "^#" trace | head -n 6'])
    assert len(hits) == 6
    assert all(hit[0] == "cat" and hit[3] == "read_time" for hit in hits)
    # Virtual time: a block of code is 4 ns, and a read of a few bytes is no more than some thousand blocks.
    assert all(100 < int(hit[4].removeprefix("ns=")) < 1_000_000 for hit in hits)
    # Five times three files, two reads each.
    assert "    Hits: 30" in sections["cat events/synthetic/read_time/hist"]


def test_uprobe(tracefs: Tracefs) -> None:
    sections = _sections(run("uprobe", tracefs))
    assert _by_start(sections, "fakefs exec --host-binary . -- bash -c 'echo hello") == ["hello", "world"]
    hits = _hits(sections["cat trace"])
    assert [(hit[0], hit[3]) for hit in hits] == [("bash", "echo"), ("bash", "echoed")] * 2
    assert [hit[4].rpartition(") ")[2] for hit in hits] == ['word="hello"', "status=0", 'word="world"', "status=0"]
    assert [line.split()[1:] for line in sections["cat uprobe_profile"] if line] == [["echo", "2"], ["echoed", "2"]]
    hits = _hits(sections['grep -v "^#" trace'])
    assert [(hit[0], hit[4].rpartition(" ")[2]) for hit in hits] == [("ls", "status=0"), ("bash", "status=3")]


def test_errors(tracefs: Tracefs) -> None:
    sections = _sections(run("errors", tracefs))
    refused = [lines for command, lines in sections.items() if command.startswith("echo 'p:")]
    assert len(refused) == 2
    # Linux 6.1 says ENOENT for a function that is not there, later ones EINVAL.
    assert refused[0][0].startswith("bash: echo: write error: ")
    assert refused[1] == ["bash: echo: write error: Invalid argument"]
    log = sections["cat error_log"]
    carets = [line.index("^") for line in log if line.strip() == "^"]
    assert [log[1][carets[0] :], log[4][carets[1] :]] == ["vfs_raed", "u63"]


@pytest.mark.parametrize("argument", ["", "/nowhere", "/proc"])
def test_an_example_without_a_mount_says_how_to_use_it(argument: str) -> None:
    argv = [str(EXAMPLES / "kprobe.sh"), *([argument] if argument else [])]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")


def test_the_demonstration_ends_and_leaves_nothing(
    environment: dict[str, str], kernel_path: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [str(EXAMPLES / "demo.sh"), "--kernel", str(kernel_path)],
        env={**environment, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(_hits(done.stdout.splitlines())) >= 20
    for title in ("# A kprobe", "# A kretprobe", "# A histogram", "# Latency", "# A wrong probe", "To go on by hand"):
        assert title in done.stdout
    assert list(tmp_path.glob("tracing.*")) == []


# In a mount namespace of its own: a /dev/fuse for everybody, and a home that fusermount3 reaches as nobody.
# The capability is for a Python that lies in root's home.
_AS_NOBODY = """
HOME=/media
mount -t tmpfs none "$HOME"
mknod -m 666 "$HOME/fuse" c 10 229
mount --bind "$HOME/fuse" /dev/fuse
mkdir "$HOME/nobody"
chown 65534:65534 "$HOME/nobody"
export HOME="$HOME/nobody" TMPDIR="$HOME/nobody" XDG_RUNTIME_DIR="$HOME/nobody/run"
export XDG_CACHE_HOME="$HOME" FAKEFS_CACHE="$HOME/cache"
capability=dac_read_search
exec setpriv --reuid 65534 --regid 65534 --clear-groups \
    --inh-caps "+$capability" --ambient-caps "+$capability" "$@"
"""


def test_the_demonstration_without_root(environment: dict[str, str], kernel_path: Path) -> None:
    unshare = ("unshare", "-m")
    try:
        subprocess.run([*unshare, "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("unshare(1) is not allowed here")
    done = subprocess.run(
        [*unshare, "sh", "-ec", _AS_NOBODY, "sh", str(EXAMPLES / "demo.sh"), "--kernel", str(kernel_path)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(_hits(done.stdout.splitlines())) >= 20
    assert "To go on by hand" in done.stdout


def test_an_interrupted_demonstration_leaves_nothing(
    environment: dict[str, str], kernel_path: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [str(EXAMPLES / "demo.sh"), "--kernel", str(kernel_path)],
        env={**environment, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert any("A kprobe" in line for line in process.stdout)
        process.terminate()
        process.stdout.read()
        assert process.wait(PATIENCE) == 130
    assert not running(process.pid)
    assert list(tmp_path.glob("tracing.*")) == []
    with open("/proc/self/mountinfo", "rb") as file:
        mounts = [mount.directory for mount in mountpoint.parse_mountinfo(file.read())]
    assert not [directory for directory in mounts if directory.startswith(os.fsencode(tmp_path))]


def test_wprobe(tracefs: Tracefs) -> None:
    sections = _sections(run("wprobe", tracefs))
    first, second, *stack = _by_start(sections, "grep -m 1 -B 1")
    assert "my_jiffies: (" in first
    assert second.endswith("<stack trace>")
    assert " => asm_exc_debug" in stack
    assert " => tick_do_update_jiffies64" in stack
    if "f[:" not in tracefs.read("README"):
        return
    hits = _hits(_by_start(sections, 'grep "refs: "'))
    counts = [re.findall(r"was=(\d+) count=(\d+)$", text)[0] for *_, text in hits]
    assert [was for was, _ in counts[1:]] == [count for _, count in counts[:-1]]  # each change was seen
    assert counts[0][0] == "1"
    assert counts[-1][1] in ("0", "1")  # d_make_discardable() does not count down to 0 in newer ones
