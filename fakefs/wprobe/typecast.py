"""Typecasts, `(STRUCT[,FIELD])pointer->member`: what is asked of BTF for them.

STRUCT is what the pointer points to. With FIELD it points to that member of STRUCT instead, as container_of has it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Member(NamedTuple):
    """A member of a structure: `offset` in bytes from its start."""

    offset: int
    fetch_type: str | None = None  # as a fetch argument names it ("s32"); None: no such type, the default x64 it is
    pointee: str | None = None  # the structure it points to, if it is such a pointer
    bitfield: bool = False


class Structs(Protocol):
    """The kernel's structures and unions."""

    def known(self, struct: str) -> bool:
        """Whether there is a structure or union (or a typedef of one) of that name."""

    def member(self, struct: str, path: str) -> Member | None:
        """The member `path` ("f_path.dentry") of a known structure, or None. No pointer is followed."""


class NoStructs:
    """A kernel without BTF."""

    def known(self, struct: str) -> bool:
        return False

    def member(self, struct: str, path: str) -> Member | None:
        return None
