"""What a wprobe and its triggers are while they exist: the objects watched, who has it enabled, what was missed."""

from __future__ import annotations

from dataclasses import dataclass, field

from fakefs.wprobe.definition import Definition
from fakefs.wprobe.trigger import Trigger


@dataclass(eq=False)
class Slot:
    """One address a wprobe watches while it is enabled. `until` is when that ends by itself, in virtual ns."""

    address: int
    watchpoint: int | None = None
    until: int | None = None


@dataclass(eq=False)
class Wprobe:
    """A wprobe. `slots` are in the order they were set, none while it is parked; `users` have it enabled."""

    definition: Definition
    kprobe: int
    call: int  # its trace_event_call in the guest
    slots: list[Slot] = field(default_factory=list)
    users: int = 0
    missed: int = 0
    evicted: int = 0  # slots taken for another object
    expired: int = 0
    triggers: int = 0  # set and clear triggers that refer to it
    setters: int = 0  # set triggers among them
    alarm: int | None = None  # when the next one comes that was set for the end of a slot, virtual ns

    @property
    def in_use(self) -> bool:
        """Is it enabled in a way that forbids another set trigger, soft-enabled by one included?

        One with slots may have any number of them.
        """
        return self.users > 0 and not (self.definition.slots and self.triggers)

    @property
    def capacity(self) -> int:
        """How many objects it can watch."""
        return self.definition.slots or 1

    @property
    def address(self) -> int | None:
        """What it watches, of several the one set last; None while it is parked."""
        return self.slots[-1].address if self.slots else None

    def slot_of(self, address: int) -> Slot | None:
        """Return the slot that watches an address."""
        return next((slot for slot in self.slots if slot.address == address), None)

    def show(self) -> str:
        """Return its line in dynamic_events."""
        address = self.address
        return self.definition.show(self.definition.dummy_address if address is None else address)

    def show_slots(self) -> str:
        """Return what its triggers' lines say of slots; nothing for one that has the series' single one."""
        if not self.definition.slots:
            return ""
        counts = [("evicted", self.evicted), ("expired", self.expired)]
        return f"slots: {len(self.slots)}/{self.capacity}" + "".join(f" {what}: {n}" for what, n in counts if n)


@dataclass(eq=False)
class Attached:
    """A trigger on an event file. `event_id` is that event's, `field` the offset of the value in its records."""

    path: bytes  # of the trigger file
    trigger: Trigger
    target: Wprobe
    event_id: int
    field: int | None
    second: bool = False  # the event has another trigger for this wprobe, which is its first
    target_file: int = 0  # the target's trace_event_file in the guest, once it has acted

    @property
    def command(self) -> str:
        """The guest's trigger that stands for it. An event takes one enable_event or disable_event for a target.

        enable_hist and disable_hist soft-enable their target too, so a second trigger is one of these.
        """
        what = "hist" if self.second else "event"
        verb = "enable" if self.trigger.kind == "set" else "disable"
        return f"{verb}_{what}:{self.target.definition.group}:{self.target.definition.event}"
