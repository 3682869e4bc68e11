"""uprobes on files of the host: definitions bring them into the guest, and programs that run there hit them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakefs.hostfiles.program import host_program
from tests.mount.conftest import MakeMount
from tests.mounted import FAKEFS, Mounted, Resetter, until

SOURCE = """
#include <stdio.h>
#include <string.h>

__attribute__((noinline)) long add(long a, long b)
{
    __asm__ volatile("");
    return a + b;
}

__attribute__((noinline)) long measure(const char *text)
{
    __asm__ volatile("");
    return strlen(text);
}

long answer = 42;

int main(int argc, char **argv)
{
    long sum = 0;

    for (int i = 1; i < argc; i++)
        sum = add(sum, measure(argv[i]));
    printf("%ld\\n", sum);
    return sum;
}
"""


class Program:
    """A program compiled from SOURCE, and where in its file its functions and variables are."""

    def __init__(self, path: Path, *options: str) -> None:
        self.path = path
        source = path.with_suffix(".c")
        source.write_text(SOURCE)
        subprocess.run(["gcc", "-O1", *options, "-o", path, source], check=True)
        table = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        self.addresses = {name: int(at, 16) for at, _, name in re.findall(r"^([0-9a-f]+) (\w) (\w+)$", table, re.M)}
        headers = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True).stdout
        numbers = r"LOAD +0x(\w+) 0x(\w+) 0x\w+ 0x(\w+)"
        self.segments = [[int(each, 16) for each in found] for found in re.findall(numbers, headers)]

    def offset(self, name: str) -> int:
        """The offset in the file, in bytes."""
        address = self.addresses[name]
        return next(address - start + at for at, start, size in self.segments if start <= address < start + size)

    def at(self, name: str) -> str:
        """The place of a function, as a definition names it."""
        return f"{self.path}:{self.offset(name):#x}"


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("static") / "measure", "-static")


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("dynamic") / "measure")


def c_library(function: str) -> str:
    """The place of a function of the C library, as the loader finds it."""
    [library] = [path for path in host_program("bash").files if path.endswith(b"/libc.so.6")]
    table = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"^([0-9a-f]+) T {function}(@@\S+)?$", table, re.M)
    assert found is not None
    return f"{os.fsdecode(library)}:0x{found[1]}"  # in a shared library, addresses are offsets here


@pytest.fixture(scope="module")
def resetter(shared_mount: Mounted) -> Resetter:
    return Resetter(shared_mount)


@pytest.fixture
def m(shared_mount: Mounted, resetter: Resetter) -> Iterator[Mounted]:
    """The shared mount, as new afterwards but for the files brought into the guest."""
    yield shared_mount
    resetter.reset("trigger")


def hits(mount: Mounted, event: str) -> list[str]:
    """What the hits of an event say behind its name, and whose they are: "comm text"."""
    found = [re.fullmatch(rf" *(\S+)-\d+ .*?: {event}: \(.*?\) ?(.*)", line) for line in mount.trace()]
    return [f"{match[1]} {match[2]}".rstrip() for match in found if match]


def in_guest(mount: Mounted, command: str) -> str:
    done = mount.exec("sh", "-c", command)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- hits


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


# ---- programs of the host


def run_here(mount: Mounted, *argv: str, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program of the host in the guest."""
    return subprocess.run(
        [*FAKEFS, "exec", "--host-binary", str(mount.path), "--", *argv],
        input=stdin,
        capture_output=True,
        text=True,
        env=mount.env,
        cwd=cwd,
        timeout=60,
        check=False,
    )


def test_a_dynamic_program_and_its_libraries_hit(m: Mounted, dynamic: Program) -> None:
    m.write("uprobe_events", f"p:adds {dynamic.at('add')} a=%di b=%si\n")
    m.write("uprobe_events", f"r:sums {dynamic.at('add')} sum=$retval\n", append=True)
    m.write("uprobe_events", f"p:prints {c_library('printf')} format=+0(%di):string\n", append=True)
    m.write("events/uprobes/enable", "1")
    done = run_here(m, "./measure", "a", "bcd", cwd=dynamic.path.parent)
    assert (done.stdout, done.stderr, done.returncode) == ("4\n", "", 4)
    done = run_here(m, str(dynamic.path), "abcde")
    m.write("events/uprobes/enable", "0")
    assert hits(m, "adds") == ["measure a=0x0 b=0x1", "measure a=0x1 b=0x3", "measure a=0x0 b=0x5"]
    assert hits(m, "sums") == ["measure sum=0x1", "measure sum=0x4", "measure sum=0x5"]
    assert len(hits(m, "prints")) == 2  # the format has a newline in it, and so has the hit
    assert [line for line in m.trace() if line == '"'] == ['"', '"']


def test_two_programs_with_one_library(m: Mounted) -> None:
    m.write("uprobe_events", f"p:exits {c_library('exit')} status=%di:s32\n")
    m.write("events/uprobes/exits/enable", "1")
    for argv in (["ls", "/"], ["sleep", "0"]):  # brings them, and what they need
        assert run_here(m, *argv).returncode == 0
    m.write("trace", "")
    done = run_here(m, "bash", "-c", "sleep 0.2 & ls / >/dev/null; wait")
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    m.write("events/uprobes/exits/enable", "0")
    assert sorted(hits(m, "exits")) == ["bash status=0", "ls status=0", "sleep status=0"]


def test_input_output_status_and_environment_are_the_hosts(m: Mounted, tmp_path: Path) -> None:
    done = run_here(m, "tr", "a-z", "A-Z", stdin="hello\n")
    assert (done.stdout, done.stderr, done.returncode) == ("HELLO\n", "", 0)
    m.env["SET_BY_THE_TEST"] = "set"
    done = run_here(m, "bash", "-c", 'echo "$SET_BY_THE_TEST $0 $PWD"; echo wrong >&2; exit 7', cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == (f"set bash {tmp_path}\n", "wrong\n", 7)
    done = run_here(m, "bash", "-c", "kill -TERM $$")
    assert done.returncode == 128 + signal.SIGTERM
    script = tmp_path / "script"
    script.write_text('#!/usr/bin/env bash\necho "$0 $1"\n')
    script.chmod(0o755)
    assert run_here(m, str(script), "argument").stdout == f"{script} argument\n"


def test_random_numbers_need_not_be_waited_for(mount: Mounted) -> None:
    """The guest's kernel, left to itself, takes seconds to gather a seed, in the first getrandom(2)."""
    assert "random: crng init done" in in_guest(mount, "dmesg")


def test_programs_that_cannot_be_run(m: Mounted, tmp_path: Path) -> None:
    done = run_here(m, "no-such-program")
    assert (done.stdout, done.returncode) == ("", 127)
    assert done.stderr == "fakefs: no-such-program: no such program on this machine\n"
    big = tmp_path / "big"
    big.write_bytes(Path("/bin/busybox").read_bytes())
    big.chmod(0o755)
    os.truncate(big, 1 << 40)
    done = run_here(m, str(big))
    assert done.returncode == 1
    assert done.stderr == f"fakefs: {big}: File too large; it is to fit the guest's memory: --memory\n"
    source = tmp_path / "avx.c"
    source.write_text('int main(void) { __asm__("vpxor %ymm0, %ymm0, %ymm0"); return 0; }')
    subprocess.run(["gcc", "-o", tmp_path / "avx", source], check=True)
    done = run_here(m, str(tmp_path / "avx"))
    assert done.returncode == 128 + signal.SIGILL
    assert "an instruction that the guest's processor does not have" in done.stderr


def test_in_a_private_view(environment: dict[str, str], kernel_path: Path, dynamic: Program) -> None:
    script = f"""
        cd /sys/kernel/tracing
        echo 'p:adds {dynamic.at("add")} b=%si' > uprobe_events
        echo 1 > events/uprobes/adds/enable
        {shlex.join(FAKEFS)} exec --host-binary -- {dynamic.path} abc
        grep -c 'measure-.*adds: .* b=0x3' trace
    """
    done = subprocess.run(
        [*FAKEFS, "run", "--kernel", str(kernel_path), "--", "bash", "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("3\n1\n", "")


# ---- files


def test_links_and_modes_are_the_hosts(m: Mounted, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_bytes(b"\x90" * 5000)
    (tmp_path / "real/file").chmod(0o754)
    (tmp_path / "link").symlink_to("real")
    m.write("uprobe_events", f"p:x {tmp_path}/link/file:0x10\n")
    assert m.read("uprobe_events") == f"p:uprobes/x {tmp_path}/link/file:0x{16:016x}\n"  # as it was written
    listed = in_guest(m, f"cd {tmp_path}; readlink link; readlink -f link/file; stat -c '%a %s' link/file; ls -A real")
    assert listed.splitlines() == ["real", f"{tmp_path}/real/file", "754 5000", "file"]


def test_where_the_guest_has_a_directory_and_the_host_a_link(m: Mounted) -> None:
    m.write("uprobe_events", "p:x /bin/bash:0x4245\n")
    assert int(in_guest(m, "stat -L -c %s /bin/bash")) == os.stat("/bin/bash").st_size
    assert in_guest(m, "readlink -f /bin/bash").strip() == os.path.realpath("/bin/bash")


def test_what_the_guest_has_itself_is_left_alone(m: Mounted) -> None:
    before = in_guest(m, "stat -L -c '%i %s' /bin/sh")
    m.write("uprobe_events", "p:x /bin/sh:0x10\n")
    assert in_guest(m, "stat -L -c '%i %s' /bin/sh") == before


def test_relative_paths_start_where_the_writer_is(m: Mounted, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/file").write_bytes(bytes(100))
    done = m.sh(f"cd {tmp_path}/a/b; echo 'p:x ../file:0x10' > {m.path}/uprobe_events; cd {m.path}; cat uprobe_events")
    assert (done.stdout, done.stderr) == (f"p:uprobes/x ../file:0x{16:016x}\n", "")
    assert in_guest(m, f"stat -c %s {tmp_path}/a/file; pwd") == "100\n/\n"
    done = m.sh("echo 'p:x ./init:0x10' >> uprobe_events")  # the guest has an /init, but this is not where we are
    assert "No such file or directory" in done.stderr


def test_a_changed_file_is_brought_anew(m: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    m.write("uprobe_events", f"p:x {path}:0x0\n")
    assert in_guest(m, f"cat {path}") == "old"
    path.write_bytes(b"newer")
    m.write("uprobe_events", f"p:y {path}:0x0\n", append=True)
    assert in_guest(m, f"cat {path}") == "newer"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        m.write("uprobe_events", f"p:z {path}:0x0\n", append=True)
    path.mkdir()
    with pytest.raises(OSError, match="Invalid argument"):
        m.write("uprobe_events", f"p:z {path}:0x0\n", append=True)
    assert path.is_dir()


def test_a_link_that_leads_elsewhere_now(m: Mounted, tmp_path: Path) -> None:
    link = tmp_path / "link"
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        m.write("uprobe_events", f"p:x {link}:0x0\n")
        assert in_guest(m, f"cat {link}") == name


def test_odd_names(m: Mounted, tmp_path: Path) -> None:
    names = [b"a:b:c", b"\xff\xfe", b"x" * 255, b"#a"]
    for name in names[:3]:
        path = os.fsencode(tmp_path) + b"/" + name
        with open(path, "wb") as file:
            file.write(bytes(64))
        with open(os.fsencode(m.path) + b"/uprobe_events", "ab", buffering=0) as file:
            file.write(b"p:x " + path + b":0x10\n")
        assert m.sh("cat uprobe_events").stdout.encode("latin-1") == b"p:uprobes/x %b:0x%016x\n" % (path, 16)
        m.write("uprobe_events", "")
    (tmp_path / "with blank").write_bytes(bytes(64))
    with pytest.raises(OSError, match="Invalid argument"):
        m.write("uprobe_events", f"p:x {tmp_path}/with blank:0x10\n")


# ---- errors


def test_what_is_no_regular_file(m: Mounted, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for name, says, logged in (
        (f"{tmp_path}/none", "No such file or directory", "Failed to find the given file"),
        (f"{tmp_path}/file/none", "Not a directory", "Failed to find the given file"),
        (f"{tmp_path}/loop", "Too many levels of symbolic links", "Failed to find the given file"),
        (f"{tmp_path}/directory", "Invalid argument", "Not a regular file"),
        (f"{tmp_path}/fifo", "Invalid argument", "Not a regular file"),
        ("/dev/null", "Invalid argument", "Not a regular file"),
        ("/dev/none", "No such file or directory", "Failed to find the given file"),
        ("/proc/none", "No such file or directory", "Failed to find the given file"),
        (f"{m.path}/trace", "No such file or directory", "Failed to find the given file"),
        (f"{m.path}/../{m.path.name}/trace", "No such file or directory", "Failed to find the given file"),
    ):
        with pytest.raises(OSError, match=says):
            m.write("uprobe_events", f"p:x {name}:0x10\n")
        log = m.read("error_log").splitlines()[-3:]
        assert log[0].endswith(f"trace_uprobe: error: {logged}"), name
        assert log[1] == f"  Command: p:x {name}:0x10"
        assert log[2].index("^") == log[1].index("/")


def test_one_bad_definition_among_good_ones(m: Mounted, tmp_path: Path) -> None:
    for name in ("a", "c"):
        (tmp_path / name).write_bytes(bytes(64))
    with pytest.raises(FileNotFoundError):
        m.write("uprobe_events", "".join(f"p:{name} {tmp_path}/{name}:0x0\n" for name in "abc"))
    assert m.read("uprobe_events").split()[::2] == ["p:uprobes/a"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else, and mount for others")
def test_others_get_only_what_they_may_read(new_mount: MakeMount, tmp_path: Path) -> None:
    mount = new_mount()
    for name, mode in (("open", 0o644), ("secret", 0o600)):
        (tmp_path / name).write_bytes(bytes(64))
        (tmp_path / name).chmod(mode)
    for directory in (tmp_path, *tmp_path.parents[:-2]):
        directory.chmod(0o755)
    script = f"""
        for name in open secret; do
            echo "p:$name {tmp_path}/$name:0x0" | setpriv --reuid 65534 --regid 65534 --clear-groups \
                --bounding-set=-all tee -a uprobe_events
        done
        true
    """
    mount.path.chmod(0o755)
    (mount.path / "uprobe_events").chmod(0o666)
    done = mount.sh(script)
    assert "secret" not in mount.read("uprobe_events")
    assert f"{tmp_path}/open" in mount.read("uprobe_events"), done
    assert "Permission denied" in done.stderr
    mount.stop()


def test_too_big(m: Mounted, tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="File too large"):
        m.write("uprobe_events", f"p:x {big}:0x0\n")
    assert m.read("uprobe_events") == ""
    assert in_guest(m, f"ls -A {tmp_path}") == ""


def test_no_room(m: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    in_guest(m, "mkdir -p /tmp/full && mount -t tmpfs -o size=1M none /tmp/full")
    try:
        in_guest(m, f"mkdir -p {tmp_path} && mount --bind /tmp/full {tmp_path}")
        with pytest.raises(OSError, match="No space left on device"):
            m.write("uprobe_events", f"p:x {path}:0x0\n")
        assert in_guest(m, f"ls -A {tmp_path}") == ""
    finally:
        m.exec("sh", "-c", f"umount {tmp_path}; umount /tmp/full")


def test_two_writers_at_once(m: Mounted, tmp_path: Path) -> None:
    errors: list[OSError] = []

    def write(writer: int) -> None:
        try:
            for number in range(5):
                path = tmp_path / f"file{number}"
                m.write("uprobe_events", f"p:w{writer}n{number} {path}:0x{writer}\n", append=True)
        except OSError as error:
            errors.append(error)

    for number in range(5):
        (tmp_path / f"file{number}").write_bytes(bytes(100_000))
    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert len(m.read("uprobe_events").splitlines()) == 15


def test_nothing_hangs_on_a_path_that_hangs(m: Mounted, tmp_path: Path) -> None:
    """A path through a FIFO or our own mount ends at once, and the mount goes on answering."""
    os.mkfifo(tmp_path / "fifo")
    writer = m.popen(["bash", "-c", f"echo 'p:x {tmp_path}/fifo:0' > uprobe_events"], stderr=subprocess.DEVNULL)
    until(lambda: writer.poll() is not None, 20, "the writer's end")
    assert m.read("tracing_on") == "1\n"


def test_writers_that_are_mirrored(environment: dict[str, str], kernel_path: Path, dynamic: Program) -> None:
    """Their shadows have another root directory and a stub at the path of their program; uprobes are on a copy."""
    script = f"""
        set -e
        cd {dynamic.path.parent}
        echo 'p:echo /bin/bash:0x100' > /sys/kernel/tracing/uprobe_events
        echo 'p:adds ./measure:{dynamic.offset("add")} b=%si' >> /sys/kernel/tracing/uprobe_events
        echo 1 > /sys/kernel/tracing/events/uprobes/adds/enable
        {shlex.join(FAKEFS)} exec --host-binary -- ./measure abc || true
        cat /sys/kernel/tracing/uprobe_events
        grep -c 'measure-.*adds: .* b=0x3' /sys/kernel/tracing/trace
        : > here # the shadow is back where it was
        {shlex.join(FAKEFS)} exec -- ls /host{dynamic.path.parent}
        rm here
    """
    done = subprocess.run(
        [*FAKEFS, "run", "--mirror=files", "--kernel", str(kernel_path), "--", "/bin/bash", "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    shown = ["p:uprobes/echo", f"/bin/bash:0x{0x100:016x}", "p:uprobes/adds"]
    shown += [f"./measure:0x{dynamic.offset('add'):016x}", "b=%si"]
    assert done.stdout.split()[:7] == ["3", *shown, "1"]
    assert "here" in done.stdout.split()[7:]
