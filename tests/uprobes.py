"""A program compiled for tests of uprobes, the places in it, and what hits of them said."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from fakefs.hostfiles.program import host_program
from fakefs.testbed import Tracefs

SOURCE = """
#include <stdio.h>
#include <string.h>

__attribute__((noinline)) long add(long a, long b)
{
    __asm__ volatile("");
    return a + b;
}

__attribute__((noinline)) long measure(const char *text)
{
    __asm__ volatile("");
    return strlen(text);
}

long answer = 42;

int main(int argc, char **argv)
{
    long sum = 0;

    for (int i = 1; i < argc; i++)
        sum = add(sum, measure(argv[i]));
    printf("%ld\\n", sum);
    return sum;
}
"""


class Program:
    """A program compiled from a source, and where in its file its functions and variables are."""

    def __init__(self, path: Path, *options: str, text: str = SOURCE) -> None:
        self.path = path
        source = path.with_suffix(".c")
        source.write_text(text)
        subprocess.run(["gcc", "-O1", *options, "-o", path, source], check=True)
        table = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        self.addresses = {name: int(at, 16) for at, _, name in re.findall(r"^([0-9a-f]+) (\w) (\w+)$", table, re.M)}
        headers = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True).stdout
        numbers = r"LOAD +0x(\w+) 0x(\w+) 0x\w+ 0x(\w+)"
        self.segments = [[int(each, 16) for each in found] for found in re.findall(numbers, headers)]

    def offset(self, name: str) -> int:
        """The offset in the file, in bytes."""
        address = self.addresses[name]
        return next(address - start + at for at, start, size in self.segments if start <= address < start + size)

    def at(self, name: str) -> str:
        """The place of a function, as a definition names it."""
        return f"{self.path}:{self.offset(name):#x}"


def c_library(function: str) -> str:
    """The place of a function of the C library, as the loader finds it."""
    [library] = [path for path in host_program("bash").files if path.endswith(b"/libc.so.6")]
    table = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"^([0-9a-f]+) [TW] {function}(@@\S+)?$", table, re.M)
    assert found is not None
    return f"{os.fsdecode(library)}:0x{found[1]}"  # in a shared library, addresses are offsets here


def hits(mount: Tracefs, event: str) -> list[str]:
    """What the hits of an event say behind its name, and whose they are: "comm text"."""
    found = [re.fullmatch(rf" *(\S+)-\d+ .*?: {event}: \(.*?\) ?(.*)", line) for line in mount.lines("trace")]
    return [f"{match[1]} {match[2]}".rstrip() for match in found if match]
