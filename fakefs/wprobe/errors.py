"""What a refused wprobe command answers: an errno and, most often, an entry of error_log.

The texts are those of the wprobe series (v18) and of the fetcharg parser it shares with kprobes; the golden transcripts
hold each of them that a guest was made to print.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

WPROBE = "wprobe"
WPROBE_TRIGGER = "wprobe_trigger"

# Definitions.
NO_ARG_BODY = "No argument expression"
NO_MAXACT = "Watchpoint probe does not support maxactive"
BAD_ACCESS_FMT = "Access memory address requires @"
BAD_ACCESS_TYPE = "Bad memory access type"
BAD_ACCESS_LEN = "This memory access length is not supported"
BAD_ACCESS_ADDR = "Invalid access memory address"
BAD_PROBE_ADDR = "Invalid probed address or symbol"
NO_SIBLING = "Watchpoint probe does not support sibling probes"
EVENT_EXIST = "Given group/event name is already used by another event"
NO_EVENT_NAME = "Event name is not specified"
EVENT_TOO_LONG = "Event name is too long"
BAD_EVENT_NAME = "Event name must follow the same rules as C identifiers"
NO_GROUP_NAME = "Group name is not specified"
GROUP_TOO_LONG = "Group name is too long"
BAD_GROUP_NAME = "Group name must follow the same rules as C identifiers"

# Definitions, where we accept more than the series.
BAD_SLOTS = "Number of slots must be 1 to 64"
BAD_CHANGE = "Only writes can be watched for changes"
OFF_LIMITS = "Memory that recording a hit needs cannot be watched"

# Fetch arguments.
TOO_MANY_ARGS = "Too many arguments are specified"
NO_ARG_NAME = "Argument name is not specified"
ARG_NAME_TOO_LONG = "Argument name is too long"
BAD_ARG_NAME = "Argument name must follow the same rules as C identifiers"
USED_ARG_NAME = "This argument name is already used"
BAD_SYMSTRING = "Symbol String doesn't accept data/userdata"
ARG_TOO_LONG = "Argument expression is too long"
NO_PER_CPU = "This kernel has no this_cpu_read() and this_cpu_ptr()"
BAD_VAR = "Invalid $-variable specified"
NOSUP_BTFARG = "BTF is not available or not supported"
DEREF_NEED_BRACE = "Dereference needs a brace"
DEREF_OPEN_BRACE = "Dereference brace is not closed"
BAD_DEREF_OFFS = "Invalid dereference offset"
TYPECAST_REQ_FIELD = "Typecast requires a field access"
BAD_BTF_TID = "Failed to get BTF type info."
NO_BTF_FIELD = "This field is not found."
NO_PTR_STRCT = "This is not a pointer to union/structure."

# Triggers.
WPROBE_NOT_FOUND = "Target wprobe event is not found"
WPROBE_ON_KPROBE = "Wprobe trigger is not supported on kprobe event"
WPROBE_BUSY = "Target wprobe event is already enabled"
WPROBE_NEED_FIELD = "Wprobe trigger requires a target field"
WPROBE_BAD_FIELD = "Target field must be pointer size"
NO_EVENT_FIELD = "This event field is not found."
BAD_IMM = "Invalid immediate value"
BAD_TIMEOUT = "Invalid timeout"


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry of error_log, without its time. `caret` is a column of `command`; it may lie beyond its end."""

    subsystem: str
    text: str
    command: str
    caret: int


class ProbeError(OSError):
    """A refused command: `errno` for the writer and, unless the kernel refuses it silently, `entry` for error_log."""

    def __init__(self, number: int, entry: LogEntry | None = None) -> None:
        super().__init__(number, entry.text if entry else os.strerror(number))
        self.number = number
        self.entry = entry
