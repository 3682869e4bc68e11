"""The few addresses and offsets of a kernel that waking one of its tasks from outside needs.

Looked up once per kernel in its symbols and BTF, and kept in the snapshot. See `emulator.agent` for their use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        )
    except KeyError as missing:
        raise EmulatorError(f"this kernel has no {missing.args[0]}: it cannot be used; try another kernel") from None
