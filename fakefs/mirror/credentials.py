"""What setuid(2) and its relatives come to on the host, foreseen from what the kernel goes by: credentials(7).

A call goes on before anybody could see its result. But its thread waits until then, and whether it will be allowed
depends on nothing but the thread and its user namespace: so the ids are translated to those outside the namespace, as
the guest has them, and a call that will be refused is known to be.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from fakefs.mirror.calls import Call
from fakefs.mirror.records import Credentials
from fakefs.mirror.seccomp import Notification, read_memory

GROUPS_MAX = 64
"""More groups than these a process does not have in the guest."""
_CAP_SETGID, _CAP_SETUID = 6, 7
_STATUS_MAX, _MAP_MAX = 8192, 1 << 16
NO_ID = 0xFFFFFFFF
"""For calls that change several ids: leave this one. No user or group has it."""


class Range(NamedTuple):
    """A line of uid_map or gid_map, as user_namespaces(7) has it."""

    inside: int
    outside: int
    size: int


class Facts(NamedTuple):
    """What the host's kernel looks at: the thread's own ids, whether it may take others, and which there are."""

    own: frozenset[int]  # outside
    capable: bool
    ranges: list[Range]
    groups: bool = True  # may setgroups(2) be called at all?


def requested(notification: Notification, call: Call) -> Credentials:
    """Return the record of a call of the family. Raises OSError and ValueError when its thread is gone."""
    letter = "U" if "U" in call.arguments else "G"
    facts = _read(notification.tid, letter)
    if call.name != "setgroups":
        ids = [value & 0xFFFFFFFF for value in notification.arguments[: len(call.arguments)]]
        return foreseen(notification.tid, call, ids, facts)
    count = notification.arguments[0] & 0xFFFFFFFF
    data = read_memory(notification.tid, notification.arguments[1], 4 * count) if count <= GROUPS_MAX else b""
    groups = [group for (group,) in struct.iter_unpack("<I", data)] if len(data) == 4 * count else [NO_ID]
    return foreseen(notification.tid, call, groups, facts)


def foreseen(tid: int, call: Call, ids: Sequence[int], facts: Facts) -> Credentials:
    """Return the record of a call with ids of a user namespace."""
    outside = [NO_ID if each == NO_ID else translate(each, facts.ranges) for each in ids]
    there = [each for each in outside if each is not None]
    if call.name == "setgroups":
        capable = facts.capable and facts.groups
    else:
        capable = facts.capable or {NO_ID, *facts.own}.issuperset(there)
    return Credentials(tid, call.number, there if len(there) == len(ids) else None, capable)


def translate(inside: int, ranges: Sequence[Range]) -> int | None:
    """Return the id outside a user namespace of one inside it; None if there is none."""
    for each in ranges:
        if each.inside <= inside < each.inside + each.size:
            return each.outside + inside - each.inside
    return None


def parse(status: bytes, id_map: bytes, setgroups: bytes, letter: str) -> Facts:
    """Parse /proc/TID/status, uid_map or gid_map, and setgroups. Raises ValueError when they are not that.

    `letter` is U for users and G for groups.
    """
    fields = dict(line.split(b":\t", 1) for line in status.split(b"\n") if b":\t" in line)
    try:
        own = frozenset(int(word) for word in fields[b"Uid" if letter == "U" else b"Gid"].split())
        capabilities = int(fields[b"CapEff"], 16)
        ranges = [Range(*(int(word) for word in line.split())) for line in id_map.splitlines()]
    except (KeyError, TypeError) as error:
        raise ValueError(f"not /proc/TID/status and its maps: {error}") from None
    capable = bool(capabilities >> (_CAP_SETUID if letter == "U" else _CAP_SETGID) & 1)
    return Facts(own, capable, ranges, setgroups.strip() != b"deny")


def _read(tid: int, letter: str) -> Facts:
    name = "uid_map" if letter == "U" else "gid_map"
    with (
        open(f"/proc/{tid}/status", "rb") as status,
        open(f"/proc/{tid}/{name}", "rb") as id_map,
        open(f"/proc/{tid}/setgroups", "rb") as setgroups,
    ):
        return parse(status.read(_STATUS_MAX), id_map.read(_MAP_MAX), setgroups.read(16), letter)
