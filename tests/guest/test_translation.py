"""Our way of translating the guest's code (native/translate.c) gives what Unicorn's own gives, to the block."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

_WORK = """
import hashlib, json, sys
from contextlib import closing
from pathlib import Path
from emulator.cpu.native import NativeCPU
from emulator.guest import restore
from emulator.snapshot import open_snapshot
from tests.guest_tasks import TRACEFS, read_file, spawn, write_file
plain = sys.argv[2] == "plain"
with closing(restore(open_snapshot(Path(sys.argv[1])), lambda ports: NativeCPU(ports, plain=plain))) as guest:
    if not plain:
        guest.machine.cpu.shortcuts.block(1)  # they change the time
    assert write_file(guest, TRACEFS + "/kprobe_events", b"p:in vfs_read count=$arg3\\nr:out vfs_read\\n") > 0
    for event in ("kprobes", "sched", "timer", "irq_vectors"):
        assert write_file(guest, TRACEFS + "/events/" + event + "/enable", b"1") == 1
    for name in ("trace_options", "kprobe_events", "enabled_functions", "/proc/self/maps"):
        read_file(guest, TRACEFS + "/" + name if name[0] != "/" else name)
    spawn(guest)
    assert write_file(guest, TRACEFS + "/events/enable", b"0") == 1
    trace = read_file(guest, TRACEFS + "/trace")
    left_out = guest.machine.cpu._core.translate.left_out
    ram = hashlib.sha256(guest.machine.memory.view).hexdigest()
print(json.dumps([trace.decode(), guest.machine.cpu.counters, guest.machine.cpu.now, ram, left_out]))
"""


def _work(snapshot_dir: Path, how: str) -> list[object]:
    command = [sys.executable, "-c", _WORK, str(snapshot_dir), how]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY)
    result: list[object] = json.loads(done.stdout)
    return result


def test_the_same_result_as_unicorns_own_translation(snapshot_dir: Path) -> None:
    *ours, left_out = _work(snapshot_dir, "ours")
    *plain, nothing = _work(snapshot_dir, "plain")
    assert isinstance(left_out, int)
    assert left_out > 10_000
    assert nothing == 0
    assert ours == plain
