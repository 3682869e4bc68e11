"""What `emulator.kernel.btf` answers with: the kinds of BTF types, one frozen dataclass for each shape of record.

Nothing here reads a blob. Types name each other by id; sizes and offsets are bytes unless a field says bits. The kinds
and their fields follow Linux's Documentation/bpf/btf.rst.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from emulator.errors import EmulatorError


class BtfError(EmulatorError):
    """The blob is malformed, or the question makes no sense for the type it is about."""


class BtfLookupError(BtfError):
    """The blob is fine and has no type or member of that name."""


class Kind(IntEnum):
    """What a record describes (BTF_KIND_*)."""

    UNKN = 0  # void (id 0), or a kind newer than this list in a blob that tells the size of its records
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


@dataclass(frozen=True)
class Type:
    """What all types have. ``name`` is empty for what has none: pointers, anonymous structures, ``void``."""

    id: int
    kind: Kind
    name: str


@dataclass(frozen=True)
class Int(Type):
    """INT and FLOAT. ``size`` in bytes; ``bits`` of them count, from ``bit_offset`` on (0 but for old bit-fields)."""

    size: int
    bits: int
    bit_offset: int
    signed: bool


@dataclass(frozen=True)
class Ref(Type):
    """PTR, TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG and DECL_TAG: something about another ``type``.

    ``component`` is for DECL_TAG: the member or parameter it is attached to, -1 for the whole. ``attribute`` is for
    the two tags: the name is a compiler attribute (``__attribute__((name))``) and not a tag's value.
    """

    type: int
    component: int = -1
    attribute: bool = False


@dataclass(frozen=True)
class Array(Type):
    """``length`` elements of ``type``; a flexible array has length 0."""

    type: int
    index_type: int
    length: int


@dataclass(frozen=True)
class Member:
    """A member of a structure or union. It begins at bit ``offset * 8 + bit_offset``, bits counted from the lowest.

    ``offset`` and ``size`` are bytes; ``size`` is that of the declared type, for a bit-field too. ``bit_size`` is the
    width of a bit-field and 0 for everything else, which has ``bit_offset`` 0 as well.
    """

    name: str
    type: int
    offset: int
    size: int
    bit_offset: int = 0
    bit_size: int = 0


@dataclass(frozen=True)
class Struct(Type):
    """STRUCT and UNION. Members are those declared directly: an anonymous one is a member without a name."""

    size: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Enum(Type):
    """ENUM and ENUM64; ``size`` in bytes."""

    size: int
    signed: bool
    values: dict[str, int]


@dataclass(frozen=True)
class Fwd(Type):
    """A structure or union that is declared and nowhere defined."""

    union: bool


@dataclass(frozen=True)
class Param:
    """A parameter; in the type of a function pointer the name is often empty."""

    name: str
    type: int


@dataclass(frozen=True)
class Function(Type):
    """FUNC and FUNC_PROTO (a function's type alone: no name). ``variadic``: ``...`` follows the parameters.

    ``linkage`` is 0 for static, 1 for global, 2 for extern, and 0 in a FUNC_PROTO.
    """

    params: tuple[Param, ...]
    returns: int
    variadic: bool
    linkage: int = 0


@dataclass(frozen=True)
class Variable(Type):
    """VAR. ``linkage`` is 0 for static, 1 for global, 2 for extern."""

    type: int
    linkage: int


@dataclass(frozen=True)
class Section(Type):
    """DATASEC: an ELF section, ``variables`` as (VAR's id, offset, size); sizes and offsets in bytes."""

    size: int
    variables: tuple[tuple[int, int, int], ...]
