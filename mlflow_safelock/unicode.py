"""Text that can be tokenized, written to a file, and sent."""

from __future__ import annotations

HALF_A_CHARACTER = "holds half of a character (a lone surrogate)"
"""What is wrong with text that is not valid Unicode, to go on a sentence with."""


def is_unicode(text: str) -> bool:
    """Whether a text is valid Unicode.

    Python's need not be: escapes of JSON can make halves of characters, and so does a byte of the command
    line that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
