"""The guest and its init: the protocol between them and the host, snapshots, and that nothing depends on chance."""

from __future__ import annotations

import errno
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emulator import agent as protocol
from emulator.agent import SLOT_MAX_CALLS, Call
from emulator.guest import Guest, Recipe, start
from emulator.snapshot import DamagedSnapshot, open_snapshot
from fakefs.syscalls import Sys
from tests.guest_tasks import AT_FDCWD, TRACEFS, call, elf, read_file, run_elf, spawn, write_file

REPOSITORY = Path(__file__).resolve().parents[2]
_VM_FS_FILES = 0x100 | 0x200 | 0x400

# ---- the protocol


def test_both_ends_have_the_same_numbers() -> None:
    header = (REPOSITORY / "emulator/guest/protocol.h").read_text()
    numbers = {
        name: int(value.rstrip("ulUL"), 0)
        for name, value in re.findall(r"^#define (\w+)[ \t]+((?:0x)?[0-9a-fA-F]+[ulUL]*)", header, re.MULTILINE)
    }
    ours = {name: getattr(protocol, name) for name in numbers if hasattr(protocol, name)}
    assert ours == {name: numbers[name] for name in ours}
    assert set(numbers) - set(ours) == {"HYPERCALL_LEAF", "SLOT_RETURN"}  # in C alone
    assert len(ours) >= 9


def test_results_are_the_kernels(guest: Guest) -> None:
    assert guest.call((Sys.CLOSE, 9999)) == [-errno.EBADF]
    assert write_file(guest, f"{TRACEFS}/tracing_on", b"0") == 1
    assert read_file(guest, f"{TRACEFS}/tracing_on") == b"0\n"
    assert write_file(guest, f"{TRACEFS}/current_tracer", b"none") == -errno.EINVAL
    assert write_file(guest, f"{TRACEFS}/nothing", b"") == -errno.ENOENT


def test_a_full_batch(guest: Guest) -> None:
    calls = [(Sys.LSEEK, 9999, number, 0) if number % 2 else (Sys.KILL, 1, 0) for number in range(SLOT_MAX_CALLS)]
    assert guest.call(*calls) == [0, -errno.EBADF] * (SLOT_MAX_CALLS // 2)
    with pytest.raises(ValueError, match="1 to 128"):
        guest.call(*calls, calls[0])


def test_tasks_have_the_pid_they_are_given(guest: Guest) -> None:
    child, pid = spawn(guest, pid=31415, flags=_VM_FS_FILES)
    assert pid == 31415
    assert call(guest, child, (Sys.KILL, 31415, 0)) == [0]
    assert spawn(guest, pid=31415, flags=_VM_FS_FILES)[1] == -errno.EEXIST
    guest.agent.submit(child, [(Sys.EXIT, 0)])
    while guest.call((Sys.KILL, 31415, 0)) == [0]:
        pass
    guest.agent.forget(child)
    assert list(guest.agent.tasks) == [0]


def test_all_slots_can_be_used(guest: Guest) -> None:
    children = [spawn(guest, flags=_VM_FS_FILES) for _ in range(60)]
    assert all(pid > 1 for _, pid in children)
    assert len({task.slot for task, _ in children}) == 60
    for task, pid in reversed(children):
        assert call(guest, task, (Sys.KILL, pid, 0), (Sys.CLOSE, 9999)) == [0, -errno.EBADF]


@pytest.mark.parametrize("slot", [1023, 1024, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 1])
def test_a_program_with_a_made_up_slot_gets_nothing(guest: Guest, slot: int) -> None:
    leaf = 0x46414B45
    code = b"\xb8" + struct.pack("<I", leaf)  # mov eax, leaf
    code += b"\x48\xb9" + struct.pack("<Q", slot)  # mov rcx, slot
    code += b"\x0f\xa2\xeb\x00\x89\xc7"  # cpuid; jmp to the next, as protocol.h wants it; mov edi, eax
    code += b"\xb8" + struct.pack("<I", Sys.EXIT) + b"\x0f\x05"  # mov eax, EXIT; syscall
    assert run_elf(guest, elf(code)) == protocol.OP_SLEEP << 8
    assert guest.call((Sys.CLOSE, 9999)) == [-errno.EBADF]


def test_a_program_that_faults_is_killed(guest: Guest) -> None:
    assert run_elf(guest, elf(b"\x0f\x0b")) & 0x7F == 4  # ud2: SIGILL
    assert run_elf(guest, elf(b"\xf4")) & 0x7F == 11  # hlt: SIGSEGV


def test_a_program_that_is_overwritten_is_the_new_one(guest: Guest) -> None:
    assert run_elf(guest, elf(b"\x0f\x0b"), "/tmp/same") & 0x7F == 4
    assert run_elf(guest, elf(b"\xf4"), "/tmp/same") & 0x7F == 11


_BAD_FD = st.integers(1000, 1 << 30)
_ANY = st.integers(-(1 << 63), (1 << 63) - 1)


def _with(result: int, *words: int | st.SearchStrategy[int]) -> st.SearchStrategy[tuple[Call, int]]:
    parts = [word if isinstance(word, st.SearchStrategy) else st.just(int(word)) for word in words]
    return st.tuples(st.tuples(*parts), st.just(result))


HARMLESS = st.one_of(
    _with(-errno.EBADF, Sys.CLOSE, _BAD_FD),
    _with(-errno.EBADF, Sys.LSEEK, _BAD_FD, _ANY, st.integers(0, 2)),
    _with(-errno.EBADF, Sys.READ, _BAD_FD, _ANY, _ANY),
    _with(-errno.EBADF, Sys.WRITE, _BAD_FD, _ANY, _ANY),
    _with(-errno.EFAULT, Sys.OPENAT, AT_FDCWD, st.integers(0, 4095), 0, 0),
    _with(-errno.EFAULT, Sys.PIPE2, st.integers(1, 4095), 0),
    _with(-errno.EINVAL, Sys.PIPE2, _ANY, 1),
    _with(-errno.EINVAL, Sys.KILL, 1, st.integers(65, 1 << 20)),
    _with(-errno.ESRCH, Sys.KILL, st.integers(1 << 23, 1 << 30), 0),
    _with(-errno.ENOSYS, st.integers(2000, 60000), _ANY, _ANY, _ANY, _ANY, _ANY, _ANY),
    _with(0, Sys.KILL, 1, 0),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(HARMLESS, min_size=1, max_size=SLOT_MAX_CALLS))
def test_any_batch_has_its_results_in_order(guest: Guest, batch: list[tuple[Call, int]]) -> None:
    assert guest.call(*(one for one, _ in batch)) == [result for _, result in batch]


# ---- snapshots


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def _halve(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


@pytest.fixture
def copy(snapshot_dir: Path, tmp_path: Path) -> Path:
    """A snapshot of the test's own, in a cache of its own."""
    directory = tmp_path / "snapshots" / snapshot_dir.name
    directory.parent.mkdir()
    subprocess.run(["cp", "-r", "--sparse=always", snapshot_dir, directory], check=True)
    return directory


def test_a_copied_snapshot_is_as_good(copy: Path) -> None:
    snapshot = open_snapshot(copy)
    assert snapshot is not None
    assert snapshot.directory == copy


@pytest.mark.parametrize("damage", [_flip, _halve, Path.unlink])
@pytest.mark.parametrize("name", ["ram", "cpu", "symbols"])
def test_damage_is_found(copy: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(copy / name)
    with pytest.raises(DamagedSnapshot):
        open_snapshot(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 0}', '{"format": 2, "files": {"ram": 7}}'])
def test_a_damaged_manifest_is_found(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DamagedSnapshot):
        open_snapshot(tmp_path)


def test_a_damaged_snapshot_is_made_again(copy: Path, recipe: Recipe) -> None:
    _flip(copy / "cpu")
    said: list[str] = []
    with closing(start(recipe, copy.parent.parent, say=said.append)) as guest:
        assert guest.call((Sys.CLOSE, 9999)) == [-errno.EBADF]
    assert len(said) == 1
    assert "thrown away" in said[0]
    assert open_snapshot(copy) is not None
    shutil.rmtree(copy)


# ---- determinism

_TELL = f"""
import sys
from contextlib import closing
from pathlib import Path
from emulator.guest import restore
from emulator.snapshot import open_snapshot
from tests.guest_tasks import read_file, spawn, write_file
top = {TRACEFS!r}
with closing(restore(open_snapshot(Path(sys.argv[1])))) as guest:
    assert write_file(guest, top + "/kprobe_events", b"p:in vfs_read count=$arg3\\n") > 0
    for event in ("kprobes", "sched", "timer", "irq_vectors"):
        assert write_file(guest, top + "/events/" + event + "/enable", b"1") == 1
    for name in ("trace_options", "available_tracers", "kprobe_events"):
        read_file(guest, top + "/" + name)
    spawn(guest)
    guest.call((230, 1, 0, guest.agent.init.virtual(0x100), 0))  # clock_nanosleep
    guest.agent.put(guest.agent.init, 0x100, (0).to_bytes(8, "little") + (3_000_000).to_bytes(8, "little"))
    guest.call((230, 1, 0, guest.agent.init.virtual(0x100), 0))
    assert write_file(guest, top + "/events/enable", b"0") == 1
    sys.stdout.buffer.write(read_file(guest, top + "/trace"))
    print(guest.machine.cpu.now)
"""


def test_the_same_calls_give_the_same_trace_to_the_nanosecond(snapshot_dir: Path) -> None:
    # Each in a process of its own, whose addresses, hashes and times differ.
    first, second = (
        subprocess.run([sys.executable, "-c", _TELL, snapshot_dir], check=True, capture_output=True, cwd=REPOSITORY)
        for _ in range(2)
    )
    events = [line for line in first.stdout.decode().splitlines() if line and not line.startswith("#")]
    assert len(events) > 20
    assert any(" in: (vfs_read" in line for line in events)
    assert any(" sched_switch: " in line for line in events)
    assert first.stdout == second.stdout
