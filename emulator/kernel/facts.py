"""The few addresses and offsets of a kernel that waking one of its tasks from outside needs.

Looked up once per kernel in its symbols and BTF, and kept in the snapshot. See `emulator.agent` for their use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Self

from emulator.errors import EmulatorError

if TYPE_CHECKING:  # a restore needs neither
    from emulator.kernel.btf import Btf
    from emulator.kernel.kallsyms import Symbols

_WORD = (1 << 64) - 1
_WORK_ROOM = 128  # bytes the agent sets aside for one irq_work with the sleeper's task behind it


@dataclass(frozen=True)
class Facts:
    """Numbers of one kernel that are kept with its snapshot: addresses, offsets and sizes, each up to 64 bits."""

    MISSING: ClassVar[str] = "snapshot: the facts are not of this version"

    def to_json(self) -> dict[str, int]:
        """Return the facts as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Return what `to_json()` gave, checked. Raises EmulatorError."""
        if not isinstance(values, Mapping):
            raise EmulatorError(cls.MISSING)
        numbers: dict[str, int] = {}
        for item in fields(cls):
            value = values.get(item.name)
            if type(value) is not int or not 0 <= value <= _WORD:
                raise EmulatorError(f"snapshot: {item.name} is not a value it can have")
            numbers[item.name] = value
        return cls(**numbers)


@dataclass(frozen=True)
class WakeFacts(Facts):
    """Addresses are guest virtual unless named otherwise; offsets and sizes in bytes."""

    current_task: int  # of the per-CPU word that points to the running task, from the per-CPU base
    raised_list: int  # physical, of this CPU's list of raised irq_works
    hrtimer_wakeup: int  # wakes the task of the hrtimer_sleeper it is given the timer of
    direct_map: int  # virtual address of physical 0
    work_flags: int  # in irq_work
    work_func: int
    sleeper_task: int  # in hrtimer_sleeper
    task_dead: int  # address of the last function that a task calls
    task_pid: int  # in task_struct

    @classmethod
    def for_ram(cls, values: object, ram_size: int) -> WakeFacts:
        """Return what `to_json()` gave, checked. Raises EmulatorError."""
        facts = cls.from_json(values)
        if (
            facts.raised_list > ram_size - 8
            or max(facts.work_flags, facts.work_func, facts.sleeper_task) > _WORK_ROOM - 8
        ):
            raise EmulatorError("snapshot: the agent's facts are not of this version")
        return facts


@dataclass(frozen=True)
class TextPokeFacts(Facts):
    """Where and in what form the kernel hands over the code patches it is about to make (see `emulator.textpoke`)."""

    entry: int  # guest virtual address of the function that makes them
    stext: int  # patch addresses are relative to this
    array: int  # of the patches; 0: the function is given array and number as its arguments
    count: int  # guest virtual address of the number of patches in `array`, which the function clears; 0 like that
    size: int  # of one patch, bytes; offsets in it follow
    rel_addr: int
    length: int
    text: int
    queue: int  # guest virtual address of the function that puts a patch (address, text, length) into `array`
    decoder: int  # and of insn_decode(), which it calls

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Return what `to_json()` gave, checked. Raises EmulatorError."""
        facts = super().from_json(values)
        if not 0 < facts.size <= 64 or max(facts.rel_addr, facts.length, facts.text) >= facts.size:
            raise EmulatorError("snapshot: the text patching facts are not of this version")
        return facts


@dataclass(frozen=True)
class SeqFileFacts:
    """What `emulator.seqfile` needs: guest virtual addresses of functions, offsets in struct seq_file."""

    starts: tuple[int, ...]
    size: int
    count: int
    op: int

    def to_json(self) -> dict[str, object]:
        """Return the facts as JSON values."""
        return {**asdict(self), "starts": list(self.starts)}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> SeqFileFacts:
        """Return what `to_json()` gave, checked. Raises EmulatorError."""
        starts = values.get("starts")
        given = [values.get("size"), values.get("count"), values.get("op")]
        given += starts if isinstance(starts, list) else [None]
        numbers = [number for number in given if type(number) is int and 0 <= number <= _WORD]
        if len(numbers) != len(given):
            raise EmulatorError("snapshot: the seq_file facts are not of this version")
        return cls(tuple(numbers[3:]), *numbers[:3])


@dataclass(frozen=True)
class RecordFacts(Facts):
    """The loops over all functions ftrace knows (see `emulator.shortcuts`): functions with their ends, offsets."""

    next: int  # ftrace_rec_iter_next()
    next_end: int
    replace: int  # ftrace_replace_code(), which calls it and the following ones
    replace_end: int
    record: int  # ftrace_rec_iter_record()
    record_end: int
    test: int  # ftrace_test_record()
    test_end: int
    check: int  # ftrace_check_record()
    check_end: int
    iter_page: int
    iter_index: int
    page_next: int
    page_records: int
    page_used: int
    record_size: int
    record_flags: int
    busy: int  # flags: being traced, or the number of tracers


@dataclass(frozen=True)
class SymbolNameFacts(Facts):
    """The kernel's compressed symbol names: guest virtual addresses."""

    function: int  # get_symbol_offset()
    function_end: int
    names: int
    markers: int  # the table behind the names


# From the highest bit down; the bits below the last are a counter. The first is what a record's state is compared by.
_RECORD_FLAGS = (
    "ENABLED", "REGS", "REGS_EN", "TRAMP", "TRAMP_EN", "IPMODIFY", "DISABLED", "DIRECT", "DIRECT_EN", "CALL_OPS",
    "CALL_OPS_EN", "TOUCHED", "MODIFIED",
)  # fmt: skip


def record_facts(symbols: Symbols, btf: Btf) -> RecordFacts | None:
    """Look the facts up; None for a kernel that keeps its records in some other way."""
    from emulator.kernel.btf import BtfLookupError

    def extent(label: str, name: str) -> dict[str, int]:
        return {label: symbols[name], f"{label}_end": symbols.after(symbols[name])}

    try:
        flags = [btf.constant("FTRACE_FL_ENABLED"), btf.constant("FTRACE_FL_DISABLED")]
        for name in _RECORD_FLAGS:
            with suppress(BtfLookupError):
                flags.append(btf.constant(f"FTRACE_FL_{name}"))
        return RecordFacts(
            **extent("next", "ftrace_rec_iter_next"),
            **extent("replace", "ftrace_replace_code"),
            **extent("record", "ftrace_rec_iter_record"),
            **extent("test", "ftrace_test_record"),
            **extent("check", "ftrace_check_record"),
            iter_page=btf.offsetof("ftrace_rec_iter", "pg"),
            iter_index=btf.offsetof("ftrace_rec_iter", "index"),
            page_next=btf.offsetof("ftrace_page", "next"),
            page_records=btf.offsetof("ftrace_page", "records"),
            page_used=btf.offsetof("ftrace_page", "index"),
            record_size=btf.sizeof("dyn_ftrace"),
            record_flags=btf.offsetof("dyn_ftrace", "flags"),
            busy=flags[0] | min(flags) - 1,
        )
    except (KeyError, BtfLookupError):
        return None


def symbol_name_facts(symbols: Symbols) -> SymbolNameFacts | None:
    """Look the facts up; None for a kernel that does not list its tables, or has them in another order."""
    try:
        function, names, markers = (
            symbols[name] for name in ("get_symbol_offset", "kallsyms_names", "kallsyms_markers")
        )
        return SymbolNameFacts(function, symbols.after(function), names, markers) if names < markers else None
    except KeyError:
        return None


def seq_file_facts(symbols: Symbols, btf: Btf) -> SeqFileFacts:
    """Look the facts up. ftrace's start function is called t_start, as are a few others, which do no harm."""
    starts = tuple(symbol.address for symbol in symbols.find("t_start"))
    return SeqFileFacts(starts, *(btf.offsetof("seq_file", name) for name in ("size", "count", "op")))


def text_poke_facts(symbols: Symbols, btf: Btf) -> TextPokeFacts | None:
    """Look the facts up; None for a kernel that patches its code in some other way, which then is only slower."""
    from emulator.kernel.btf import BtfLookupError

    try:
        if "smp_text_poke_batch_finish" in symbols:  # from 6.16
            entry, patch = symbols["smp_text_poke_batch_finish"], "smp_text_poke_loc"
            array = symbols["text_poke_array"]
            count = array + btf.offsetof("smp_text_poke_array", "nr_entries")
            array += btf.offsetof("smp_text_poke_array", "vec")
            queue = "smp_text_poke_batch_add"
        else:
            entry, patch, array, count = symbols["text_poke_bp_batch"], "text_poke_loc", 0, 0
            queue = "text_poke_queue"
        return TextPokeFacts(
            entry=entry,
            stext=symbols["_stext"],
            array=array,
            count=count,
            size=btf.sizeof(patch),
            rel_addr=btf.offsetof(patch, "rel_addr"),
            length=btf.offsetof(patch, "len"),
            text=btf.offsetof(patch, "text"),
            queue=symbols[queue],
            decoder=symbols["insn_decode"],
        )
    except (KeyError, BtfLookupError):
        return None


def wake_facts(
    symbols: Symbols, btf: Btf, per_cpu_base: int, translate: Callable[[int], int], read_u64: Callable[[int], int]
) -> WakeFacts:
    """Look the facts up. `translate` maps guest virtual to physical, `read_u64` reads at a guest virtual address.

    Raises EmulatorError naming what this kernel lacks.
    """
    try:
        if "pcpu_hot" in symbols:  # 6.2 to 6.14
            current = symbols["pcpu_hot"] + btf.offsetof("pcpu_hot", "current_task")
        else:
            current = symbols["current_task"]
        return WakeFacts(
            current_task=current,
            raised_list=translate(symbols["raised_list"] + per_cpu_base & _WORD),
            hrtimer_wakeup=symbols["hrtimer_wakeup"],
            direct_map=read_u64(symbols["page_offset_base"]),
            work_flags=btf.offsetof("irq_work", "node") + btf.offsetof("__call_single_node", "u_flags"),
            work_func=btf.offsetof("irq_work", "func"),
            sleeper_task=btf.offsetof("hrtimer_sleeper", "task"),
            task_dead=symbols["do_task_dead"],
            task_pid=btf.offsetof("task_struct", "pid"),
        )
    except KeyError as missing:
        raise EmulatorError(f"this kernel has no {missing.args[0]}: it cannot be used; try another kernel") from None
