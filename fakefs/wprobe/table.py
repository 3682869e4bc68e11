"""The wprobes of a guest and what happens to them inside it: enabling, disabling, re-pointing by triggers.

Carriers are ordinary events, so they are enabled and soft-enabled by many ways: `enable` files, set_event, instances,
enable_event triggers. All of them end in the kernel's kprobe_register(), and a trap there arms and disarms the
watchpoint. A set_wprobe trigger is an enable_event trigger in the guest, a clear_wprobe trigger a disable_event one;
they already do what the series does with soft-enabling, and a trap in their common function moves the watchpoint.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar

from emulator.cpu.watchpoints import Access
from emulator.errors import EmulatorError
from emulator.guest import Guest
from emulator.kernel.facts import Facts
from emulator.memory import BadAddress
from fakefs.wprobe.carrier import Carriers
from fakefs.wprobe.definition import TASK_SIZE, Definition
from fakefs.wprobe.off_limits import OffLimits
from fakefs.wprobe.trigger import Trigger
from fakefs.wprobe.wprobe import Attached, Slot, Wprobe

_WORD = (1 << 64) - 1
_REGISTER, _UNREGISTER = 0, 1  # enum trace_reg
_UNLIMITED = (1 << 32) - 1  # the count of a trigger that has none
STRICT_REGISTERS = 4
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
    count_func: int  # 0 where the triggers do it; enable_event's, and that of all others
    count_func_others: int
    private_data: int  # in event_trigger_data
    count: int
    file: int  # in enable_trigger_data
    enable: int
    event_call: int  # in trace_event_file
    file_flags: int
    soft_disabled: int  # a bit of these flags


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
            count_func=_address(guest, "event_enable_count_func"),
            count_func_others=_address(guest, "event_trigger_count"),
            private_data=btf.offsetof("event_trigger_data", "private_data"),
            count=btf.offsetof("event_trigger_data", "count"),
            file=btf.offsetof("enable_trigger_data", "file"),
            enable=btf.offsetof("enable_trigger_data", "enable"),
            event_call=btf.offsetof("trace_event_file", "event_call"),
            file_flags=btf.offsetof("trace_event_file", "flags"),
            soft_disabled=btf.constant("EVENT_FILE_FL_SOFT_DISABLED"),
        )
    except (KeyError, BtfLookupError):
        return None


def _address(guest: Guest, name: str) -> int:
    return next((each.address for each in guest.symbols.find(name)), 0)


class _Moved(Enum):
    """What a set or clear trigger has done to its wprobe."""

    NOT = auto()
    SOME = auto()  # a slot was cleared, others are still watched
    ALL = auto()


class Table:
    """All wprobes of one guest. `strict` behaves like the four debug registers of a real CPU."""

    def __init__(
        self, guest: Guest, facts: TableFacts, carriers: Carriers, off_limits: OffLimits, *, strict: bool = False
    ) -> None:
        self._machine = guest.machine
        self._facts = facts
        self.strict = strict
        self.carriers = carriers
        self.off_limits = off_limits
        self.wprobes: list[Wprobe] = []  # in order of definition
        self.attached: list[Attached] = []
        self._done: int | None = None
        machine = guest.machine
        machine.trap(facts.kprobe_register, self._on_register, when=lambda: bool(self.wprobes))
        for address in filter(None, (facts.enable_trigger, facts.enable_count_trigger)):
            machine.trap(address, self._on_trigger, when=lambda: bool(self.attached))
        for address in filter(None, (facts.hist_trigger, facts.hist_count_trigger)):
            machine.trap(address, self._on_hist_trigger, when=lambda: bool(self.attached))
        for address in filter(None, (facts.count_func, facts.count_func_others)):
            machine.trap(address, self._on_count, when=lambda: bool(self.attached))

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
        slots = [] if address is None else [Slot(address)]
        wprobe = Wprobe(definition, kprobe, self.carriers.call_of(kprobe), slots)
        self.wprobes.append(wprobe)
        return wprobe

    def is_busy(self, wprobe: Wprobe) -> bool:
        """May it not be removed: is it enabled, or does a trigger refer to it?"""
        return wprobe.users > 0 or wprobe.triggers > 0

    def remove(self, wprobe: Wprobe) -> None:
        """Forget a wprobe, disarmed first; its carrier is the caller's to remove, afterwards."""
        self._disarm(wprobe)
        self.wprobes.remove(wprobe)

    def is_mapped(self, address: int) -> bool:
        """Is there memory at a guest virtual address now?"""
        if address + (1 << 47) & _WORD >= 1 << 48:  # not canonical
            return False
        try:
            self._machine.memory.translate(address, self._machine.cpu.read("cr3"))
        except BadAddress:
            return False
        return True

    def attach(self, attached: Attached) -> None:
        """Take in a trigger that is about to be made in the guest."""
        self.attached.append(attached)
        attached.target.triggers += 1
        attached.target.setters += attached.trigger.kind == "set"

    def detach(self, attached: Attached) -> None:
        """Forget a trigger that is gone."""
        self.attached.remove(attached)
        attached.target.triggers -= 1
        attached.target.setters -= attached.trigger.kind == "set"

    # ---- arming

    def _arm(self, wprobe: Wprobe) -> None:
        """Watch what is not watched yet, if it is enabled. Raises EmulatorError, with nothing of it watched then."""
        if not wprobe.users:
            return
        definition = wprobe.definition
        access = _ACCESS[definition.access] | (Access.CHANGE if definition.changes else Access(0))
        try:
            for slot in wprobe.slots:
                if slot.watchpoint is None:
                    slot.watchpoint = self.carriers.arm(wprobe.kprobe, slot.address, definition.length, access)
        except EmulatorError:
            self._disarm(wprobe)
            raise

    def _disarm(self, wprobe: Wprobe) -> None:
        for slot in wprobe.slots:
            self._disarm_slot(slot)

    def _disarm_slot(self, slot: Slot) -> None:
        if slot.watchpoint is not None:
            self.carriers.watchpoints.remove(slot.watchpoint)
            slot.watchpoint = None

    def _drop(self, wprobe: Wprobe, slot: Slot) -> None:
        self._disarm_slot(slot)
        wprobe.slots.remove(slot)

    def park(self, wprobe: Wprobe) -> None:
        """Watch nothing until a trigger says what."""
        self._disarm(wprobe)
        wprobe.slots.clear()

    # ---- time

    def _set_alarm(self, wprobe: Wprobe) -> None:
        """See to it that `_on_alarm` comes when the first of its slots has to end."""
        end = min((slot.until for slot in wprobe.slots if slot.until is not None), default=None)
        if end is not None and (wprobe.alarm is None or end < wprobe.alarm):
            wprobe.alarm = end
            self._machine.alarm(end, lambda: self._on_alarm(wprobe))

    def _on_alarm(self, wprobe: Wprobe) -> None:
        now = self._machine.cpu.now
        if wprobe.alarm is not None and wprobe.alarm <= now:
            wprobe.alarm = None
        for slot in [slot for slot in wprobe.slots if slot.until is not None and slot.until <= now]:
            self._drop(wprobe, slot)
            wprobe.expired += 1
            if not wprobe.slots:
                self._soft_disable(wprobe)
        self._set_alarm(wprobe)

    def _soft_disable(self, wprobe: Wprobe) -> None:
        """Do what a clear trigger's kernel part does, so that `enable` says that nothing is watched."""
        for file in {each.target_file for each in self.attached if each.target is wprobe and each.target_file}:
            at = file + self._facts.file_flags
            try:
                if self._word(file + self._facts.event_call) == wprobe.call:  # its instance may be gone
                    self._put(at, self._word(at, 4) | self._facts.soft_disabled)
            except BadAddress:
                continue

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
        """Return the errno enabling gives; 0 when it can be done."""
        if wprobe.users:
            return 0
        definition, address = wprobe.definition, wprobe.address
        if definition.unresolved:
            return errno.ENOENT
        if address is not None and self.off_limits(address, definition.length):
            return errno.EINVAL
        if not self.strict:
            return 0
        if definition.access == "r":
            return errno.EINVAL  # DR7 knows writes, and reads together with writes
        if address is not None and self.off_limits.strictly(address, definition.length):
            return errno.EINVAL
        taken = sum(1 for other in self.wprobes if other.users)
        return errno.ENOSPC if taken >= STRICT_REGISTERS else 0

    def _return(self, value: int) -> bool:
        self._machine.cpu.write("rax", value & _WORD)
        self._machine.return_from_call()
        return True

    def _on_trigger(self) -> bool:
        """event_enable_trigger(data, buffer, rec, event): the event of a set or clear trigger has passed its filter.

        When the wprobe is moved, the kernel's own part follows: it sets or clears the target's soft-disabled bit.
        """
        cpu, facts = self._machine.cpu, self._facts
        data, counts = cpu.read("rdi"), cpu.read("rip") == facts.enable_count_trigger
        if self._done == data and not counts:
            self._done = None  # the counting variant, dealt with, has become the plain one
            return False
        try:
            found = self._attached_for(data, cpu.read("rdx"))
            if found is None:
                return False
            attached, value = found
            count = self._word(data + facts.count, 4)
            moved = self._switch(attached.trigger, attached.target, value) if count else _Moved.NOT
            attached.target.missed += moved is _Moved.NOT and count != 0
            if moved is not _Moved.NOT and count != _UNLIMITED:
                self._put(data + facts.count, count - 1)
        except BadAddress:
            return False
        if moved is not _Moved.ALL:
            return self._return(0)
        if counts:
            self._done = data
            cpu.write("rip", facts.enable_trigger)
        return counts

    def _on_count(self) -> bool:
        """event_trigger_count(data, buffer, rec, event): may a counted trigger act? Ours count when they do."""
        cpu = self._machine.cpu
        try:
            data = cpu.read("rdi")
            if self._attached_for(data, cpu.read("rdx")) is None:
                return False
            return self._return(int(self._word(data + self._facts.count, 4) != 0))
        except BadAddress:
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
        file = self._word(private + facts.file)
        call = self._word(file + facts.event_call)
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
                attached.target_file = file
                return attached, None if attached.field is None else self._word(record + attached.field)
        return None

    def _switch(self, trigger: Trigger, target: Wprobe, value: int | None) -> _Moved:
        """Watch another object, or no more: NOT when the wprobe is in no state for that, or it cannot be watched."""
        address = None if value is None else value + trigger.adjust & _WORD
        if trigger.kind == "set":
            return _Moved.NOT if address is None else self._set(trigger, target, address)
        if address is None:
            cleared = list(target.slots)
        else:
            slot = target.slot_of(address)
            cleared = [] if slot is None else [slot]
        if not cleared:
            return _Moved.NOT
        for slot in cleared:
            self._drop(target, slot)
        return _Moved.SOME if target.slots else _Moved.ALL

    def _set(self, trigger: Trigger, target: Wprobe, address: int) -> _Moved:
        definition = target.definition
        if (target.slots and not definition.slots) or not self._may_watch(address, definition.length):
            return _Moved.NOT
        slot = target.slot_of(address)
        if slot is None and len(target.slots) == target.capacity:
            self._drop(target, target.slots[0])
            target.evicted += 1
        if slot is not None:
            target.slots.remove(slot)  # to become the one set last
        slot = slot or Slot(address)
        slot.until = self._machine.cpu.now + trigger.timeout if trigger.timeout else None
        target.slots.append(slot)
        try:
            self._arm(target)
        except EmulatorError:  # more than 65,536 watchpoints
            target.slots.remove(slot)
            return _Moved.NOT
        self._set_alarm(target)
        return _Moved.ALL

    def _may_watch(self, address: int, length: int) -> bool:
        if address <= TASK_SIZE or address + length > 1 << 64 or (self.strict and address % length):
            return False
        return not self.off_limits(address, length)

    def _put(self, at: int, value: int) -> None:
        """Write a 32-bit word of the guest's."""
        where = self._machine.memory.translate(at, self._machine.cpu.read("cr3"))
        self._machine.memory.write_u32(where, value)

    def _word(self, at: int, size: int = 8) -> int:
        return int.from_bytes(self._machine.memory.read_virtual(at, size, self._machine.cpu.read("cr3")), "little")
