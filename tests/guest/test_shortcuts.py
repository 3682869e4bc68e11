"""What the shortcuts (emulator/shortcuts.py) leave out makes no difference: the same kernel with and without them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from emulator.cpu.native import NativeCPU
from emulator.guest import Guest
from tests.guest_tasks import TRACEFS, read_file, write_file

REPOSITORY = Path(__file__).resolve().parents[2]

_WORK = """
import hashlib, json, os, re, sys
from contextlib import closing
from pathlib import Path
from emulator.cpu.native import NativeCPU
from emulator.guest import restore
from emulator.snapshot import open_snapshot
from tests.guest_tasks import TRACEFS, read_file, write_file

plain, seen = sys.argv[2] == "plain", []
_TIME = re.compile(rb"^(.*\\[000\\]) \\S+ +[\\d.]+: ", re.MULTILINE)  # and whether a tick has come by then

def write(name, text, flags=os.O_WRONLY | os.O_APPEND):
    assert write_file(guest, TRACEFS + "/" + name, text, flags) > 0, (name, text)

def look(*names):
    memory, symbols = guest.machine.memory.view, guest.symbols
    image = 0xFFFFFFFF80000000
    text = memory[symbols["_stext"] - image : symbols["_etext"] - image]
    seen.append(hashlib.sha256(text).hexdigest())
    for name in ("enabled_functions", *names):
        seen.append(_TIME.sub(rb"\\1 ", read_file(guest, TRACEFS + "/" + name)).decode())

with closing(restore(open_snapshot(Path(sys.argv[1])), lambda ports: NativeCPU(ports, plain=plain))) as guest:
    look()
    write("kprobe_events", b"p:in vfs_read\\nr:out vfs_write\\np:third ksys_read\\n")
    for event in ("in", "out", "third"):
        write(f"events/kprobes/{event}/enable", b"1")
        look()
    write("events/kprobes/in/trigger", b"stacktrace")
    read_file(guest, "/proc/version")
    write("tracing_on", b"0")
    look("trace", "kprobe_profile")
    write("set_ftrace_filter", b"vfs_*")
    write("current_tracer", b"function")
    look("touched_functions" if b"touched" in read_file(guest, TRACEFS + "/README") else "kprobe_events")
    write("events/kprobes/in/enable", b"0")
    write("current_tracer", b"nop")
    look()
    for event in ("out", "third"):
        write(f"events/kprobes/{event}/enable", b"0")
        look()
    taken = guest.machine.cpu.shortcuts.taken if guest.machine.cpu.shortcuts else []
print(json.dumps([seen, taken]))
"""


def _work(snapshot_dir: Path, how: str) -> tuple[list[str], list[int]]:
    command = [sys.executable, "-c", _WORK, str(snapshot_dir), how]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY)
    seen, taken = json.loads(done.stdout)
    return seen, taken


def test_nothing_is_different_but_the_time(snapshot_dir: Path) -> None:
    ours, taken = _work(snapshot_dir, "ours")
    plain, nothing = _work(snapshot_dir, "plain")
    assert taken[0] > 10
    assert nothing == []
    assert len(set(ours)) > 10
    assert ours == plain


def test_a_shortcut_is_not_taken_past_a_probe(guest: Guest) -> None:
    cpu = guest.machine.cpu
    assert isinstance(cpu, NativeCPU)
    assert cpu.shortcuts is not None
    if guest.symbol_names is None:
        return  # this kernel does not list its tables

    def print_symbols() -> None:
        assert write_file(guest, f"{TRACEFS}/events/kprobes/in/enable", b"1") == 1
        read_file(guest, "/proc/version")
        assert write_file(guest, f"{TRACEFS}/events/kprobes/in/enable", b"0") == 1
        assert b" in: (vfs_read+0x" in read_file(guest, f"{TRACEFS}/trace")

    assert write_file(guest, f"{TRACEFS}/kprobe_events", b"p:in vfs_read\np:own get_symbol_offset\n") > 0
    print_symbols()
    taken = cpu.shortcuts.taken[1]
    assert taken > 0
    assert write_file(guest, f"{TRACEFS}/events/kprobes/own/enable", b"1") == 1
    print_symbols()
    assert cpu.shortcuts.taken[1] == taken
    profile = read_file(guest, f"{TRACEFS}/kprobe_profile").decode()
    assert int(next(line for line in profile.splitlines() if " own " in f"{line} ").split()[1]) > 0

    assert write_file(guest, f"{TRACEFS}/events/kprobes/own/enable", b"0") == 1
    hits: list[int] = []

    def hit() -> bool:
        hits.append(guest.machine.cpu.now)
        return False

    trap = guest.machine.trap(guest.symbol_names.function, hit)
    print_symbols()
    assert cpu.shortcuts.taken[1] == taken
    assert hits
    guest.machine.untrap(trap)
    print_symbols()
    assert cpu.shortcuts.taken[1] > taken
