"""Gives a file of the guest's another size where nobody sees it: a truncate(2) that does not get to do_truncate().

That function is what people probe to see their own programs truncate files. So the guest only finds the file; where
vfs_truncate() begins, the size is written into the inode and the function left. The files are on a tmpfs, where nothing
else depends on it: what is missing reads as zeros, and pages behind the end stay until the file goes. (fallocate(2)
needs an open file, and opens are what people probe next; nor can it make a file smaller.)

A truncation to nothing is the kernel's own: it gives back what was written.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import ClassVar

from emulator.agent import Task
from emulator.guest import Guest
from emulator.kernel.facts import Facts
from emulator.memory import BadAddress


@dataclass(frozen=True)
class SizeFacts(Facts):
    """The guest virtual address of vfs_truncate(struct path *, loff_t), and byte offsets."""

    MISSING: ClassVar[str] = "this kernel has no vfs_truncate() of that kind"

    function: int
    path_dentry: int
    dentry_inode: int
    inode_mode: int
    inode_size: int


def size_facts(guest: Guest) -> SizeFacts | None:
    """Look the facts up in a just booted guest; None when its kernel lacks something."""
    from emulator.kernel.btf import BtfLookupError

    btf = guest.btf
    try:
        return SizeFacts(
            function=guest.symbols["vfs_truncate"],
            path_dentry=btf.offsetof("path", "dentry"),
            dentry_inode=btf.offsetof("dentry", "d_inode"),
            inode_mode=btf.offsetof("inode", "i_mode"),
            inode_size=btf.offsetof("inode", "i_size"),
        )
    except (KeyError, BtfLookupError):
        return None


class Sizes:
    """Has truncate(2) be that for one task of the guest. Without `facts` it truncates as everybody does."""

    def __init__(self, guest: Guest, task: Task, facts: SizeFacts | None) -> None:
        self._machine = guest.machine
        self._agent = guest.agent
        self._task = task
        self._setting = False
        if facts is not None:
            self._machine.trap(facts.function, lambda: self._set(facts), when=lambda: self._setting)

    @contextmanager
    def setting(self) -> Iterator[None]:
        """What the task truncates meanwhile gets its size."""
        self._setting = True
        try:
            yield
        finally:
            self._setting = False

    def _set(self, facts: SizeFacts) -> bool:
        cpu, memory = self._machine.cpu, self._machine.memory
        cr3, size = cpu.read("cr3"), cpu.read("rsi")
        if not size or not self._agent.runs(self._task):
            return False

        def at(virtual: int) -> int:
            return memory.translate(virtual, cr3)

        with suppress(BadAddress):
            inode = memory.read_u64(at(memory.read_u64(at(cpu.read("rdi") + facts.path_dentry)) + facts.dentry_inode))
            if stat.S_ISREG(memory.read_u32(at(inode + facts.inode_mode)) & 0xFFFF):
                memory.write_u64(at(inode + facts.inode_size), size)
                cpu.write("rax", 0)
                self._machine.return_from_call()
                return True
        return False
