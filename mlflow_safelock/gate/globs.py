"""Globs of a policy: ``*``, ``?`` and ``[…]`` as in file names, case-sensitive, checked when read."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import AfterValidator, Field

_CLASS = re.compile(r"\[!?+(?P<members>.[^\]]*)\]", re.DOTALL)


def check_glob(glob: str) -> str:
    """The glob itself.

    Raises:
        ValueError: A bracket is never closed, which would stand for itself unnoticed, or a range in it holds
            no character.
    """
    at = glob.find("[")
    while at >= 0:
        found = _CLASS.match(glob, at)
        if found is None:
            raise ValueError(
                f"the bracket at character {at + 1} is never closed; write [[] for the character itself"
            )
        for low, high in re.findall(r"(.)-(.)", found["members"], re.DOTALL):
            if low > high:
                raise ValueError(f"the range {low}-{high} holds no character")
        at = glob.find("[", found.end())
    return glob


Glob = Annotated[str, Field(min_length=1), AfterValidator(check_glob)]


def matches(text: str, glob: str) -> bool:
    """Whether a text is one of those that a glob stands for."""
    return fnmatchcase(text, glob)


def covers(wide: str, narrow: str) -> bool:
    """Whether every text that ``narrow`` stands for is certainly one of ``wide``'s."""
    if wide in ("*", narrow):
        return True
    # A star of the wide one then takes what is special in the narrow one, whatever that stands for.
    return not set("?[") & set(wide) and "[" not in narrow and fnmatchcase(narrow, wide)
