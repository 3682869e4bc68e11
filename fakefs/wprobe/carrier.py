"""Carriers: the guest's kernel records wprobe hits as events of a kprobe that itself never runs.

A wprobe gets a kprobe event of its group and name on a function nobody calls. When its watchpoint is hit, the emulator
raises #DB and has the guest's kernel call that kprobe's handler from there (native/redirect.c). The record is laid out
as a wprobe's would be, so filters, triggers, histograms, instances and raw pages are the kernel's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from emulator.cpu.watchpoints import Access, Kind, Watchpoints
from emulator.errors import EmulatorError
from emulator.guest import Guest
from emulator.kernel.facts import Facts
from emulator.memory import BadAddress

FUNCTION = "emergency_restart"
_WORD = (1 << 64) - 1
_EVENTS_MAX = 65536
_NAME_MAX = 64
_DEBUG_VECTOR = 1
_GATE_SIZE = 16
_IST_AT = 4  # in a gate (Intel SDM vol. 3, 7.14.1)
_ACCESS_NAMES = b"".join(name.ljust(8, b"\0") for name in (b"r", b"w", b"rw"))
_HANDLER_STACK = 8192  # EXCEPTION_STKSZ (arch/x86/include/asm/page_64_types.h)


@dataclass(frozen=True)
class CarrierFacts(Facts):
    """Guest virtual addresses, and byte offsets in the kernel's structures."""

    MISSING: ClassVar[str] = "this kernel cannot carry wprobes"

    notifier: int
    dispatcher: int
    die_args_regs: int
    pt_regs_orig_ax: int  # of the members of pt_regs that carry what is known of a hit: see fetcharg.py
    pt_regs_r11: int
    pt_regs_r8: int
    pt_regs_r9: int
    pt_regs_r14: int
    kprobe_addr: int
    events: int  # dyn_event_list
    event_list: int  # of the list node, in trace_kprobe
    kprobe: int  # in trace_kprobe
    probe_event: int  # of the pointer to the trace_probe_event, in trace_kprobe
    call: int  # in trace_probe_event
    call_name: int  # in trace_event_call
    call_class: int
    class_system: int
    stack_low: int  # of the #DB handler
    stack_high: int


def carrier_facts(guest: Guest) -> CarrierFacts | None:
    """Look the facts up in a just booted guest; None when its kernel lacks something."""
    from emulator.kernel.btf import BtfLookupError

    symbols, btf = guest.symbols, guest.btf
    try:
        low, high = _handler_stack(guest)
        return CarrierFacts(
            notifier=symbols["hw_breakpoint_exceptions_notify"],
            dispatcher=symbols["kprobe_dispatcher"],
            die_args_regs=btf.offsetof("die_args", "regs"),
            pt_regs_orig_ax=btf.offsetof("pt_regs", "orig_ax"),
            pt_regs_r11=btf.offsetof("pt_regs", "r11"),
            pt_regs_r8=btf.offsetof("pt_regs", "r8"),
            pt_regs_r9=btf.offsetof("pt_regs", "r9"),
            pt_regs_r14=btf.offsetof("pt_regs", "r14"),
            kprobe_addr=btf.offsetof("kprobe", "addr"),
            events=symbols["dyn_event_list"],
            event_list=btf.offsetof("trace_kprobe", "devent.list"),
            kprobe=btf.offsetof("trace_kprobe", "rp.kp"),
            probe_event=btf.offsetof("trace_kprobe", "tp.event"),
            call=btf.offsetof("trace_probe_event", "call"),
            call_name=btf.offsetof("trace_event_call", "name"),
            call_class=btf.offsetof("trace_event_call", "class"),
            class_system=btf.offsetof("trace_event_class", "system"),
            stack_low=low,
            stack_high=high,
        )
    except (KeyError, BtfLookupError, BadAddress):
        return None


def _handler_stack(guest: Guest) -> tuple[int, int]:
    """Return the bounds of the stack the guest's IDT and TSS give to #DB."""
    cpu, memory, symbols = guest.machine.cpu, guest.machine.memory, guest.symbols
    cr3 = cpu.read("cr3")
    gate = memory.read_virtual(symbols["idt_table"] + _DEBUG_VECTOR * _GATE_SIZE, _GATE_SIZE, cr3)
    stack = gate[_IST_AT] & 7
    per_cpu = max(cpu.read("gs_base"), cpu.read("kernel_gs_base"))  # user mode has the other, which is lower
    at = symbols["cpu_tss_rw"] + per_cpu + guest.btf.offsetof("x86_hw_tss", "ist") + 8 * (stack - 1) & _WORD
    high = int.from_bytes(memory.read_virtual(at, 8, cr3), "little")
    return high - _HANDLER_STACK, high


class Carriers:
    """Finds carriers in the guest and puts watchpoints behind them."""

    def __init__(self, guest: Guest, facts: CarrierFacts) -> None:
        """Raises EmulatorError when the CPU has no watchpoints."""
        self._machine = guest.machine
        self._facts = facts
        watchpoints = getattr(guest.machine.cpu, "watchpoints", None)
        if not isinstance(watchpoints, Watchpoints):
            raise EmulatorError(f"no watchpoints: {getattr(guest.machine.cpu, 'no_watchpoints', 'not with this CPU')}")
        self.watchpoints = watchpoints
        watchpoints.ignore_handler_stack(facts.stack_low, facts.stack_high)
        watchpoints.redirect(
            facts.notifier,
            facts.dispatcher,
            back=facts.notifier + self._first_instruction(facts.notifier),
            access_names=guest.agent.place(_ACCESS_NAMES),
            die_args_regs=facts.die_args_regs,
            kprobe_addr=facts.kprobe_addr,
            lent=(facts.pt_regs_orig_ax, facts.pt_regs_r11, facts.pt_regs_r8, facts.pt_regs_r9, facts.pt_regs_r14),
        )

    def _first_instruction(self, function: int) -> int:
        """Return the length of what functions begin with, ENDBR64 or room for a call; 0 when it is something else."""
        code = self._machine.memory.read_virtual(function, 5, self._machine.cpu.read("cr3"))
        if code[:4] in (b"\xf3\x0f\x1e\xfa", b"\x0f\x1f\x40\xd6"):  # the second where it was sealed
            return 4
        return 5 if code == b"\x0f\x1f\x44\x00\x00" else 0

    def find(self, group: str, event: str) -> int | None:
        """Return the guest address of the kprobe of event `group`/`event`; None when there is none."""
        facts, at = self._facts, self._facts.events
        try:
            for _ in range(_EVENTS_MAX):
                at = self._pointer(at)
                if at == facts.events:
                    return None
                probe = at - facts.event_list
                if self._names(probe) == (group.encode(), event.encode()):
                    return probe + facts.kprobe
        except BadAddress:
            return None
        return None

    def _names(self, probe: int) -> tuple[bytes, bytes] | None:
        """Return group and name, if this is a trace_kprobe; other dynamic events lead anywhere."""
        facts = self._facts
        try:
            call = self._pointer(probe + facts.probe_event) + facts.call
            system = self._pointer(self._pointer(call + facts.call_class) + facts.class_system)
            return self._string(system), self._string(self._pointer(call + facts.call_name))
        except BadAddress:
            return None

    def _pointer(self, at: int) -> int:
        return int.from_bytes(self._machine.memory.read_virtual(at, 8, self._machine.cpu.read("cr3")), "little")

    def _string(self, at: int) -> bytes:
        cr3 = self._machine.cpu.read("cr3")
        room = min(_NAME_MAX, 4096 - at % 4096)
        return self._machine.memory.read_virtual(at, room, cr3).split(b"\0", 1)[0]

    def call_of(self, kprobe: int) -> int:
        """Return the guest address of the trace_event_call of a carrier `find()` found."""
        return self._pointer(kprobe - self._facts.kprobe + self._facts.probe_event) + self._facts.call

    def arm(self, kprobe: int, address: int, length: int, access: Access) -> int:
        """Watch for a carrier; return the watchpoint's number. Raises EmulatorError."""
        return self.watchpoints.add(address, length, access, Kind.DEBUG, kprobe)
