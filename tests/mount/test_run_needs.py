"""What `fakefs run` needs of a machine: where it is refused the message says why, and a container has enough of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.mount.conftest import Run
from tests.mounted import FAKEFS

pytestmark = pytest.mark.usefixtures("host_unchanged")

_SYSCTL = "user.max_user_namespaces"
_LIMITED = 'echo $0 > /proc/sys/user/max_user_namespaces; exec "$@"'
_CONTAINER = ("--user", "--map-user=1000", "--map-group=1000", "--mount", "--pid", "--fork", "--mount-proc", "--net")


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        (0, f"user namespaces are forbidden by {_SYSCTL} = 0: sudo sysctl {_SYSCTL}=15000"),
        (1, f"no more user namespaces: raise the sysctl {_SYSCTL}"),
    ],
)
def test_without_user_namespaces(environment: dict[str, str], kernel_path: Path, allowed: int, said: str) -> None:
    """A limit that holds in a namespace of our own; a view needs two, one inside the other."""
    command = [*FAKEFS, "run", "--kernel", str(kernel_path), "--", "true"]
    argv = ["unshare", "--user", "--map-root-user", "sh", "-c", _LIMITED, str(allowed), *command]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (125, f"fakefs: {said}\n")


def test_in_an_unprivileged_container(environment: dict[str, str], kernel_path: Path) -> None:
    """Namespaces of its own, a user who is not root, no capabilities, and none to be had."""
    script = """
        stat -f -c %t /sys/kernel/tracing; cd /sys/kernel/tracing
        echo 'p:mine vfs_read' > kprobe_events; echo 1 > events/kprobes/enable
        cat tracing_on > /dev/null; grep -c mine: trace > /dev/null && echo traced; id -u
    """
    inside = 'grep CapEff /proc/self/status | tr -d "\\t"; id -u; exec "$@"'
    command = [*FAKEFS, "run", "--kernel", str(kernel_path), "--", "bash", "-c", script]
    argv = ["unshare", *_CONTAINER, "setpriv", "--no-new-privs", "sh", "-c", inside, "sh", *command]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stderr, done.stdout.split()) == ("", ["CapEff:0000000000000000", "1000", "65735546", "traced", "0"])


def test_a_mount_in_use(run: Run) -> None:
    """umount(8) refuses it, as with a real one; lazily it goes."""
    done = run("""
        export LC_ALL=C
        cd /sys/kernel/tracing; umount /sys/kernel/tracing; echo $?; cat tracing_on
        umount -l /sys/kernel/tracing; echo $?; cat tracing_on; ls -A /sys/kernel/tracing
    """)
    assert "busy" in done.stderr
    assert done.stdout.split() == ["32", "1", "0", "1"]


def test_what_cannot_be_executed(environment: dict[str, str], tmp_path: Path) -> None:
    """As in a shell: 126, or 127 for what is not there; a script without a first line of #! is one of sh."""

    def run_program(name: str) -> tuple[int, str, str]:
        argv = [*FAKEFS, "run", "--", name, "argument"]
        done = subprocess.run(argv, env=environment, capture_output=True, timeout=60, check=False)
        return done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr)

    plain, lacking, damaged = (tmp_path / name for name in ("plain", "lacking", "damaged"))
    plain.write_text('echo "$0 $1"; exit 3\n')
    lacking.write_text("#!/nowhere/interpreter\n")
    damaged.write_bytes(b"\x7fELF" + bytes(100))
    for path in (plain, lacking, damaged):
        path.chmod(0o755)
    assert run_program(str(plain)) == (3, f"{plain} argument\n", "")
    assert run_program(str(lacking)) == (127, "", f"fakefs: {lacking}: not found\n")
    assert run_program(str(damaged)) == (126, "", f"fakefs: {damaged}: Exec format error\n")
    assert run_program(str(tmp_path)) == (126, "", f"fakefs: {tmp_path}: Permission denied\n")
    assert run_program("") == (127, "", "fakefs: : not found\n")
    odd = os.fsdecode(b"/nowhere/\xff")
    assert run_program(odd) == (127, "", f"fakefs: {odd}: not found\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_closed_descriptors(environment: dict[str, str], closed: str) -> None:
    """What fakefs opens itself does not become one of them; the program has them as they were."""
    argv = ["sh", "-c", f'exec "$@" {closed}', "sh", *FAKEFS, "run", "--", "sh", "-c", "[ ! -e /dev/fd/$0 ]; exit 4$?"]
    argv.append(str("<>".index(closed[0])))
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (40, "", "")


def test_a_directory_that_is_gone(environment: dict[str, str], tmp_path: Path) -> None:
    argv = ["sh", "-c", 'mkdir gone; cd gone; rmdir ../gone; exec "$@"', "sh", *FAKEFS, "run", "--", "pwd"]
    done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    said = "fakefs: the current directory has been removed: go to another\n"
    assert (done.returncode, done.stdout, done.stderr) == (125, "", said)
