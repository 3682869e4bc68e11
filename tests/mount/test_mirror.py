"""Mirroring: what a script does outside tracefs is traced too, and the script does not notice."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fakefs.records import Record, parse
from tests.mounted import FAKEFS

Run = Callable[..., subprocess.CompletedProcess[str]]
_SETUP = """
    cd /sys/kernel/tracing
    on() { for event; do echo 1 > events/$event/enable; done; }
"""
_SHOW = """
    echo 0 > /sys/kernel/tracing/tracing_on
    grep -v '^#' /sys/kernel/tracing/trace
"""


def hits(done: subprocess.CompletedProcess[str]) -> list[Record]:
    """The trace a script has shown."""
    assert (done.stderr, done.returncode) == ("", 0)
    return [hit for hit in parse(done.stdout) if hit.event]


def test_processes(mirrored: Run) -> None:
    """Fork, exec, exit, signals and sleeps, by their names and ids."""
    done = mirrored(
        _SETUP
        + """
        echo 'p:slept do_nanosleep' > kprobe_events
        on sched/sched_process_fork sched/sched_process_exec sched/sched_process_exit
        on signal/signal_generate kprobes/slept
        /bin/true
        ( exit 3 )
        sleep 0.01 &
        wait
        sleep 1000 &
        until mapfile -t lines < trace; [[ "${lines[*]}" == *"sleep-$! "*slept:* ]]; do :; done
        exec 2> /dev/null  # where bash may tell of it
        kill -TERM $!; wait $!
        """
        + _SHOW,
        "process",
    )
    seen = hits(done)
    shell = next(hit.pid for hit in seen if hit.event == "sched_process_fork")
    children = [hit.fields["child_pid"] for hit in seen if hit.event == "sched_process_fork"][:4]
    assert all(hit.pid == shell and hit.task == "bash" for hit in seen if hit.event == "sched_process_fork")
    executed = [(hit.pid, hit.task, hit.fields["filename"]) for hit in seen if hit.event == "sched_process_exec"][:3]
    true, subshell, sleep, killed = children
    assert executed == [(true, "true", "/bin/true"), *((pid, "sleep", "/usr/bin/sleep") for pid in (sleep, killed))]
    ended = [(hit.task, hit.pid) for hit in seen if hit.event == "sched_process_exit"][:4]
    assert ended == [("true", true), ("bash", subshell), ("sleep", sleep), ("sleep", killed)]
    slept = [(hit.task, hit.pid) for hit in seen if hit.event == "slept"]
    assert slept == [("sleep", sleep), ("sleep", killed)]
    signals = [hit for hit in seen if hit.event == "signal_generate" and hit.pid == shell]
    assert [(hit.fields["sig"], hit.fields["comm"], hit.fields["pid"]) for hit in signals] == [(15, "sleep", killed)]


def test_working_directories(mirrored: Run, tmp_path: Path) -> None:
    """A program goes to the tracefs in the guest too, and comes back from there."""
    done = mirrored(
        _SETUP
        + """
        here=$OLDPWD
        echo 'e:goes syscalls.sys_enter_chdir path=+0($filename):ustring' > dynamic_events
        echo 'e:went syscalls.sys_exit_chdir answer=$ret' >> dynamic_events
        echo 1 > events/eprobes/enable
        cd /sys/kernel/tracing/events; cd ..; cat tracing_on > /dev/null; cd "$here"; mkdir -p a/b; cd a; rmdir b
        """
        + _SHOW
    )
    seen = [hit for hit in hits(done) if hit.task == "bash"]
    paths = [hit.fields["path"] for hit in seen if hit.event == "goes"]
    assert paths == ["/sys/kernel/tracing/events", "/sys/kernel/tracing", str(tmp_path), f"{tmp_path}/a"]
    assert [hit.fields["answer"] for hit in seen if hit.event == "went"] == [0, 0, 0, 0]


def test_programs_by_relative_paths(environment: dict[str, str], kernel_path: Path, tmp_path: Path) -> None:
    """The very first one too, of which no call has told the guest where it is."""
    script = tmp_path / "script"
    script.write_text(f"""#!/bin/bash
        {_SETUP}
        on sched/sched_process_exec
        cd "$OLDPWD"
        bin/true
        {_SHOW}""")
    script.chmod(0o755)
    (tmp_path / "bin").symlink_to("/bin")
    argv = [*FAKEFS, "run", "--kernel", str(kernel_path), "--mirror", "all", "--", "./script"]
    done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert next(hit.fields["filename"] for hit in hits(done)) == "bin/true"


def test_a_program_that_runs_itself_again(mirrored: Run) -> None:
    """By a link of the kernel's, which leads to what stands for it in the guest."""
    done = mirrored(_SETUP + "on sched/sched_process_exec\n(exec /proc/self/exe -c 'exec /bin/true')" + _SHOW)
    assert [hit.fields["filename"] for hit in hits(done)][:2] == ["/proc/self/exe", "/bin/true"]


def test_files_by_their_names(mirrored: Run) -> None:
    """Probes see the host's names, types and order; the files are the host's alone."""
    done = mirrored(
        _SETUP
        + """
        cd "$OLDPWD"
        T=/sys/kernel/tracing
        echo 'p:trunc do_truncate name=+0(+0x28($arg2)):string' > $T/kprobe_events || exit
        echo 'p:made vfs_mkdir' >> $T/kprobe_events
        echo 'p:gone vfs_unlink' >> $T/kprobe_events
        echo 'p:moved vfs_rename' >> $T/kprobe_events
        echo 1 > $T/events/kprobes/enable
        echo one > hoge; echo two > hoge; mkdir dir; mv hoge dir/fuga; rm dir/fuga; rmdir dir
        """
        + _SHOW
    )
    seen = [hit for hit in hits(done) if hit.func != "handle_truncate"]
    mine = [(hit.event, hit.task) for hit in seen if hit.task != "init"]
    assert [each for each in mine if each[0] != "trunc"] == [("made", "mkdir"), ("moved", "mv"), ("gone", "rm")]
    assert ("trunc", "bash") in mine


def test_a_script_is_the_same_with_it_and_without(mirrored: Run, tmp_path: Path) -> None:
    script = """
        exec 2>&1
        mkdir -p a/b; cd a/b; umask 027
        for i in 1 2 3; do echo "line $i" >> "file $i"; done
        cat > here <<END
here $((1 + 2))
END
        ln -s here link; ln here hard; chmod 600 here; stat -c '%A %h %n' here link hard 'file 1'
        mkfifo fifo; (echo through > fifo &); cat fifo
        tar cf - . | tar tf - | sort
        ( trap 'echo trapped' TERM; kill -TERM $BASHPID; echo after )
        sleep 100 & kill -9 $!; wait $!; echo "status $?"
        sh -c 'exit 7'; echo "status $?"
        sh -c 'kill -SEGV $$'; echo "status $?"
        nosuchcommand; echo "status $?"
        cat nothing; > /nowhere/file; rm nothing; mv nothing other; echo "status $?"
        find . -type f | xargs -n1 basename | sort | tr '\\n' ' '; echo
        printf 'x' > $'bad\\xff\\nname'; ls -b; rm $'bad\\xff\\nname'
        ln -s loop loop; cat loop; dd if=/dev/zero of=big bs=1M count=3 status=none; truncate -s 1G sparse
        stat -c %s big sparse
        python3 -c 'import threading; threading.Thread(target=print, args=(1,)).start()'
        mkdir gone; cd gone; rmdir ../gone; echo still > here; pwd; cd ../..; rm -r b; ls
        exit 5
    """
    results = []
    for mirror in ("off", "process", "files", "all"):
        done = mirrored(script, mirror)
        assert done.returncode == 5
        results.append(re.sub(r" \d+ (Killed|Terminated|Segmentation)", r" PID \1", done.stdout))
        subprocess.run(["rm", "-rf", str(tmp_path / "a")], check=True)
    assert results[0].count("status") == 5
    assert results[1] == results[0]
    assert results[2] == results[0]
    assert results[3] == results[0]


def test_pid_filters_follow_children(mirrored: Run) -> None:
    done = mirrored(
        _SETUP
        + """
        echo 1 > options/event-fork
        echo $$ > set_event_pid
        on sched/sched_process_exec
        ( /bin/true; )
        sh -c 'ls / > /dev/null; exit'
        """
        + _SHOW
    )
    seen = {hit.fields["filename"] for hit in hits(done)}
    assert {"/bin/true", "/usr/bin/sh", "/usr/bin/ls"} <= seen


def test_nothing_is_left_of_many_processes(mirrored: Run) -> None:
    done = mirrored(
        """
        for i in $(seq 100); do /bin/true & done; wait
        cat /sys/kernel/tracing/tracing_on > /dev/null
        fakefs() { "$PYTHON" -m fakefs "$@"; }
        fakefs status | grep -o '"slots": [0-9]*'
        """.replace("$PYTHON", os.fspath(FAKEFS[0]))
    )
    assert done.stderr == ""
    assert int(done.stdout.split()[1]) < 12


def test_the_recorders_death_harms_nobody(mirrored: Run) -> None:
    done = mirrored(
        """
        recorder=$(grep -l fakefs /proc/[0-9]*/cmdline | cut -d/ -f3 | sort -n | tail -1)
        for pid in $(ls /proc | grep '^[0-9]*$'); do
            [ "$(cut -d' ' -f4 /proc/$pid/stat 2>/dev/null)" = 1 ] && [ $pid != $$ ] && last=$pid
        done
        kill -9 $last; sleep 0.1; echo text > file; cat file; /bin/true && echo fine
        """
    )
    assert done.stdout == "text\nfine\n"
    assert done.stderr == "fakefs: what follows is not mirrored: the process that records it is gone\n"


def test_one_inside_another_is_not_mirrored(mirrored: Run) -> None:
    """A process has one filter that notifies: the inner program runs all the same."""
    done = mirrored(f"{FAKEFS[0]} -m fakefs run -- sh -c 'echo text > file; cat file'")
    assert (done.stdout, done.returncode) == ("text\n", 0)
    assert done.stderr == (
        "fakefs: what the program does is not mirrored, as it cannot be watched here (Device or resource busy)\n"
    )


def test_killed_in_the_middle_of_calls(mirrored: Run) -> None:
    done = mirrored(
        f"""
        for i in 1 2 3 4 5; do
            (while :; do echo x > f$i; rm -f f$i; mkdir d$i; rmdir d$i; /bin/true; done) 2>/dev/null & p="$p $!"
        done
        until [ -e f5 ]; do :; done
        kill -9 $p; wait 2>/dev/null
        cat /sys/kernel/tracing/tracing_on
        {FAKEFS[0]} -m fakefs status | grep -o '"slots": [0-9]*'
        """
    )
    assert done.stdout.split("\n")[0] == "1"
    assert int(done.stdout.split()[2]) < 12


def test_nonsense_is_the_hosts_to_refuse(mirrored: Run) -> None:
    program = """
import ctypes, errno
call = ctypes.CDLL(None, use_errno=True).syscall
for at in (0, 1, 1 << 46, (1 << 64) - 1):
    p = ctypes.c_void_p(at)
    for arguments in ((257, -100, p, 65, 0), (59, p, p, p), (35, p, 0), (437, -100, p, p, 24), (263, 99, b"x", 0),
                      (76, p, -1), (82, p, p), (88, b"", p), (157, 15, p), (62, 1 << 30, 99), (230, 77, 9, p, p)):
        assert call(*arguments) in (-1, 0), arguments
print(open("file", "w").write("text"))
"""
    done = mirrored(f"python3 -c '{program}' && cat file && cat /sys/kernel/tracing/tracing_on")
    assert (done.stdout, done.stderr) == ("4\ntext1\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("mirror", ["process", "files", "all"])
def test_a_script_of_200_commands_is_the_same(mirrored: Run, mirror: str) -> None:
    script = str(Path(__file__).parents[2] / "bench/configure.sh")
    without, done = mirrored(script, "off"), mirrored(script, mirror, 300)
    assert without.returncode == done.returncode == 7
    assert "status 42" in without.stdout
    pids = r" \d+ (?=Terminated)"
    assert re.sub(pids, " PID ", done.stdout) == re.sub(pids, " PID ", without.stdout)


@pytest.mark.slow
def test_more_processes_than_the_guest_has_room_for(mirrored: Run) -> None:
    done = mirrored(
        f"""
        for i in $(seq 1100); do sleep 5 & done; wait
        cat /sys/kernel/tracing/tracing_on
        {FAKEFS[0]} -m fakefs status | grep -o '"slots": [0-9]*'
        """,
        "process",
        300,
    )
    assert done.stderr == ("fakefs: the guest has no room for more processes (at most 1023): not all are traced\n")
    assert done.stdout.startswith("1\n")
    assert int(done.stdout.split()[2]) < 12


def test_open_files(mirrored: Run) -> None:
    """With `all`, what is read and written has the host's sizes and, as far as it goes, the host's data."""
    done = mirrored(
        _SETUP
        + """
        echo 'p:reads vfs_read count=$arg3' > kprobe_events
        echo 'p:writes vfs_write count=$arg3 text=+0($arg2):ustring' >> kprobe_events
        echo 'p:looks vfs_statx' >> kprobe_events
        on kprobes
        cd "$OLDPWD"
        /bin/echo hello > file; dd if=file bs=3 status=none | cat; stat -c %s file
        """
        + _SHOW,
        "all",
    )
    seen = hits(done)
    assert done.stdout.startswith("hello\n6\n")
    told = {(hit.task, hit.event, hit.fields.get("count")) for hit in seen}
    assert ("echo", "writes", 6) in told
    assert [hit.fields["count"] for hit in seen if (hit.task, hit.event) == ("dd", "writes")] == [3, 3]
    assert ("dd", "reads", 3) in told
    assert ("stat", "looks", None) in told
    assert 'text="hello' in done.stdout
