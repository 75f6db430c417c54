"""Text of others, made safe: on a terminal no character of it moves a cursor, changes a colour or
is invisible; on a page none is markup.
"""

import sys
import unicodedata
from typing import TextIO

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
MARKUP = str.maketrans({c: f"&#{ord(c)};" for c in "&<>\"'|*_`[]\\{}#~^=!"})


def visible(text: object) -> str:
    """The text with control characters, bidirectional and zero-width marks, separators and lone
    surrogates as escapes such as `\\x1b`. Newlines and tabs stay.
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(map(_escaped, plain))


def _escaped(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in HIDDEN:
        return character
    return character.encode("unicode_escape").decode("ascii")


def without_markup(text: object) -> str:
    """The text on one line, with no character that is markup in Markdown or HTML."""
    return "".join(c if c.isprintable() else " " for c in str(text)).translate(MARKUP)


def print_visible(text: object = "", *, file: TextIO | None = None) -> None:
    """Print a line, visibly; characters that the stream cannot encode become escapes."""
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = visible(text).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, flush=True)
