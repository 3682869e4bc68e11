"""Which uprobes the guest's kernel has registered: those of enabled events, and of triggers that may enable one.

Defining an event registers nothing. It is seen by traps in the kernel's functions, whose parameters differ: before 6.12
uprobe_register(inode, offset, consumer) and uprobe_unregister(inode, offset, consumer), since then
uprobe_register(inode, offset, ref_ctr_offset, consumer) and uprobe_unregister_nosync(uprobe, consumer).
"""

from __future__ import annotations

from emulator.guest import Guest

_MOST = 1 << 16


class Enabled:
    """Counts consumers by their offset: two files with a uprobe at the same one are not told apart.

    `changed` is set when some are registered or unregistered.
    """

    def __init__(self, guest: Guest) -> None:
        self._cpu = guest.machine.cpu
        self._offsets: dict[int, int] = {}  # by the address of the consumer
        self.changed = False
        symbols = guest.symbols
        old = "uprobe_register_refctr" in symbols
        self._traps = {
            "uprobe_register": "rdx" if old else "rcx",
            "uprobe_register_refctr": "rcx",
            "uprobe_unregister": "rdx",
            "uprobe_unregister_nosync": "rsi",
        }
        """The register that has the consumer."""
        self.known = "uprobe_register" in symbols
        for name, register in self._traps.items():
            if name in symbols:
                self._trap(guest, symbols[name], register, registers=not name.startswith("uprobe_unregister"))

    def _trap(self, guest: Guest, address: int, register: str, *, registers: bool) -> None:
        def note() -> bool:
            consumer = self._cpu.read(register)
            if not registers:
                self._offsets.pop(consumer, None)
            elif len(self._offsets) < _MOST:
                self._offsets[consumer] = self._cpu.read("rsi")
            self.changed = True
            return False

        guest.machine.trap(address, note)

    def has(self, offset: int) -> bool:
        """May there be a registered uprobe at this offset of a file?"""
        return not self.known or offset in self._offsets.values()
