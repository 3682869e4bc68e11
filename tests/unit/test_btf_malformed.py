"""BTF that is wrong, by accident or on purpose: it is refused, or answers, and nothing loops or fails otherwise."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.kernel.btf import (
    Btf,
    BtfError,
    BtfLookupError,
    Kind,
)
from tests.btf_writer import BtfWriter, kernel_like


@pytest.mark.parametrize("kind", [Kind.TYPEDEF, Kind.CONST, Kind.PTR, Kind.ARRAY, Kind.STRUCT, Kind.FUNC_PROTO])
def test_types_within_themselves_end(kind: Kind) -> None:
    w = BtfWriter()
    match kind:
        case Kind.ARRAY:
            w.array(1, 1 << 31)
        case Kind.STRUCT:
            w.struct("s", 4, [("", 1, 0), ("", 1, 8)])
        case Kind.FUNC_PROTO:
            w.prototype(1, [("", 1), ("", 1)])
        case _:
            w.ref(kind, 1, "t")
    w.typedef("s", 1)
    btf = Btf(bytes(w))
    for question in (btf.type, btf.sizeof, btf.describe, btf.resolve):
        with contextlib.suppress(BtfError):
            question(1)
    with pytest.raises(BtfError):
        btf.member("s", "a")


def test_structures_that_multiply_are_searched_once() -> None:
    w = BtfWriter()
    for step in range(60):  # 2 ** 60 paths
        w.struct("top" if step == 0 else "", 4, [("", step + 2, 0), ("", step + 2, 32)])
    w.struct("", 4, [("leaf", w.next_id + 1, 0)])
    w.integer("int", 4)
    btf = Btf(bytes(w))
    assert btf.member("top", "leaf").size == 4
    with pytest.raises(BtfLookupError):
        btf.member("top", "nosuch")


def test_parameters_that_multiply_are_cut_short() -> None:
    w = BtfWriter()
    for step in range(30):
        w.prototype(0, [("", step + 2), ("", step + 2)])
    w.integer("int", 4)
    with pytest.raises(BtfError, match="nested too deeply"):
        Btf(bytes(w)).describe(1)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"\xeb\x9f", "magic"),
        (2, b"\2", "version 2"),
        (4, b"\x17", "header of 23"),
        (4, b"\xff\xff\xff\xff", "header"),
        (8, b"\xff\xff\xff\xff", "types end"),
        (12, b"\x0d", "13 bytes of types"),
        (12, b"\xfc\xff\xff\xff", "types end"),
        (20, b"\xff\xff\xff\xff", "strings end"),
        (20, b"\0\0\0\0", "begin and end"),
    ],
)
def test_headers_that_lie(at: int, value: bytes, message: str) -> None:
    w = BtfWriter()
    w.integer("int", 4)
    blob = bytearray(bytes(w))
    blob[at : at + len(value)] = value
    with pytest.raises(BtfError, match=message):
        Btf(bytes(blob))


def test_what_follows_the_blob_does_not_matter() -> None:
    blob = bytes(kernel_like())
    assert Btf(memoryview(blob + b"\xff" * 64)).layout(["task_struct"]) == {"task_struct": 48}
    for end in range(len(blob)):
        with pytest.raises(BtfError):
            Btf(blob[:end])


def test_ids_and_names_out_of_bounds() -> None:
    w = BtfWriter()
    w.typedef("t", 77)
    w.func("f", 1)
    w.struct("s", 8, [("m", 99, 0)])
    btf = Btf(bytes(w))
    for type_id in (-1, 4, 77, 1 << 40):
        with pytest.raises(BtfError, match="no type"):
            btf.type(type_id)
    with pytest.raises(BtfError, match="no function's type"):
        btf.function("f")
    with pytest.raises(BtfError, match="no type 99"):
        btf.struct("s")
    blob = bytearray(bytes(w))
    blob[24:28] = b"\xff\xff\0\0"  # the name of type 1
    with pytest.raises(BtfError, match="name at byte 65535"):
        Btf(bytes(blob)).type(1)


@pytest.mark.parametrize("words", [1, 2, 3, 4])
def test_a_record_beyond_the_end_of_the_types(words: int) -> None:
    w = BtfWriter()
    w.integer("int", 4)
    blob = bytearray(bytes(w))
    blob[12:16] = (16 - 4 * words).to_bytes(4, "little")
    if words < 4:
        with pytest.raises(BtfError, match="last type ends"):
            Btf(bytes(blob)).type(1)
    else:
        assert len(Btf(bytes(blob))) == 1


def ask_everything(btf: Btf) -> None:
    """Every question about every type: an answer or BtfError, nothing else."""
    with contextlib.suppress(BtfError):
        for type_id in range(min(len(btf), 50) + 1):
            for question in (btf.type, btf.sizeof, btf.describe, btf.resolve):
                with contextlib.suppress(BtfError):
                    question(type_id)
            with contextlib.suppress(BtfError):
                btf.member(type_id, "sp.x")
    for name in ("task_struct", "int", "nosuch", ""):
        for named in (btf.struct, btf.sizeof, btf.enum, btf.function, btf.typedef):
            with contextlib.suppress(BtfError):
                named(name)
        with contextlib.suppress(BtfError):
            btf.member(name, "thread.sp")


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_btf_error(data: bytes) -> None:
    for blob in (data, b"\x9f\xeb\x01\0\x18\0\0\0" + data):
        with contextlib.suppress(BtfError):
            ask_everything(Btf(blob))


@settings(max_examples=300)
@given(st.data())
def test_mutated_blobs_raise_nothing_but_btf_error(data: st.DataObject) -> None:
    w = kernel_like()
    w.func("f", w.prototype(1, [("a", 4), ("b", 5)]))
    w.datasec(".data", 8, [(w.var("v", 2), 0, 8)])
    w.enum("e", {"A": 1})
    w.enum64("e64", {"B": 1})
    w.decl_tag("tag", 3)
    w.ref(Kind.TYPE_TAG, 1, "user")
    w.floating("float", 4)
    blob = bytearray(bytes(w))
    for _ in range(data.draw(st.integers(1, 6))):
        blob[data.draw(st.integers(8, len(blob) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BtfError):
        ask_everything(Btf(bytes(blob)))


words = st.integers(0, 12)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from([k for k in Kind if k]), st.sampled_from(["", "a", "sp"]), words, words)))
def test_types_that_refer_to_anything_raise_nothing_but_btf_error(records: list[tuple[Kind, str, int, int]]) -> None:
    w = BtfWriter()
    for kind, name, a, b in records:
        match kind:
            case Kind.STRUCT | Kind.UNION:
                w.struct(name, 8, [("", a, 0), ("sp", b, 64)], kind)
            case Kind.FUNC_PROTO:
                w.prototype(a, [("p", b), ("q", a)])
            case Kind.ARRAY:
                w.array(a, b)
            case Kind.INT | Kind.VAR | Kind.DECL_TAG:
                w.record(kind, name, a, b)
            case _:
                w.record(kind, name, a)
    ask_everything(Btf(bytes(w)))
