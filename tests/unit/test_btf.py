from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.kernel.btf import (
    Array,
    Btf,
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
from tests.btf_writer import SIGNED, BtfWriter, kernel_like

names = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="_"), min_size=1, max_size=12)


def test_every_kind_is_read_back() -> None:
    w = BtfWriter()
    i32 = w.integer("int", 4, SIGNED)
    written: dict[int, Type] = {i32: Int(i32, Kind.INT, "int", size=4, bits=32, bit_offset=0, signed=True)}

    def expect(type_id: int, cls: type[Type], kind: Kind, name: str, *rest: object) -> int:
        written[type_id] = cls(type_id, kind, name, *rest)
        return type_id

    pointer = expect(w.ptr(i32), Ref, Kind.PTR, "", i32)
    expect(w.array(i32, 3), Array, Kind.ARRAY, "", i32, 1, 3)
    members = (Member("a", i32, 0, 4), Member("b", pointer, 8, 8))
    expect(w.struct("s", 16, [("a", i32, 0), ("b", pointer, 64)]), Struct, Kind.STRUCT, "s", 16, members)
    expect(w.struct("u", 4, [("a", i32, 0)], Kind.UNION), Struct, Kind.UNION, "u", 4, (Member("a", i32, 0, 4),))
    expect(w.enum("e", {"A": 1, "B": 0xFFFFFFFF}), Enum, Kind.ENUM, "e", 4, False, {"A": 1, "B": 0xFFFFFFFF})
    expect(w.enum("n", {"M": -1}, signed=True), Enum, Kind.ENUM, "n", 4, True, {"M": -1})
    expect(w.enum64("e64", {"C": 1 << 63}), Enum, Kind.ENUM64, "e64", 8, False, {"C": 1 << 63})
    expect(w.enum64("n64", {"D": -2}, signed=True), Enum, Kind.ENUM64, "n64", 8, True, {"D": -2})
    expect(w.fwd("f"), Fwd, Kind.FWD, "f", False)
    expect(w.fwd("g", union=True), Fwd, Kind.FWD, "g", True)
    expect(w.typedef("t", i32), Ref, Kind.TYPEDEF, "t", i32)
    for kind in (Kind.VOLATILE, Kind.CONST, Kind.RESTRICT):
        expect(w.ref(kind, pointer), Ref, kind, "", pointer)
    expect(w.ref(Kind.TYPE_TAG, i32, "user"), Ref, Kind.TYPE_TAG, "user", i32)
    proto = w.prototype(i32, [("x", pointer)], variadic=True)
    expect(proto, Function, Kind.FUNC_PROTO, "", (Param("x", pointer),), i32, True)
    function = expect(w.func("fn", proto, 1), Function, Kind.FUNC, "fn", (Param("x", pointer),), i32, True, 1)
    variable = expect(w.var("v", i32, 1), Variable, Kind.VAR, "v", i32, 1)
    expect(w.datasec(".data", 8, [(variable, 4, 4)]), Section, Kind.DATASEC, ".data", 8, ((variable, 4, 4),))
    expect(w.floating("double", 8), Int, Kind.FLOAT, "double", 8, 64, 0, True)
    expect(w.decl_tag("kfunc", function), Ref, Kind.DECL_TAG, "kfunc", function, -1)
    expect(w.decl_tag("arg", function, 0), Ref, Kind.DECL_TAG, "arg", function, 0)

    btf = Btf(bytes(w))
    assert {type_id: btf.type(type_id) for type_id in range(1, len(btf))} == written
    assert {t.kind for t in written.values()} == set(Kind) - {Kind.UNKN}
    for expected in written.values():
        if expected.name:
            assert btf.find(expected.kind, expected.name) == expected
    assert btf.type(0) == Type(0, Kind.UNKN, "")


def test_members_are_found_by_path_and_through_anonymous_ones() -> None:
    btf = Btf(bytes(kernel_like()))
    assert btf.offsetof("task_struct", "thread.sp") == 24
    assert btf.offsetof("task_struct", "both") == 8
    assert btf.member("task_struct", "tgid") == Member("tgid", 1, offset=12, size=4)
    assert btf.member("task_struct", "comm").size == 16
    assert [m.name for m in btf.struct("task_struct").members] == ["", "thread", "comm"]
    assert btf.offsetof(btf.struct("thread_struct").id, "sp") == 8


@pytest.mark.parametrize("path", ["nosuch", "thread.nosuch", "comm.x", "pid.x", "", ".", "thread.", "thread..sp"])
def test_a_member_that_is_not_there(path: str) -> None:
    with pytest.raises(BtfLookupError, match="has no member"):
        Btf(bytes(kernel_like())).member("task_struct", path)


@pytest.mark.parametrize("name", ["nosuch", "task_struc", "ask_struct", "", "\0", "int\0long unsigned int", "pid_t"])
def test_a_structure_that_is_not_there(name: str) -> None:
    with pytest.raises(BtfLookupError):
        Btf(bytes(kernel_like())).struct(name)


def test_bit_fields() -> None:
    w = BtfWriter()
    i32 = w.integer("unsigned int", 4)
    w.bitfields("flags", 8, [("a", i32, 0, 3), ("b", i32, 13, 1), ("whole", i32, 32, 0)])
    btf = Btf(bytes(w))
    a, b, whole = btf.struct("flags").members
    assert (a.offset, a.bit_offset, a.bit_size, a.size) == (0, 0, 3, 4)
    assert (b.offset, b.bit_offset, b.bit_size, b.size) == (1, 5, 1, 4)
    assert (whole.offset, whole.bit_offset, whole.bit_size) == (4, 0, 0)
    assert btf.member("flags", "b") == b
    with pytest.raises(BtfError, match="bit-field"):
        btf.offsetof("flags", "b")


def test_bit_fields_before_kind_flag_have_a_narrow_integer() -> None:
    w = BtfWriter()
    narrow = w.typedef("narrow", w.integer("unsigned int", 4, bits=5, bit_offset=3))
    w.struct("old", 4, [("field", narrow, 8)])
    assert Btf(bytes(w)).member("old", "field") == Member("field", narrow, offset=1, size=4, bit_offset=3, bit_size=5)


def test_sizes() -> None:
    w = kernel_like()
    const = w.const(w.typedef("table", w.array(w.array(w.ptr(0), 3), 5)))
    void = w.typedef("nothing", 0)
    btf = Btf(bytes(w))
    assert btf.sizeof("task_struct") == 48
    assert btf.sizeof("pid_t") == btf.sizeof("int") == 4
    assert btf.sizeof(const) == 3 * 5 * 8
    with pytest.raises(BtfError, match=r"void .* has no size"):
        btf.sizeof(void)


def test_layout_answers_can_be_kept_as_json() -> None:
    layout = Btf(bytes(kernel_like())).layout(["task_struct.thread.sp", "task_struct", "thread_struct.sp"])
    assert layout == {"task_struct.thread.sp": 24, "task_struct": 48, "thread_struct.sp": 8}
    assert json.loads(json.dumps(layout)) == layout


def test_a_typedef_names_the_structure_behind_it() -> None:
    w = BtfWriter()
    i32 = w.integer("int", 4, SIGNED)
    anonymous = w.struct("", 4, [("counter", i32, 0)])
    typedef = w.typedef("atomic_t", w.const(anonymous))
    btf = Btf(bytes(w))
    assert btf.struct("atomic_t").id == anonymous
    assert btf.offsetof("atomic_t", "counter") == 0
    assert btf.resolve(typedef) == btf.type(anonymous)
    assert btf.typedef("atomic_t").id == typedef


def test_kinds_are_told_apart_by_name() -> None:
    w = BtfWriter()
    i32 = w.integer("int", 4, SIGNED)
    typedef = w.typedef("file", i32)
    union = w.struct("file", 8, [], Kind.UNION)
    structure = w.struct("file", 4, [])
    w.struct("file", 16, [])
    function = w.func("file", w.prototype(0, []))
    btf = Btf(bytes(w))
    assert btf.struct("file").id == structure
    assert btf.find(Kind.UNION, "file").id == union
    assert btf.typedef("file").id == typedef
    assert btf.function("file").id == function
    assert btf.sizeof("file") == 4


def test_types_sorted_by_name_are_found_as_well() -> None:
    w = BtfWriter()
    anonymous = w.struct("", 4, [])
    found = {name: w.struct(name, 4, []) for name in ("a", "b", "file", "inode", "z")}
    last = w.typedef("z", anonymous)
    btf = Btf(bytes(w))
    assert {name: btf.struct(name).id for name in found} == found
    assert btf.typedef("z").id == last
    for name in ("", "A", "f", "zz"):
        with pytest.raises(BtfLookupError):
            btf.struct(name)


def test_a_name_is_not_found_across_two_others() -> None:
    w = BtfWriter()
    assert w.string("x") == 1  # as packed number 01 00 00 00
    w.string("-" * 300)
    other = w.integer("zzz", 4)  # at 0x130: 30 01 00 00, and the 00 of the next makes 01 00 00 00
    assert w.string("zzz") >> 8 == w.string("x")
    w.struct("", 4, [("a", other, 0)])
    wanted = w.integer("x", 8)
    assert Btf(bytes(w)).find(Kind.INT, "x").id == wanted


def test_types_in_c() -> None:
    w = BtfWriter()
    i32, char = w.integer("int", 4, SIGNED), w.integer("char", 1, SIGNED)
    file = w.struct("file", 8, [])
    pfile, pvoid, pchar, pconst = w.ptr(file), w.ptr(0), w.ptr(char), w.ptr(w.const(char))
    callback = w.prototype(i32, [("", pvoid)])
    shown = {
        0: "void",
        i32: "int",
        pfile: "struct file *",
        pconst: "const char *",
        w.const(pchar): "char *const",
        w.ptr(w.const(pconst)): "const char *const *",
        w.ref(Kind.RESTRICT, pchar): "char *restrict",
        w.const(w.ref(Kind.VOLATILE, i32)): "const volatile int",
        w.ptr(callback): "int (*)(void *)",
        callback: "int (void *)",
        w.prototype(0, []): "void (void)",
        w.prototype(0, [("fmt", pconst)], variadic=True): "void (const char *fmt, ...)",
        w.array(char, 16): "char[16]",
        w.array(char, 0): "char[]",
        w.array(w.array(i32, 3), 2): "int[2][3]",
        w.array(pchar, 4): "char *[4]",
        w.array(w.const(pchar), 4): "char *const [4]",
        w.ptr(w.array(i32, 4)): "int (*)[4]",
        w.const(w.array(char, 2)): "const char[2]",
        w.array(w.ptr(callback), 2): "int (*[2])(void *)",
        w.ptr(w.prototype(w.ptr(callback), [])): "int (*(*)(void))(void *)",
        w.ptr(w.ref(Kind.TYPE_TAG, w.const(char), "user")): "const char __user *",
        w.ptr(w.ref(Kind.TYPE_TAG, 0, "address_space(1)", flag=True)): "void __attribute__((address_space(1))) *",
        w.struct("", 4, [], Kind.UNION): "union {...}",
        w.enum64("big", {}): "enum big",
        w.fwd("opaque"): "struct opaque",
        w.fwd("either", union=True): "union either",
        w.typedef("u8", i32): "u8",
        w.func("vfs_read", w.prototype(w.typedef("ssize_t", i32), [("file", pfile), ("cb", w.ptr(callback))])): (
            "ssize_t vfs_read(struct file *file, int (*cb)(void *))"
        ),
        w.var("names", w.array(pchar, 2)): "char *names[2]",
    }
    btf = Btf(bytes(w))
    assert {type_id: btf.describe(type_id) for type_id in shown} == shown
    assert btf.describe(callback, "(*name)") == "int (*name)(void *)"


def test_a_module_builds_on_vmlinux() -> None:
    kernel = kernel_like()
    base = Btf(bytes(kernel))
    w = BtfWriter(kernel)
    task = base.struct("task_struct").id
    pointer = w.ptr(task)
    own = w.struct("foo_data", 16, [("owner", pointer, 0), ("sp", 2, 64)])
    shadow = w.struct("thread_struct", 8, [("mine", 2, 0)])
    btf = Btf(bytes(w), base=base)
    assert (pointer, len(btf)) == (len(base), len(base) + 3)
    assert btf.struct("foo_data").id == own
    assert btf.describe(pointer) == "struct task_struct *"
    assert btf.struct("task_struct") == base.struct("task_struct")
    assert btf.struct("thread_struct").id == shadow  # the module's own comes first
    assert btf.offsetof("foo_data", "sp") == 8
    assert btf.offsetof("task_struct", "thread.sp") == 24
    with pytest.raises(BtfLookupError):
        base.struct("foo_data")


def test_a_module_without_types_or_strings() -> None:
    kernel = kernel_like()
    base = Btf(bytes(kernel))
    btf = Btf(bytes(BtfWriter(kernel)), base=base)
    assert len(btf) == len(base)
    assert btf.struct("task_struct") == base.struct("task_struct")


def test_kinds_of_the_future_are_skipped_if_the_blob_tells_their_size() -> None:
    w = BtfWriter()
    i32 = w.integer("int", 4, SIGNED)
    unknown = w.record(20, "novel", 0, 1, 2, 3, vlen=2)  # one word, and one for each of two elements
    after = w.struct("after", 4, [("a", i32, 0)])
    with pytest.raises(BtfError, match="kind 20"):
        Btf(bytes(w)).struct("after")
    btf = Btf(w.blob(layouts=[(0, 0)] * 20 + [(4, 4)]))
    assert btf.struct("after").id == after
    assert btf.type(unknown) == Type(unknown, Kind.UNKN, "novel")
    assert btf.describe(unknown) == "novel"


members = st.lists(st.tuples(names, st.integers(0, 1 << 20)), max_size=8, unique_by=lambda member: member[0])


@given(st.dictionaries(names, members))
def test_structures_are_read_back(structures: dict[str, list[tuple[str, int]]]) -> None:
    w = BtfWriter()
    u8 = w.integer("u8", 1)
    ids = {
        name: w.struct(name, len(members), [(member, u8, offset * 8) for member, offset in members])
        for name, members in structures.items()
    }
    btf = Btf(bytes(w))
    assert len(btf) == w.next_id
    for name, members in structures.items():
        expected = tuple(Member(member, u8, offset, 1) for member, offset in members)
        assert btf.struct(name) == Struct(ids[name], Kind.STRUCT, name, len(members), expected)
        for member in expected:
            assert btf.member(name, member.name) == member


@given(st.dictionaries(names, st.integers(-(1 << 63), (1 << 63) - 1)))
def test_enumerations_are_read_back(values: dict[str, int]) -> None:
    w = BtfWriter()
    w.enum64("wide", values, signed=True)
    narrow = {name: value & 0xFFFFFFFF for name, value in values.items()}
    w.enum("narrow", narrow)
    btf = Btf(bytes(w))
    assert btf.enum("wide").values == values
    assert btf.enum("narrow").values == narrow


def test_a_constant_is_found_without_the_name_of_its_enumeration() -> None:
    w = BtfWriter()
    w.enum("", {"FIRST": 1})
    w.struct("SECOND", 4, [])  # the same name, of something else
    w.enum("", {"ZERO": 0, "SECOND": 64})
    w.enum64("wide", {"THIRD": 1 << 40}, signed=False)
    btf = Btf(bytes(w))
    assert [btf.constant(name) for name in ("FIRST", "SECOND", "ZERO", "THIRD")] == [1, 64, 0, 1 << 40]
    for name in ("wide", "FOURTH", ""):
        with pytest.raises(BtfLookupError):
            btf.constant(name)
