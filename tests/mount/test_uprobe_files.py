"""Files of the host that uprobe definitions name: how they get into the guest, and which do not."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
from pathlib import Path

import pytest

from tests.mount.conftest import MakeMount
from tests.mounted import FAKEFS, Mounted, until
from tests.uprobes import Program, in_guest


def test_links_and_modes_are_the_hosts(m: Mounted, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_bytes(b"\x90" * 5000)
    (tmp_path / "real/file").chmod(0o754)
    (tmp_path / "link").symlink_to("real")
    m.write("uprobe_events", f"p:x {tmp_path}/link/file:0x10\n")
    assert m.read("uprobe_events") == f"p:uprobes/x {tmp_path}/link/file:0x{16:016x}\n"  # as it was written
    listed = in_guest(m, f"cd {tmp_path}; readlink link; readlink -f link/file; stat -c '%a %s' link/file; ls -A real")
    assert listed.splitlines() == ["real", f"{tmp_path}/real/file", "754 5000", "file"]


def test_where_the_guest_has_a_directory_and_the_host_a_link(m: Mounted) -> None:
    m.write("uprobe_events", "p:x /bin/bash:0x4245\n")
    assert int(in_guest(m, "stat -L -c %s /bin/bash")) == os.stat("/bin/bash").st_size
    assert in_guest(m, "readlink -f /bin/bash").strip() == os.path.realpath("/bin/bash")


def test_what_the_guest_has_itself_is_left_alone(m: Mounted) -> None:
    before = in_guest(m, "stat -L -c '%i %s' /bin/sh")
    m.write("uprobe_events", "p:x /bin/sh:0x10\n")
    assert in_guest(m, "stat -L -c '%i %s' /bin/sh") == before


def test_relative_paths_start_where_the_writer_is(m: Mounted, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/file").write_bytes(bytes(100))
    done = m.sh(f"cd {tmp_path}/a/b; echo 'p:x ../file:0x10' > {m.path}/uprobe_events; cd {m.path}; cat uprobe_events")
    assert (done.stdout, done.stderr) == (f"p:uprobes/x ../file:0x{16:016x}\n", "")
    assert in_guest(m, f"stat -c %s {tmp_path}/a/file; pwd") == "100\n/\n"
    done = m.sh("echo 'p:x ./init:0x10' >> uprobe_events")  # the guest has an /init, but this is not where we are
    assert "No such file or directory" in done.stderr


def test_a_changed_file_is_brought_anew(m: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    m.write("uprobe_events", f"p:x {path}:0x0\n")
    assert in_guest(m, f"cat {path}") == "old"
    path.write_bytes(b"newer")
    m.write("uprobe_events", f"p:y {path}:0x0\n", append=True)
    assert in_guest(m, f"cat {path}") == "newer"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        m.write("uprobe_events", f"p:z {path}:0x0\n", append=True)
    path.mkdir()
    with pytest.raises(OSError, match="Invalid argument"):
        m.write("uprobe_events", f"p:z {path}:0x0\n", append=True)
    assert path.is_dir()


def test_a_link_that_leads_elsewhere_now(m: Mounted, tmp_path: Path) -> None:
    link = tmp_path / "link"
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        m.write("uprobe_events", f"p:x {link}:0x0\n")
        assert in_guest(m, f"cat {link}") == name


def test_odd_names(m: Mounted, tmp_path: Path) -> None:
    names = [b"a:b:c", b"\xff\xfe", b"x" * 255, b"#a"]
    for name in names[:3]:
        path = os.fsencode(tmp_path) + b"/" + name
        with open(path, "wb") as file:
            file.write(bytes(64))
        with open(os.fsencode(m.path) + b"/uprobe_events", "ab", buffering=0) as file:
            file.write(b"p:x " + path + b":0x10\n")
        assert m.sh("cat uprobe_events").stdout.encode("latin-1") == b"p:uprobes/x %b:0x%016x\n" % (path, 16)
        m.write("uprobe_events", "")
    (tmp_path / "with blank").write_bytes(bytes(64))
    with pytest.raises(OSError, match="Invalid argument"):
        m.write("uprobe_events", f"p:x {tmp_path}/with blank:0x10\n")


# ---- errors


def test_what_is_no_regular_file(m: Mounted, tmp_path: Path) -> None:
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
        (f"{m.path}/trace", "No such file or directory", "Failed to find the given file"),
        (f"{m.path}/../{m.path.name}/trace", "No such file or directory", "Failed to find the given file"),
    ):
        with pytest.raises(OSError, match=says):
            m.write("uprobe_events", f"p:x {name}:0x10\n")
        log = m.read("error_log").splitlines()[-3:]
        assert log[0].endswith(f"trace_uprobe: error: {logged}"), name
        assert log[1] == f"  Command: p:x {name}:0x10"
        assert log[2].index("^") == log[1].index("/")


def test_one_bad_definition_among_good_ones(m: Mounted, tmp_path: Path) -> None:
    for name in ("a", "c"):
        (tmp_path / name).write_bytes(bytes(64))
    with pytest.raises(FileNotFoundError):
        m.write("uprobe_events", "".join(f"p:{name} {tmp_path}/{name}:0x0\n" for name in "abc"))
    assert m.read("uprobe_events").split()[::2] == ["p:uprobes/a"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else, and mount for others")
def test_others_get_only_what_they_may_read(new_mount: MakeMount, tmp_path: Path) -> None:
    mount = new_mount()
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
    mount.path.chmod(0o755)
    (mount.path / "uprobe_events").chmod(0o666)
    done = mount.sh(script)
    assert "secret" not in mount.read("uprobe_events")
    assert f"{tmp_path}/open" in mount.read("uprobe_events"), done
    assert "Permission denied" in done.stderr
    mount.stop()


def test_too_big(m: Mounted, tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="File too large"):
        m.write("uprobe_events", f"p:x {big}:0x0\n")
    assert m.read("uprobe_events") == ""
    assert in_guest(m, f"ls -A {tmp_path}") == ""


def test_no_room(m: Mounted, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    in_guest(m, "mkdir -p /tmp/full && mount -t tmpfs -o size=1M none /tmp/full")
    try:
        in_guest(m, f"mkdir -p {tmp_path} && mount --bind /tmp/full {tmp_path}")
        with pytest.raises(OSError, match="No space left on device"):
            m.write("uprobe_events", f"p:x {path}:0x0\n")
        assert in_guest(m, f"ls -A {tmp_path}") == ""
    finally:
        m.exec("sh", "-c", f"umount {tmp_path}; umount /tmp/full")


def test_two_writers_at_once(m: Mounted, tmp_path: Path) -> None:
    errors: list[OSError] = []

    def write(writer: int) -> None:
        try:
            for number in range(5):
                path = tmp_path / f"file{number}"
                m.write("uprobe_events", f"p:w{writer}n{number} {path}:0x{writer}\n", append=True)
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
    assert len(m.read("uprobe_events").splitlines()) == 15


def test_nothing_hangs_on_a_path_that_hangs(m: Mounted, tmp_path: Path) -> None:
    """A path through a FIFO or our own mount ends at once, and the mount goes on answering."""
    os.mkfifo(tmp_path / "fifo")
    writer = m.popen(["bash", "-c", f"echo 'p:x {tmp_path}/fifo:0' > uprobe_events"], stderr=subprocess.DEVNULL)
    until(lambda: writer.poll() is not None, 20, "the writer's end")
    assert m.read("tracing_on") == "1\n"


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
