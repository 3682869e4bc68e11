"""The text of a tracefs's `trace` and `trace_pipe` as records: what tests compare.

Follows the header that `trace` itself begins with ("TASK-PID CPU# ||||| TIMESTAMP FUNCTION") and, for what comes
after it, the `print fmt` of kprobes, kretprobes, uprobes, wprobes, system calls and most tracepoints. It is text made
for people: a tracepoint may print what it likes, so `fields` has what looks like name=value and `text` has all of it.

Not here: histograms, the graphs of function_graph, latency_format, the raw buffers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

Value = int | str | list[int]

# Greedy: the task's name is 16 columns wide with its padding (TASK_COMM_LEN), and may have dashes and blanks itself.
_HEADER = re.compile(
    r"(?P<task>.{0,16})-(?P<pid>\d+) +"
    r"(?:\( *(?P<tgid>\d+|-+)\) +)?"
    r"\[(?P<cpu>\d+)\] +"
    r"(?:(?P<flags>[^\s:]{2,8}) +)?"
    r"(?P<time>\d+(?:\.\d+)?): (?P<rest>.*)",
    re.DOTALL,
)
_NAMED = re.compile(r"(?P<event>[^\s:(]+): ?(?P<text>.*)", re.DOTALL)
_ENTER = re.compile(r"sys_(?P<call>\w+)\((?P<arguments>.*)\)$", re.DOTALL)
_EXIT = re.compile(r"sys_(?P<call>\w+) -> (?P<result>\S+)$")
_CALLED = re.compile(r"(?P<function>[^\s(]+)(?:\(.*\))? <-(?P<caller>\S+)$")
_PLACE = re.compile(
    r"\((?P<ip>[^\s()=]+)(?: \[[^\]]*\])?(?: <- (?P<from>[^\s()]+)(?: \[[^\]]*\])?)?\) ?(?P<text>.*)", re.DOTALL
)
_FIELD = re.compile(r"(?:^|(?<=[\s,(|{]))(?P<name>[A-Za-z_]\w*)=")
_QUOTED = re.compile(r'"(?P<text>.*?)"(?=\s*$|[\s,]+[A-Za-z_]\w*=)', re.DOTALL)
_INTEGER = re.compile(r"-?(?:0x[0-9a-fA-F]+|0|[1-9]\d*)$")
_ARRAY = re.compile(r"\{(?P<items>[^{}\"]*)\}$")
_FRAME = " => "


@dataclass(frozen=True, slots=True)
class Record:
    """One event of a trace.

    `timestamp` is in seconds of the trace clock (`counter`, `x86-tsc`: its count). `ip` is the place in the kernel
    that a probe tells ("vfs_read+0x4/0x370"; for a return probe that returned to), `func` the function it is about.
    `fields` have ints where the text is a number with no leading zeros (an unprefixed hexadecimal one of digits only
    looks like one too), lists of ints for arrays, and text without its quotes otherwise. `stack` are the lines of a
    stack trace that follows, innermost first.
    """

    task: str
    pid: int
    cpu: int
    flags: str
    timestamp: float
    event: str
    text: str = ""
    ip: str = ""
    func: str = ""
    fields: dict[str, Value] = field(default_factory=dict)
    tgid: int | None = None
    stack: tuple[str, ...] = ()


def parse(text: str | Iterable[str]) -> list[Record]:
    """Return the events of `trace`, oldest first; lines that are none (comments, lost events) are left out."""
    records: list[Record] = []
    in_stack = False
    for line in text.split("\n") if isinstance(text, str) else text:
        if in_stack and line.startswith(_FRAME):
            records[-1] = replace(records[-1], stack=(*records[-1].stack, line.removeprefix(_FRAME).rstrip()))
            continue
        in_stack = False
        record = parse_line(line)
        if record is None:
            continue
        if record.event == "<stack trace>":
            in_stack = bool(records)  # it belongs to the event before
        else:
            records.append(record)
    return records


def parse_line(line: str) -> Record | None:
    """Return the event of one line; None when it is none."""
    header = _HEADER.match(line.rstrip("\n"))
    if header is None:
        return None
    event, text, ip, func, fields = _body(header["rest"])
    tgid = header["tgid"]
    return Record(
        task=header["task"].lstrip(" "),
        pid=int(header["pid"]),
        cpu=int(header["cpu"]),
        flags=header["flags"] or "",
        timestamp=float(header["time"]),
        event=event,
        text=text,
        ip=ip,
        func=func,
        fields=fields,
        tgid=int(tgid) if tgid and tgid.isdigit() else None,
    )


def _body(rest: str) -> tuple[str, str, str, str, dict[str, Value]]:
    """What follows the timestamp: event, text, ip, func, fields."""
    if rest.strip() == "<stack trace>":
        return "<stack trace>", "", "", "", {}
    if match := _ENTER.match(rest):
        return f"sys_enter_{match['call']}", rest, "", "", _arguments(match["arguments"])
    if match := _EXIT.match(rest):
        return f"sys_exit_{match['call']}", rest, "", "", {"ret": to_value(match["result"])}
    if match := _CALLED.match(rest):
        return "function", rest, match["function"], _symbol(match["function"]), {"parent": match["caller"]}
    match = _NAMED.match(rest)
    if match is None:
        return "", rest, "", "", {}
    event, text = match["event"], match["text"]
    place = _PLACE.match(text)
    if place is None:
        return event, text, "", "", to_fields(text)
    return event, text, place["ip"], _symbol(place["from"] or place["ip"]), to_fields(place["text"])


def _symbol(place: str) -> str:
    return place.partition("+")[0]


def _arguments(text: str) -> dict[str, Value]:
    """What a system call was given, as `name: value, ...`: hexadecimal without a prefix."""
    found: dict[str, Value] = {}
    for part in text.split(", "):
        name, colon, value = part.partition(": ")
        if colon:
            found[name] = int(value, 16) if re.fullmatch("[0-9a-f]+", value) else value
    return found


def to_fields(text: str) -> dict[str, Value]:
    """Return what looks like name=value in a text; a value goes on until the next name, or its closing quote."""
    fields: dict[str, Value] = {}
    at = 0
    while match := _FIELD.search(text, at):
        begin = match.end()
        quoted = _QUOTED.match(text, begin)
        if quoted:
            fields[match["name"]], at = quoted["text"], quoted.end()
            continue
        following = _FIELD.search(text, begin)
        at = following.start() if following else len(text)
        # sched_switch has an arrow between two fields.
        fields[match["name"]] = to_value(text[begin:at].rstrip(" ,").removesuffix(" ==>"))
    return fields


def to_value(text: str) -> Value:
    """Return a number, decimal or with 0x, as an int; {1,2} as a list of them; else the text itself."""
    if _INTEGER.match(text):
        return int(text, 0)
    array = _ARRAY.match(text)
    if array:
        items = array["items"].split(",")
        if all(_INTEGER.match(item) for item in items):
            return [int(item, 0) for item in items]
    return text
