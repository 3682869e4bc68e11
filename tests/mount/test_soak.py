"""Eight shells use one mount for minutes, mixing everything; afterwards no task, descriptor or slot is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from fakefs.testbed import FreshTracefs
from tests.mounted import PATIENCE, popen, until

SECONDS = int(os.environ.get("FAKEFS_SOAK_SECONDS", "300"))
SHELLS = 8

# Each turn does one of these; $N is the shell's number, $I its turn. What may fail in a race is let fail.
_SHELL = r"""
end=$((SECONDS + $1)); N=$2; I=0; ops=0
while [ $SECONDS -lt $end ]; do
  I=$((I + 1))
  case $(((N + I) % 10)) in
    0) echo "p:soak/k$N vfs_read count=\$arg3" >> dynamic_events && echo 1 > events/soak/k$N/enable
       cat tracing_on > /dev/null; echo 0 > events/soak/k$N/enable; echo "-:soak/k$N" >> dynamic_events ;;
    1) echo "r:soak/r$N vfs_write ret=\$retval" >> kprobe_events; echo "-:soak/r$N" >> kprobe_events ;;
    2) mkdir instances/i$N && echo 1 > instances/i$N/events/sched/sched_switch/enable
       cat instances/i$N/trace > /dev/null; rmdir instances/i$N ;;
    3) timeout -s INT 0.2 cat trace_pipe > /dev/null ;;
    4) timeout -s KILL 0.1 cat per_cpu/cpu0/trace_pipe_raw > /dev/null ;;
    5) ls -l events/sched > /dev/null; cat available_tracers set_event > /dev/null ;;
    6) echo "hist:keys=prev_pid" > events/sched/sched_switch/trigger; cat events/sched/sched_switch/hist > /dev/null
       echo '!hist:keys=prev_pid' > events/sched/sched_switch/trigger ;;
    7) echo "p:soak/bad$N no_such_function_$I" >> kprobe_events; cat error_log > /dev/null ;;
    8) echo "w:soak/w$N w@jiffies:8 value=\$value" >> dynamic_events && echo 1 > events/soak/w$N/enable
       echo 0 > events/soak/w$N/enable; echo "-:soak/w$N" >> dynamic_events ;;
    9) (cat trace > /dev/null & cat trace_clock > /dev/null; wait); head -c 100 README > /dev/null ;;
  esac 2> /dev/null
  ops=$((ops + 1))
done
echo $ops
"""


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.slow
def test_soak(tracefs: FreshTracefs) -> None:
    tracefs.read("tracing_on")
    before = _descriptors(tracefs.pid)
    began = tracefs.status()  # this process has a shadow too
    shells = [
        popen(
            tracefs,
            ["timeout", "-k", "5", str(SECONDS + 60), "bash", "-c", _SHELL, "soak", str(SECONDS), str(number)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for number in range(SHELLS)
    ]
    counts = []
    try:
        for shell in shells:
            output, _ = shell.communicate(timeout=SECONDS + 120)
            assert shell.returncode == 0
            counts.append(int(output))
    finally:
        for shell in shells:
            if shell.poll() is None:
                shell.send_signal(signal.SIGKILL)
                shell.wait()
    print(f"{sum(counts)} operations by {SHELLS} shells in {SECONDS} s")
    assert min(counts) >= SECONDS // 10, "a shell made no progress"
    until(lambda: tracefs.status()["shadows"] == began["shadows"], PATIENCE, "the end of all shadows")
    until(lambda: tracefs.status()["slots"] == began["slots"], PATIENCE, "all slots given back")
    until(lambda: _descriptors(tracefs.pid) <= before, PATIENCE, "the daemon's descriptors closed")
    assert tracefs.status()["dead"] is None
    for name in ("dynamic_events", "kprobe_events"):
        left = [line for line in tracefs.read(name).splitlines() if "soak/" in line]
        for line in left:  # a shell that was at its end between two lines
            tracefs.write("dynamic_events", "-:" + line.split()[0].partition(":")[2], append=True)
        assert "soak/" not in tracefs.read(name)
    assert not [path for path in (tracefs.path / "instances").iterdir() if path.name.startswith("i")]
