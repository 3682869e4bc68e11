"""Inodes of the guest's files, so that their sizes can be written there without a call of the guest's.

truncate(2) would show where people look: do_truncate() is what they probe to see their own programs truncate files, and
to look a path up is to access its dentry, which they may watch. The files are on a tmpfs, where nothing else depends on
the size: what is missing reads as zeros, and pages behind the end stay until the file goes.

The kernel tells of each inode it gives a name to its security modules; a trap there catches those of the files that a
task makes. An inode is written to only if it has its number still, as the guest might have freed it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from emulator.agent import Task
from emulator.guest import Guest
from emulator.kernel.facts import Facts
from emulator.memory import BadAddress


@dataclass(frozen=True)
class InodeFacts(Facts):
    """Guest virtual address of security_d_instantiate(struct dentry *, struct inode *); offsets in an inode, bytes."""

    MISSING: ClassVar[str] = "this kernel does not tell of its inodes"

    function: int
    mode: int
    size: int
    number: int


def inode_facts(guest: Guest) -> InodeFacts | None:
    """Look the facts up in a just booted guest; None when its kernel lacks something."""
    from emulator.kernel.btf import BtfLookupError

    try:
        members = [guest.btf.offsetof("inode", name) for name in ("i_mode", "i_size", "i_ino")]
        return InodeFacts(guest.symbols["security_d_instantiate"], *members)
    except (KeyError, BtfLookupError):
        return None


class Inode(NamedTuple):
    """A regular file's. `at` is its guest physical address, `number` what stat(2) shows."""

    at: int
    number: int


class Inodes:
    """Without `facts` none is found."""

    def __init__(self, guest: Guest, facts: InodeFacts | None) -> None:
        self._machine = guest.machine
        self._agent = guest.agent
        self._facts = facts
        self._maker: Task | None = None
        self._made: list[Inode] = []
        if facts is not None:
            self._machine.trap(facts.function, lambda: self._catch(facts), when=lambda: self._maker is not None)

    @contextmanager
    def made_by(self, task: Task) -> Iterator[list[Inode]]:
        """Have a list of the files that a task gives a name to meanwhile, in their order. For one task at a time."""
        self._maker, self._made = task, []
        try:
            yield self._made
        finally:
            self._maker = None

    def _catch(self, facts: InodeFacts) -> bool:
        if self._maker is not None and self._agent.runs(self._maker):
            cpu, memory = self._machine.cpu, self._machine.memory
            with suppress(BadAddress):
                at = memory.translate(cpu.read("rsi"), cpu.read("cr3"))
                if stat.S_ISREG(memory.read_u32(at + facts.mode) & 0xFFFF):
                    self._made.append(Inode(at, memory.read_u64(at + facts.number)))
        return False

    def size(self, inode: Inode) -> int:
        """Return a file's size in bytes; 0 when it is not there any more."""
        at = self._size_at(inode)
        return 0 if at is None else self._machine.memory.read_u64(at)

    def set_size(self, inode: Inode | None, size: int) -> bool:
        """Give a file a size in bytes; False when it is not there any more."""
        at = None if inode is None else self._size_at(inode)
        if at is not None:
            self._machine.memory.write_u64(at, size)
        return at is not None

    def _size_at(self, inode: Inode) -> int | None:
        """Return the physical address of a file's size, if the file is there still."""
        if (facts := self._facts) is None:
            return None
        memory = self._machine.memory
        mode, number = memory.read_u32(inode.at + facts.mode) & 0xFFFF, memory.read_u64(inode.at + facts.number)
        return inode.at + facts.size if stat.S_ISREG(mode) and number == inode.number else None
