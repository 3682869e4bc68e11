"""Make ftracetest.tsv from what ftracetest has printed: python3 ftracetest.py OUTPUT TEST.D

Its columns: the test, its description, the result here, the result on a real kernel (ftracetest-real-kernel.tsv: Linux
7.2 with two CPUs), and for a test that passes there and not here the reason (ftracetest-reasons.tsv).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
_LINE = re.compile(r"^\[\d+\] (.*?)\s*\[(PASS|FAIL|UNRESOLVED|UNTESTED|UNSUPPORTED|XFAIL)\]$")


def results(output: str) -> dict[str, str]:
    """The result of each test by its description."""
    return {match[1]: match[2] for line in output.splitlines() if (match := _LINE.match(line))}


def descriptions(directory: Path) -> dict[str, str]:
    """The description of each test by its path."""
    found = {}
    for path in sorted(directory.rglob("*.tc")):
        if match := re.search(r"^# ?description: ?(.*?)\s*$", path.read_text(), re.MULTILINE):
            found[str(path.relative_to(directory))] = match[1]
    return found


def rows(path: Path, key: int, value: int) -> dict[str, str]:
    """Two columns of a table."""
    lines = [line.split("\t") for line in path.read_text().splitlines() if line]
    return {line[key]: line[value] for line in lines}


def main(output: Path, directory: Path) -> None:
    here = results(output.read_text(errors="replace"))
    real = rows(HERE / "ftracetest-real-kernel.tsv", 3, 1)
    reasons = rows(HERE / "ftracetest-reasons.tsv", 0, 1)
    table = ["testcase\tdescription\there\treal kernel\treason"]
    passed = wanted = 0
    for test, description in descriptions(directory).items():
        # The same tests are run once more in an instance, if they can be: [n] (instance) DESCRIPTION.
        for prefix in ("", "(instance)  ", "(instance) "):
            if (result := here.get(prefix + description)) is None:
                continue
            name = f"{test} (instance)" if prefix else test
            there = real.get(name, real.get(test, "")) if not prefix else ""
            reason = reasons.get(name, "") if there == "PASS" and result != "PASS" else ""
            table.append("\t".join([name, description, result, there, reason]))
            wanted += there == "PASS"
            passed += there == "PASS" and result == "PASS"
    (HERE / "ftracetest.tsv").write_text("\n".join(table) + "\n")
    print(f"{passed} of the {wanted} that pass on a real kernel pass here, of {len(table) - 1} in ftracetest.tsv")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
