"""The host's end of the guest's init: tasks of the guest that make the system calls the host asks them for.

Each task owns a slot of the shared window (guest/protocol.h has the layout). It gives its slot to the host by a
hypercall, at which the CPU stops; the host fills in calls and lets it go on, or sends it to sleep in a futex. To wake
a sleeper without any device showing in the guest's traces, the host links an `irq_work` whose function is the
kernel's own `hrtimer_wakeup()` and raises the irq_work interrupt.

Nothing here trusts what the guest writes: slot numbers and results are checked, buffers are read by their own bounds.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from emulator.cpu.interface import GuestDied, Stop
from emulator.errors import EmulatorError
from emulator.kernel.facts import WakeFacts
from emulator.machine import Machine
from emulator.memory import PAGE

WINDOW_VIRTUAL = 0x100_0000_0000
SLOT_SIZE = 0x10000
SLOT_CALLS = 64
SLOT_MAX_CALLS = 128
SLOT_STACK_TOP = 0x4000
SLOT_DATA = 0x4000
DATA_SIZE = SLOT_SIZE - SLOT_DATA
SINK_SIZE = 1 << 20
"""Bytes at the end of the window that any task may have the kernel write to, and nobody reads."""
OP_SLEEP = 0
OP_CALLS = 1
CALL_SPAWN = 0x10000
CALL_COPY = 0x10001
CALL_ENTER = 0x10002
CALL_AFTER = 0x20000
WINDOW_FD = 63
"""Init's descriptor of the memory that has the window."""
FIRST_FD = 64
"""The first descriptor that is not init's: what the host opens is here and behind."""
OTHER_ROOT = b"/host"
"""Directory of the guest that is the root directory of processes that stand for those of the host."""

_Item = TypeVar("_Item")

_CALL = struct.Struct("<7qq")
_CALL_SIZE = _CALL.size
# irq_work flags: pending, busy, and the type bits of an irq_work in a call_single_node (smp_types.h, irq_work.h).
_IRQ_WORK_QUEUED = 0x23
_IRQ_WORK_VECTOR = 0xF6  # irq_vectors.h, the same in every kernel since 3.x
_WORK_SIZE = 128
# A wake-up can fall between a task's look at its futex and its sleep: repeated after this much virtual time (ns).
_WAKE_AGAIN = 2_000_000

Call = Sequence[int]


class Request:
    """Calls a task was asked to make. `results` are their return values (negative errno), once `done`.

    When the task died of them, those that it did not come back from have 0; -ESRCH are all results of a request that
    it did not get to.
    """

    __slots__ = ("calls", "done", "on_done", "results")

    def __init__(self, calls: Sequence[Call], on_done: Callable[[], None] | None = None) -> None:
        self.calls = calls
        self.on_done = on_done
        self.results: list[int] = []
        self.done = False


class Task:
    """A task of the guest and its slot. `pid` is its number in the guest once known, 0 before."""

    __slots__ = ("asleep", "current", "dead", "pid", "queue", "slot", "task_struct", "woken_at")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.pid = 0
        self.queue: deque[Request] = deque()
        self.current: Request | None = None
        self.asleep = False
        self.dead = False
        self.task_struct = 0
        self.woken_at = 0

    def virtual(self, offset: int = 0) -> int:
        """Return the guest virtual address of a byte of this task's data area."""
        return self.start + SLOT_DATA + offset

    @property
    def start(self) -> int:
        """Guest virtual address of this task's slot."""
        return WINDOW_VIRTUAL + self.slot * SLOT_SIZE

    @property
    def stack(self) -> tuple[int, int]:
        """Guest virtual address and size in bytes of the stack in this task's slot."""
        bottom = SLOT_CALLS + SLOT_MAX_CALLS * _CALL_SIZE
        return self.start + bottom, SLOT_STACK_TOP - bottom


class Agent:
    """All tasks that work for the host on one machine. Slot 0 is init's own."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.window = machine.ram_size
        self.slots = (machine.memory.size - machine.ram_size - SINK_SIZE) // SLOT_SIZE
        self.tasks: dict[int, Task] = {0: Task(0)}
        self.held: Task | None = None
        self.facts: WakeFacts | None = None
        self._free = list(range(self.slots - 1, 0, -1))
        self._page = 0
        self._waiting: dict[int, Task] = {}  # asleep, with requests queued

    @property
    def init(self) -> Task:
        """The guest's init."""
        return self.tasks[0]

    @property
    def sink(self) -> int:
        """Guest physical address of the end of the window, which is no slot."""
        return self.window + self.slots * SLOT_SIZE

    @property
    def quiet_address(self) -> int:
        """A kernel virtual address, divisible by 8, that nothing in the guest ever reads or writes."""
        return 0 if self.facts is None else self.facts.direct_map + self._page + PAGE - 8

    def place(self, data: bytes) -> int:
        """Write up to 120 bytes where the guest can read them and never does; return their kernel virtual address."""
        assert self.facts is not None
        assert len(data) <= _WORK_SIZE - 8
        self.machine.memory.write(self._page + PAGE - _WORK_SIZE, data)
        return self.facts.direct_map + self._page + PAGE - _WORK_SIZE

    # ---- slots

    def new_task(self) -> Task:
        """Return a task with a free slot, still to be spawned in the guest. Raises EmulatorError when all are taken."""
        if not self._free:
            raise EmulatorError(f"all {self.slots} slots of the guest's window are taken")
        task = Task(self._free.pop())
        self.tasks[task.slot] = task
        return task

    def forget(self, task: Task) -> None:
        """Take back the slot of a task that is gone from the guest."""
        if self.tasks.get(task.slot) is task:
            del self.tasks[task.slot]
            self._waiting.pop(task.slot, None)
            if self.held is task:
                self.held = None
            self.machine.memory.write(self.physical(task), bytes(SLOT_CALLS))
            self._free.append(task.slot)

    def physical(self, task: Task) -> int:
        """Return the guest physical address of a task's slot."""
        return self.window + task.slot * SLOT_SIZE

    def put(self, task: Task, offset: int, data: bytes | memoryview) -> None:
        """Write into a task's data area. Raises ValueError when it does not fit."""
        if offset < 0 or offset + len(data) > DATA_SIZE:
            raise ValueError("outside the slot's data area")
        self.machine.memory.write(self.physical(task) + SLOT_DATA + offset, data)

    def get(self, task: Task, offset: int, size: int) -> bytes:
        """Read from a task's data area. Raises ValueError when it is not inside."""
        if offset < 0 or size < 0 or offset + size > DATA_SIZE:
            raise ValueError("outside the slot's data area")
        return self.machine.memory.read(self.physical(task) + SLOT_DATA + offset, size)

    def runs(self, task: Task) -> bool:
        """Is this the task that the guest, stopped in its kernel, runs?"""
        return self.facts is not None and self._current_task(self.facts, "gs_base") == task.task_struct

    # ---- death

    def _task_dies(self) -> bool:
        """Called when a task is about to leave the CPU for ever: take its slot back if it has one."""
        assert self.facts is not None
        task_struct = self._current_task(self.facts, "gs_base")
        pid = self._read_virtual(task_struct + self.facts.task_pid, 4)
        for task in self.tasks.values():
            # One that is killed before its first hypercall is known by its pid alone.
            if task.task_struct == task_struct or (not task.task_struct and task.pid == pid):
                task.dead = True
                self.forget(task)
                current, task.current = task.current, None
                queue, task.queue = task.queue, deque()
                if current is not None:
                    self._finish(current, self._results(task, current))
                for request in queue:
                    self._finish(request, [-errno.ESRCH] * len(request.calls))
                break
        return False

    def _finish(self, request: Request, results: list[int]) -> None:
        request.results = results
        request.done = True
        if request.on_done:
            request.on_done()

    # ---- requests

    def submit(self, task: Task, calls: Sequence[Call], on_done: Callable[[], None] | None = None) -> Request:
        """Queue calls for a task, at most SLOT_MAX_CALLS of (number, up to six arguments). `step()` makes them."""
        if not 0 < len(calls) <= SLOT_MAX_CALLS:
            raise ValueError(f"1 to {SLOT_MAX_CALLS} calls")
        request = Request(calls, on_done)
        if task.dead:
            self._finish(request, [-errno.ESRCH] * len(calls))
            return request
        task.queue.append(request)
        if task.asleep:
            self._waiting[task.slot] = task
            task.woken_at = 0
        return request

    @property
    def busy(self) -> bool:
        """Has the guest something to do for the host that it could do now?"""
        return bool(self._waiting) or (self.held is not None and bool(self.held.queue))

    def step(self, until_ns: int) -> Stop:
        """Run the guest until a task gives its slot (HYPERCALL), it is idle (HALTED) or one of `Machine.run()`'s stops.

        A task stopped at its hypercall goes on with its next request, or to sleep when it has none.
        """
        self._release()
        self._wake_waiting()
        stop = self.machine.run(until_ns)
        if stop is Stop.HYPERCALL:
            self._take_slot()
        elif stop is Stop.HALTED and self._waiting:
            for task in self._waiting.values():
                task.woken_at = 0
        return stop

    def _release(self) -> None:
        task = self.held
        if task is None:
            return
        self.held = None
        if task.queue:
            task.current = task.queue.popleft()
            self._load(task, task.current.calls)
            self.machine.cpu.write("rax", OP_CALLS)
        else:
            task.asleep = True
            self.machine.cpu.write("rax", OP_SLEEP)

    def _load(self, task: Task, calls: Sequence[Call]) -> None:
        at = self.physical(task)
        data = b"".join(_CALL.pack(*call, *(0,) * (8 - len(call))) for call in calls)
        self.machine.memory.write(at, struct.pack("<II", 0, len(calls)))
        self.machine.memory.write(at + SLOT_CALLS, data)

    def _take_slot(self) -> None:
        """A hypercall: read results, hold the task. CPUID with our leaf from elsewhere is answered like sleep."""
        cpu = self.machine.cpu
        task = self.tasks.get(cpu.read("rcx"))
        if task is None:
            cpu.write("rax", OP_SLEEP)
            return
        task.asleep = False
        self._waiting.pop(task.slot, None)
        self.held = task
        if self.facts is not None:
            task.task_struct = task.task_struct or self._current_task(self.facts)
        request, task.current = task.current, None
        if request is not None:
            self._finish(request, self._results(task, request))

    def _results(self, task: Task, request: Request) -> list[int]:
        at = self.physical(task) + SLOT_CALLS
        view = self.machine.memory.view[at : at + _CALL_SIZE * len(request.calls)]
        return [entry[7] for entry in _CALL.iter_unpack(view)]

    # ---- waking sleepers

    def _current_task(self, facts: WakeFacts, per_cpu_base: str = "kernel_gs_base") -> int:
        """Return the running task's task_struct. In user mode the kernel's GS base waits in `kernel_gs_base`."""
        cpu = self.machine.cpu
        per_cpu = cpu.read(per_cpu_base)
        return self._read_virtual(facts.current_task + per_cpu & (1 << 64) - 1, 8)

    def _read_virtual(self, address: int, size: int) -> int:
        cr3 = self.machine.cpu.read("cr3")
        return int.from_bytes(self.machine.memory.read_virtual(address, size, cr3), "little")

    def _wake_waiting(self) -> None:
        """Link an irq_work for every sleeper that has requests and was not woken lately."""
        if not self._waiting or self.facts is None:
            return
        now, facts, memory = self.machine.cpu.now, self.facts, self.machine.memory
        linked = False
        for task in self._waiting.values():
            if task.woken_at and now - task.woken_at < _WAKE_AGAIN:
                continue
            work = self._free_work(facts)
            if work is None:
                break
            memory.write_u32(self.physical(task), 1)
            self._link(facts, work, task)
            task.woken_at = max(now, 1)
            linked = True
        if linked:
            self.machine.post_interrupt(_IRQ_WORK_VECTOR)

    def _link(self, facts: WakeFacts, work: int, task: Task) -> None:
        memory, head = self.machine.memory, facts.raised_list
        memory.write_u64(work, memory.read_u64(head))
        memory.write_u32(work + facts.work_flags, _IRQ_WORK_QUEUED)
        memory.write_u64(work + facts.work_func, facts.hrtimer_wakeup)
        memory.write_u64(work + facts.sleeper_task, task.task_struct)
        memory.write_u64(head, facts.direct_map + work)

    def stir(self, task: Task) -> bool:
        """Wake a task from whatever it sleeps in: it looks again, and sleeps on if nothing has changed.

        False when that cannot be done now.
        """
        work = None if self.facts is None or not task.task_struct else self._free_work(self.facts)
        if self.facts is None or work is None:
            return False
        self._link(self.facts, work, task)
        self.machine.post_interrupt(_IRQ_WORK_VECTOR)
        return True

    def _free_work(self, facts: WakeFacts) -> int | None:
        """Return the physical address of an irq_work that is in no list: its busy flags are clear."""
        for work in range(self._page, self._page + PAGE - _WORK_SIZE, _WORK_SIZE):  # the last is `place()`'s
            if not self.machine.memory.read_u32(work + facts.work_flags) & 3:
                return work
        return None

    # ---- start and snapshot

    def attach(self, facts: Callable[[int], WakeFacts]) -> None:
        """At init's first hypercall: find its page and, with `facts(per_cpu_base)`, what waking needs."""
        machine = self.machine
        cr3 = machine.cpu.read("cr3")
        page = machine.memory.read_u64(self.window + SLOT_CALLS)
        self._page = machine.memory.translate(page, cr3)
        if self._page % PAGE or self._page + PAGE > machine.ram_size:
            raise GuestDied("the guest's init gave a bad address")
        self.facts = facts(machine.cpu.read("kernel_gs_base"))
        machine.trap(self.facts.task_dead, self._task_dies)
        self._take_slot()
        self.init.pid = 1

    def state(self) -> dict[str, Any]:
        """Return what a snapshot needs, as JSON values. All tasks but init must be gone and init asleep."""
        if list(self.tasks) != [0] or not self.init.asleep or self.facts is None:
            raise EmulatorError("a snapshot can be made only while the guest's init sleeps alone")
        return {"page": self._page, "task_struct": self.init.task_struct, "facts": self.facts.to_json()}

    def load(self, state: Mapping[str, object]) -> None:
        """Restore what `state()` gave. Raises EmulatorError when it is not of this version."""
        page, task_struct, facts = state.get("page"), state.get("task_struct"), state.get("facts")
        if type(page) is not int or type(task_struct) is not int or not isinstance(facts, Mapping):
            raise EmulatorError("snapshot: the agent's state is not of this version")
        if page % PAGE or not 0 <= page <= self.machine.ram_size - PAGE:
            raise EmulatorError("snapshot: the agent's page is not in RAM")
        self._page = page
        self.facts = WakeFacts.for_ram(facts, self.machine.ram_size)
        self.machine.trap(self.facts.task_dead, self._task_dies)
        self.init.task_struct = task_struct
        self.init.pid = 1
        self.init.asleep = True


def slot_batches(
    items: Iterable[_Item], need: Callable[[_Item], int], room: int, limit: int = SLOT_MAX_CALLS
) -> Iterator[list[_Item]]:
    """Divide what is put into a slot: into parts of at most `limit` that `need` at most `room` bytes, or of one."""
    batch: list[_Item] = []
    left = room
    for item in items:
        needed = need(item)
        if batch and (needed > left or len(batch) == limit):
            yield batch
            batch, left = [], room
        batch.append(item)
        left -= needed
    if batch:
        yield batch


def strings(texts: Iterable[bytes]) -> tuple[bytes, list[int]]:
    """Return NUL-terminated strings one behind the other, and the offset of each."""
    blob, offsets = bytearray(), []
    for text in texts:
        offsets.append(len(blob))
        blob += text + b"\0"
    return bytes(blob), offsets
