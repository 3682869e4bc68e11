"""The guest's symbols and BTF, as the parsers of wprobe commands ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.errors import EmulatorError
from emulator.guest import Guest

if TYPE_CHECKING:
    from emulator.kernel.btf import Member as BtfMember
from fakefs.wprobe.typecast import Member


class GuestSymbols:
    """Symbols of the guest's kernel. `dummy` is an address in a page of the guest's init that nothing touches."""

    def __init__(self, guest: Guest, dummy: int) -> None:
        self._guest = guest
        self.dummy = dummy

    def lookup(self, name: str) -> int | None:
        """Return the kernel address of a symbol, data or text."""
        try:
            return self._guest.symbols[name]
        except KeyError:
            return None


class GuestStructs:
    """Structures of the guest's kernel."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def known(self, struct: str) -> bool:
        """Is there a structure or union of that name?"""
        try:
            self._guest.btf.struct(struct)
        except EmulatorError:
            return False
        return True

    def member(self, struct: str, path: str) -> Member | None:
        """Return a member of a known structure; None when it has none of that path."""
        btf = self._guest.btf
        try:
            member = btf.member(struct, path)
        except EmulatorError:
            return None
        return Member(
            member.offset, self._fetch_type(member), _pointee(btf.describe(member.type)), bool(member.bit_size)
        )

    def _fetch_type(self, member: BtfMember) -> str | None:
        """Return the fetch argument type of an integer, an enumeration or a bit-field; None: what is read as x64."""
        kind = self._guest.btf.resolve(member.type)
        signed = getattr(kind, "signed", None)  # of Int and Enum alone
        if signed is None or member.size not in (1, 2, 4, 8):
            return None
        if member.bit_size:
            return f"b{member.bit_size}@{member.bit_offset}/{8 * member.size}"
        return f"{'s' if signed else 'u'}{8 * member.size}"


def _pointee(described: str) -> str | None:
    """Return the structure a C type points to."""
    words = described.replace("const ", "").split()
    if len(words) == 3 and words[0] in ("struct", "union") and words[2] == "*":
        return words[1]
    return None
