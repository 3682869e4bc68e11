"""What `fakefs run` must not do: let a program reach the host's tracefs, or change the host.

As root and as an ordinary user. Nothing here touches a real tracefs: where one is needed a ramfs stands for it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fakefs import namespace
from fakefs.errors import UserError
from fakefs.view import View, check_inherited
from tests.mount.conftest import Run
from tests.mount.perf_client import client
from tests.mounted import FAKEFS

pytestmark = pytest.mark.usefixtures("host_unchanged")


def test_the_hosts_tracepoints_are_out_of_reach(mirrored: Run) -> None:
    """A tracepoint's number in the guest is that of another one on the host: not even when nobody asks the guest."""
    done = mirrored(
        """
        for pid in $(ls /proc | grep '^[0-9]*$'); do
            [ "$(cut -d' ' -f4 /proc/$pid/stat 2>/dev/null)" = 1 ] && [ $pid != $$ ] && recorder=$pid
        done
        kill -9 $recorder
        """
        + client('print(error_of(opened, "sched/sched_switch"))')
    )
    assert done.stdout == "EIO\n"


def test_the_hosts_tracefs_is_out_of_reach(run: Run) -> None:
    """Neither mounting nor unmounting nor other processes lead there."""
    done = run("""
        cd "$(mktemp -d)" && mkdir m
        for kind in tracefs debugfs sysfs; do
            mount -i -t $kind none m 2>/dev/null && { echo "$kind could be mounted"; stat -f -c %t m; }
        done
        rmdir m "$PWD"
        for i in 1 2 3 4; do umount /sys/kernel/tracing; umount -l /sys/kernel/debug; umount -l /sys/kernel
            umount -R -l /sys; done 2>/dev/null
        for place in /sys/kernel/tracing /sys/kernel/debug/tracing /sys/kernel/debug /proc/[0-9]*/root/sys/kernel/*; do
            type=$(stat -f -c %t "$place" 2>/dev/null)
            case $type in 74726163|64626720) echo "$place is the host's";; esac
        done
        for pid in 1 $PPID; do nsenter -t $pid -m true 2>/dev/null && [ $pid != $$ ] && echo "entered $pid"; done
        awk '$3 == "tracefs" || $3 == "debugfs"' /proc/self/mounts
        true
    """)
    assert (done.stdout, done.returncode) == ("", 0)


def test_a_tracefs_of_the_hosts_elsewhere_is_covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is a file of it that is mounted on another file."""
    monkeypatch.setattr(namespace, "HOST_TRACING", {0x858458F6: "ramfs"})
    place, private, file = tmp_path / "tracing", tmp_path / "private", tmp_path / "file"
    place.mkdir()
    private.mkdir()
    file.touch()

    def outer() -> int:
        namespace.mount("ramfs", place)
        (place / "trace").write_text("host's")
        namespace.bind(place / "trace", file)
        View(private).protect(new_pids=False)
        return 0 if list(place.iterdir()) == [] and file.read_text() == "" else 1

    assert os.waitpid(namespace.fork_into(namespace.NEW_USER | namespace.NEW_MOUNTS, outer), 0)[1] == 0


def test_an_open_directory_of_the_hosts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "HOST_TRACING", {0x9FA0: "procfs"})
    fd = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(UserError, match=f"descriptor {fd} is open in the host's procfs"):
            check_inherited()
    finally:
        os.close(fd)


def test_more_namespaces_and_mounts_lead_nowhere(run: Run) -> None:
    """Nothing may be mounted anew, moved or taken away so that something of the host's comes to light."""
    done = run("""
        cd "$(mktemp -d)" && mkdir m
        inner() { unshare "$@" sh -c '
            for kind in tracefs debugfs sysfs proc; do mount -i -t $kind none m && echo "mounted $kind"; done
            for each in /sys /sys/kernel /proc/sys /proc/sysrq-trigger; do
                umount -il $each && [ $(stat -f -c %t /sys/kernel/tracing) != 65735546 ] && echo "uncovered $each"
                mount --move $each m && echo "moved $each"
            done
            mount --bind /sys m && echo "bound /sys alone"
            mount --rbind /sys m && umount -i m/kernel && echo "uncovered a copy of /sys/kernel"
            umount -il m; mount -o remount,bind,rw /sys && echo "made /sys writable"
            ls m/kernel'; }
        { inner -m; inner -Urm; inner -Urmn; inner -Urmpf; inner -UrmpfnCi --propagation unchanged; } 2>/dev/null
        rmdir m "$PWD"
    """)
    assert (done.stdout, done.returncode) == ("", 0)


def test_inherited_directories_are_those_of_the_view(environment: dict[str, str], tmp_path: Path) -> None:
    """A descriptor from outside would be a way to what is mounted there."""
    script = f"""
        for way in /proc/self/fd/8/kernel /proc/self/fd/9/{"../" * len(tmp_path.parts)}sys/kernel; do
            [ "$(stat -c %d:%i $way)" = "$(stat -c %d:%i /sys/kernel)" ] || echo $way
        done
        ls /proc/self/fd/9; [ -e /proc/self/fd/7 ] || echo gone
    """
    (tmp_path / "mine").touch()
    command = f"mkdir gone; exec 7<gone 8</sys 9<.; rmdir gone; {' '.join(FAKEFS)} run -- bash -c '{script}'"
    done = subprocess.run(
        ["bash", "-c", command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stderr, done.stdout, done.returncode) == ("", "mine\ngone\n", 0)


def test_the_hosts_settings_stay(run: Run) -> None:
    done = run("""
        echo 77 > /proc/sys/kernel/panic; cat /proc/sys/kernel/panic
        for file in /sys/power/state /sys/kernel/../block/*/queue/read_ahead_kb /proc/sysrq-trigger /proc/irq/*/x; do
            [ -e $file ] && (echo h > $file) 2>/dev/null && echo "wrote $file"
        done
        true
    """)
    assert done.stdout == "77\n"  # the guest's
