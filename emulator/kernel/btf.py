"""BTF, the BPF Type Format: what the kernel says about its own types.

A kernel built with ``CONFIG_DEBUG_INFO_BTF`` carries a blob of 4 to 6 MB (the ELF section ``.BTF``, in a running kernel
``/sys/kernel/btf/vmlinux``) that describes every structure, enumeration and function it was compiled from. This module
answers questions such as "at which byte of ``struct kprobe`` is ``addr``?" or "which parameters has ``vfs_read``?" and
prints types the way C writes them. It writes no BTF, and leaves ``.BTF.ext`` (source lines of BPF programs) alone.

The format follows Documentation/bpf/btf.rst and include/uapi/linux/btf.h of Linux 7.2. All numbers in it are
little-endian, and so must be the host.

    btf = Btf(blob)
    btf.offsetof("task_struct", "thread.sp")            # bytes
    btf.describe(btf.function("vfs_read").id)           # 'ssize_t vfs_read(struct file *file, char *buf, …)'

**Cost.** Opening checks the header (0.1 ms, and 2 ms for the copy if the blob is a memoryview). The first question
indexes the records (9 to 15 ms for the 118,000 types of Linux 7.2's 5.2 MB), the first name another column (7 to 11 ms;
not in 7.2, whose types are sorted by name). Afterwards a name costs 0.1 ms and a member of a large structure 0.2:
a dozen questions on a fresh blob take 17 to 28 ms in all (Python 3.11). A start that has to be faster keeps what
`Btf.layout` answered, which is plain JSON, and opens no blob at all.

**Trust.** The blob may be anybody's. Every offset is checked before use, chains of types are followed for at most 32
steps and text grows to at most 16 KiB, so that a malformed blob ends in `BtfError`, never in a loop or deep recursion.

**Identifiers.** Types refer to each other by a number, their id: 0 is ``void``, 1 the first record of vmlinux. The BTF
of a module ("split BTF", ``/sys/kernel/btf/MODULE``) goes on counting where its base ends: ``Btf(blob, base=vmlinux)``.
A ``.ko`` file with a section ``.BTF.base`` (modules built out of tree since 6.11) has that as its base, not vmlinux's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from emulator.kernel.btf_records import BtfRecords
from emulator.kernel.btf_types import (
    Array,
    BtfError,
    BtfLookupError,
    Enum,
    Function,
    Fwd,
    Int,
    Kind,
    Member,
    Param,
    Ref,
    Section,
    Struct,
    Type,
    Variable,
)

__all__ = [
    "Array",
    "Btf",
    "BtfError",
    "BtfLookupError",
    "Enum",
    "Function",
    "Fwd",
    "Int",
    "Kind",
    "Member",
    "Param",
    "Ref",
    "Section",
    "Struct",
    "Type",
    "Variable",
]

_POINTER_SIZE = 8
_MAX_DEPTH = 32  # the same bound as the kernel's own MAX_RESOLVE_DEPTH
_MAX_TEXT = 1 << 14  # bytes; the longest declaration in Linux 7.2 has 453

_AGGREGATES = (Kind.STRUCT, Kind.UNION)
_SIZED = (Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.ENUM64, Kind.FLOAT, Kind.DATASEC)
_NAMED = (*_AGGREGATES, Kind.TYPEDEF, Kind.ENUM, Kind.ENUM64, Kind.INT, Kind.FLOAT)  # what sizeof takes by name
_QUALIFIERS = {Kind.CONST: "const", Kind.VOLATILE: "volatile", Kind.RESTRICT: "restrict"}
_TRANSPARENT = (*_QUALIFIERS, Kind.TYPEDEF, Kind.TYPE_TAG)  # what a question about size or members looks through


class Btf(BtfRecords):
    """The types of one blob, and of the blob it is based on.

    Every method raises `BtfError` where it meets a malformed record and `BtfLookupError` for a name that is not there.
    """

    # ---- questions by name ----

    def find(self, kind: Kind, name: str) -> Type:
        """The first type of that kind and name: of this blob, else of its base."""
        return self.type(self._find((kind,), name))

    def struct(self, name: str) -> Struct:
        """The structure of that name, else the union, else what a typedef of that name stands for."""
        found = self.type(self._aggregate(name))
        assert isinstance(found, Struct)
        return found

    def function(self, name: str) -> Function:
        """The function of that name; of several (static ones) the first."""
        found = self.find(Kind.FUNC, name)
        assert isinstance(found, Function)
        return found

    def typedef(self, name: str) -> Ref:
        """The typedef of that name, one step: `resolve` goes to its end."""
        found = self.find(Kind.TYPEDEF, name)
        assert isinstance(found, Ref)
        return found

    def enum(self, name: str) -> Enum:
        """The enumeration of that name."""
        found = self.type(self._find((Kind.ENUM, Kind.ENUM64), name))
        assert isinstance(found, Enum)
        return found

    def constant(self, name: str) -> int:
        """The value of an enumerator, whatever enumeration it is of, those without a name included."""
        types = self.words.tobytes()
        for offset in self.string_offsets(name.encode("utf-8", "surrogateescape")):
            needle = offset.to_bytes(4, "little")
            at = types.find(needle)
            while at >= 0:
                index = bisect_right(self.starts, at // 4) - 1
                found = self.type(self.first_id + index) if at % 4 == 0 else None
                if isinstance(found, Enum) and name in found.values:
                    return found.values[name]
                at = types.find(needle, at + 1)
        if self.base is not None:
            return self.base.constant(name)
        raise BtfLookupError(f"this kernel's BTF has no constant {name!r}")

    def member(self, aggregate: str | int, path: str) -> Member:
        """The member that C would call ``path`` (``"thread.sp"``), its offset counted from the start of ``aggregate``.

        ``aggregate`` is the name of a structure, union or typedef, or a type id. Anonymous structures and unions on
        the way need no mention. A pointer is not followed.
        """
        type_id = self._aggregate(aggregate) if isinstance(aggregate, str) else aggregate
        position = bit_size = 0
        for name in path.split("."):
            found = self._search(type_id, name) if name else None
            if found is None:
                raise BtfLookupError(f"{self.describe(type_id)} has no member {name!r} in this kernel")
            type_id, bits, bit_size = found
            position += bits
        return self._member(name, type_id, position, bit_size)

    def offsetof(self, aggregate: str | int, path: str) -> int:
        """Bytes from the start of ``aggregate`` to the member ``path``; `BtfError` for a bit-field."""
        found = self.member(aggregate, path)
        if found.bit_size:
            raise BtfError(f"{aggregate}.{path} is a bit-field: it has no address")
        return found.offset

    def sizeof(self, what: str | int) -> int:
        """Bytes of the type with that id or name (structure, union, typedef, enumeration, integer)."""
        type_id = self._find(_NAMED, what) if isinstance(what, str) else what
        count = 1
        for _ in range(_MAX_DEPTH):
            owner, at, kind = self.record(type_id)
            if kind in _SIZED:
                return count * owner.words[at + 2]
            if kind == Kind.PTR:
                return count * _POINTER_SIZE
            if kind == Kind.ARRAY:
                type_id, _, length = owner.words[at + 3 : at + 6]
                count *= length
            elif kind in _TRANSPARENT or kind == Kind.VAR:
                type_id = owner.words[at + 2]
            else:
                raise BtfError(f"{self.describe(type_id)} (BTF type {type_id}) has no size")
        raise _too_deep(type_id)

    def layout(self, questions: Iterable[str]) -> dict[str, int]:
        """Answers to keep, as JSON for example: ``"task_struct.pid"`` asks for an offset, ``"pt_regs"`` for a size."""
        split = ((question, question.partition(".")) for question in questions)
        return {q: self.offsetof(name, path) if path else self.sizeof(name) for q, (name, _, path) in split}

    # ---- questions by id ----

    def type(self, type_id: int) -> Type:
        """The type with that id."""
        owner, at, kind = self.record(type_id)
        if not type_id:
            return Type(0, kind, "")
        words = owner.words
        name_off, info, third = words[at : at + 3]
        name = owner.string(name_off)
        flag = bool(info >> 31)
        match kind:
            case Kind.INT:
                encoding = words[at + 3]
                return Int(type_id, kind, name, third, encoding & 0xFF, encoding >> 16 & 0xFF, bool(encoding >> 24 & 1))
            case Kind.FLOAT:
                return Int(type_id, kind, name, third, third * 8, 0, True)
            case Kind.ARRAY:
                return Array(type_id, kind, name, *words[at + 3 : at + 6])
            case Kind.STRUCT | Kind.UNION:
                members = tuple(owner._member(*fields) for fields in owner._members(at))
                return Struct(type_id, kind, name, third, members)
            case Kind.ENUM:
                sign = 1 << 31 if flag else 0
                values = {owner.string(n): (value ^ sign) - sign for n, value in owner.elements(at, 2)}
                return Enum(type_id, kind, name, third, flag, values)
            case Kind.ENUM64:
                sign = 1 << 63 if flag else 0
                values = {owner.string(n): ((h << 32 | low) ^ sign) - sign for n, low, h in owner.elements(at, 3)}
                return Enum(type_id, kind, name, third, flag, values)
            case Kind.FWD:
                return Fwd(type_id, kind, name, flag)
            case Kind.FUNC_PROTO:
                params = tuple(Param(owner.string(n), t) for n, t in owner.elements(at, 2))
                variadic = params[-1:] == (Param("", 0),)
                return Function(type_id, kind, name, params[:-1] if variadic else params, third, variadic)
            case Kind.FUNC:
                if owner.record(third)[2] != Kind.FUNC_PROTO:
                    raise BtfError(f"BTF function {name!r} has type {third}, which is no function's type")
                proto = owner.type(third)
                assert isinstance(proto, Function)
                return Function(type_id, kind, name, proto.params, proto.returns, proto.variadic, info & 0xFFFF)
            case Kind.VAR:
                return Variable(type_id, kind, name, third, words[at + 3])
            case Kind.DATASEC:
                return Section(type_id, kind, name, third, tuple((v, o, s) for v, o, s in owner.elements(at, 3)))
            case Kind.DECL_TAG:
                component = words[at + 3]
                return Ref(type_id, kind, name, third, component - (component >> 31 << 32), flag)
            case Kind.UNKN:
                return Type(type_id, kind, name)
        return Ref(type_id, kind, name, third, attribute=flag)

    def resolve(self, type_id: int) -> Type:
        """The type behind typedefs, ``const``, ``volatile``, ``restrict`` and type tags."""
        return self.type(self._resolve(type_id))

    def describe(self, type_id: int, name: str = "") -> str:
        """The type in C, or with ``name`` the declaration of something of that type: ``int (*name)(void *)``.

        Functions and variables are declared by their own names. What has no name is shown as ``struct {...}``.
        """
        owner, at, kind = self.record(type_id)
        if kind in (Kind.FUNC, Kind.VAR):
            return owner._declare(owner.words[at + 2], name or owner.name_at(at), 0)
        return owner._declare(type_id, name, 0)

    # ---- C ----

    def _declare(self, type_id: int, inner: str, depth: int) -> str:
        """C's declarators read inside out: wrap ``inner`` in pointers, arrays and parameters down to a named type."""
        qualifiers: list[str] = []
        for _ in range(_MAX_DEPTH):
            owner, at, kind = self.record(type_id)
            if len(inner) > _MAX_TEXT or depth > _MAX_DEPTH:
                break
            if kind in _QUALIFIERS:
                qualifiers.append(_QUALIFIERS[kind])
            elif kind == Kind.TYPE_TAG:
                tag = owner.name_at(at)
                qualifiers.append(f"__attribute__(({tag}))" if owner.words[at + 1] >> 31 else f"__{tag}")
            elif kind == Kind.PTR:
                pointer = "*" + " ".join(qualifiers)
                inner = f"{pointer} {inner}" if qualifiers and inner else pointer + inner
                qualifiers = []
            elif kind == Kind.ARRAY:
                type_id, _, length = owner.words[at + 3 : at + 6]
                inner = f"{_grouped(inner)}[{length or ''}]"
                continue
            elif kind == Kind.FUNC_PROTO:
                inner = f"{_grouped(inner)}({owner._parameters(at, depth + 1)})"
                qualifiers = []  # `const` of a function means nothing in C
            else:
                before = [q for q in qualifiers if not q.startswith("__")]
                after = [q for q in qualifiers if q.startswith("__")]  # char __user *
                text = " ".join([*before, owner._base_name(type_id, at, kind), *after])
                return text + ("" if inner[:1] in ("", "[") else " ") + inner
            type_id = owner.words[at + 2]
        raise _too_deep(type_id)

    def _parameters(self, at: int, depth: int) -> str:
        shown: list[str] = []
        size = 0
        for name, type_id in self.elements(at, 2):
            shown.append(self._declare(type_id, self.string(name), depth) if type_id else "...")
            size += len(shown[-1])
            if size > _MAX_TEXT:
                raise _too_deep(type_id)
        return ", ".join(shown) or "void"

    def _base_name(self, type_id: int, at: int, kind: Kind) -> str:
        if not type_id:
            return "void"
        name = self.name_at(at)
        match kind:
            case Kind.STRUCT | Kind.UNION | Kind.ENUM | Kind.ENUM64:
                return f"{'enum' if kind == Kind.ENUM64 else kind.name.lower()} {name or '{...}'}"
            case Kind.FWD:
                return f"{'union' if self.words[at + 1] >> 31 else 'struct'} {name}"
        return name or f"<{kind.name} {type_id}>"

    # ---- names ----

    def _find(self, kinds: tuple[Kind, ...], name: str) -> int:
        """The id of the first type of that name whose kind is earliest in `kinds`."""
        later: dict[Kind, int] = {}
        for type_id, kind in self.named(name):
            if kind == kinds[0]:
                return type_id
            later.setdefault(kind, type_id)
        for kind in kinds:
            if kind in later:
                return later[kind]
        if self.base is not None:
            return self.base._find(kinds, name)
        what = "function" if kinds[0] == Kind.FUNC else kinds[0].name.lower()
        raise BtfLookupError(f"this kernel's BTF has no {what} {name!r}")

    def _resolve(self, type_id: int) -> int:
        for _ in range(_MAX_DEPTH):
            owner, at, kind = self.record(type_id)
            if kind not in _TRANSPARENT:
                return type_id
            type_id = owner.words[at + 2]
        raise _too_deep(type_id)

    # ---- members ----

    def _aggregate(self, name: str) -> int:
        type_id = self._resolve(self._find((*_AGGREGATES, Kind.TYPEDEF), name))
        if self.record(type_id)[2] not in _AGGREGATES:
            raise BtfLookupError(f"{name} is {self.describe(type_id)} in this kernel, which has no members")
        return type_id

    def _members(self, at: int) -> Iterator[tuple[str, int, int, int]]:
        """Name, type, position in bits and width of a bit-field (else 0) of a record's members.

        With kind_flag set an offset holds the width in its upper 8 bits.
        """
        flag = self.words[at + 1] >> 31
        for name, type_id, offset in self.elements(at, 3):
            yield self.string(name), type_id, offset & 0xFFFFFF if flag else offset, offset >> 24 if flag else 0

    def _member(self, name: str, type_id: int, position: int, bit_size: int) -> Member:
        size = self.sizeof(type_id)
        target = self._resolve(type_id)
        if not bit_size and self.record(target)[2] == Kind.INT:
            # Before kind_flag (Linux 5.0) a bit-field had an integer type of its own, narrower than its size.
            integer = self.type(target)
            assert isinstance(integer, Int)
            if integer.bits != size * 8:
                position, bit_size = position + integer.bit_offset, integer.bits
        return Member(name, type_id, position // 8, size, position % 8, bit_size)

    def _search(self, type_id: int, name: str) -> tuple[int, int, int] | None:
        """Type, position in bits and width of a member, anonymous members looked through.

        A type without it is not looked at twice: that ends the search whatever refers to what.
        """
        todo = [(type_id, 0)]
        seen: set[int] = set()
        while todo:
            type_id, start = todo.pop()
            type_id = self._resolve(type_id)
            owner, at, kind = self.record(type_id)
            if kind not in _AGGREGATES or type_id in seen:
                continue
            seen.add(type_id)
            for member, member_type, position, bit_size in owner._members(at):
                if member == name:
                    return member_type, start + position, bit_size
                if not member:
                    todo.append((member_type, start + position))
        return None


def _grouped(inner: str) -> str:
    """A pointer to an array or function needs parentheses, or it were an array of pointers."""
    return f"({inner})" if inner.startswith("*") else inner


def _too_deep(type_id: int) -> BtfError:
    return BtfError(f"BTF type {type_id} is nested too deeply, or within itself")
