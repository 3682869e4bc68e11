"""A guest ready for work: a machine whose kernel has booted and whose init serves the host's calls.

`start()` is the way in: it restores a snapshot, or boots once and makes one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emulator import seqfile, shortcuts, textpoke
from emulator.agent import SINK_SIZE, Agent, Call
from emulator.cpu.interface import CPU, GuestDied, PortIO, Stop
from emulator.cpu.libunicorn import WANTED_VERSION
from emulator.errors import EmulatorError
from emulator.kernel.facts import RecordFacts, SeqFileFacts, SymbolNameFacts, TextPokeFacts
from emulator.machine import Machine
from emulator.memory import Memory
from emulator.snapshot import FORMAT, DamagedSnapshot, Snapshot, open_snapshot, save

if TYPE_CHECKING:
    from emulator.kernel.btf import Btf
    from emulator.kernel.kallsyms import Symbols

# The window the guest's init and the host share: 1024 slots of 64 KiB and what all may write to, behind RAM and outside
# the kernel's memory map.
WINDOW_SIZE = (64 << 20) + SINK_SIZE
DEFAULT_MEMORY = 256 << 20
COMMAND_LINE = (
    "console=ttyS0 quiet noapic nokaslr panic=-1 reboot=k mitigations=off nopti pci=off tsc=reliable "
    "softlockup_panic=1 watchdog_thresh=5 "  # code of the kernel's that loops for ever ends it after 10 virtual seconds
    "random.trust_cpu=off rcupdate.rcu_expedited=1 cryptomgr.notests damon_stat.enabled=0"
)
_BOOT_LIMIT = 120_000_000_000  # ns of virtual time; a boot takes 0.7 s
_SETTLE = 400_000_000  # ns of virtual time after init is ready, for what the kernel still does in the background
_TYPICAL_BOOT = 700_000_000
_STEP = 100_000_000
_AGENT = Path(__file__).parent / "guest" / "agent"
_STUB = Path(__file__).parent / "guest" / "stub"
_BUSYBOX = Path("/bin/busybox")

Progress = Callable[[float], None]


def _native(ports: PortIO) -> CPU:
    from emulator.cpu.native import NativeCPU

    return NativeCPU(ports)


@dataclass(frozen=True)
class Recipe:
    """What a guest is made of, and so what its snapshot depends on. `memory` is the RAM in bytes."""

    kernel: Path
    memory: int = DEFAULT_MEMORY
    append: str = ""

    @property
    def command_line(self) -> str:
        """The kernel's command line."""
        own = f"{COMMAND_LINE} agent.window={self.memory} agent.size={WINDOW_SIZE}"
        return f"{own} {self.append}".strip()

    @cached_property
    def key(self) -> str:
        """A name for the snapshot: the same when everything that goes into the boot is the same."""
        files = [_identity(path) for path in (self.kernel, _AGENT, _STUB, _BUSYBOX)]
        text = json.dumps([FORMAT, WANTED_VERSION, self.memory, self.command_line, files])
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def _identity(path: Path) -> list[object]:
    try:
        status = path.stat()
    except OSError:
        return [str(path)]
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


class Guest:
    """A machine and the agent in it. `release` is the kernel's version string."""

    def __init__(self, machine: Machine, agent: Agent, release: str, snapshot: Snapshot | None = None) -> None:
        self.machine = machine
        self.agent = agent
        self.release = release
        self.snapshot = snapshot
        self.text_poke: TextPokeFacts | None = None
        self.seq_file: SeqFileFacts | None = None
        self.records: RecordFacts | None = None
        self.symbol_names: SymbolNameFacts | None = None
        self.notes: object = None if snapshot is None else snapshot.manifest.get("notes")

    def call(self, *calls: Call) -> list[int]:
        """Have init make system calls, and wait; an idle guest's time jumps to its next timer. Raises GuestDied."""
        request = self.agent.submit(self.agent.init, calls)
        while not request.done:
            if self.agent.step(self.machine.cpu.now + _STEP) is Stop.HALTED and not self.agent.busy:
                _skip_idle(self.machine, self.machine.cpu.now + _STEP)
        return request.results

    @cached_property
    def symbols(self) -> Symbols:
        """The kernel's symbols."""
        from emulator.kernel.kallsyms import Symbols

        if self.snapshot is None:
            raise EmulatorError("symbols are kept with a snapshot")
        return Symbols.from_bytes(self.snapshot.symbols())

    @cached_property
    def btf(self) -> Btf:
        """The kernel's types."""
        from emulator.kernel.btf import Btf

        if self.snapshot is None:
            raise EmulatorError("types are kept with a snapshot")
        return Btf(self.snapshot.btf())

    def close(self) -> None:
        """Free the machine."""
        self.machine.close()


# Runs on a guest just booted; what it returns (JSON values) is kept in the snapshot, as `Guest.notes`.
Prepare = Callable[["Guest"], object]


def start(
    recipe: Recipe, cache: Path, progress: Progress | None = None, say: Callable[[str], None] | None = None
) -> Guest:
    """Return a guest from the snapshot of `recipe` under `cache`, after booting it once if need be.

    `progress` is called with a fraction during that boot; `say` with a line when a snapshot had to be thrown away.
    Raises EmulatorError when the kernel cannot be booted or the snapshot not be written.
    """
    return find(recipe, cache, say) or restore(make_snapshot(recipe, cache, progress))


def find(recipe: Recipe, cache: Path, say: Callable[[str], None] | None = None) -> Guest | None:
    """Return a guest from the snapshot of `recipe`; None when there is none that can be trusted."""
    try:
        snapshot = open_snapshot(cache / "snapshots" / recipe.key)
        return None if snapshot is None else restore(snapshot)
    except (DamagedSnapshot, KeyError, TypeError) as damage:
        if say:
            say(f"snapshot thrown away, booting again: {damage}")
        return None


def make_snapshot(
    recipe: Recipe, cache: Path, progress: Progress | None = None, prepare: Prepare | None = None
) -> Snapshot:
    """Boot `recipe`, let `prepare` look at the guest, and write its snapshot under `cache`."""
    guest = boot(recipe, progress)
    try:
        if prepare is not None:
            guest.notes = prepare(guest)
        return _snapshot(guest, cache / "snapshots" / recipe.key)
    finally:
        guest.close()


def initramfs() -> bytes:
    """Return the guest's userland: our init, and the host's static busybox when there is one."""
    from emulator.initramfs import Initramfs

    if not (_AGENT.exists() and _STUB.exists()):
        raise EmulatorError("the guest's init is not built: make setup")
    archive = Initramfs()
    archive.add_file("/init", _AGENT.read_bytes(), 0o755)
    archive.add_file("/stub", _STUB.read_bytes(), 0o755)
    for directory in ("/bin", "/dev", "/proc", "/sys", "/root"):
        archive.add_dir(directory)
    archive.add_dir("/tmp", 0o1777)
    archive.add_node("/dev/console", 0o020600, 5, 1)
    if _BUSYBOX.exists():
        archive.add_file("/bin/busybox", _BUSYBOX.read_bytes(), 0o755)
        archive.add_symlink("/bin/sh", "busybox")
    return archive.to_bytes()


def boot(recipe: Recipe, progress: Progress | None = None, cpu_factory: Callable[[PortIO], CPU] = _native) -> Guest:
    """Boot a kernel until init is ready and asleep and the kernel has settled. Takes seconds; raises EmulatorError."""
    from emulator.boot import BootImage, load
    from emulator.kernel import kallsyms
    from emulator.kernel.btf import Btf
    from emulator.kernel.facts import record_facts, seq_file_facts, symbol_name_facts, text_poke_facts, wake_facts
    from emulator.kernel.image import KernelImage

    image = KernelImage.load(recipe.kernel)
    memory = Memory(recipe.memory + WINDOW_SIZE)
    machine = Machine(memory, recipe.memory, cpu_factory, epoch_ns=time.time_ns() // 10**9 * 10**9)
    try:
        load(BootImage(image, recipe.command_line, initramfs()), memory, recipe.memory, machine.cpu)
        agent = Agent(machine)
        _run_to_hypercall(machine, progress)
        symbols = kallsyms.from_image(image)
        btf = Btf(image.btf())
        cr3 = machine.cpu.read("cr3")

        def read_u64(virtual: int) -> int:
            return int.from_bytes(memory.read_virtual(virtual, 8, cr3), "little")

        agent.attach(lambda per_cpu: wake_facts(symbols, btf, per_cpu, lambda at: memory.translate(at, cr3), read_u64))
        _settle(machine, agent)
    except BaseException:
        machine.close()
        raise
    guest = Guest(machine, agent, image.version)
    guest.text_poke = text_poke_facts(symbols, btf)
    guest.seq_file = seq_file_facts(symbols, btf)
    guest.records = record_facts(symbols, btf)
    guest.symbol_names = symbol_name_facts(symbols)
    guest.symbols = symbols
    guest.btf = btf
    return guest


def _run_to_hypercall(machine: Machine, progress: Progress | None) -> None:
    while True:
        stop = machine.run(machine.cpu.now + 20_000_000)
        if progress:
            progress(min(machine.cpu.now / _TYPICAL_BOOT, 1.0))
        if stop is Stop.HYPERCALL:
            return
        complaint = next((line for line in machine.console.lines if line.startswith("agent: cannot")), None)
        if complaint:
            raise EmulatorError(f"the kernel booted but cannot be used: {complaint}")
        if machine.cpu.now > _BOOT_LIMIT:
            raise machine.obituary(GuestDied("the kernel did not reach init"))
        if stop is Stop.HALTED:
            _skip_idle(machine, machine.cpu.now + 1_000_000_000)


def _skip_idle(machine: Machine, until_ns: int) -> None:
    """An idle guest and nobody waiting: go to its next timer at once."""
    event = machine.next_event()
    machine.cpu.now = max(machine.cpu.now, until_ns if event is None else min(event, until_ns))


def _settle(machine: Machine, agent: Agent) -> None:
    """Let init fall asleep and the kernel finish what it does in the background."""
    settled = machine.cpu.now + _SETTLE
    while agent.step(settled) is not Stop.DEADLINE:
        _skip_idle(machine, settled)


def _snapshot(guest: Guest, directory: Path) -> Snapshot:
    _settle(guest.machine, guest.agent)
    manifest = {
        "release": guest.release,
        "ram_size": guest.machine.ram_size,
        "machine": guest.machine.state(),
        "agent": guest.agent.state(),
        "notes": guest.notes,
        "text_poke": guest.text_poke.to_json() if guest.text_poke else None,
        "seq_file": guest.seq_file.to_json() if guest.seq_file else None,
        "records": guest.records.to_json() if guest.records else None,
        "symbol_names": guest.symbol_names.to_json() if guest.symbol_names else None,
        "console": guest.machine.console.text()[-65536:],
    }
    return save(
        directory, guest.machine.memory, guest.machine.cpu.save(), guest.symbols.to_bytes(), guest.btf.data, manifest
    )


def restore(snapshot: Snapshot, cpu_factory: Callable[[PortIO], CPU] = _native) -> Guest:
    """Return a guest as it was when the snapshot was made. Raises EmulatorError (DamagedSnapshot, mostly)."""
    manifest: dict[str, Any] = snapshot.manifest
    ram_size, size = manifest["ram_size"], manifest["memory_size"]
    if type(ram_size) is not int or type(size) is not int or not 0 < ram_size < size or size - ram_size != WINDOW_SIZE:
        raise DamagedSnapshot("the snapshot's memory sizes make no sense")
    machine = Machine(Memory(size, snapshot.ram), ram_size, cpu_factory)
    try:
        machine.load(manifest["machine"], snapshot.cpu_state())
        machine.console.lines.extend(str(manifest["console"]).splitlines())
        agent = Agent(machine)
        agent.load(manifest["agent"])
        text_poke = TextPokeFacts.from_json(manifest["text_poke"]) if manifest["text_poke"] else None
        seq_file = SeqFileFacts.from_json(manifest["seq_file"]) if manifest["seq_file"] else None
        records = RecordFacts.from_json(manifest["records"]) if manifest["records"] else None
        names = SymbolNameFacts.from_json(manifest["symbol_names"]) if manifest["symbol_names"] else None
    except BaseException:
        machine.close()
        raise
    guest = Guest(machine, agent, str(manifest["release"]), snapshot)
    if text_poke is not None:
        textpoke.install(machine, text_poke)
    if seq_file is not None:
        seqfile.install(machine, seq_file)
    shortcuts.install(machine, records, names)
    return guest
