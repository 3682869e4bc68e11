"""The PC: a CPU, memory and devices on a virtual clock, run until something needs the host.

The machine knows no host time and never sleeps. `run()` comes back when the guest is idle (HLT), asks something of the
host (hypercall), has used its slice, or when a watched descriptor is ready; what to do then is the caller's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from emulator.acpi import LAPIC_ADDRESS
from emulator.cpu.interface import CPU, NS_PER_BLOCK, GuestDied, PortIO, Stop
from emulator.devices.bus import PortBus
from emulator.devices.lapic import Lapic
from emulator.devices.pic8259 import PicPair
from emulator.devices.pit8254 import Pit8254
from emulator.devices.port61 import Port61
from emulator.devices.rtc import Rtc
from emulator.devices.uart8250 import Uart8250
from emulator.errors import EmulatorError
from emulator.memory import Memory

# Interrupts off for this much virtual time (ns) are a loop, with nobody to end it.
INTERRUPTS_OFF_LIMIT = 4_000_000_000
# Virtual ns a panicking kernel gets for its last words; its way to a reset after them takes seconds.
_PANIC_WORDS = 50_000_000
_CONSOLE_LINES = 4000
_CONSOLE_LINE_MAX = 4096
_MMIO_PAGE = 4096
_MMIO_END = 1 << 32
_KEYBOARD_RESET = 0xFE


class _ResetPort:
    """Port 0x64 without a keyboard controller: reads all ones; the reset pulse ends the machine."""

    PORTS = (0x64,)

    def port_read(self, port: int, size: int) -> int:
        return 0xFF

    def port_write(self, port: int, size: int, value: int) -> None:
        if value == _KEYBOARD_RESET:
            raise GuestDied("the guest asked for a reset")


class Console:
    """What the guest printed on its serial port, the last few thousand lines of it."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=_CONSOLE_LINES)
        self.panic: str | None = None
        self.on_line: Callable[[str], None] | None = None
        self._partial = bytearray()

    def put(self, byte: int) -> None:
        """Take one byte from the UART."""
        if byte == 0x0A or len(self._partial) >= _CONSOLE_LINE_MAX:
            line = self._partial.decode("utf-8", "replace").rstrip("\r")
            self._partial.clear()
            self.lines.append(line)
            if "Kernel panic - not syncing" in line and self.panic is None:
                self.panic = line
            if self.on_line:
                self.on_line(line)
        if byte != 0x0A:
            self._partial.append(byte)

    def text(self, lines: int | None = None) -> str:
        """Return the last `lines` lines (all by default), with a newline behind each."""
        chosen = list(self.lines)[-lines:] if lines else list(self.lines)
        return "".join(line + "\n" for line in chosen)


@dataclass(frozen=True, eq=False)
class Trap:
    """What `Machine.trap()` was asked for, to be given to `Machine.untrap()`."""

    address: int  # guest virtual
    handler: Callable[[], bool]
    when: Callable[[], bool] | None
    after: Callable[[], None] | None


class Machine:
    """A PC with `ram_size` bytes of RAM in `memory`, whose rest (if any) is a window the guest's kernel is not told of.

    `cpu_factory` makes the CPU from what answers its port accesses. `epoch_ns` is the RTC's time at virtual time 0.
    """

    def __init__(
        self, memory: Memory, ram_size: int, cpu_factory: Callable[[PortIO], CPU], *, epoch_ns: int = 0
    ) -> None:
        self.memory = memory
        self.ram_size = ram_size
        self.console = Console()
        self.cpu = cpu_factory(self)
        now = self._now
        self.pic = PicPair()
        self.pit = Pit8254(now, self.pic.line(0))
        self.uart = Uart8250(self.console.put, self.pic.line(4))
        self.rtc = Rtc(now, epoch_ns)
        self.port61 = Port61(now, self.pit)
        self.lapic = Lapic(now)
        self.bus = PortBus((self.pic, self.pit, self.uart, self.rtc, self.port61, _ResetPort()))
        self.on_watch: Callable[[], None] | None = None  # called behind an instruction that hit host watchpoints
        self._traps: dict[int, list[Trap]] = {}
        self._alarms: list[tuple[int, int, Callable[[], None]]] = []  # a heap: when, in what order set, what to call
        self._alarms_set = 0
        self._deadline = 0
        self._blocked_since: int | None = None
        self._end_after_panic: int | None = None
        self.cpu.map_ram(0, memory.size, memory.host_address)
        self.cpu.map_io(LAPIC_ADDRESS, _MMIO_PAGE, self._lapic_read, self._lapic_write)
        for start, end in ((memory.size, LAPIC_ADDRESS), (LAPIC_ADDRESS + _MMIO_PAGE, _MMIO_END)):
            self.cpu.map_io(start, end - start, _open_bus_read, _open_bus_write)

    @property
    def cpus(self) -> tuple[CPU, ...]:
        """All CPUs, by number. One for now."""
        return (self.cpu,)

    def _now(self) -> int:
        return self.cpu.now

    # ---- devices

    def port_read(self, port: int, size: int) -> int:
        """Answer an IN of `size` bytes."""
        return self.bus.read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """Take an OUT of `size` bytes."""
        self.bus.write(port, size, value)
        if self.console.panic and self._end_after_panic is None:
            self._end_after_panic = self.cpu.now + _PANIC_WORDS
            self.cpu.shorten(self._end_after_panic)
        self._events_changed()

    def _lapic_read(self, offset: int, size: int) -> int:
        return self.lapic.read(offset)

    def _lapic_write(self, offset: int, size: int, value: int) -> None:
        self.lapic.write(offset, value)
        self._events_changed()

    def _events_changed(self) -> None:
        """A device was programmed during a run: the run must end in time for what it asked for."""
        event = self.next_event()
        if self.interrupt_pending():
            self.cpu.shorten(self.cpu.now)
        elif event is not None and event < self._deadline:
            self.cpu.shorten(event)

    def next_event(self) -> int | None:
        """Return the virtual time of the next timer event or alarm, ns; None when there is none."""
        events = [event for event in (self.pit.next_event(), self.lapic.next_event()) if event is not None]
        if self._alarms:
            events.append(self._alarms[0][0])
        return min(events, default=None)

    def alarm(self, at_ns: int, call: Callable[[], None]) -> None:
        """Call `call` once at a virtual time, between two instructions of the guest. Not from a device callback."""
        heappush(self._alarms, (at_ns, self._alarms_set, call))
        self._alarms_set += 1

    def interrupt_pending(self) -> bool:
        """Is there an interrupt the CPU would get if it took them?"""
        return self.lapic.pending() is not None or (self.lapic.accepts_extint and self.pic.pending())

    def advance(self) -> None:
        """Let the devices do, and alarms call, what is due at the CPU's present time."""
        now = self.cpu.now
        self.pit.advance(now)
        self.lapic.advance(now)
        while self._alarms and self._alarms[0][0] <= now:
            heappop(self._alarms)[2]()

    def _acknowledge(self) -> int:
        if self.lapic.pending() is not None:
            return self.lapic.acknowledge()
        return self.pic.acknowledge()

    def post_interrupt(self, vector: int) -> None:
        """Raise an interrupt of the local APIC's from outside, as an IPI to itself would."""
        self.lapic.post(vector)

    # ---- running

    def run(self, until_ns: int) -> Stop:
        """Run until virtual time `until_ns`, or HALTED with nothing pending, HYPERCALL, STOPPED or READY.

        Raises GuestDied, with the last console lines, when the guest cannot go on.
        """
        try:
            return self._run(until_ns)
        except GuestDied as death:
            raise self.obituary(death) from None

    def _run(self, until_ns: int) -> Stop:
        cpu = self.cpu
        passing = False  # the instruction of a trap is next, before any interrupt
        while True:
            self.advance()
            vector, window, until = None, False, until_ns
            if passing:
                if self.interrupt_pending():
                    until = cpu.now
            elif self.interrupt_pending():
                if cpu.interruptible:
                    vector = self._acknowledge()
                    window = self.interrupt_pending()
                    self._blocked_since = None
                else:
                    window = True
                    self._check_interrupts_off()
            event = self.next_event()
            deadline = min(each for each in (event, until, self._end_after_panic) if each is not None)
            self._deadline = max(deadline, cpu.now + NS_PER_BLOCK)
            stop: Stop | None = cpu.run(self._deadline, vector=vector, window=window)
            if self._end_after_panic is not None and cpu.now >= self._end_after_panic:
                raise GuestDied("the guest's kernel panicked")
            passing = stop is Stop.TRAP
            if stop is Stop.TRAP:
                stop, passing = self._trapped()
            if stop is Stop.HALTED:
                self.advance()
                if not cpu.interruptible:
                    raise GuestDied("the guest halted with interrupts off")
                self._blocked_since = None
                if not self.interrupt_pending():
                    return stop
            elif stop is Stop.DEADLINE:
                self._check_interrupts_off()
                if cpu.now >= until_ns:
                    return stop
            elif stop is Stop.READY:
                self._check_interrupts_off()
                return stop
            elif stop is Stop.WATCH and self.on_watch is not None:
                self.on_watch()
            elif stop is not None and stop is not Stop.WINDOW:
                self._blocked_since = None
                return stop

    def trap(
        self,
        address: int,
        handler: Callable[[], bool],
        when: Callable[[], bool] | None = None,
        after: Callable[[], None] | None = None,
    ) -> Trap:
        """Call `handler` each time the guest gets to a virtual address, before the instruction there.

        When it returns False the guest goes on as if nothing was; True means that it has moved RIP. `when`, if given,
        is asked first and must be quick. `after` is called behind the instruction, unless that raised an exception.
        Of several traps at an address the last one made is called first. Only while the CPU is stopped.
        """
        trap = Trap(address, handler, when, after)
        traps = self._traps.setdefault(address, [])
        traps.append(trap)
        if len(traps) == 1:
            self.cpu.add_trap(address, lambda: any(trap.when is None or trap.when() for trap in traps))
            self.cpu.forget_code(address, address + 1)
        return trap

    def untrap(self, trap: Trap) -> None:
        """Take back a trap, while the CPU is stopped (a handler may). Raises ValueError when that was done before."""
        traps = self._traps.get(trap.address, [])
        traps.remove(trap)
        if not traps:
            del self._traps[trap.address]
            self.cpu.remove_trap(trap.address)

    def _trapped(self) -> tuple[Stop | None, bool]:
        """Call the handlers of the traps at RIP; return how the run ended if it went on, and if it still has to."""
        cpu = self.cpu
        after = []
        for trap in reversed(tuple(self._traps[cpu.read("rip")])):
            if trap.when is None or trap.when():
                if trap.handler():
                    return None, False
                if trap.after is not None:
                    after.append(trap.after)
        if not after:
            cpu.pass_trap()
            return None, True
        stop = cpu.step()
        if stop is not None:
            for call in after:
                call()
        return stop, False

    def return_from_call(self) -> None:
        """Make the guest's CPU, at the entry of a function, return from it."""
        cpu = self.cpu
        rsp = cpu.read("rsp")
        cpu.write("rip", int.from_bytes(self.memory.read_virtual(rsp, 8, cpu.read("cr3")), "little"))
        cpu.write("rsp", rsp + 8)

    def _check_interrupts_off(self) -> None:
        """Raise GuestDied when interrupts were off whenever somebody looked, and for long.

        Not only while one is pending: who turns them off for ever may have stopped the timer as well.
        """
        now = self.cpu.now
        if self.cpu.interruptible:
            self._blocked_since = None
        elif self._blocked_since is None:
            self._blocked_since = now
        elif now - self._blocked_since > INTERRUPTS_OFF_LIMIT:
            where = self.cpu.read("rip")
            raise GuestDied(f"the guest loops with interrupts off at {where:#x}")

    def obituary(self, death: GuestDied) -> GuestDied:
        """Return the error with the panic message, if there was one, and the last console lines."""
        what = self.console.panic.strip() if self.console.panic else str(death)
        tail = "".join(f"\n  | {line}" for line in list(self.console.lines)[-12:])
        return GuestDied(what + tail)

    # ---- state

    def state(self) -> dict[str, Any]:
        """Return the registers of all devices and the clock as JSON values."""
        return {
            "now": self.cpu.now,
            **{name: getattr(self, name).state() for name in _DEVICES},
        }

    def load(self, state: Mapping[str, object], cpu_state: bytes) -> None:
        """Restore what `state()` and `CPU.save()` gave. Raises EmulatorError when it is not of this version."""
        now = state.get("now")
        if set(state) != {"now", *_DEVICES} or type(now) is not int or now < 0:
            raise EmulatorError("snapshot: the machine's state is not of this version")
        self.cpu.load(cpu_state)
        self.cpu.now = now
        for name in _DEVICES:
            device = state[name]
            if not isinstance(device, Mapping):
                raise EmulatorError(f"snapshot: the state of {name} is not of this version")
            getattr(self, name).load(device)

    def close(self) -> None:
        """Free CPU and memory."""
        self.cpu.close()
        self.memory.close()


_DEVICES = ("pic", "pit", "uart", "rtc", "port61", "lapic")


def _open_bus_read(offset: int, size: int) -> int:
    """Physical addresses nobody answers read all ones."""
    return (1 << 8 * size) - 1


def _open_bus_write(offset: int, size: int, value: int) -> None:
    """And ignore what is written."""
