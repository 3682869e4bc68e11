"""A model of one wprobe: where its breakpoint is, in which instances it is enabled, and what its triggers do to it.

fakefs has no such state: the guest's kernel keeps it. The model says what is to be expected of it in the unit tests,
and is itself held against transcripts of a kernel with wprobes.

No hardware here: `arm` is told the address to watch, or None. An event has one `EventFile` for each tracing instance,
whose flags are the kernel's (include/linux/trace_events.h, EVENT_FILE_FL_*) and change as in
__ftrace_event_enable_disable, surprises included: `enable` shows them. All instances share one breakpoint.

*Parked* means at the dummy address, which nothing accesses: the state between a clear and the next set.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from fakefs.wprobe.definition import TASK_SIZE, Definition
from fakefs.wprobe.errors import ProbeError
from fakefs.wprobe.trigger import Kind

DEBUG_REGISTERS = 4  # of an x86 CPU


class Registers:
    """What all wprobes draw breakpoints from.

    `strict` is as hardware has it: four of them, and none for reads alone. Otherwise there is no limit. `blocked` are
    the ranges of addresses the kernel lets nobody watch, (first, last + 1): strict again.
    """

    def __init__(self, *, strict: bool = False, blocked: Iterable[tuple[int, int]] = ()) -> None:
        self._strict = strict
        self._blocked = tuple(blocked)
        self.used = 0

    def take(self, definition: Definition, address: int) -> None:
        """Allocate one. Raises `ProbeError`: EINVAL for what cannot be watched, ENOSPC without one left."""
        if self._strict:
            end = address + definition.length
            if definition.access == "r" or any(first < end and address < last for first, last in self._blocked):
                raise ProbeError(errno.EINVAL)
            if self.used >= DEBUG_REGISTERS:
                raise ProbeError(errno.ENOSPC)
        self.used += 1

    def give_back(self) -> None:
        self.used -= 1


@dataclass(slots=True)
class EventFile:
    """The event in one tracing instance."""

    enabled: bool = False
    soft_mode: bool = False
    soft_disabled: bool = False
    soft_users: int = 0  # triggers that need the event to run, enabled or not

    @property
    def text(self) -> str:
        """What its `enable` file reads, without the newline."""
        on = self.enabled and not self.soft_disabled
        return ("1" if on else "0") + ("*" if self.soft_disabled or self.soft_mode else "")


@dataclass(eq=False, slots=True)
class Attachment:
    """A set or clear trigger in force. `source` is the trigger's event, `count` how often it can still act."""

    kind: Kind
    source: Hashable
    count: int | None
    instance: str


class State:
    """One wprobe, from its definition to its removal."""

    def __init__(self, definition: Definition, arm: Callable[[int | None], None], registers: Registers) -> None:
        self.definition = definition
        self.address = definition.address
        self.missed = 0
        self._arm = arm
        self._registers = registers
        self._files: dict[str, EventFile] = {}
        self._attached: list[Attachment] = []
        self._armed: int | None = None

    @property
    def parked(self) -> bool:
        """Whether the breakpoint is at the dummy address."""
        return self.address == self.definition.dummy_address

    @property
    def registered(self) -> bool:
        """Whether a breakpoint is allocated: enabled, or soft-enabled, in some instance."""
        return any(file.enabled for file in self._files.values())

    @property
    def in_use(self) -> bool:
        """Whether a set trigger would find it busy. The kernel's test: is a breakpoint allocated?"""
        return self.registered

    def shown_enable(self, instance: str = "") -> str:
        """The `enable` file of an instance: `0`, `1`, `0*` or `1*`."""
        return self._file(instance).text

    def records(self, instance: str = "") -> bool:
        """Whether a hit is to be recorded in an instance. Soft-disabled it is not, but triggers on the event run."""
        file = self._file(instance)
        return file.enabled and not file.soft_disabled

    def show(self) -> str:
        """Its line in dynamic_events, as of now."""
        return self.definition.show(self.address)

    def enable(self, on: bool, instance: str = "") -> None:
        """What `echo 1` or `echo 0` into `enable` does. Raises `ProbeError` (EINVAL, ENOSPC); it is 0 then."""
        file = self._file(instance)
        if on:
            file.soft_disabled = False
            self._register(file)
        else:
            if not file.soft_mode:
                self._unregister(file)
            file.soft_disabled = file.soft_mode

    def soft_enable(self, instance: str = "") -> None:
        """Run the event for a trigger's sake. Raises `ProbeError`; like the kernel it leaves `0*` behind then."""
        file = self._file(instance)
        file.soft_users += 1
        if file.soft_users > 1:
            return
        file.soft_mode = True
        if not file.enabled:
            file.soft_disabled = True
            self._register(file)

    def soft_disable(self, instance: str = "") -> None:
        """The end of a `soft_enable`."""
        file = self._file(instance)
        if not file.soft_users:
            return
        file.soft_users -= 1
        if file.soft_users:
            return
        file.soft_mode = False
        if file.soft_disabled:
            self._unregister(file)
        file.soft_disabled = False

    def attach_set(self, source: Hashable, count: int | None = None, instance: str = "") -> Attachment:
        """Put a set trigger in force and park. Raises `ProbeError`: EBUSY if in use, ENOSPC or EINVAL otherwise."""
        if self.in_use:
            raise ProbeError(errno.EBUSY)
        before = self.address
        self.address = self.definition.dummy_address
        try:
            return self._attach("set", source, count, instance)
        except ProbeError:
            self.address = before
            raise

    def attach_clear(self, source: Hashable, count: int | None = None, instance: str = "") -> Attachment:
        """Put a clear trigger in force. Raises `ProbeError`: EEXIST if that event has one already, else as above."""
        if self.attached("clear", source, instance):
            raise ProbeError(errno.EEXIST)
        return self._attach("clear", source, count, instance)

    def attached(self, kind: Kind, source: Hashable, instance: str = "") -> Attachment | None:
        """The trigger in force that a removal by `source` means, if there is one."""
        for each in self._attached:
            if (each.kind, each.source, each.instance) == (kind, source, instance):
                return each
        return None

    def detach(self, attachment: Attachment) -> None:
        """Take a trigger out of force. The address stays as it is, but a set trigger's event falls silent."""
        self._attached.remove(attachment)
        if attachment.kind == "set":
            self._file(attachment.instance).soft_disabled = True
        self.soft_disable(attachment.instance)

    def hit_set(self, attachment: Attachment, value: int) -> bool:
        """A set trigger's event happened, `value` being its field plus adjust. Whether the wprobe is armed by that."""
        address = value % (1 << 64)
        aligned = not address % self.definition.length
        wanted = self.parked and address != self.definition.dummy_address and address >= TASK_SIZE and aligned
        return self._switch(attachment, address, wanted)

    def hit_clear(self, attachment: Attachment, value: int | None = None) -> bool:
        """A clear trigger's event happened, with a field's value or without. Whether the wprobe is parked by that."""
        wanted = not self.parked and (value is None or value % (1 << 64) == self.address)
        return self._switch(attachment, self.definition.dummy_address, wanted)

    @property
    def busy(self) -> bool:
        """Whether removing it is refused with EBUSY."""
        return self.registered or bool(self._attached)

    def remove(self) -> None:
        """It is about to go. Raises `ProbeError` (EBUSY) and changes nothing if it is in use."""
        if self.busy:
            raise ProbeError(errno.EBUSY)
        self._program()

    def drop_instance(self, instance: str) -> None:
        """A tracing instance goes, and its triggers and its file with it."""
        for each in [each for each in self._attached if each.instance == instance]:
            self.detach(each)
        file = self._files.get(instance)
        if file is not None:
            self._unregister(file)
            del self._files[instance]

    def _file(self, instance: str) -> EventFile:
        return self._files.setdefault(instance, EventFile())

    def _attach(self, kind: Kind, source: Hashable, count: int | None, instance: str) -> Attachment:
        self.soft_enable(instance)
        attachment = Attachment(kind, source, count, instance)
        self._attached.append(attachment)
        return attachment

    def _switch(self, attachment: Attachment, address: int, wanted: bool) -> bool:
        if attachment.count == 0 or attachment not in self._attached:
            return False
        if not wanted:
            self.missed += 1
            return False
        if attachment.count is not None:
            attachment.count -= 1
        self.address = address
        self._file(attachment.instance).soft_disabled = attachment.kind == "clear"
        self._program()
        return True

    def _register(self, file: EventFile) -> None:
        if file.enabled:
            return
        if not self.registered:
            self._registers.take(self.definition, self.address)
        file.enabled = True
        self._program()

    def _unregister(self, file: EventFile) -> None:
        if not file.enabled:
            return
        file.enabled = False
        if not self.registered:
            self._registers.give_back()
        self._program()

    def _program(self) -> None:
        wanted = self.address if self.registered and not self.parked else None
        if wanted != self._armed:
            self._armed = wanted
            self._arm(wanted)
