"""uprobes that programs of the host hit in `fakefs run`, and that these do not notice."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from fakefs.records import Record, parse
from tests.mount.conftest import Run
from tests.mount.mirrored import SETUP, SHOW, hits
from tests.uprobes import Program, c_library

_GREET = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

__attribute__((noinline)) int greet(const char *name, int times, char **words)
{
	for (int i = 0; i < times; i++)
		printf("hello, %s\n", name);
	return times * 2;
}

__attribute__((noinline)) long factorial(long n)
{
	return n < 2 ? 1 : n * factorial(n - 1);
}

int main(int argc, char **argv)
{
	int result = greet(argv[1], atoi(argv[2]), argv);

	puts("puts");
	printf("%ld\n", factorial(4));
	return result;
}
"""


@pytest.fixture(scope="module")
def greet(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("greet") / "greet", "-fno-optimize-sibling-calls", text=_GREET)


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Program:
    text = Path(__file__).with_name("probed.c").read_text()
    return Program(tmp_path_factory.mktemp("probed") / "probed", "-pthread", "-fno-optimize-sibling-calls", text=text)


def on_all(program: Program, *functions: str) -> str:
    """The commands that define and enable probes at the beginning of functions and on return from them."""
    lines = [f"p:{name} {program.at(name)} a=%di" for name in functions]
    lines += [f"r:r_{name} {program.at(name)} r=$retval" for name in functions]
    return "".join(f"echo '{line}' >> uprobe_events\n" for line in lines) + "on uprobes\n"


def entry(program: str) -> str:
    """The place where a program begins."""
    header = subprocess.run(["readelf", "-h", "-l", "-W", program], capture_output=True, text=True, check=True).stdout
    [address] = [int(found, 16) for found in re.findall(r"Entry point address: +0x(\w+)", header)]
    for at, start, size in re.findall(r"LOAD +0x(\w+) 0x(\w+) 0x\w+ 0x(\w+)", header):
        if 0 <= address - int(start, 16) < int(size, 16):
            return f"{program}:{address - int(start, 16) + int(at, 16):#x}"
    raise AssertionError(header)


def texts(seen: list[Record], event: str) -> list[str]:
    """What the hits of an event say behind the addresses."""
    return [re.sub(r"^\(.*?\) ?", "", hit.text) for hit in seen if hit.event == event]


def test_a_program_is_begun(run: Run) -> None:
    """As the kernel's add_remove_uprobe.tc has it: the first instruction of the shell."""
    shell = str(Path("/bin/sh").resolve())
    done = run(
        SETUP
        + f"""
        echo 'p:begun {entry(shell)}' >> uprobe_events
        on uprobes/begun
        echo ls | /bin/sh > /dev/null & wait
        echo $! >&2
        echo 0 > events/uprobes/begun/enable
        /bin/sh -c :
        """
        + SHOW
        + """
        echo -:begun >> uprobe_events
        /bin/sh -c :
        """
    )
    assert done.returncode == 0
    pid, seen = int(done.stderr), [hit for hit in hits_of(done) if hit.event == "begun"]
    assert [(hit.task, hit.pid) for hit in seen] == [("sh", pid)]


def hits_of(done: subprocess.CompletedProcess[str]) -> list[Record]:
    """The trace of a script that has said more on its standard error."""
    return hits(subprocess.CompletedProcess(done.args, done.returncode, done.stdout, ""))


@pytest.mark.parametrize("run", ["root"], indirect=True)
def test_functions_and_their_arguments(run: Run, greet: Program) -> None:
    done = run(
        SETUP
        + f"""
        echo 'p:greet {greet.at("greet")} name=+0(%di):string times=%si:s32 second=+0(+8(%dx)):string' > uprobe_events
        echo 'p:begun {greet.at("factorial")} n=%di here=$stack0' >> uprobe_events
        echo 'r:greeted {greet.at("greet")} result=$retval:s32' >> uprobe_events
        echo 'r:factorial {greet.at("factorial")} n=$retval' >> uprobe_events
        echo 'p:puts {c_library("puts")} text=+0(%di):string' >> uprobe_events
        echo 'r:put {c_library("puts")} result=$retval' >> uprobe_events
        on uprobes
        {greet.path} world 2 >&2 & wait $!
        echo "$! $?" >&2
        """
        + SHOW
    )
    *said, ending = done.stderr.splitlines()
    assert said == ["hello, world", "hello, world", "puts", "24"]
    pid, status = map(int, ending.split())
    assert status == 4
    seen = [hit for hit in hits_of(done) if hit.task == "greet"]
    assert {hit.pid for hit in seen} == {pid}
    order = ["greet", "greeted", "puts", "put", *["begun"] * 4, *["factorial"] * 4]
    assert [hit.event for hit in seen] == order
    assert texts(seen, "greet") == ['name="world" times=2 second="world"']
    assert texts(seen, "greeted") == ["result=4"]
    assert texts(seen, "puts") == ['text="puts"']
    assert texts(seen, "put") == ["result=0x5"]
    assert [text.split()[0] for text in texts(seen, "begun")] == [f"n={n:#x}" for n in (4, 3, 2, 1)]
    assert texts(seen, "factorial") == [f"n={n:#x}" for n in (1, 2, 6, 24)]
    came_from = [text.split("here=")[1] for text in texts(seen, "begun")]
    returned_to = [hit.text.split()[0].lstrip("(") for hit in seen if hit.event == "factorial"]
    assert came_from == returned_to[::-1]


def test_the_shell_that_defines_a_probe(run: Run) -> None:
    """It runs already, and so do the subshells that it forks."""
    bash = shutil.which("bash")
    assert bash is not None
    symbols = subprocess.run(["nm", "-D", bash], capture_output=True, text=True, check=True).stdout
    found = re.search(r"^([0-9a-f]+) T (echo_builtin)$", symbols, re.M)
    assert found is not None
    place = f"{Path(bash).resolve()}:0x{found[1]}"
    done = run(
        SETUP
        + f"""
        echo 'p:echoes {place} first=+0(+0(+8(%di))):string' > uprobe_events
        on uprobes
        echo one
        ( echo two )
        echo $BASHPID >&2
        """
        + SHOW
    )
    assert done.returncode == 0
    seen = [hit for hit in hits_of(done) if hit.event == "echoes"]
    assert [hit.task for hit in seen] == ["bash"] * len(seen)
    assert texts(seen, "echoes")[:3] == [f'first="{word}"' for word in ("one", "two", done.stderr.strip())]
    assert seen[0].pid == seen[2].pid == int(done.stderr) != seen[1].pid


@pytest.mark.parametrize("run", ["root"], indirect=True)
def test_a_program_does_not_notice(run: Run, probed: Program) -> None:
    """Forks, jumps out of functions, threads, signals and nonsense: all say what they say without probes."""
    plain = subprocess.run([probed.path], capture_output=True, text=True, check=False)
    functions = ("forks", "jumps", "many", "deep", "adds")
    done = run(
        SETUP
        + "echo 20000 > buffer_size_kb\n"
        + on_all(probed, *functions)
        + f"{probed.path} >&2; echo status $? >&2\n"
        + SHOW
    )
    assert done.stderr == f"{plain.stdout}status {plain.returncode}\n"
    counts = Counter(hit.event for hit in hits_of(done))
    assert [counts[name] for name in functions[:4]] == [3, 150, 1, 201]
    assert counts["r_forks"] == 6  # in the children too
    assert [counts[f"r_{name}"] for name in functions[1:3]] == [100, 1]
    assert counts["r_deep"] in (16, 64)  # as many as there is room for
    assert counts["adds"] == counts["r_adds"] > 170


@pytest.mark.parametrize("run", ["root"], indirect=True)
def test_a_function_returns_without_the_recorder(run: Run, probed: Program) -> None:
    done = run(
        SETUP
        + on_all(probed, "waits")
        + f"""
        coproc {probed.path} wait 41
        read line <&${{COPROC[0]}}; echo $line
        for pid in $(ls /proc | grep '^[0-9]*$'); do
            [ "$(cut -d' ' -f4 /proc/$pid/stat 2>/dev/null)" = 1 ] && [ $pid != $$ ] && recorder=$pid
        done
        kill -9 $recorder; sleep 0.1
        echo >&${{COPROC[1]}}; wait $COPROC_PID; echo $?
        """
    )
    assert done.stdout == "waits\n42\n"
    assert done.stderr == "fakefs: what follows is not mirrored: the process that records it is gone\n"


@pytest.mark.parametrize("run", ["root"], indirect=True)
def test_probes_that_are_removed(run: Run, greet: Program) -> None:
    """The program that has the trampolines goes on; the same probe hits again when it is back."""
    define = f"echo 'p:greet {greet.at('greet')}' > uprobe_events; on uprobes"
    done = run(
        SETUP
        + f"""
        {define}
        {greet.path} a 1 > /dev/null
        cat trace
        echo 0 > events/enable; echo > uprobe_events
        {greet.path} b 1 > /dev/null
        cat trace
        {define}
        {greet.path} c 1 > /dev/null
        cat trace
        """
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert [hit.event for hit in parse(done.stdout) if hit.event] == ["greet"] * 2


@pytest.mark.parametrize("run", ["root"], indirect=True)
def test_a_library_that_is_loaded_later(run: Run, tmp_path: Path) -> None:
    """In a program that runs: it is hit from the next call on that is mirrored."""
    library = Program(tmp_path / "later.so", "-shared", "-fPIC", text="int later(int a) { return a * 1000 + 1; }")
    load = f"""import ctypes; library = ctypes.CDLL("{library.path}"); open("/dev/null"); print(library.later(5))"""
    done = run(
        SETUP
        + f"""
        echo 'p:later {library.at("later")} a=%di:s32' > uprobe_events
        on uprobes
        python3 -c '{load}' >&2
        """
        + SHOW
    )
    assert done.stderr == "5001\n"
    assert texts(hits_of(done), "later") == ["a=5"]


@pytest.mark.parametrize("run", ["root"], indirect=True)
def test_a_program_that_is_built_anew(run: Run, greet: Program, tmp_path: Path) -> None:
    """A probe is on what was there when it was defined, as on an inode."""
    program = tmp_path / "program"
    define = f"echo 'p:greet {greet.at('greet').replace(str(greet.path), str(program))} times=%si:s32' >> uprobe_events"
    done = run(
        SETUP
        + f"""
        cp {greet.path} {program}
        {define}; on uprobes/greet
        {program} a 1 > /dev/null
        cat {greet.path} - > {program} <<< 'another one'
        {program} a 2 > /dev/null
        echo 0 > events/uprobes/enable
        {define.replace("p:greet", "p:again")}; on uprobes/again
        {program} a 3 > /dev/null
        """
        + SHOW
    )
    assert (done.stderr, done.returncode) == ("", 0)
    seen = hits_of(done)
    assert (texts(seen, "greet"), texts(seen, "again")) == (["times=1"], ["times=3"])


@pytest.mark.parametrize("run", ["root"], indirect=True)
def test_nonsense_from_a_program_is_its_own(run: Run, probed: Program) -> None:
    """It can have its shadow hit, with any registers; that works on, and nobody else is touched."""
    done = run(
        SETUP
        + on_all(probed, "adds", "deep")
        + f"{probed.path} hostile >&2; echo > trace; {probed.path} hostile >&2"
        + SHOW
    )
    assert done.stderr == "deep 6\n" * 2
    seen = hits_of(done)
    assert [hit.text.split()[-1] for hit in seen if hit.event == "deep"][-4:] == [f"a={n:#x}" for n in (3, 2, 1, 0)]
    assert [hit.text.split()[-1] for hit in seen if hit.event == "r_deep"][-4:] == [f"r={n:#x}" for n in (0, 1, 3, 6)]
