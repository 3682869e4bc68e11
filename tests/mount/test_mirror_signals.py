"""Signals between mirrored processes: what one does on the host, it does in the guest."""

from __future__ import annotations

from fakefs.records import Record
from tests.mount.conftest import Run
from tests.mount.mirrored import GUEST, SETUP, SHOW, STATE, hits
from tests.mounted import FAKEFS


def _of(seen: list[Record], event: str) -> list[Record]:
    return [hit for hit in seen if hit.event == event]


def test_one_that_is_caught_is_delivered(mirrored: Run) -> None:
    """To a handler; the sleep that it interrupts ends, and the process goes on."""
    done = mirrored(
        SETUP
        + """
        on signal/signal_generate signal/signal_deliver
        ( trap 'echo one' USR1; trap 'echo two' USR2; kill -USR1 $BASHPID; kill -USR2 $BASHPID; echo on )
        """
        + SHOW,
        "process",
    )
    seen = hits(done)
    assert done.stdout.splitlines()[:3] == ["one", "two", "on"]
    sent = [(hit.fields["sig"], hit.fields["pid"], hit.pid) for hit in _of(seen, "signal_generate")]
    itself = sent[0][1]
    assert [each for each in sent if each[0] in (10, 12)] == [(10, itself, itself), (12, itself, itself)]
    got = [(hit.fields["sig"], hit.pid) for hit in _of(seen, "signal_deliver") if hit.fields["sig"] in (10, 12)]
    assert got == [(10, itself), (12, itself)]
    assert all(hit.fields["sa_handler"] for hit in _of(seen, "signal_deliver"))


def test_a_handler_ends_a_sleep(mirrored: Run) -> None:
    program = """
import os, signal, time
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"caught"))
print("ready", flush=True)
try: time.sleep(1000)
except KeyboardInterrupt: pass
"""
    done = mirrored(
        SETUP
        + f"""
        echo 'p:slept do_nanosleep' > kprobe_events
        on signal/signal_deliver sched/sched_process_exit kprobes/slept
        coproc exec {FAKEFS[0]} -c '{program}'
        read -u ${{COPROC[0]}} line
        until mapfile -t lines < trace; [[ "${{lines[*]}}" == *slept:* ]]; do :; done
        kill -USR1 $COPROC_PID; read -N 6 -u ${{COPROC[0]}} line; echo "$line"
        kill -INT $COPROC_PID; wait $COPROC_PID; echo "status $?"
        """
        + SHOW,
        "process",
    )
    seen = hits(done)
    assert done.stdout.splitlines()[:2] == ["caught", "status 0"]
    [slept, *_] = _of(seen, "slept")
    assert [hit.pid for hit in _of(seen, "signal_deliver") if hit.fields["sig"] == 10] == [slept.pid]
    assert slept.pid in [hit.pid for hit in _of(seen, "sched_process_exit")]


def test_the_kernels_are_sent_as_the_kernel_does(mirrored: Run) -> None:
    """A timer's, which ends a sleep; a child's end, told by the child; none twice."""
    program = """
import os, signal, time
def end(*_): raise InterruptedError
signal.signal(signal.SIGALRM, end)
signal.setitimer(signal.ITIMER_REAL, 0.05)
try: time.sleep(1000)
except InterruptedError: pass
"""
    done = mirrored(
        SETUP
        + f"""
        echo 'r:slept do_nanosleep' > kprobe_events
        on signal/signal_generate signal/signal_deliver kprobes/slept
        {FAKEFS[0]} -c '{program}'
        """
        + SHOW,
        "files",
    )
    seen = hits(done)
    python = _of(seen, "slept")[0].pid
    about = [
        (hit.event, hit.pid, hit.fields["sig"], hit.fields["code"])
        for hit in seen
        if hit.event.startswith("signal_") and hit.fields["sig"] in (14, 17)
    ]
    shell = about[-1][1]
    assert about == [
        ("signal_generate", 1, 14, 128),  # the process itself sleeps
        ("signal_deliver", python, 14, 128),
        ("signal_generate", python, 17, 1),
        ("signal_deliver", shell, 17, 1),
    ]


def test_nothing_else_shows_of_what_ends_a_call(mirrored: Run) -> None:
    """The signals themselves interrupt it, whether they are handled or end the process, and nobody else sends one."""
    program = """
import signal, subprocess, time
signal.signal(signal.SIGALRM, lambda *_: child.terminate())
child = subprocess.Popen(["sleep", "1000"])
while "do_nanosleep" not in open("trace").read(): pass
signal.alarm(1)
child.wait()
"""
    done = mirrored(
        SETUP
        + f"""
        echo 'p:slept do_nanosleep' > kprobe_events
        on signal kprobes/slept sched/sched_process_exit
        {FAKEFS[0]} -c '{program}'
        """
        + SHOW,
        "all",
    )
    seen = hits(done)
    [sleep] = [hit.pid for hit in _of(seen, "slept")]
    at = [(hit.event.removeprefix("signal_"), hit.fields["sig"]) for hit in seen if hit.event.startswith("signal_")]
    assert at[:5] == [("generate", 14), ("deliver", 14), ("generate", 15), ("deliver", 15), ("generate", 17)]
    assert [hit.pid for hit in _of(seen, "signal_deliver") if hit.fields["sig"] == 15] == [sleep]
    assert sleep in [hit.pid for hit in _of(seen, "sched_process_exit")]


def test_one_that_is_blocked_waits(mirrored: Run) -> None:
    """Until its process lets it through."""
    program = """
import os, signal, time
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.001)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
time.sleep(0.001)
"""
    done = mirrored(
        SETUP
        + f"""
        echo 'p:slept do_nanosleep' > kprobe_events
        on signal/signal_generate signal/signal_deliver kprobes/slept
        for event in generate deliver; do echo sig == 10 > events/signal/signal_$event/filter; done
        {FAKEFS[0]} -c '{program}'
        """
        + SHOW,
        "process",
    )
    assert [hit.event for hit in hits(done)] == ["signal_generate", "slept", "signal_deliver", "slept"]


def test_timers_by_the_thousand(mirrored: Run) -> None:
    """Handlers that interrupt each other, and their own return, are noticed by nobody."""
    program = """
import signal, time
count = {}
for number in (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF):
    signal.signal(number, lambda number, _: count.__setitem__(number, count.get(number, 0) + 1))
end = time.monotonic() + 0.3
for timer, interval in ((signal.ITIMER_REAL, 9e-4), (signal.ITIMER_VIRTUAL, 1e-3), (signal.ITIMER_PROF, 1e-3)):
    signal.setitimer(timer, interval, interval)
while time.monotonic() < end: pass
for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF): signal.setitimer(timer, 0)
print(sorted(count))
"""
    done = mirrored(SETUP + f"on signal/signal_deliver\n{FAKEFS[0]} -c '{program}'" + SHOW, "process")
    delivered = {hit.fields["sig"] for hit in hits(done)}
    assert done.stdout.splitlines()[0] == "[14, 26, 27]"
    assert {14, 26, 27} <= delivered


def test_one_that_ends_a_process_ends_its_shadow(mirrored: Run) -> None:
    """It is sent once, delivered once, and is what the kernel's exit code says. SIGHUP may be ignored: nohup(1)."""
    done = mirrored(
        SETUP
        + f"""
        echo 'p:ended do_group_exit code=$arg1:s32' > kprobe_events
        on kprobes/ended signal/signal_generate signal/signal_deliver
        exec 2>/dev/null
        for number in TERM USR1 KILL; do sleep 1000 & kill -$number $!; wait $!; done
        sh -c 'kill -SEGV $$'
        {FAKEFS[0]} -c 'import os; os.abort()'
        {{ cat tracing_on; exec yes; }} | head -n 2 >/dev/null
        """
        + SHOW,
        "process",
    )
    seen = hits(done)
    died = [hit.fields["code"] for hit in _of(seen, "ended") if hit.fields["code"] not in (0, 0x100)]
    assert sorted(code & 0x7F for code in died if isinstance(code, int) and code & 0x7F) == [6, 9, 10, 11, 13, 15]
    for number in (15, 10, 11, 6):
        assert len([hit for hit in _of(seen, "signal_generate") if hit.fields["sig"] == number]) == 1
        assert len([hit for hit in _of(seen, "signal_deliver") if hit.fields["sig"] == number]) == 1


def test_stopped_and_continued(mirrored: Run) -> None:
    done = mirrored(
        SETUP
        + GUEST
        + STATE
        + """
        ( while :; do cat tracing_on; sleep 0.01; done >/dev/null ) & loop=$!
        kill -STOP $loop; state $loop T
        kill -CONT $loop; state $loop S
        kill -STOP $loop; state $loop T
        kill -TERM $loop; kill -CONT $loop; wait $loop; echo "status $?"
        sleep 1000 & kill -STOP $!; state $! T; kill -KILL $!; wait $!; echo "status $?"
        """
    )
    assert done.stdout == "status 143\nstatus 137\n"


def test_a_terminal_stops_and_ends_a_job(mirrored: Run) -> None:
    """^Z, fg and ^C, in an interactive shell: the job's shadow is stopped, goes on in its sleep, and dies of SIGINT."""
    program = """
import os, pty
child, terminal = pty.fork()
if child == 0:
    os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
def until(text):
    while text not in open("trace").read(): pass
os.write(terminal, b"sleep 1000\\n")
until("slept:")
os.write(terminal, b"\\x1a")
until("code=5")
os.write(terminal, b"fg\\n")
until("code=6")
os.write(terminal, b"\\x03")
until("sig=2 ")
os.write(terminal, b"exit\\n")
os.waitpid(child, 0)
"""
    done = mirrored(
        SETUP
        + f"""
        echo 'p:slept do_nanosleep' > kprobe_events
        on signal/signal_generate signal/signal_deliver kprobes/slept
        {FAKEFS[0]} -c '{program}'
        """
        + SHOW,
        "process",
    )
    seen = hits(done)
    job = _of(seen, "slept")[0].pid
    about = [
        (hit.event.removeprefix("signal_"), hit.fields.get("sig"), hit.fields.get("code"))
        for hit in seen
        if hit.fields.get("pid") == job or hit.pid == job
    ]
    assert about == [
        ("slept", None, None),
        ("generate", 20, 128),
        ("deliver", 20, 128),
        ("generate", 17, 5),
        ("generate", 18, 0),
        ("generate", 17, 6),
        ("slept", None, None),
        ("generate", 2, 128),
        ("deliver", 2, 128),
        ("generate", 17, 2),
    ]


def test_groups_and_everybody(mirrored: Run) -> None:
    """kill(2) with 0, a negative group, and -1, which leaves out those that live in the guest alone."""
    done = mirrored(
        SETUP
        + GUEST
        + """
        guest sh -c 'sleep 1000 </dev/null >/dev/null 2>&1 & echo $!' > "$OLDPWD/other"
        read other < "$OLDPWD/other"
        on signal/signal_generate
        set -m
        sleep 1000 & lone=$!
        ( sleep 1000 & exec sleep 1000 ) & group=$!
        set +m
        until [ "$(cat /proc/$group/comm /proc/$(pgrep -P $group)/comm)" = $'sleep\\nsleep' ]; do :; done 2>/dev/null
        kill -WINCH -$group; kill -URG -1
        exec 2>/dev/null
        kill -KILL -$group; kill -TERM $lone; wait
        guest kill $other
        echo "$lone $group $other"
        """
        + SHOW,
        "process",
    )
    seen = hits(done)
    lone, group, other = map(int, done.stdout.split("\n")[0].split())
    sent = _of(seen, "signal_generate")
    got = {number: [hit.fields["pid"] for hit in sent if hit.fields["sig"] == number] for number in (28, 23, 9)}
    assert len(got[28]) == len(set(got[28])) == 2
    assert set(got[23]) == {lone, *got[28]}
    assert set(got[9]) == set(got[28])
    assert group in got[28]
    assert other not in {*got[28], *got[23]}
