"""What a kernel with the wprobe series printed, against what ours print.

`wprobe_golden/*.txt` are excerpts of shell transcripts of such a kernel: a `# name:` line for each case, then commands
(`$ `), what they printed, and `[exit N]`. Timestamps and the numbers of missed hits do not count. A line
`! EVENT FIELD=VALUE...` is not in the original: it tells of what happened inside the kernel, an event with the fields
its triggers look at.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

from fakefs.wprobe import commands, definition, trigger
from fakefs.wprobe.errorlog import ErrorLog
from fakefs.wprobe.errors import WPROBE_TRIGGER, LogEntry, ProbeError
from fakefs.wprobe.typecast import Member
from tests.wprobe_model import Attachment, Registers, State

GOLDEN = Path(__file__).parent / "wprobe_golden"

NO_TRIGGERS = (
    "# Available triggers:\n# traceon traceoff snapshot stacktrace enable_event disable_event"
    " enable_hist disable_hist hist set_wprobe clear_wprobe\n"
)
BLOCKED = 0xFFFFFFFF82001000


class Image:
    """The symbols and structures of the kernel that printed the transcripts, as far as they matter."""

    dummy = 0xFFFFFFFF820F8940
    _symbols: Mapping[str, int] = {
        "jiffies": 0xFFFFFFFF81C07A00,
        "vfs_read": 0xFFFFFFFF812B0100,
        "linux_banner": 0xFFFFFFFF81A00000,
        "loops_per_jiffy": 0xFFFFFFFF81C00010,
        "panic_on_warn": 0xFFFFFFFF81D45124,
        "init_uts_ns": 0xFFFFFFFF81C10000,
        "cpu_dr7": 0xFFFFFFFF820AA6C0,
        "__per_cpu_offset": BLOCKED,
    }
    _structs: Mapping[str, Mapping[str, Member]] = {
        "file": {"f_op": Member(8), "f_inode": Member(32), "f_path.dentry": Member(72)},
        "dentry": {"d_inode": Member(48)},
        "task_struct": {"pid": Member(1000, "s32"), "comm": Member(1500), "tasks": Member(900)},
    }

    def lookup(self, name: str) -> int | None:
        return self._symbols.get(name)

    def known(self, struct: str) -> bool:
        return struct in self._structs

    def member(self, struct: str, path: str) -> Member | None:
        return self._structs[struct].get(path)


class Foreign(NamedTuple):
    """An event that is no wprobe: the guest's affair."""

    group: str
    event: str
    line: str

    @classmethod
    def parse(cls, line: str) -> Foreign:
        head, _, rest = line.partition(" ")
        group, slash, event = head[2:].rpartition("/")
        default = {"p": "kprobes", "f": "fprobes", "e": "eprobes"}[head[0]]
        name = f"{group if slash else default}/{event}"
        return cls(group if slash else default, event, f"{head[0]}:{name} {rest}")


class Source(NamedTuple):
    """The triggers of an event, newest first, and its fields: name to (offset, size)."""

    fields: dict[str, tuple[int, int]]
    triggers: list[tuple[trigger.Trigger, State, Attachment]]


class World:
    """As much of a tracefs as the transcripts touch."""

    def __init__(self) -> None:
        self.image = Image()
        self.registers = Registers(strict=True, blocked=[(BLOCKED, BLOCKED + 512)])
        self.wprobes: list[State] = []
        self.foreign: list[Foreign] = []
        self.order: list[tuple[str, str]] = []
        self.sources: dict[str, Source] = {}
        self.logs: dict[str, ErrorLog] = {}
        self.armed: dict[tuple[str, str], int | None] = {}
        self.clock = 0

    def log(self, error: ProbeError, instance: str) -> None:
        self.clock += 1
        if error.entry:
            self.logs.setdefault(instance, ErrorLog()).add(error.entry, self.clock)

    def busy(self, group: str, event: str) -> bool:
        source = self.sources.get(f"{group}/{event}")
        return bool(source and source.triggers)

    def define(self, line: str) -> None:
        removal = commands.parse_removal(line)
        if removal:
            self.remove(removal)
        elif commands.is_wprobe(line):
            self.define_wprobe(line)
        elif line.strip():
            foreign = Foreign.parse(line)
            self.foreign.append(foreign)
            self.order.append((foreign.group, foreign.event))

    def define_wprobe(self, line: str) -> None:
        defined = definition.parse(line, self.image, self.image)
        key = (defined.group, defined.event)
        if key in self.order:
            raise defined.taken(by_wprobe=self.wprobe(*key) is not None)

        def arm(address: int | None) -> None:
            self.armed[key] = address

        self.wprobes.append(State(defined, arm, self.registers))
        self.order.append(key)

    def wprobe(self, group: str, event: str) -> State | None:
        for state in self.wprobes:
            if (state.definition.group, state.definition.event) == (group, event):
                return state
        return None

    def remove(self, removal: commands.Removal) -> None:
        found = [state for state in self.wprobes if removal.matches(state.definition)]
        others = [each for each in self.foreign if each.event == removal.event]
        if not found and not others:
            raise ProbeError(errno.ENOENT)
        for state in found:
            state.remove()
            self.wprobes.remove(state)
            self.order.remove((state.definition.group, state.definition.event))
        for each in others:
            if self.busy(each.group, each.event):
                raise ProbeError(errno.EBUSY)
            self.foreign.remove(each)
            self.order.remove((each.group, each.event))

    def truncate(self) -> None:
        if any(state.busy for state in self.wprobes):
            raise ProbeError(errno.EBUSY)
        self.wprobes, self.foreign, self.order = [], [], []

    def source(self, event: str) -> Source:
        if event not in self.sources:
            group, _, name = event.partition("/")
            state = self.wprobe(group, name)
            line = state.definition.show() if state else next(f.line for f in self.foreign if f.event == name)
            fields = {"common_pid": (4, 4), "__probe_ip": (8, 8)}
            for field, kind in re.findall(r"(\w+)=[^ :]*:?(\w*)", line):
                fields[field] = (16, 4 if kind.endswith("32") else 8)
            self.sources[event] = Source(fields, [])
        return self.sources[event]

    def trigger(self, event: str, instance: str, written: str) -> None:
        source = self.source(event)
        parsed = trigger.parse(
            written,
            source.fields,
            lambda name: self.wprobe("wprobes", name),
            structs=self.image,
            on_kprobe=event.startswith("kprobes/"),
        )
        if parsed is None:
            raise ProbeError(errno.EINVAL)
        state = self.wprobe("wprobes", parsed.target)
        assert state
        if parsed.remove:
            attachment = state.attached(parsed.kind, event, instance)
            if attachment:
                state.detach(attachment)
                source.triggers[:] = [each for each in source.triggers if each[2] is not attachment]
            return
        if parsed.filter and parsed.filter.startswith("nosuch"):
            raise ProbeError(
                errno.EINVAL, LogEntry("event filter parse error", "Field not found", parsed.filter, len("nosuch "))
            )
        attach = state.attach_set if parsed.kind == "set" else state.attach_clear
        source.triggers.insert(0, (parsed, state, attach(event, parsed.count, instance)))

    def happen(self, event: str, values: Mapping[str, int]) -> None:
        for parsed, state, attachment in self.source(event).triggers:
            value = None if parsed.field is None else values[parsed.field] + parsed.adjust
            if parsed.kind == "clear":
                state.hit_clear(attachment, value)
            else:
                assert value is not None
                state.hit_set(attachment, value)

    def read(self, path: str) -> str:
        instance, path = self.split(path)
        if path == "dynamic_events":
            lines = {(s.definition.group, s.definition.event): s.show() for s in self.wprobes}
            lines |= {(each.group, each.event): each.line for each in self.foreign}
            return "".join(f"{lines[key]}\n" for key in self.order)
        if path == "error_log":
            return self.logs.setdefault(instance, ErrorLog()).render("")
        _, group, name, file = path.split("/")
        if file == "enable":
            return "".join(
                f"{state.shown_enable(instance)}\n"
                for state in sorted(self.wprobes, key=lambda state: state.definition.event)
                if state.definition.group == group and fnmatchcase(state.definition.event, name)
            )
        assert file == "trigger"
        shown = [
            parsed.show(state.missed, attachment.count)
            for parsed, state, attachment in self.source(f"{group}/{name}").triggers
        ]
        return "".join(f"{line}\n" for line in shown) or NO_TRIGGERS

    def write(self, path: str, text: str, appending: bool) -> None:
        instance, path = self.split(path)
        try:
            if path == "dynamic_events":
                if not appending:
                    self.truncate()
                for line in commands.lines(text.encode()):
                    self.define(line)
                return
            _, group, name, file = path.split("/")
            if file == "trigger":
                self.trigger(f"{group}/{name}", instance, text)
            else:
                assert file == "enable"
                state = self.wprobe(group, name)
                if state:
                    state.enable(text.strip() == "1", instance)
        except ProbeError as error:
            self.log(error, instance)
            raise

    @staticmethod
    def split(path: str) -> tuple[str, str]:
        found = re.fullmatch(r"instances/(\w+)/(.*)", path)
        return (found[1], found[2]) if found else ("", path)

    def shell(self, command: str) -> tuple[str, int]:
        """Run what a shell ran: its output, and exit status."""
        written = re.fullmatch(r"(echo|printf)\b ?(.*?) ?(>>?) (\S+)", command)
        if written:
            text = "".join(shlex.split(written[2])[:1])
            # bash's printf writes line by line
            writes = re.findall(r"[^\n]*\n", text.replace("\\n", "\n")) if written[1] == "printf" else [text + "\n"]
            output, status = "", 0
            for write in writes:
                try:
                    self.write(written[4], write, written[3] == ">>")
                except ProbeError as error:
                    opening = text == "" and written[4] == "dynamic_events"
                    where = "dynamic_events" if opening else f"{written[1]}: write error"
                    output, status = f"{where}: {os.strerror(error.number)}\n", 1
            return output, status
        words = command.split()
        if command.startswith("grep -o"):
            return "".join(f"{found}\n" for found in re.findall(r"rw@-1|rw@0x", self.read(words[-1]))), 0
        if words[0] == "cat":
            return "".join(map(self.read, words[1:])), 0
        assert words[0] in ("mkdir", "rmdir"), command
        if words[0] == "rmdir":
            for state in self.wprobes:
                state.drop_instance(self.split(words[1] + "/")[0])
        return "", 0


def cases() -> Iterator[tuple[str, list[str]]]:
    for path in sorted(GOLDEN.glob("*.txt")):
        for chunk in path.read_text().split("# name: ")[1:]:
            name, *body = chunk.rstrip("\n").split("\n")
            yield f"{path.stem}:{name}", body


CASES = dict(cases())


def normalised(text: str) -> str:
    text = re.sub(r"(?m)^\[ *[0-9]+\.[0-9]{6}\]", "[T]", text)
    return re.sub(r"missed: ([0-9]+|N)", "missed: N", text)


@pytest.mark.parametrize("name", CASES)
def test_prints_what_a_kernel_printed(name: str) -> None:
    world = World()
    body = "\n".join(CASES[name]) + "\n"
    for step in re.split(r"(?m)^(?=[$!] )", body)[1:]:
        first, _, rest = step.partition("\n")
        if first[0] == "!":
            event, *values = first[2:].split()
            world.happen(event, {k: int(v, 16) for k, _, v in (each.partition("=") for each in values)})
            continue
        output, status = world.shell(first[2:])
        assert normalised(output) + f"[exit {status}]\n" == normalised(rest), first


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 120


def test_what_is_registered_is_given_back_and_disarmed() -> None:
    for name, body in CASES.items():
        world = World()
        for line in body:
            if line.startswith("$ "):
                world.shell(line[2:])
        assert world.registers.used == sum(state.registered for state in world.wprobes), name
        for state in world.wprobes:
            expected = state.address if state.registered and not state.parked else None
            key = (state.definition.group, state.definition.event)
            assert world.armed.get(key) == expected, name


def test_subsystem_of_trigger_errors() -> None:
    assert any(f" {WPROBE_TRIGGER}: error:" in line for body in CASES.values() for line in body)
