"""Files of the host that uprobe definitions name: how they get into the guest, and which do not."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
from pathlib import Path

import pytest

from fakefs.testbed import Tracefs
from tests.mounted import FAKEFS, popen, until
from tests.uprobes import Program


def test_links_and_modes_are_the_hosts(tracefs: Tracefs, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_bytes(b"\x90" * 5000)
    (tmp_path / "real/file").chmod(0o754)
    (tmp_path / "link").symlink_to("real")
    tracefs.write("uprobe_events", f"p:x {tmp_path}/link/file:0x10\n")
    assert tracefs.read("uprobe_events") == f"p:uprobes/x {tmp_path}/link/file:0x{16:016x}\n"  # as it was written
    look = f"cd {tmp_path}; readlink link; readlink -f link/file; stat -c '%a %s' link/file; ls -A real"
    assert tracefs.guest(look).stdout.splitlines() == ["real", f"{tmp_path}/real/file", "754 5000", "file"]


def test_where_the_guest_has_a_directory_and_the_host_a_link(tracefs: Tracefs) -> None:
    tracefs.write("uprobe_events", "p:x /bin/bash:0x4245\n")
    assert int(tracefs.guest("stat -L -c %s /bin/bash").stdout) == os.stat("/bin/bash").st_size
    assert tracefs.guest("readlink -f /bin/bash").stdout.strip() == os.path.realpath("/bin/bash")


def test_what_the_guest_has_itself_is_left_alone(tracefs: Tracefs) -> None:
    before = tracefs.guest("stat -L -c '%i %s' /bin/sh").stdout
    tracefs.write("uprobe_events", "p:x /bin/sh:0x10\n")
    assert tracefs.guest("stat -L -c '%i %s' /bin/sh").stdout == before


def test_relative_paths_start_where_the_writer_is(tracefs: Tracefs, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/file").write_bytes(bytes(100))
    done = tracefs.sh("echo 'p:x ../file:0x10' > $TRACEFS/uprobe_events", cwd=tmp_path / "a/b")
    assert (done.stderr, tracefs.read("uprobe_events")) == ("", f"p:uprobes/x ../file:0x{16:016x}\n")
    assert tracefs.guest(f"stat -c %s {tmp_path}/a/file; pwd").stdout == "100\n/\n"
    done = tracefs.sh("echo 'p:x ./init:0x10' >> uprobe_events")  # the guest has an /init, but this is not where we are
    assert "No such file or directory" in done.stderr


def test_a_changed_file_is_brought_anew(tracefs: Tracefs, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    tracefs.write("uprobe_events", f"p:x {path}:0x0\n")
    assert tracefs.guest(f"cat {path}").stdout == "old"
    path.write_bytes(b"newer")
    tracefs.write("uprobe_events", f"p:y {path}:0x0\n", append=True)
    assert tracefs.guest(f"cat {path}").stdout == "newer"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        tracefs.write("uprobe_events", f"p:z {path}:0x0\n", append=True)
    path.mkdir()
    with pytest.raises(OSError, match="Invalid argument"):
        tracefs.write("uprobe_events", f"p:z {path}:0x0\n", append=True)
    assert path.is_dir()


def test_a_link_that_leads_elsewhere_now(tracefs: Tracefs, tmp_path: Path) -> None:
    link = tmp_path / "link"
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        tracefs.write("uprobe_events", f"p:x {link}:0x0\n")
        assert tracefs.guest(f"cat {link}").stdout == name


def test_odd_names(tracefs: Tracefs, tmp_path: Path) -> None:
    names = [b"a:b:c", b"\xff\xfe", b"x" * 255, b"#a"]
    for name in names[:3]:
        path = os.fsencode(tmp_path) + b"/" + name
        with open(path, "wb") as file:
            file.write(bytes(64))
        with open(os.fsencode(tracefs.path) + b"/uprobe_events", "ab", buffering=0) as file:
            file.write(b"p:x " + path + b":0x10\n")
        shown = tracefs.read("uprobe_events").encode("utf-8", "surrogateescape")
        assert shown == b"p:uprobes/x %b:0x%016x\n" % (path, 16)
        tracefs.write("uprobe_events", "")
    (tmp_path / "with blank").write_bytes(bytes(64))
    with pytest.raises(OSError, match="Invalid argument"):
        tracefs.write("uprobe_events", f"p:x {tmp_path}/with blank:0x10\n")


# ---- errors


def test_what_is_no_regular_file(tracefs: Tracefs, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for name, says, logged in (
        (f"{tmp_path}/none", "No such file or directory", "Failed to find the given file"),
        (f"{tmp_path}/file/none", "Not a directory", "Failed to find the given file"),
        (f"{tmp_path}/loop", "Too many levels of symbolic links", "Failed to find the given file"),
        (f"{tmp_path}/directory", "Invalid argument", "Not a regular file"),
        (f"{tmp_path}/fifo", "Invalid argument", "Not a regular file"),
        ("/dev/null", "Invalid argument", "Not a regular file"),
        ("/dev/none", "No such file or directory", "Failed to find the given file"),
        ("/proc/none", "No such file or directory", "Failed to find the given file"),
        (f"{tracefs.path}/trace", "No such file or directory", "Failed to find the given file"),
        (f"{tracefs.path}/../{tracefs.path.name}/trace", "No such file or directory", "Failed to find the given file"),
    ):
        with pytest.raises(OSError, match=says):
            tracefs.write("uprobe_events", f"p:x {name}:0x10\n")
        log = tracefs.read("error_log").splitlines()[-3:]
        assert log[0].endswith(f"trace_uprobe: error: {logged}"), name
        assert log[1] == f"  Command: p:x {name}:0x10"
        assert log[2].index("^") == log[1].index("/")


def test_one_bad_definition_among_good_ones(tracefs: Tracefs, tmp_path: Path) -> None:
    for name in ("a", "c"):
        (tmp_path / name).write_bytes(bytes(64))
    with pytest.raises(FileNotFoundError):
        tracefs.write("uprobe_events", "".join(f"p:{name} {tmp_path}/{name}:0x0\n" for name in "abc"))
    assert tracefs.read("uprobe_events").split()[::2] == ["p:uprobes/a"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else, and mount for others")
def test_others_get_only_what_they_may_read(tracefs: Tracefs, tmp_path: Path) -> None:
    for name, mode in (("open", 0o644), ("secret", 0o600)):
        (tmp_path / name).write_bytes(bytes(64))
        (tmp_path / name).chmod(mode)
    for directory in (tmp_path, *tmp_path.parents[:-2]):
        directory.chmod(0o755)
    script = f"""
        for name in open secret; do
            echo "p:$name {tmp_path}/$name:0x0" | setpriv --reuid 65534 --regid 65534 --clear-groups \
                --bounding-set=-all tee -a uprobe_events
        done
        true
    """
    tracefs.path.chmod(0o755)
    (tracefs.path / "uprobe_events").chmod(0o666)
    done = tracefs.sh(script)
    assert "secret" not in tracefs.read("uprobe_events")
    assert f"{tmp_path}/open" in tracefs.read("uprobe_events"), done
    assert "Permission denied" in done.stderr


def test_too_big(tracefs: Tracefs, tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="File too large"):
        tracefs.write("uprobe_events", f"p:x {big}:0x0\n")
    assert tracefs.read("uprobe_events") == ""
    assert tracefs.guest(f"ls -A {tmp_path}").stdout == ""


def test_no_room(tracefs: Tracefs, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    tracefs.guest("mkdir -p /tmp/full && mount -t tmpfs -o size=1M none /tmp/full")
    try:
        tracefs.guest(f"mkdir -p {tmp_path} && mount --bind /tmp/full {tmp_path}")
        with pytest.raises(OSError, match="No space left on device"):
            tracefs.write("uprobe_events", f"p:x {path}:0x0\n")
        assert tracefs.guest(f"ls -A {tmp_path}").stdout == ""
    finally:
        tracefs.guest(f"umount {tmp_path}; umount /tmp/full", check=False)


def test_two_writers_at_once(tracefs: Tracefs, tmp_path: Path) -> None:
    errors: list[OSError] = []

    def write(writer: int) -> None:
        try:
            for number in range(5):
                path = tmp_path / f"file{number}"
                tracefs.write("uprobe_events", f"p:w{writer}n{number} {path}:0x{writer}\n", append=True)
        except OSError as error:
            errors.append(error)

    for number in range(5):
        (tmp_path / f"file{number}").write_bytes(bytes(100_000))
    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert len(tracefs.read("uprobe_events").splitlines()) == 15


def test_nothing_hangs_on_a_path_that_hangs(tracefs: Tracefs, tmp_path: Path) -> None:
    """A path through a FIFO or our own mount ends at once, and the mount goes on answering."""
    os.mkfifo(tmp_path / "fifo")
    writer = popen(tracefs, ["bash", "-c", f"echo 'p:x {tmp_path}/fifo:0' > uprobe_events"], stderr=subprocess.DEVNULL)
    until(lambda: writer.poll() is not None, 20, "the writer's end")
    assert tracefs.read("tracing_on") == "1\n"


def test_writers_that_are_mirrored(environment: dict[str, str], kernel_path: Path, dynamic: Program) -> None:
    """Their shadows have another root directory and a stub at the path of their program; uprobes are on a copy."""
    script = f"""
        set -e
        cd {dynamic.path.parent}
        echo 'p:echo /bin/bash:0x100' > /sys/kernel/tracing/uprobe_events
        echo 'p:adds ./measure:{dynamic.offset("add")} b=%si' >> /sys/kernel/tracing/uprobe_events
        echo 1 > /sys/kernel/tracing/events/uprobes/adds/enable
        {shlex.join(FAKEFS)} exec --host-binary -- ./measure abc || true
        cat /sys/kernel/tracing/uprobe_events
        grep -c 'measure-.*adds: .* b=0x3' /sys/kernel/tracing/trace
        : > here # the shadow is back where it was
        {shlex.join(FAKEFS)} exec -- ls /host{dynamic.path.parent}
        rm here
    """
    done = subprocess.run(
        [*FAKEFS, "run", "--mirror=files", "--kernel", str(kernel_path), "--", "/bin/bash", "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    shown = ["p:uprobes/echo", f"/bin/bash:0x{0x100:016x}", "p:uprobes/adds"]
    shown += [f"./measure:0x{dynamic.offset('add'):016x}", "b=%si"]
    assert done.stdout.split()[:7] == ["3", *shown, "1"]
    assert "here" in done.stdout.split()[7:]
