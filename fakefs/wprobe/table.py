"""The wprobes of a guest and what happens to them inside it: enabling, disabling, re-pointing by triggers.

Carriers are ordinary events, so they are enabled and soft-enabled by many ways: `enable` files, set_event, instances,
enable_event triggers. All of them end in the kernel's kprobe_register(), and a trap there arms and disarms the
watchpoint. A set_wprobe trigger is an enable_event trigger in the guest, a clear_wprobe trigger a disable_event one;
they already do what the series does with soft-enabling, and a trap in their common function moves the watchpoint.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import ClassVar

from emulator.cpu.watchpoints import Access
from emulator.errors import EmulatorError
from emulator.guest import Guest
from emulator.kernel.facts import Facts
from emulator.memory import BadAddress
from fakefs.wprobe.carrier import Carriers
from fakefs.wprobe.definition import Definition
from fakefs.wprobe.trigger import Trigger

_WORD = (1 << 64) - 1
_REGISTER, _UNREGISTER = 0, 1  # enum trace_reg
_TASK_SIZE = 0x7FFF_FFFF_F000
STRICT_REGISTERS = 4
# What the kernel's own #DB handler reads, and so keeps debug registers off.
_READ_BY_HANDLER = ("__per_cpu_offset",)
_ACCESS = {"r": Access.READ, "w": Access.WRITE, "rw": Access.READ | Access.WRITE}


@dataclass(frozen=True)
class TableFacts(Facts):
    """Guest virtual addresses of functions, and byte offsets in the kernel's structures."""

    MISSING: ClassVar[str] = "this kernel cannot carry wprobes"

    kprobe_register: int
    enable_trigger: int
    enable_count_trigger: int  # 0 where the kernel counts elsewhere
    hist_trigger: int  # enable_hist's, with the same arguments
    hist_count_trigger: int
    private_data: int  # in event_trigger_data
    count: int
    file: int  # in enable_trigger_data
    enable: int
    event_call: int  # in trace_event_file


def table_facts(guest: Guest) -> TableFacts | None:
    """Look the facts up in a just booted guest; None when its kernel lacks something."""
    from emulator.kernel.btf import BtfLookupError

    symbols, btf = guest.symbols, guest.btf
    try:
        return TableFacts(
            kprobe_register=symbols["kprobe_register"],
            enable_trigger=symbols["event_enable_trigger"],
            enable_count_trigger=_address(guest, "event_enable_count_trigger"),
            hist_trigger=_address(guest, "hist_enable_trigger"),
            hist_count_trigger=_address(guest, "hist_enable_count_trigger"),
            private_data=btf.offsetof("event_trigger_data", "private_data"),
            count=btf.offsetof("event_trigger_data", "count"),
            file=btf.offsetof("enable_trigger_data", "file"),
            enable=btf.offsetof("enable_trigger_data", "enable"),
            event_call=btf.offsetof("trace_event_file", "event_call"),
        )
    except (KeyError, BtfLookupError):
        return None


def _address(guest: Guest, name: str) -> int:
    return next((each.address for each in guest.symbols.find(name)), 0)


@dataclass(eq=False)
class Wprobe:
    """A wprobe. `address` is what it watches when enabled, None while it is parked; `users` have it enabled."""

    definition: Definition
    kprobe: int
    call: int  # its trace_event_call in the guest
    address: int | None
    watchpoint: int | None = None
    users: int = 0
    missed: int = 0
    triggers: int = 0  # set and clear triggers that refer to it

    @property
    def in_use(self) -> bool:
        """Is it enabled in any way, soft-enabled by a trigger included?"""
        return self.users > 0

    def show(self) -> str:
        """Return its line in dynamic_events."""
        definition = self.definition
        return definition.show(definition.dummy_address if self.address is None else self.address)


@dataclass(eq=False)
class Attached:
    """A trigger on an event file. `event_id` is that event's, `field` the offset of the value in its records."""

    path: bytes  # of the trigger file
    trigger: Trigger
    target: Wprobe
    event_id: int
    field: int | None
    second: bool = False  # the event had a trigger for this wprobe before

    @property
    def command(self) -> str:
        """The guest's trigger that stands for it. An event takes one enable_event or disable_event for a target.

        enable_hist and disable_hist soft-enable their target too, so a second trigger is one of these.
        """
        what = "hist" if self.second else "event"
        verb = "enable" if self.trigger.kind == "set" else "disable"
        return f"{verb}_{what}:{self.target.definition.group}:{self.target.definition.event}"


class Table:
    """All wprobes of one guest. `strict` behaves like the four debug registers of a real CPU."""

    def __init__(self, guest: Guest, facts: TableFacts, carriers: Carriers, *, strict: bool = False) -> None:
        self._machine = guest.machine
        self._facts = facts
        self._strict = strict
        self.carriers = carriers
        self.wprobes: list[Wprobe] = []  # in order of definition
        self.attached: list[Attached] = []
        self._done: int | None = None
        machine = guest.machine
        machine.trap(facts.kprobe_register, self._on_register, when=lambda: bool(self.wprobes))
        for address in filter(None, (facts.enable_trigger, facts.enable_count_trigger)):
            machine.trap(address, self._on_trigger, when=lambda: bool(self.attached))
        for address in filter(None, (facts.hist_trigger, facts.hist_count_trigger)):
            machine.trap(address, self._on_hist_trigger, when=lambda: bool(self.attached))

    # ---- the table

    def find(self, group: str, event: str) -> Wprobe | None:
        """Return the wprobe of that name."""
        for wprobe in self.wprobes:
            if (wprobe.definition.group, wprobe.definition.event) == (group, event):
                return wprobe
        return None

    def add(self, definition: Definition, address: int | None) -> Wprobe:
        """Take in a wprobe whose carrier has just been made in the guest. Raises EmulatorError when it is not there."""
        kprobe = self.carriers.find(definition.group, definition.event)
        if kprobe is None:
            raise EmulatorError(f"the carrier of {definition.group}/{definition.event} is not in the guest")
        wprobe = Wprobe(definition, kprobe, self.carriers.call_of(kprobe), address)
        self.wprobes.append(wprobe)
        return wprobe

    def is_busy(self, wprobe: Wprobe) -> bool:
        """May it not be removed: is it enabled, or does a trigger refer to it?"""
        return wprobe.users > 0 or wprobe.triggers > 0

    def remove(self, wprobe: Wprobe) -> None:
        """Forget a wprobe, disarmed first; its carrier is the caller's to remove, afterwards."""
        self._disarm(wprobe)
        self.wprobes.remove(wprobe)

    # ---- arming

    def _arm(self, wprobe: Wprobe) -> None:
        if wprobe.watchpoint is None and wprobe.users > 0 and wprobe.address is not None:
            definition = wprobe.definition
            access = _ACCESS[definition.access]
            wprobe.watchpoint = self.carriers.arm(wprobe.kprobe, wprobe.address, definition.length, access)

    def _disarm(self, wprobe: Wprobe) -> None:
        if wprobe.watchpoint is not None:
            self.carriers.watchpoints.remove(wprobe.watchpoint)
            wprobe.watchpoint = None

    def park(self, wprobe: Wprobe) -> None:
        """Watch nothing until a trigger says what."""
        wprobe.address = None
        self._disarm(wprobe)

    # ---- inside the guest

    def _on_register(self) -> bool:
        """kprobe_register(call, type, data): one more or one less has a carrier enabled."""
        cpu = self._machine.cpu
        call, kind = cpu.read("rdi"), cpu.read("rsi") & 0xFFFF_FFFF
        wprobe = next((wprobe for wprobe in self.wprobes if wprobe.call == call), None)
        if wprobe is None:
            return False
        if kind == _REGISTER:
            refusal = self._refusal(wprobe)
            if refusal:
                return self._return(-refusal)
            wprobe.users += 1
            try:
                self._arm(wprobe)
            except EmulatorError:
                wprobe.users -= 1
                return self._return(-errno.ENOSPC)
        elif kind == _UNREGISTER:
            wprobe.users -= 1
            if wprobe.users <= 0:
                wprobe.users = 0
                self._disarm(wprobe)
        else:
            return self._return(-errno.EOPNOTSUPP)  # perf
        return False

    def _refusal(self, wprobe: Wprobe) -> int:
        """Return the errno enabling gives on a real CPU; 0 when it can be done."""
        if not self._strict or wprobe.users:
            return 0
        if wprobe.definition.symbol in _READ_BY_HANDLER:
            return errno.EINVAL
        if wprobe.definition.access == "r":
            return errno.EINVAL  # DR7 knows writes, and reads together with writes
        taken = sum(1 for other in self.wprobes if other.users)
        return errno.ENOSPC if taken >= STRICT_REGISTERS else 0

    def _return(self, value: int) -> bool:
        self._machine.cpu.write("rax", value & _WORD)
        self._machine.return_from_call()
        return True

    def _on_trigger(self) -> bool:
        """event_enable_trigger(data, buffer, rec, event): the event of a set or clear trigger has passed its filter.

        When the watchpoint is moved, the kernel's own part follows: it sets or clears the target's soft-disabled bit.
        """
        cpu = self._machine.cpu
        data = cpu.read("rdi")
        if self._done == data and cpu.read("rip") == self._facts.enable_trigger:
            self._done = None  # the counting variant, dealt with, calls the plain one
            return False
        try:
            found = self._attached_for(data, cpu.read("rdx"))
            if found is None:
                return False
            attached, value = found
            if cpu.read("rip") == self._facts.enable_count_trigger and self._word(data + self._facts.count, 4) == 0:
                return False
        except BadAddress:
            return False
        target = attached.target
        if not self._switch(attached.trigger, target, value):
            target.missed += 1
            return self._return(0)
        if cpu.read("rip") == self._facts.enable_count_trigger:
            self._done = data
        return False

    def _on_hist_trigger(self) -> bool:
        """hist_enable_trigger(data, buffer, rec, event): what is ours goes on as an enable_event trigger."""
        cpu = self._machine.cpu
        try:
            if self._attached_for(cpu.read("rdi"), cpu.read("rdx")) is None:
                return False
        except BadAddress:
            return False
        counts = cpu.read("rip") == self._facts.hist_count_trigger
        cpu.write("rip", self._facts.enable_count_trigger if counts else self._facts.enable_trigger)
        return True

    def _attached_for(self, data: int, record: int) -> tuple[Attached, int | None] | None:
        facts = self._facts
        private = self._word(data + facts.private_data)
        call = self._word(self._word(private + facts.file) + facts.event_call)
        enables = bool(self._word(private + facts.enable, 1))
        if not record:
            return None
        event_id = self._word(record, 2)
        for attached in self.attached:
            if (
                attached.event_id == event_id
                and attached.target.call == call
                and (attached.trigger.kind == "set") == enables
            ):
                return attached, None if attached.field is None else self._word(record + attached.field)
        return None

    def _switch(self, trigger: Trigger, target: Wprobe, value: int | None) -> bool:
        """Arm or park a wprobe; False when it is not in a state for that, or the value no address to watch."""
        address = None if value is None else value + trigger.adjust & _WORD
        if trigger.kind == "set":
            if target.address is not None or address is None:
                return False
            if address <= _TASK_SIZE or address % target.definition.length:
                return False
            target.address = address
            self._arm(target)
            return True
        if target.address is None or (address is not None and target.address != address):
            return False
        self.park(target)
        return True

    def _word(self, at: int, size: int = 8) -> int:
        return int.from_bytes(self._machine.memory.read_virtual(at, size, self._machine.cpu.read("cr3")), "little")
