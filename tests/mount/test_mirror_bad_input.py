"""What programs do to mirroring that they had better not: they fare as without it, and the guest lives on."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from fakefs.mirror.calls import TABLE
from tests.mount.conftest import Run
from tests.mount.mirrored import GUEST, SETUP, SHOW, hits
from tests.mounted import FAKEFS

_ALIVE = """
    cat /sys/kernel/tracing/tracing_on
"""
_SLOTS = f"""
    cat /sys/kernel/tracing/tracing_on
    {FAKEFS[0]} -m fakefs status | grep -o '"slots": [0-9]*'
"""


def slots(done: subprocess.CompletedProcess[str]) -> int:
    """Return how many tasks the guest has for us; `_SLOTS` was the end of the script."""
    alive, text = done.stdout.splitlines()[-2:]
    assert alive == "1"
    return int(text.split()[1])


_ODD_FILES = r"""
    exec 2>&1
    # no regular files
    mkfifo fifo; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
    cat socket; : > socket; echo $?; mv socket moved; stat -c %F fifo moved; rm moved
    for device in null zero full urandom; do head -c 3 /dev/$device | wc -c; echo x > /dev/$device; done
    cat /proc/self/comm /proc/nothing; : > /proc/sys/nothing; ls -d /proc/self/fd /sys/kernel /dev/fd
    cat < /dev/fd/0 <<< in; ls -d /dev/stdin
    ln -s /proc/self/cmdline magic; cat magic | tr '\0' ' '; echo; echo x > /sys/nothing; mkdir /proc/dir; rm magic
    # names
    long=$(printf '%0255d' 1); : > $long; : > ${long}x; rm $long; cat "$(printf '%05000d' 1)" | cut -c1-20
    bad=$'bad\xff\xfe \n"\\name'
    mkdir "$bad"; cd "$bad"; echo text > $'\xc3\x28'; cat $'\xc3\x28'
    cp "$(type -P true)" $'\xff'
    ./$'\xff' $'\xff'; echo $?; cd ..; rm -r "$bad"
    : > ''; cat ''; : > .; : > ..; mkdir .; rmdir ..; cat ./././//./..//./
    # links
    ln -s a b; ln -s b a; cat a; echo x > a; ln -s . here; cat here/here/here/here/none; mkdir d; ln -s ../d d/up
    echo deep > d/up/up/up/up/file; cat d/file; ln -s nowhere dangling; echo x > dangling; cat nowhere
    ln -s /proc/self/exe exe; readlink -f exe | xargs basename; ln -s "$PWD/d" absolute; ls absolute/up
    for i in $(seq 41); do ln -s $((i - 1)) $i; done; : > 0; cat 40; cat 41
    # directories
    path=d; for i in $(seq 60); do path=$path/$(printf %080d $i); mkdir $path 2>/dev/null || break; done; echo $i
    mv d e; cat e/file; mkdir gone; cd gone; rmdir ../gone; pwd; echo x > file; cat ../e/file
    mkdir sub; cd ..; ls -d ../"${PWD##*/}" | wc -l
    # sizes
    truncate -s 7E huge; truncate -s 3P sparse; stat -c %s huge sparse
    dd if=/dev/zero of=far bs=1 seek=1T count=1 status=none
    stat -c %s far; truncate -s -1 far; stat -c %s far; fallocate -l 10M allocated; stat -c %s allocated
    rm -f huge sparse far
    exec 3> unlinked; rm unlinked; echo still >&3; wc -c < /dev/fd/3; exec 3>&-
    head -c 3000000 /dev/zero > big; cp big copy; cmp big copy && echo equal
    dd if=big bs=7 count=20 status=none | wc -c
"""


def test_odd_files_are_the_hosts(mirrored: Run, tmp_path: Path) -> None:
    """FIFOs, sockets, devices, /proc and /sys; names of any bytes; loops of links; sizes beyond the guest's memory."""
    outputs = []
    for mirror in ("off", "files", "all"):
        done = mirrored(f"mkdir scratch; cd scratch; {_ODD_FILES}{_ALIVE}", mirror)
        assert done.returncode == 0
        outputs.append(re.sub(r"line \d+: ", "", done.stdout).splitlines())
        subprocess.run(["rm", "-rf", tmp_path / "scratch"], check=True)
    assert outputs[0][-1] == "1"
    assert outputs[0].count("deep") == 3
    assert outputs[1] == outputs[0]
    assert outputs[2] == outputs[0]


def test_a_descriptor_of_the_guests_is_not_what_the_host_means(mirrored: Run) -> None:
    """Its numbers are others there: what is truncated by way of /proc is not the trace that has it there."""
    done = mirrored(
        """
        cd /sys/kernel/tracing; echo here > trace_marker; exec 5< trace 6< trace 7< trace; cd "$OLDPWD"
        exec 8> file; for fd in 0 1 2 3 4; do { : > /proc/self/fd/$fd; : > /dev/fd/$fd; } 2> /dev/null; done
        : > /proc/self/fd/8; : > /proc/sysrq-trigger; : > /proc/self/cwd/file
        grep -c 'tracing_mark_write: here' /sys/kernel/tracing/trace
        """
        + _ALIVE
    )
    assert done.stdout.split() == ["1", "1"]


_OWN_FILTER = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
ALLOW, ERRNO, NOTIFY = 0x7FFF0000, 0x50000, 0x7FC00000
def install(action, flags):
    code = struct.pack("<HBBI", 0x20, 0, 0, 0) + struct.pack("<HBBI", 0x15, 0, 1, 83)  # mkdir
    code += struct.pack("<HBBI", 6, 0, 0, action) + struct.pack("<HBBI", 6, 0, 0, ALLOW)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("<H6xQ", 4, ctypes.addressof(buffer)))
    result = libc.syscall(317, 1, flags, program)
    return os.strerror(ctypes.get_errno()) if result < 0 else "installed"
libc.prctl(38, 1, 0, 0, 0)
print(install(ERRNO | 13, 0))
try:
    os.mkdir("refused")
except OSError as error:
    print(error.strerror)
print(install(NOTIFY, 8))
open("made", "w").close()
os.execvp("sh", ["sh", "-c", ": > made; exit 5"])
"""


def test_nonsense_about_open_files(mirrored: Run) -> None:
    """Each call, with what a program may give it by mistake or not: none is a fault of ours, and the guest lives on."""
    calls = [(call.number, call.name, call.arguments) for call in TABLE if call.is_on_open_files]
    program = Path(__file__).parent / "nonsense.py"
    done = mirrored(f"{FAKEFS[0]} {program} '{json.dumps(calls)}'; ls -s file" + _SLOTS, "all")
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.startswith("made\n")
    assert slots(done) < 12


def test_programs_with_filters_of_their_own(mirrored: Run) -> None:
    """What their filter refuses never was a call; one that notifies they cannot have; the rest is mirrored on."""
    done = mirrored(
        SETUP
        + f"""
        echo 'p:made vfs_mkdir comm=$comm' > kprobe_events
        echo 'p:truncated do_truncate comm=$comm' >> kprobe_events
        on kprobes
        cd "$OLDPWD"
        python3 -c '{_OWN_FILTER}'
        echo "status $?"
        """
        + SHOW
    )
    lines = done.stdout.splitlines()
    assert lines[:4] == ["installed", "Permission denied", "Device or resource busy", "status 5"]
    seen = {(hit.event, hit.fields["comm"]) for hit in hits(done)}
    assert ("truncated", "sh") in seen
    assert ("made", "python3") not in seen


def test_setuid_programs_keep_their_rights(mirrored: Run) -> None:
    """The filter is installed without no_new_privs, so that a setuid program may be one."""
    done = mirrored(
        SETUP
        + """
        on sched/sched_process_exec
        cd "$OLDPWD"; cp "$(type -P true)" program; chmod 4755 program; ./program && grep NoNewPrivs /proc/self/status
        """
        + SHOW
    )
    assert [line.split() for line in done.stdout.splitlines() if "NoNewPrivs" in line] == [["NoNewPrivs:", "0"]]
    assert "./program" in [hit.fields["filename"] for hit in hits(done) if hit.event == "sched_process_exec"]


def test_killed_at_any_moment(mirrored: Run) -> None:
    """Processes, a whole group and threads, by SIGKILL, while they start and while they make calls."""
    threads = (
        "import threading, os\\n"
        "def work():\\n"
        '    while True: open(f"t{threading.get_ident()}", "w").close()\\n'
        "for _ in range(4): threading.Thread(target=work, daemon=True).start()\\n"
        'open("started", "w").close()\\n'
        "threading.Event().wait()\\n"
    )
    done = mirrored(
        f"""
        exec 2> /dev/null
        for i in $(seq 15); do
            bash -c ': > a; /bin/true; mkdir -p d/e; mv a b; sh -c "exit 1"; sleep 98.7654' & kill -9 $!
            bash -c ': > a; /bin/true; sleep 98.7654 & exec sleep 98.7654' & pid=$!
            until [ -e a ]; do :; done; kill -9 $pid; rm -f a
        done
        python3 -c $'{threads}' & pid=$!
        until [ -e started ]; do :; done; kill -9 $pid
        setsid bash -c 'for i in 1 2 3 4 5 6; do (while :; do /bin/true; done) & done; : > group; wait' & pid=$!
        until [ -e group ]; do :; done; kill -9 -$pid
        wait; pkill -9 -f "^sleep 98.7654"
        """
        + _SLOTS
    )
    assert done.stderr == ""
    assert slots(done) < 9


def test_no_file_stays_open_in_the_guest(mirrored: Run) -> None:
    """Files of the mount are closed there when the host's kernel tells, which may be in the middle of the next open."""
    done = mirrored(
        GUEST
        + """
        for i in $(seq 300); do echo 1 >> /sys/kernel/tracing/tracing_on; : > file; : < file; done
        cat /sys/kernel/tracing/tracing_on
        guest ls -l /proc/$$/fd | grep -v ' 63 -> /dev/mem'
        """
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["1", "total 0"]


@pytest.mark.slow
def test_a_fork_bomb_is_the_hosts_to_bear(mirrored: Run) -> None:
    """Of 2047 processes at once the guest takes 1023, and says so once; all of its are gone afterwards."""
    done = mirrored(
        """
        bomb() { [ "$1" = 0 ] || { bomb $(($1 - 1)) & bomb $(($1 - 1)) & }; until [ -e out ]; do sleep 1; done; wait; }
        bomb 10 & until [ $(ls /proc | grep -c '^[0-9]') -ge 2047 ]; do sleep 0.5; done; : > out; wait
        """
        + _SLOTS,
        "process",
        600,
    )
    assert done.stderr == "fakefs: the guest has no room for more processes (at most 1023): not all are traced\n"
    assert slots(done) < 12


@pytest.mark.slow
def test_500_programs_at_once_are_all_seen(mirrored: Run) -> None:
    done = mirrored(
        """
        cd /sys/kernel/tracing/events/sched
        echo hist:keys=filename > sched_process_exec/trigger
        echo hist:keys=comm > sched_process_exit/trigger
        for i in $(seq 500); do /bin/true & done; wait
        grep -hE '^{ (filename: .bin.true|comm: true) ' */hist
        """
        + _SLOTS
    )
    assert done.stderr == ""
    assert [line.split()[-1] for line in done.stdout.splitlines() if "true" in line] == ["500", "500"]
    assert slots(done) < 12


@pytest.mark.slow
def test_more_content_than_the_guest_has_memory(mirrored: Run) -> None:
    """What is written is forgotten there when it is much: files keep their sizes, others still have room."""
    done = mirrored(
        GUEST
        + """
        for file in one two three; do dd if=/dev/zero of=$file bs=16k count=5000 status=none; done
        cat /sys/kernel/tracing/tracing_on > /dev/null
        guest sh -c "cd /host$PWD; stat -c %s one two three; sed -n 's/^Shmem: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"
        """
        + _SLOTS,
        "all",
        300,
    )
    assert done.stderr == ""
    *sizes, shmem = [int(line) for line in done.stdout.splitlines()[:4]]
    assert sizes == [16384 * 5000] * 3
    assert shmem < 48 << 10
    assert slots(done) < 12


@pytest.mark.slow
def test_more_files_than_the_guest_has_memory(mirrored: Run) -> None:
    """Those made first are removed there, and made again when they are looked at."""
    done = mirrored(
        GUEST
        + SETUP
        + """
        mkdir "$OLDPWD/many"; cd "$OLDPWD/many"
        seq 20000 | xargs touch
        cat /sys/kernel/tracing/tracing_on > /dev/null
        guest sh -c "ls /host$PWD | wc -l; ls /host$PWD/1"
        cat 1; cat /sys/kernel/tracing/tracing_on > /dev/null
        guest sh -c "ls /host$PWD | wc -l; ls /host$PWD/1"
        """
        + _SLOTS,
        "files",
        300,
    )
    first, second, there, *_ = done.stdout.splitlines()
    assert 8000 < int(first) < 16400
    assert 8000 < int(second) < 16400
    assert there.endswith("/many/1")
    assert slots(done) < 12
