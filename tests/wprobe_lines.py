"""Lines that may define a wprobe, for property tests: whatever is in them, they define one or are refused properly."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from fakefs.wprobe.definition import Definition
from fakefs.wprobe.errors import ProbeError


def texts(*words: str) -> st.SearchStrategy[str]:
    """Any text, and such as the parser knows the words of."""
    anything = st.text(st.characters(codec="latin-1"), max_size=80)
    return st.one_of(anything, st.lists(st.sampled_from(words)).map("".join))


def accepted(define: Callable[[str], Definition], line: str) -> Definition | None:
    """What a line defines; None when it is refused, with an entry for error_log that points into it."""
    try:
        return define(line)
    except ProbeError as error:
        refused = error
    assert refused.entry
    assert 0 <= refused.entry.caret <= len(refused.entry.command)
    return None
