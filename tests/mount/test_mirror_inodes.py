"""What probes find in the inode of a mirrored file: the host's size, mode, owners, and of several names the same."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from fakefs.records import Record
from tests.mount.conftest import Run
from tests.mount.mirrored import GUEST, SETUP, SHOW, hits

# Offsets in struct dentry and struct inode, the same in Debian's kernels from 6.1 to 7.2.
_INODE, _NAME, _SIZE = 0x30, 0x28, 0x50
_PROBES = f"""
    echo 'p:gone vfs_unlink name=+0(+{_NAME}($arg3)):string size=+{_SIZE}(+{_INODE}($arg3)):s64' > kprobe_events
    echo 'p:truncated do_truncate name=+0(+{_NAME}($arg2)):string size=+{_SIZE}(+{_INODE}($arg2)):s64' >> kprobe_events
    echo 'p:truncates vfs_truncate' >> kprobe_events
    on kprobes
    cd "$OLDPWD"
"""


def sizes(seen: list[Record]) -> dict[str, int]:
    """Return the sizes that files had when rm removed them, by their names."""
    return {
        str(hit.fields["name"]): int(str(hit.fields["size"])) for hit in seen if (hit.event, hit.task) == ("gone", "rm")
    }


@pytest.mark.parametrize("mirror", ["files", "all"])
def test_probes_see_the_hosts_sizes(mirrored: Run, tmp_path: Path, mirror: str) -> None:
    """However a file got its size, and though nobody told of the writes; and who sets it does not show."""
    (tmp_path / "there").write_text("hello")
    done = mirrored(
        SETUP
        + _PROBES
        + """
        cat there > /dev/null; rm there
        echo aaaa > twice; echo bb > twice; echo cc >> twice; rm twice
        printf %05000d > moved; mkdir dir; mv moved dir/here; rm dir/here
        : > empty; rm empty
        echo text > one; ln one other; echo more > one; echo else >> other; rm one; rm other
        truncate -s 3T sparse; rm sparse
        """
        + SHOW,
        mirror,
    )
    seen = hits(done)
    expected = {"there": 5, "twice": 6, "here": 5000, "empty": 0, "one": 10, "other": 10, "sparse": 3 << 40}
    assert sizes(seen) == expected
    truncated = [(hit.fields["name"], hit.fields["size"], hit.task) for hit in seen if hit.event == "truncated"]
    assert truncated[:2] == [("twice", 5, "bash"), ("one", 5, "bash")]
    assert {hit.task for hit in seen if hit.event != "gone"} == {"bash", "truncate"}
    assert "truncates" not in {hit.event for hit in seen}


@pytest.mark.parametrize("mirror", ["files", "all"])
def test_sizes_of_programs(mirrored: Run, mirror: str) -> None:
    """What stands for them in the guest has the size of each, and can be executed still, however small that is."""
    done = mirrored(
        SETUP
        + _PROBES
        + r"""
        T=/sys/kernel/tracing; echo 1 > $T/events/sched/sched_process_exec/enable
        cp "$(type -P true)" large; printf '#!/bin/true' > small; chmod +x small
        sleep 1000 & until mapfile -t lines < $T/trace; [[ "${lines[*]}" == *filename=*/sleep* ]]; do :; done
        for i in 1 2 3; do ./large; ./small; cat small large > /dev/null; : < small; done
        ln large again; mv small tiny; exec 2> /dev/null; kill $!; wait; stat -c %s large; rm again tiny large
        """
        + SHOW,
        mirror,
    )
    seen = hits(done)
    large = int(done.stdout.split()[0])
    assert sizes(seen) == {"large": large, "again": large, "tiny": 11}
    executed = [hit.fields["filename"] for hit in seen if hit.event == "sched_process_exec"]
    assert executed.count("./large") == executed.count("./small") == 3


def test_sizes_of_odd_files(mirrored: Run) -> None:
    """Names of any bytes, by links and from a removed directory; sizes beyond everything; what has none."""
    done = mirrored(
        SETUP
        + _PROBES
        + r"""
        bad=$'\xff\xfe'; echo one > "$bad"; ln -s "$bad" link; ln -s link again; echo two >> again; rm link "$bad"
        ln -s loop loop; { echo x > loop; } 2> /dev/null; rm loop
        mkdir gone; cd gone; rmdir ../gone; { echo x > file; } 2> /dev/null; echo three > ../up; cd ..; rm up
        truncate -s 2T huge; cat huge 2> /dev/null | head -c 1 > /dev/null; rm huge
        dd if=/dev/zero of=far bs=1 seek=1T count=1 status=none; truncate -s -1 far; rm far
        mkfifo fifo; (echo through > fifo &); cat fifo > /dev/null; rm fifo
        python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'; cat socket 2> /dev/null; rm socket
        """
        + SHOW,
    )
    seen = sizes(hits(done))
    links = {"link": 2, "loop": 4}
    assert {name: seen.pop(name) for name in links} == links
    assert seen.pop("\udcff\udcfe") == 8
    assert seen == {"up": 6, "huge": 2 << 40, "far": 1 << 40, "fifo": 0, "socket": 0}


def test_a_size_that_others_change(mirrored: Run, tmp_path: Path) -> None:
    """Nothing tells of it: it grows, shrinks, and is gone entirely when the file is looked at."""
    for name in ("grows", "shrinks", "empties"):
        (tmp_path / name).write_text("hello")
    (tmp_path / "changes").write_text(
        """
        until [ -e ready ]; do sleep 0.01; done
        truncate -s 1000 grows; truncate -s 2 shrinks; truncate -s 0 empties; touch changed
        """
    )
    with subprocess.Popen(["sh", "changes"], cwd=tmp_path):
        done = mirrored(
            SETUP
            + _PROBES
            + """
            cat grows shrinks empties > /dev/null
            touch ready; until [ -e changed ]; do :; done
            cat grows shrinks empties > /dev/null; rm grows shrinks empties
            """
            + SHOW
        )
    assert sizes(hits(done)) == {"grows": 1000, "shrinks": 2, "empties": 0}


_FILES = "there copy plain program sticky group fifo link"
_LISTING = f"stat -c '%n %f %u %g' {_FILES}; stat -c '%n %s' there copy plain"


def test_modes_and_owners(mirrored: Run, tmp_path: Path) -> None:
    """As they are, and as they become, with the bits that chown(2) takes away."""
    there = tmp_path / "there"
    there.write_text("hello")
    if os.geteuid() == 0:
        os.chown(there, 7, 8)
    there.chmod(0o6755)
    done = mirrored(
        GUEST
        + f"""
        printf 12345 > plain; chmod 640 plain; cp -p there copy; : > program; chmod 4755 program
        mkdir -m 1777 sticky; mkdir -m 2750 group; mkfifo -m 600 fifo; ln -s plain link
        for i in 1 2; do
            {_LISTING}
            guest sh -c "cd /host$PWD; {_LISTING}"
            chmod 604 plain; chown 7:8 plain program copy 2> /dev/null
        done
        """,
        "all",
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    host, guest, host_then, guest_then = (lines[at : at + 11] for at in range(0, 44, 11))
    assert guest == host
    assert guest_then == host_then
    assert host[0].startswith(f"there {stat.S_IFREG | 0o6755:x} ")
