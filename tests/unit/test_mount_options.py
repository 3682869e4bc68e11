"""`-o uid=,gid=,mode=,ro`."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as some

from fakefs.errors import UserError
from fakefs.files import Stat
from fakefs.fuse.options import MountOptions

IDS = some.none() | some.integers(0, 0xFFFF_FFFE)
OPTIONS = some.builds(MountOptions, uid=IDS, gid=IDS, mode=some.none() | some.integers(0, 0o7777), ro=some.booleans())


@given(OPTIONS)
def test_written_and_parsed(options: MountOptions) -> None:
    assert MountOptions.parse(str(options)) == options


@given(some.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with suppress(UserError):
        MountOptions.parse(text)


def test_what_mount_and_fstab_add_changes_nothing() -> None:
    assert MountOptions.parse("rw,nosuid,nodev,noexec,relatime,defaults, nofail,") == MountOptions()
    assert MountOptions.parse("ro,gid=5,gid=6,rw,mode=0755") == MountOptions(gid=6, mode=0o755)


@pytest.mark.parametrize(
    "text",
    ["gid=", "gid", "gid=-1", "uid=4294967295", "uid=root", "mode=8", "mode=10000", "uid=٣", "wat\nx", "uid=1_0"],
)
def test_refused(text: str) -> None:
    with pytest.raises(UserError, match="mount option") as caught:
        MountOptions.parse(text)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


def test_applied_to_what_the_guest_says() -> None:
    stat = Stat(0o40700, 2, 1, 2, 0, 7, 4096, 0, 0, 0)
    assert MountOptions().apply(stat, is_root=True) is stat
    shown = MountOptions(uid=3, mode=0o1755).apply(stat, is_root=True)
    assert (shown.mode, shown.uid, shown.gid) == (0o41755, 3, 2)
    shown = MountOptions(gid=4, mode=0o755).apply(stat)
    assert (shown.mode, shown.uid, shown.gid) == (0o40700, 1, 4)
