"""The FUSE layer with real programs on it and no guest: files, names, attributes, errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.fuse_daemon import Daemon


def test_plain_files(fs: Daemon) -> None:
    assert fs.out("cat tracing_on link; head -1 current_tracer; wc -c < big") == "1\n1\nnop\n4194304\n"
    ways = ("sha256sum < big", "dd if=big bs=1234 status=none | sha256sum", "cp big /dev/stdout | sha256sum")
    assert len(set(fs.out("; ".join(ways)).split())) == 2  # one sum, and "-"
    assert fs.out("tail -c +4194303 big | od -An -tx1").split() == ["fe", "ff"]
    assert fs.out("readlink link; cat $'\\xff\\xfe'") == "tracing_on\nlatin\n"


def test_offsets_and_short_reads(fs: Daemon) -> None:
    assert (
        fs.python(
            "import os; f = os.open('big', os.O_RDONLY)\n"
            "print(list(os.pread(f, 3, 254)), os.lseek(f, 100, 0), os.read(f, 1))"
        )
        == "[254, 255, 0] 100 b'd'\n"
    )
    assert fs.out("cat short") == "0123456789abcdefghij"
    assert fs.python("print(len(open('long', 'rb', 0).read(1000)))") == "1000\n"


def test_write_flags_and_offsets(fs: Daemon) -> None:
    fs.out("echo one > log; echo two >> log; printf 'a\\nb\\n' > log; (echo x; echo y) > log")
    lines = [line.split() for line in fs.out("cat log").splitlines()]
    assert lines[0] == ["0", "4", "1", "0"]
    assert lines[1][1:] == ["4", "0", "1"]
    assert [line[1] for line in lines[2:]] == ["2", "2", "2", "2"]
    assert lines[-1][0] == "2"  # the second echo, at its offset
    big = (1 << 20) - 4096  # a whole MiB only from a page-aligned buffer
    assert fs.python(f"import os; f = os.open('log', os.O_WRONLY); print(os.write(f, b'z' * {big}))") == f"{big}\n"
    assert fs.out("tail -1 log").split()[1] == str(big)  # in one piece


def test_truncate_append_and_short_writes(fs: Daemon) -> None:
    assert fs.out("echo 0 > tracing_on; cat tracing_on; echo 1 >> tracing_on; cat tracing_on") == "0\n0\n1\n"
    assert fs.out("truncate -s 1 tracing_on; cat tracing_on; : > tracing_on; cat tracing_on") == "0"
    assert fs.out("echo 1 > tracing_on; cat tracing_on") == "1\n"
    assert fs.python("import os; f = os.open('short', os.O_WRONLY); print(os.write(f, b'y' * 25))") == "10\n"
    assert fs.sh("echo hello > minus").returncode != 0  # a negative count from the guest does not end the mount


def test_every_errno(fs: Daemon) -> None:
    names = sorted({name.split("_", 1)[1] for name in os.listdir(fs.path / "errors")})
    told = fs.python(
        # PEP 475: Python repeats calls that answer EINTR, so libc is asked.
        "import ctypes\n"
        "c = ctypes.CDLL(None, use_errno=True); buffer = ctypes.create_string_buffer(9)\n"
        f"for name in {names!r}:\n"
        "    got = []\n"
        "    for what, flags in (('open', 0), ('read', 0), ('write', 1)):\n"
        "        f = c.open(f'errors/{what}_{name}'.encode(), flags)\n"
        "        if f >= 0: (c.read if what == 'read' else c.write)(f, buffer, 9)\n"
        "        got.append(ctypes.get_errno())\n"
        "        f >= 0 and c.close(f)\n"
        "    print(name, *got)\n"
    )
    for line in told.splitlines():
        name, *got = line.split()
        want = int(name) if name.isdigit() else getattr(errno, name)
        if name == "ENOSYS":
            want = errno.EOPNOTSUPP
        elif 512 <= want <= 516:
            want = errno.EINTR
        elif want > 511:
            want = errno.EIO
        assert got == [str(want)] * 2 + [str(errno.EAGAIN if want == errno.EINTR else want)], name


def test_errors_in_bash(fs: Daemon) -> None:
    done = fs.sh("echo x > errors/write_EINVAL; echo x > errors/open_EBUSY; cat nothing; mkdir events; ln big new")
    assert [line.split(": ")[-1] for line in done.stderr.splitlines()] == [
        "Invalid argument", "Device or resource busy", "No such file or directory", "File exists",
        "Operation not permitted",
    ]  # fmt: skip
    assert "Resource busy" not in fs.out("exec 3< busy; cat busy 2>&1 | grep -o 'resource busy'; exec 3<&-; cat busy")


def test_a_bug_is_one_line_and_eio(fs: Daemon) -> None:
    assert fs.sh("cat crash").stderr == "cat: crash: Input/output error\n"
    lines = [line for line in fs.stderr().splitlines() if "ZeroDivisionError" in line]
    assert len(lines) == 1
    assert lines[0].startswith("fakefs: read failed: ZeroDivisionError('as asked') at fake_files.py:")
    assert fs.out("cat tracing_on") == "1\n"


def test_the_caller_is_the_reader(fs: Daemon) -> None:
    first, second = fs.out("exec 3< caller; bash -c 'echo $$ 0 0; exec cat <&3'").splitlines()
    assert first == second


def test_directories_come_and_go(fs: Daemon) -> None:
    fs.out(
        "for i in $(seq 60); do echo mkdir events/x > control; echo file events/x/id $i > control;"
        " test $(cat events/x/id) = $i; test $(ls events) = x; echo rm events/x > control; ! test -e events/x/id; done"
    )
    fs.out(
        "mkdir events/m; echo 1 > events/m/new; cat events/m/new; mv events/m/new events/m/old; cat events/m/old;"
        " ! cat events/m/new 2>/dev/null; ! rmdir events/m 2>/dev/null; rm events/m/old; rmdir events/m;"
        " ! ls events/m 2>/dev/null"
    )


def test_a_removed_directory_is_not_the_new_one(fs: Daemon) -> None:
    told = fs.sh(
        "mkdir events/d; cd events/d; rmdir ../d; mkdir ../d; ls . ; stat -c %h .; touch ../d/file; ls ../d; cat file;"
        " rm ../d/file; rmdir ../d"
    )
    assert told.stdout == "0\nfile\n"
    assert "file: No such file" in told.stderr


def test_fstat_of_a_removed_file(fs: Daemon) -> None:
    assert (
        fs.python(
            "import os\n"
            "open('control', 'w').write('file gone 1\\n')\n"
            "f = os.open('gone', os.O_RDONLY); os.unlink('gone')\n"
            "print(os.fstat(f).st_nlink, os.read(f, 9))\n"
        )
        == "0 b'1'\n"
    )


def test_listing(fs: Daemon) -> None:
    fs.out("echo mkdir many > control; echo many many 3000 > control; echo raw many/x > control")
    assert fs.out("ls many | wc -l; find many -type f | wc -l; ls -lR many | grep -c ^-rw-r--r--") == "3000\n" * 3
    assert fs.out("ls -a many | head -2") == ".\n..\n"
    inodes = fs.out("ls -i many | sort -k2 | head -50")
    assert inodes == fs.out("ls -i many | sort -k2 | head -50")
    assert len({line.split()[0] for line in fs.out("ls -i many").splitlines()}) == 3000
    assert (
        fs.python(
            "import os\n"
            "d = os.scandir('many'); first = next(d).name\n"
            "for i in range(3000): os.unlink(f'many/f{i}')\n"
            "rest = [e.name for e in d]\n"  # the listing is the one of opendir
            "print(len({first, *rest}), os.listdir('many'))\n"
        )
        == "3000 []\n"
    )
    fs.out("rmdir many 2>/dev/null; ls -lR . > /dev/null; find . > /dev/null; du -a . > /dev/null")


def test_names(fs: Daemon) -> None:
    long = "n" * 255
    fs.out(f"echo x > {long}; cat {long}; rm {long}")
    assert "File name too long" in fs.sh(f"echo x > {long}n").stderr
    assert "File name too long" in fs.sh(f"cat {long}n").stderr
    fs.out("echo 1 > $'\\x80\\xff\\n'; cat $'\\x80\\xff\\n'; rm $'\\x80\\xff\\n'")


def test_attributes(fs: Daemon) -> None:
    assert fs.out("stat -c '%a %u %g %s %F' tracing_on; stat -c %Y.%y tracing_on | cut -c 1-10") == (
        "644 0 0 0 regular empty file\n1000000000\n"
    )
    assert fs.out("chmod 600 secret; chown 7:8 secret; stat -c '%a %u %g' secret") == "600 7 8\n"
    assert fs.out("chown :9 secret; stat -c '%u %g' secret") == "7 9\n"
    fs.out("chmod 640 secret; chown 0:0 secret; touch tracing_on; test -w tracing_on; test ! -x tracing_on")
    assert fs.out("stat -f -c '%T %l %s %b' .").split()[1:] == ["255", "4096", "0"]
    told = fs.python(
        "import os\n"
        "for call in (lambda: os.getxattr('big', 'user.x'), lambda: os.setxattr('big', 'user.x', b''),"
        " lambda: os.fsync(os.open('big', 0))):\n"
        "    try: call()\n"
        "    except OSError as e: print(e.errno)\n"
        "print(os.listxattr('big'))\n"
    )
    assert told.split() == [str(errno.EOPNOTSUPP)] * 2 + [str(errno.EINVAL), "[]"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_others_are_held_to_the_mode_bits(fs: Daemon) -> None:
    for directory in fs.path.parents[:-2]:  # pytest makes its directories 0700
        if directory.stat().st_uid == 0 and "pytest" in str(directory):
            directory.chmod(0o755)
    nobody = "setpriv --reuid=1000 --regid=1000 --clear-groups"
    done = fs.sh(f"{nobody} sh -c 'cat tracing_on; cat secret; echo 1 > tracing_on'")
    assert done.stdout == "1\n"
    assert done.stderr.count("ermission denied") == 2


def test_mknod_and_links(fs: Daemon) -> None:
    assert fs.sh("mknod dev c 1 3").stderr.endswith("Operation not permitted\n")
    fs.out("mkfifo p 2>/dev/null; ln -s tracing_on l; cat l; rm l")


def test_mounts_line(fs: Daemon) -> None:
    line = next(line for line in Path("/proc/mounts").read_text().splitlines() if f" {fs.path} " in line)
    assert line.startswith(f"tracefs {fs.path} fuse.fakefs rw,nosuid,nodev,noexec,relatime")
