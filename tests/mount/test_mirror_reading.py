"""Opens for reading: each is seen, under the name of the program that made it, and files are what they are now."""

from __future__ import annotations

import subprocess
from os import O_CREAT, O_PATH, O_RDONLY, O_TRUNC, O_WRONLY
from pathlib import Path

from fakefs.records import parse
from tests.mount.conftest import Run
from tests.mount.mirrored import SETUP, SHOW, hits

_O_LARGEFILE = 0x8000  # the kernel adds it
_OPENS = """
    echo 'p:opened do_sys_openat2 name=+0($arg2):ustring comm=$comm' > kprobe_events
    echo 'p:found vfs_open name=+0(+0x28(+8($arg1))):string comm=$comm' >> kprobe_events
    on kprobes sched/sched_process_exec
    cd "$OLDPWD"
"""


def test_what_a_program_opens_when_it_starts(mirrored: Run) -> None:
    """Its own name is on it, as it is a program by then, and nothing is left out however many start at once."""
    done = mirrored(
        SETUP
        + _OPENS
        + """
        echo text > file
        for i in $(seq 20); do /bin/cat file > /dev/null & done; wait
        """
        + SHOW
    )
    seen: dict[int, list[str]] = {}
    for hit in hits(done):
        if hit.event == "sched_process_exec" and hit.fields["filename"] == "/bin/cat":
            seen[hit.pid] = []
        elif hit.event == "opened" and hit.pid in seen:
            assert hit.fields["comm"] == "cat", hit
            seen[hit.pid].append(str(hit.fields["name"]))
    assert len(seen) == 20
    first = next(iter(seen.values()))
    assert first[0] == "/etc/ld.so.cache"
    assert first[-1] == "file"
    assert any("libc.so" in name for name in first)
    assert all(names == first for names in seen.values())


def test_a_file_that_changes_is_the_new_one_in_the_guest(mirrored: Run, tmp_path: Path) -> None:
    """Whoever changes it, here or outside: missing or not, a file, a directory, behind a link or another one."""
    outside = "until [ -e ready ]; do sleep 0.01; done; rm one; mv dir moved; ln -s moved dir; touch moved/here changed"
    with subprocess.Popen(["sh", "-c", outside], cwd=tmp_path):
        done = mirrored(
            SETUP
            + _OPENS
            + """
            exec 2> /dev/null
            look() { : < "$1"; }
            look one; echo text > one; look one; rm one; look one
            mkdir one; look one; rmdir one; ln -s two one; look one; echo text > two; look one
            mkdir dir; echo text > dir/there; look dir/there
            touch ready; until [ -e changed ]; do :; done
            look one; look dir/there; look dir/here
            """
            + SHOW
        )
    names = ("one", "two", "there", "here", "dir/there", "dir/here")
    events = [
        (hit.event, hit.fields["name"])
        for hit in parse(done.stdout)
        if hit.event in ("opened", "found") and hit.fields["comm"] == "bash" and hit.fields["name"] in names
    ]
    assert events == [
        *[("opened", "one")],
        *[("opened", "one"), ("found", "one")] * 2,
        *[("opened", "one")],
        *[("opened", "one"), ("found", "one")],
        *[("opened", "one")],
        *[("opened", "two"), ("found", "two"), ("opened", "one"), ("found", "two")],
        *[("opened", "dir/there"), ("found", "there")] * 2,
        *[("opened", "one")],
        *[("opened", "dir/there"), ("found", "there"), ("opened", "dir/here"), ("found", "here")],
    ]


def test_what_has_gone_on_before_it_was_noted_is_in_the_trace(mirrored: Run, tmp_path: Path) -> None:
    """Also of a process that nobody is told the end of: a fault ends it right behind its last look at a file."""
    fault = "import ctypes\nfor _ in range(100): open('last').close()\nctypes.string_at(0)\n"
    (tmp_path / "last").touch()
    (tmp_path / "fault.py").write_text(fault)
    done = mirrored(
        SETUP
        + _OPENS
        + """
        echo text > file; exec 5< /sys/kernel/tracing/trace
        for i in {1..200}; do : < file; done
        mapfile -t lines <&5
        python3 -S fault.py 2> /dev/null & wait $!; echo $?
        mapfile -t others < /sys/kernel/tracing/trace
        seen=0; for line in "${lines[@]}"; do [[ $line != *'opened: '*'name="file"'* ]] || ((++seen)); done; echo $seen
        last=0; for line in "${others[@]}"; do [[ $line != *'found: '*'name="last"'* ]] || ((++last)); done; echo $last
        """
    )
    assert (done.stdout.split(), done.returncode) == (["139", "201", "100"], 0)


def test_files_have_their_sizes_where_they_are_read(mirrored: Run, tmp_path: Path) -> None:
    """With `all`: what is read is as much as on the host, now and after the file has grown or shrunk."""
    (tmp_path / "file").write_bytes(b"x" * 5000)
    done = mirrored(
        SETUP
        + """
        echo 'r:got vfs_read $retval' > kprobe_events
        echo 'comm == "cat"' > events/kprobes/got/filter
        on kprobes
        cd "$OLDPWD"
        cat file > /dev/null; truncate -s 3000 file; cat file > /dev/null; echo more >> file; cat file > /dev/null
        : > file; cat file > /dev/null
        """
        + SHOW,
        "all",
    )
    sizes = [int(str(hit.fields["arg1"]), 0) for hit in hits(done)]
    assert [size for size in sizes if size in (5000, 3000, 3005)] == [5000, 3000, 3005]
    assert sizes[-1] == 0


def test_files_of_the_kernel(mirrored: Run) -> None:
    """What the host and the guest both have is opened, each once; devices, and what leads on, are only looked up."""
    opened = (
        *("/proc/version", "/proc/uptime", "/proc/self/status", "/proc/1/nothing", "/proc/sys/kernel/pid_max"),
        *("/sys/class/net", "/sys/kernel/mm/ksm/run", "/sys/kernel/tracing/tracing_on", "/proc/filesystems"),
        *("/dev/null", "/dev/zero", "/dev/tty", "/dev/mem", "/dev/none", "/proc/self/exe", "/proc/self/fd/0"),
    )
    done = mirrored(
        SETUP
        + f"""
        echo 'p:opened do_sys_openat2 name=+0($arg2):ustring flags=+0($arg3):x64' > kprobe_events
        echo 'r:is do_sys_openat2 $retval' >> kprobe_events
        on kprobes
        for file in {" ".join(opened)}; do {{ : < $file; }} 2> /dev/null; done
        cd /proc; : < uptime
        """
        + SHOW
    )
    seen = [hit for hit in hits(done) if hit.task == "bash"]
    names = [str(hit.fields["name"]) for hit in seen if hit.event == "opened"]
    results = dict(zip(names, (int(str(hit.fields["arg1"]), 0) for hit in seen if hit.event == "is"), strict=True))
    expected = [name for name in opened if name != "/dev/null"] + ["uptime", "/sys/kernel/tracing/tracing_on"]
    assert [name for name in names if name != "/dev/null"] == expected
    assert names.count("/dev/null") == len(opened) + 1
    missing = {name for name, result in results.items() if result < 0}
    assert missing <= {"/proc/1/nothing", "/dev/none", "/proc/self/fd/0"}
    flags = {str(hit.fields["name"]): int(str(hit.fields["flags"]), 0) for hit in seen if hit.event == "opened"}
    looked_up = {"/dev/tty", "/dev/mem", "/dev/none", "/proc/self/exe", "/proc/self/fd/0"}
    assert {name for name, each in flags.items() if each & O_PATH} == looked_up
    assert flags["/dev/null"] & ~_O_LARGEFILE == O_WRONLY | O_CREAT | O_TRUNC
    assert {flags[name] & ~_O_LARGEFILE for name in opened[:7]} == {O_RDONLY}
