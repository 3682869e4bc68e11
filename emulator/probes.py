"""Probes of the guest's kernel from Python, in the words of the kernel's own: kprobes, kretprobes and wprobes.

    probes = Probes(guest)
    probe = probes.register_kprobe("vfs_read", pre_handler=lambda context: print(context.task(), context.stack()))
    …
    probe.unregister()

No byte of the guest changes and no time passes in it: it cannot tell that it is looked at, and may be tracing the same
functions itself. What its kernel refuses is refused here too, with the same errno (`emulator.probe_address`).

Handlers are called while the guest stands still; they may look (`emulator.probe_context`), register and unregister
probes, but not run the guest. One that raises is reported, and its probe is disabled; the guest goes on.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from emulator.cpu.watchpoints import Access, Hit, Kind, Watchpoints
from emulator.errors import EmulatorError
from emulator.machine import Trap
from emulator.memory import BadAddress
from emulator.probe_address import Addresses, NoInstruction, NoSymbol, NotAllowed, ProbeError
from emulator.probe_context import Context, Task, View

if TYPE_CHECKING:
    from emulator.guest import Guest

__all__ = [
    "Context",
    "Kprobe",
    "Kretprobe",
    "NoInstruction",
    "NoSymbol",
    "NotAllowed",
    "Probe",
    "ProbeError",
    "Probes",
    "Task",
    "Wprobe",
]

Handler = Callable[[Context], object]
Report = Callable[["Probe", Exception], None]
# Instances of a kretprobe unless told otherwise: max(10, 2 * CPUs), Documentation/trace/kprobes.rst.
_MAXACTIVE = 10
_MAXACTIVE_LIMIT = 4096
_KINDS = {"r": Access.READ, "w": Access.WRITE, "rw": Access.READ | Access.WRITE}
_WPROBE_MAX = 1 << 20


class Probe:
    """What all kinds have in common. `hits` counts what handlers were called for."""

    def __init__(self, probes: Probes, name: str) -> None:
        self._probes = probes
        self.name = name
        self.hits = 0
        self.enabled = False
        self.registered = True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.hits} hits>"

    def enable(self) -> None:
        """Call the handlers from now on. Raises ProbeError when it was unregistered."""
        if not self.registered:
            raise NotAllowed(f"{self.name}: unregistered")
        if not self.enabled:
            self._arm()
            self.enabled = True

    def disable(self) -> None:
        """Call the handlers no more, until `enable()`."""
        if self.enabled:
            self.enabled = False
            self._disarm()

    def unregister(self) -> None:
        """Take the probe away for good."""
        self.disable()
        self.registered = False
        self._probes._forget(self)

    def _arm(self) -> None:
        raise NotImplementedError

    def _disarm(self) -> None:
        raise NotImplementedError

    def _call(self, handler: Handler | None, context: Context) -> object:
        """Call a handler; what it raises is reported and disables the probe."""
        if handler is None or not self.enabled:
            return None
        try:
            return handler(context)
        except Exception as error:
            self.disable()
            self._probes.report(self, error)
            return None


class Kprobe(Probe):
    """A probe on an instruction."""

    def __init__(
        self, probes: Probes, name: str, address: int, pre_handler: Handler | None, post_handler: Handler | None
    ) -> None:
        super().__init__(probes, name)
        self.address = address
        self._pre, self._post = pre_handler, post_handler
        self._trap: Trap | None = None

    def _arm(self) -> None:
        after = None if self._post is None else self._on_post
        self._trap = self._probes.machine.trap(self.address, self._on_pre, after=after)

    def _disarm(self) -> None:
        assert self._trap is not None
        self._probes.machine.untrap(self._trap)
        self._trap = None

    def _on_pre(self) -> bool:
        self.hits += 1
        self._call(self._pre, Context(self._probes.view))
        return False

    def _on_post(self) -> None:
        self._call(self._post, Context(self._probes.view))


class _Instance:
    """A call of a probed function that has not returned yet."""

    __slots__ = ("address", "context", "rsp", "task", "trap")

    def __init__(self, context: Context, task: int, rsp: int, address: int) -> None:
        self.context = context
        self.task = task
        self.rsp = rsp  # behind the return
        self.address = address
        self.trap: Trap | None = None


class Kretprobe(Probe):
    """A probe on a function's entry and its returns. `nmissed` counts calls there was no instance for."""

    def __init__(
        self,
        probes: Probes,
        name: str,
        address: int,
        entry_handler: Handler | None,
        handler: Handler | None,
        maxactive: int,
    ) -> None:
        super().__init__(probes, name)
        self.address = address
        self.maxactive = maxactive
        self.nmissed = 0
        self._entry, self._handler = entry_handler, handler
        self._trap: Trap | None = None
        self._instances: list[_Instance] = []

    def _arm(self) -> None:
        self._trap = self._probes.machine.trap(self.address, self._on_entry)
        self._probes._watch_exits(self)

    def _disarm(self) -> None:
        assert self._trap is not None
        self._probes.machine.untrap(self._trap)
        self._trap = None
        self._probes._watch_exits(self, stop=True)
        for instance in tuple(self._instances):
            self._release(instance)

    def _release(self, instance: _Instance) -> None:
        self._instances.remove(instance)
        if instance.trap is not None:
            self._probes.machine.untrap(instance.trap)

    def _on_entry(self) -> bool:
        view = self._probes.view
        context = Context(view)
        rsp = context.regs.rsp
        try:
            task, address = view.current(), view.read_u64(rsp)
        except BadAddress:
            self.nmissed += 1
            return False
        if len(self._instances) >= self.maxactive:
            self.nmissed += 1
            return False
        # As in the kernel: an entry handler that returns something true wants no call at the return.
        if self._call(self._entry, context) or not self.enabled:
            return False
        instance = _Instance(context, task, rsp + 8, address)
        self._instances.append(instance)
        instance.trap = self._probes.machine.trap(address, lambda: self._on_return(instance))
        return False

    def _on_return(self, instance: _Instance) -> bool:
        view = self._probes.view
        if view.cpu.read("rsp") != instance.rsp or instance not in self._instances:
            return False
        if view.current() != instance.task:
            return False
        self._release(instance)
        self.hits += 1
        self._call(self._handler, instance.context)
        return False

    def forget_task(self, task: int) -> None:
        """A task is gone: the functions it was in will not return."""
        for instance in [instance for instance in self._instances if instance.task == task]:
            self._release(instance)


class Wprobe(Probe):
    """A probe on accesses to memory; handlers see `context.hit`, and `regs.rip` behind the instruction."""

    def __init__(self, probes: Probes, name: str, address: int, length: int, access: Access, handler: Handler) -> None:
        super().__init__(probes, name)
        self.address = address
        self.length = length
        self.access = access
        self._handler = handler
        self._number = -1

    def move(self, address: int) -> None:
        """Watch another guest virtual address from now on."""
        if self.enabled:
            self._probes._watchpoints().move(self._number, address)
        self.address = address

    def _arm(self) -> None:
        watchpoints = self._probes._watchpoints()
        self._number = watchpoints.add(self.address, self.length, self.access, Kind.STOP, self._probes._token_of(self))

    def _disarm(self) -> None:
        self._probes._watchpoints().remove(self._number)

    def _on_hit(self, hit: Hit) -> None:
        if self.enabled:
            self.hits += 1
            self._call(self._handler, Context(self._probes.view, hit=hit))


class Probes:
    """The probes of a guest. `report(probe, error)` is told of handlers that raise; by default a line on stderr is."""

    def __init__(self, guest: Guest, report: Report | None = None) -> None:
        self.guest = guest
        self.machine = guest.machine
        self.view = View(guest)
        self.report: Report = report or _report
        self._addresses = Addresses(self.view)
        self._probes: dict[int, Probe] = {}  # by token
        self._next_token = 1
        self._kretprobes: set[Kretprobe] = set()
        self._exit_trap: Trap | None = None

    # ---- kinds

    def register_kprobe(
        self,
        symbol: str | int,
        offset: int = 0,
        pre_handler: Handler | None = None,
        post_handler: Handler | None = None,
    ) -> Kprobe:
        """Call `pre_handler` before the instruction at `symbol` (a name or a guest virtual address) + `offset` bytes.

        `post_handler` is called behind it, with RIP at the next one, unless the instruction raised an exception; the
        CPU then comes back to it, and the `pre_handler` is called again.
        Raises NoSymbol, NotAllowed or NoInstruction.
        """
        address = self._addresses.resolve(symbol) + offset
        self._addresses.check(address)
        probe = Kprobe(self, self._name(symbol, offset), address, pre_handler, post_handler)
        self._add(probe)
        return probe

    def register_kretprobe(
        self,
        symbol: str | int,
        entry_handler: Handler | None = None,
        handler: Handler | None = None,
        maxactive: int = 0,
    ) -> Kretprobe:
        """Call `entry_handler` at a function's entry and `handler` when it has returned, with the same Context.

        At most `maxactive` (0: 10) calls are followed at a time. Raises NoSymbol, NotAllowed or NoInstruction.
        """
        if not 0 <= maxactive <= _MAXACTIVE_LIMIT:
            raise NotAllowed(f"maxactive is 0 to {_MAXACTIVE_LIMIT}")
        address = self._addresses.resolve(symbol)
        self._addresses.check(address)
        if not self._addresses.is_entry(address):
            raise NotAllowed(f"{self._name(symbol, 0)}: not the entry of a function")
        probe = Kretprobe(self, self._name(symbol, 0), address, entry_handler, handler, maxactive or _MAXACTIVE)
        self._add(probe)
        return probe

    def register_wprobe(self, symbol: str | int, length: int, kind: str, handler: Handler) -> Wprobe:
        """Call `handler` behind each instruction that accesses any of `length` bytes at `symbol`.

        `kind` is "r", "w" or "rw". Any length up to 1 MiB will do, and any number of wprobes. Raises NoSymbol or
        NotAllowed, and EmulatorError when this CPU has no watchpoints.
        """
        if kind not in _KINDS:
            raise NotAllowed(f"{kind!r}: a wprobe is for r, w or rw")
        if not 0 < length <= _WPROBE_MAX:
            raise NotAllowed(f"a wprobe is 1 to {_WPROBE_MAX} bytes long")
        address = self._addresses.resolve(symbol)
        if not 0 <= address <= (1 << 64) - length:
            raise NotAllowed(f"{self._name(symbol, 0)}: not an address")
        probe = Wprobe(self, self._name(symbol, 0), address, length, _KINDS[kind], handler)
        self._add(probe)
        return probe

    def close(self) -> None:
        """Unregister all probes."""
        for probe in tuple(self._probes.values()):
            probe.unregister()

    # ---- for the probes

    def _name(self, symbol: str | int, offset: int) -> str:
        name = symbol if isinstance(symbol, str) else self.view.symbols.symbolize(symbol)
        return f"{name}+{offset:#x}" if offset else name

    def _add(self, probe: Probe) -> None:
        self._probes[self._next_token] = probe
        self._next_token += 1
        try:
            probe.enable()
        except BaseException:
            self._forget(probe)
            raise

    def _forget(self, probe: Probe) -> None:
        self._probes = {token: other for token, other in self._probes.items() if other is not probe}

    def _token_of(self, probe: Probe) -> int:
        return next(token for token, other in self._probes.items() if other is probe)

    def _watchpoints(self) -> Watchpoints:
        cpu = self.machine.cpu
        watchpoints = getattr(cpu, "watchpoints", None)
        if not isinstance(watchpoints, Watchpoints):
            raise EmulatorError(f"no wprobes: {getattr(cpu, 'no_watchpoints', 'this CPU has no watchpoints')}")
        if self.machine.on_watch != self._on_watch:
            if self.machine.on_watch is not None:
                raise _Busy("the machine's watchpoints are in use")
            self.machine.on_watch = self._on_watch
        return watchpoints

    def _on_watch(self) -> None:
        for hit in self._watchpoints().take_hits():
            probe = self._probes.get(hit.token)
            if isinstance(probe, Wprobe):
                probe._on_hit(hit)

    def _watch_exits(self, probe: Kretprobe, *, stop: bool = False) -> None:
        """While there are kretprobes, have the kernel's own function for dead tasks tell of them."""
        if stop:
            self._kretprobes.discard(probe)
        else:
            self._kretprobes.add(probe)
        if self._kretprobes and self._exit_trap is None:
            for name in ("rethook_flush_task", "kprobe_flush_task"):
                if name in self.view.symbols:
                    self._exit_trap = self.machine.trap(self.view.symbols[name], self._on_exit)
                    break
        elif not self._kretprobes and self._exit_trap is not None:
            self.machine.untrap(self._exit_trap)
            self._exit_trap = None

    def _on_exit(self) -> bool:
        task = self.view.cpu.read("rdi")
        for probe in self._kretprobes:
            probe.forget_task(task)
        return False


class _Busy(ProbeError):
    errno = errno.EBUSY


def _report(probe: Probe, error: Exception) -> None:
    print(f"{probe.name}: disabled: its handler raised {type(error).__name__}: {error}", file=sys.stderr)
