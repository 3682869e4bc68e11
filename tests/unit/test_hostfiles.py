"""Which files of the host are wanted in the guest, and finding them with the rights of who wants them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from fakefs.files import Caller
from fakefs.hostfiles.definitions import named_files, takes_uprobes
from fakefs.hostfiles.look import Found, acting_as, find

ME = Caller(os.getpid(), os.geteuid(), os.getegid())
STRANGER = Caller(os.getpid(), 65534, 65534)

# What argv_split() takes for the end of a word, the comment sign and the end of the text.
ENDS = b" \t\n\v\f\r\xa0#\0"
PATHS = some.lists(some.binary(min_size=1, max_size=20).filter(lambda name: not set(name) & set(ENDS)), min_size=1).map(
    lambda names: b"/" + b"/".join(names)
)
KINDS = some.sampled_from([b"p", b"r", b"p:name", b"r:group/name", b"p:group/", b"r5:name"])
OFFSETS = some.sampled_from([b"0", b"0x4245c0", b"0x10(0x20)", b"0x10%return", b"7zz"])
REST = some.sampled_from([b"", b" a=%di", b" s=+0(%di):string # p:x /not/this:0", b"\tx=@+0x20:x32"])


@given(some.binary())
def test_any_write_is_looked_through(written: bytes) -> None:
    for path in named_files(written):
        assert path in written


@given(some.lists(some.tuples(KINDS, PATHS, OFFSETS, REST), max_size=10))
def test_every_definition_names_its_file(parts: list[tuple[bytes, bytes, bytes, bytes]]) -> None:
    written = b"".join(b"%b %b:%b%b\n" % part for part in parts)
    assert named_files(written) == list(dict.fromkeys(path for _, path, _, _ in parts))


@pytest.mark.parametrize(
    ("written", "paths"),
    [
        (b"p:x vfs_read\np:y /bin/bash:0x10\n-:x\n", [b"/bin/bash"]),
        (b"p /a:b/c:0x10", [b"/a:b/c"]),
        (b"  r:x\tbin/./bash:1\n", [b"bin/./bash"]),
        (b"p:x ./a.out:0\np:y ../b:0\np:z ./a.out:4", [b"./a.out", b"../b"]),
        (b"# p:x /bin/bash:0x10\n", []),
        (b"w:x /bin/bash:0x10\n", []),
        (b"-:x /bin/bash:0x10\n!p:x /bin/bash:0\n", []),
        (b"p:x /bin/bash\np:x /bin/bash:\np:x /bin/bash:sym\np:x a.out:0x10\np:x\np\n", []),
        (b"p:x /\xff\xfe:0x10", [b"/\xff\xfe"]),
        (b"p:x /a\xc3\xa0:0x10", []),  # its second byte is a blank to the kernel, which sees two words
        (b"p:x /bin/bash:0x10\n" + b"#" * 5000, [b"/bin/bash"]),
    ],
)
def test_named_files(written: bytes, paths: list[bytes]) -> None:
    assert named_files(written) == paths


def test_takes_uprobes() -> None:
    assert takes_uprobes(b"/sys/kernel/tracing/uprobe_events")
    assert takes_uprobes(b"/sys/kernel/debug/tracing/dynamic_events")
    assert not takes_uprobes(b"/sys/kernel/tracing/kprobe_events")


# ---- finding


def walk(path: Path | str, caller: Caller = ME) -> tuple[list[tuple[str, str]], bytes | None]:
    """The kinds and paths of the steps, "l" with the target; and what was read."""
    found = find(caller, os.fsencode(path))
    try:
        steps = [
            (stat.filemode(step.mode)[0], os.fsdecode(step.path + (b" " + step.target if step.target else b"")))
            for step in found.steps
        ]
        return steps, found.read() if found.fd >= 0 else None
    finally:
        found.close()


def below(path: Path, steps: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave out the way to the test's own directory."""
    return [(kind, where.replace(str(path), "")) for kind, where in steps if where.startswith(f"{path}/")]


def test_a_file_and_the_directories_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").write_bytes(b"text")
    steps, text = walk(f"{tmp_path}/./a//../a/b")
    assert steps[0] == ("d", "/" + tmp_path.parts[1])
    assert below(tmp_path, steps) == [("d", "/a"), ("d", "/a"), ("-", "/a/b")]
    assert text == b"text"


def test_links_are_followed_and_told(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "usr/bin/vi").symlink_to(f"{tmp_path}/etc")
    (tmp_path / "etc").symlink_to("usr/../usr/bin/vim")
    (tmp_path / "usr/bin/vim").write_bytes(b"vim")
    steps, text = walk(tmp_path / "bin/vi")
    assert text == b"vim"
    assert below(tmp_path, steps)[:4] == [
        ("l", "/bin usr/bin"),
        ("d", "/usr"),
        ("d", "/usr/bin"),
        ("l", f"/usr/bin/vi {tmp_path}/etc".replace(str(tmp_path), "")),
    ]
    assert below(tmp_path, steps)[-1] == ("-", "/usr/bin/vim")


def test_a_walk_ends_where_there_is_no_way_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    for path, last in (
        ("none/x", None),
        ("x" * 300, None),
        ("fifo", ("p", "/fifo")),
        ("loop", ("l", "/loop loop")),
    ):
        steps, text = walk(tmp_path / path)
        assert below(tmp_path, steps)[-1:] == ([last] if last else [])
        assert text is None


def test_what_is_no_place_for_programs_is_not_entered() -> None:
    for path in ("/proc/self/exe", "/proc/version", "/sys/kernel/notes"):
        steps, text = walk(path)
        assert (steps, text) == ([], None)


def test_bytes_of_any_kind_can_be_a_name(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff \xfe:1"
    with open(path, "wb") as file:
        file.write(b"odd")
    assert walk(os.fsdecode(path))[1] == b"odd"


def test_a_caller_who_may_not_read_gets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    with pytest.raises(PermissionError):
        find(STRANGER, os.fsencode(path))
    assert walk(path)[1] == b"secret"  # this thread is itself again


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for others")
def test_root_acts_for_others_with_their_rights(tmp_path: Path) -> None:
    secret, groups = tmp_path / "secret", os.getgroups()
    secret.write_bytes(b"secret")
    secret.chmod(0o640)
    os.chown(secret, 0, 12345)
    tmp_path.chmod(0o755)
    directory = os.open(tmp_path, os.O_PATH)  # the way to it is pytest's own user's alone
    try:
        for gids, may in (([], False), ([12345], True)):
            with acting_as(STRANGER, gids):
                assert os.getgroups() == gids
                assert _can_read("secret", directory) is may
            assert os.getgroups() == groups
            assert _can_read("secret", directory)
    finally:
        os.close(directory)


def _can_read(name: str, directory: int) -> bool:
    try:
        os.close(os.open(name, os.O_RDONLY, dir_fd=directory))
    except PermissionError:
        return False
    return True


def test_the_unknown_find_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for tid in (0, 4194304 + 1):
        assert find(Caller(tid, 0, 0), os.fsencode(tmp_path / "file")) == Found()
