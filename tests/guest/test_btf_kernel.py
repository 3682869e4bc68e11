"""The BTF of a real kernel, held against what bpftool and pahole read in it. No guest is booted."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from emulator.kernel.btf import Btf, Enum, Function, Kind, Struct
from emulator.kernel.image import KernelImage

STRUCTURES = ["task_struct", "kprobe", "trace_event_call", "file", "dentry", "sk_buff", "pt_regs", "perf_event_attr"]


@pytest.fixture(scope="module")
def blob(kernel_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("btf") / "vmlinux"
    path.write_bytes(KernelImage.load(kernel_path).btf())
    return path


@pytest.fixture(scope="module")
def btf(blob: Path) -> Btf:
    return Btf(blob.read_bytes())


def run(*command: str | Path) -> str:
    program = shutil.which(command[0]) or shutil.which(command[0], path="/usr/sbin:/sbin")
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run([program, *command[1:]], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def dump(blob: Path) -> list[dict[str, Any]]:
    """Every type as bpftool sees it."""
    types: list[dict[str, Any]] = json.loads(run("bpftool", "--json", "btf", "dump", "file", blob))["types"]
    return types


def test_every_type_is_the_one_bpftool_reads(btf: Btf, dump: list[dict[str, Any]]) -> None:
    assert len(btf) == len(dump) + 1
    for theirs in dump:
        ours = btf.type(theirs["id"])
        assert (ours.kind.name, ours.name or "(anon)") == (theirs["kind"], theirs["name"])
        assert theirs.get("size", 0) == getattr(ours, "size", 0)
        if isinstance(ours, Struct):
            assert [(m.name or "(anon)", m.type, m.offset * 8 + m.bit_offset, m.bit_size) for m in ours.members] == [
                (m["name"], m["type_id"], m["bits_offset"], m.get("bitfield_size", 0)) for m in theirs["members"]
            ]
        elif isinstance(ours, Enum):
            # bpftool 7.1 extends the sign of 32-bit values that have none.
            mask = (1 << ours.size * 8) - 1
            values = {name: value & mask for name, value in ours.values.items()}
            assert values == {value["name"]: value["val"] & mask for value in theirs["values"]}
        elif isinstance(ours, Function) and ours.kind == Kind.FUNC_PROTO:
            assert ours.returns == theirs["ret_type_id"]
            params = [(param.name or "(anon)", param.type) for param in ours.params]
            assert params + [("(anon)", 0)] * ours.variadic == [(p["name"], p["type_id"]) for p in theirs["params"]]
        elif "type_id" in theirs and not isinstance(ours, Function):
            assert getattr(ours, "type", None) == theirs["type_id"]


@pytest.mark.parametrize("name", STRUCTURES)
def test_offsets_and_sizes_are_those_pahole_prints(btf: Btf, blob: Path, name: str) -> None:
    text = run("pahole", "-F", "btf", blob, "-C", name)
    end = re.search(r"^\t/\* size: (\d+),", text, re.MULTILINE)
    assert end is not None
    assert btf.sizeof(name) == int(end[1])
    # "	unsigned int   on_rq:1;   /*  1234: 5  4 */": members declared directly are indented by one tab.
    shown = re.findall(r"^\t\S.*/\*\s+(\d+)(?::\s*(\d+))?\s+(\d+) \*/$", text, re.MULTILINE)
    assert [(m.offset * 8 + m.bit_offset, m.size) for m in btf.struct(name).members] == [
        (int(offset) * 8 + int(bit or 0), int(size)) for offset, bit, size in shown
    ]


def test_every_type_has_a_declaration(btf: Btf) -> None:
    assert all(btf.describe(type_id) for type_id in range(len(btf)))


def test_what_users_ask_for(btf: Btf) -> None:
    read = btf.function("vfs_read")
    assert [param.name for param in read.params] == ["file", "buf", "count", "pos"]
    assert re.fullmatch(
        r"ssize_t vfs_read\(struct file \*file, char (__user )?\*buf, size_t count, loff_t \*pos\)",
        btf.describe(read.id),
    )
    assert btf.describe(btf.member("task_struct", "comm").type, "comm") == "char comm[16]"
    assert btf.enum("pid_type").values["PIDTYPE_TGID"] == 1
    assert btf.sizeof("pt_regs") == 168
    assert btf.offsetof("pt_regs", "orig_ax") == 120
    assert btf.offsetof("task_struct", "thread.sp") == (
        btf.offsetof("task_struct", "thread") + btf.offsetof("thread_struct", "sp")
    )
    assert btf.member("file", "f_path.dentry").size == 8
