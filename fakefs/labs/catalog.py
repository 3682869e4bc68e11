"""Labs as they lie on disk: which there are, and what a lab's directory has to have.

lab.toml     title, level, minutes; modules, parameters, secret, answer
README.md    the text for the student
hints.md     hints, divided by lines of ---
check        shell script that grades: see prelude.sh
solution     shell script: what a student would type
setup        optional: shell script that is run in the tracefs before the student comes
workload     optional: shell script that runs inside the guest until the lab ends
*.c, *.h     optional: modules, built for the kernel in use and loaded before the setup
"""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from fakefs.errors import UserError

CATALOG = Path(__file__).parent / "catalog"
"""The labs that come with the package."""

_REQUIRED = ("lab.toml", "README.md", "hints.md", "check", "solution")
_KEYS: dict[str, type] = {
    "title": str,
    "level": int,
    "minutes": int,
    "modules": list,
    "parameters": str,
    "secret": list,
    "answer": str,
}


@dataclass(frozen=True)
class Lab:
    """A lab. `secret` are the words one of which is drawn at each start, `answer` says what the student has to find."""

    name: str
    directory: Path
    title: str
    level: int
    minutes: int
    modules: tuple[str, ...]
    parameters: str
    secret: tuple[str, ...]
    answer: str

    def text(self, file: str) -> str:
        """The text of one of the lab's files; empty when there is none. Raises UserError."""
        try:
            return (self.directory / file).read_text()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"lab {self.name}: {file}: {error}") from None

    @property
    def hints(self) -> list[str]:
        """The hints, in the order they are given."""
        return [hint.strip() for hint in re.split(r"^---+$", self.text("hints.md"), flags=re.M) if hint.strip()]


def names() -> list[str]:
    """The names of the labs that come with the package."""
    return sorted(path.parent.name for path in CATALOG.glob("*/lab.toml"))


def labs() -> list[Lab]:
    """The labs that come with the package, from first steps to hard."""
    return sorted((read(CATALOG / name) for name in names()), key=lambda lab: (lab.level, lab.minutes, lab.name))


def find(name: str) -> Lab:
    """Return a lab by its name, or by its directory. Raises UserError that suggests the nearest name."""
    known = names()
    if name in known:
        return read(CATALOG / name)
    if "/" in name or Path(name).is_dir():
        return read(Path(name))
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else "see: fakefs lab list"
    raise UserError(f"no lab is called {name}; {hint}", exit_status=2)


def read(directory: Path) -> Lab:
    """Read a lab's directory. Raises UserError for the first thing wrong with it."""
    directory = directory.absolute()
    name = directory.name
    missing = [file for file in _REQUIRED if not (directory / file).is_file()]
    if missing:
        raise UserError(f"lab {name}: {directory} has no {', '.join(missing)}; start with: fakefs lab new NAME")
    try:
        with open(directory / "lab.toml", "rb") as file:
            values = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"lab {name}: lab.toml: {error}") from None
    for key, value in values.items():
        kind = _KEYS.get(key)
        if kind is None:
            near = difflib.get_close_matches(key, _KEYS, 1)
            raise UserError(f"lab {name}: lab.toml: unknown {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        texts = isinstance(value, list) and all(isinstance(word, str) for word in value)
        if type(value) is not kind or (kind is list and not texts):
            what = {str: "a text", int: "a number", list: "a list of texts"}[kind]
            raise UserError(f"lab {name}: lab.toml: {key} is {what}")
    title = values.get("title", "")
    if not title.strip() or not title.isprintable():
        raise UserError(f"lab {name}: lab.toml: " + ("the title is not one line" if title else "there is no title"))
    if not 1 <= values.get("level", 1) <= 5:
        raise UserError(f"lab {name}: lab.toml: level is a number from 1 to 5")
    if not 1 <= values.get("minutes", 10) <= 999:
        raise UserError(f"lab {name}: lab.toml: minutes is a number from 1 to 999")
    modules = tuple(values.get("modules", ()))
    for module in modules:
        if not (directory / module).is_file():
            raise UserError(f"lab {name}: lab.toml: there is no {module}")
    return Lab(
        name,
        directory,
        title,
        values.get("level", 1),
        values.get("minutes", 10),
        modules,
        values.get("parameters", ""),
        tuple(values.get("secret", ())),
        values.get("answer", ""),
    )
