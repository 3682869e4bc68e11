"""`-o uid=,gid=,mode=,ro`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as some

from fakefs.errors import UserError
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
    fuse = "rw,nosuid,nodev,noexec,relatime,user_id=0,group_id=0,default_permissions,allow_other,remount"
    assert MountOptions.parse(fuse) == MountOptions()


@pytest.mark.parametrize(
    "text",
    ["gid=", "gid", "gid=-1", "uid=4294967295", "uid=root", "mode=8", "mode=10000", "uid=٣", "wat\nx", "uid=1_0"],
)
def test_refused(text: str) -> None:
    with pytest.raises(UserError, match="mount option") as caught:
        MountOptions.parse(text)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


@given(OPTIONS)
def test_the_guest_is_told_all_but_ro(options: MountOptions) -> None:
    assert MountOptions.parse(options.for_guest()) == replace(options, ro=False)
