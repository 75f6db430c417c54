"""Regular expressions of other people: refused where a match could take exponential time.

The engines backtrack and have no limit of time. A pattern is refused if it repeats a group that
repeats something itself or has alternatives, or repeats the same thing too often. Those that
published tokenizers and suites use do neither.
"""

import re
from collections import Counter

MAX_CHARS = 4096
MAX_SAME = 5  # repeats of the same atom in one pattern: each adds a power of the length of the text
FEW = 64  # a repeat of at most this many times counts as bounded, if its atom is
FEW_GROUPS = 4  # times that a group with a repeat inside may come again
REPEAT = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")
LOCAL = re.compile(r"\?(?:[a-zA-Z^-]*:|<?[=!]|>|P?<[^>]*>|'[^']*')")  # the opening of a group
FLAGS = re.compile(r"\?[a-zA-Z^-]*\)")  # flags for the rest of the pattern
ESCAPE = re.compile(r"\\(?:[pPxgkoN]\{[^}]*\}|.)", re.DOTALL)
CALLS = re.compile(r"\\g[<']|\(\?(?:R|&|P>|\d)|\\[1-9]")


def slow(pattern: str) -> str:
    """Why a match of a pattern could take exponential time; empty if none was found."""
    if len(pattern) > MAX_CHARS:
        return f"it has more than {MAX_CHARS} characters"
    if CALLS.search(pattern):
        return "it refers to its own groups"
    place, same = 0, Counter()
    branching = [False]  # whether the open groups hold a repeat or alternatives
    while place < len(pattern):
        start, inner = place, False
        char = pattern[place]
        if char == "|":
            branching[-1] = True
            place += 1
            continue
        if char == "(":
            if flags := FLAGS.match(pattern, place + 1):
                place = flags.end()
                continue
            opening = LOCAL.match(pattern, place + 1)
            place = opening.end() if opening else place + 1
            branching.append(False)
            continue
        if char == ")":
            inner = branching.pop() if len(branching) > 1 else False
            place += 1
        elif char == "[":
            place = _end_of_class(pattern, place)
        elif escape := ESCAPE.match(pattern, place):
            place = escape.end()
        else:
            place += 1
        repeat = REPEAT.match(pattern, place)
        most = _most(repeat) if repeat else 1
        if inner and most > FEW_GROUPS:
            return "it repeats a group that holds a repeat or alternatives"
        branching[-1] |= most > FEW or (inner and len(branching) > 1)
        if repeat:
            same[pattern[start:place]] += most > FEW and char != ")"
            place = repeat.end()
            place += pattern[place : place + 1] in ("?", "+")  # lazy, or without backtracking
    atom, number = max(same.items(), key=lambda item: item[1], default=("", 0))
    return f"it repeats {atom} {number} times" if number > MAX_SAME else ""


def _most(repeat: re.Match) -> float:
    """The largest number of a repeat."""
    if repeat[0] == "?":
        return 1
    if repeat[0] in "*+":
        return float("inf")
    least, comma, most = repeat.groups()
    if not least and not most:
        return 1  # braces that are text
    return float("inf") if comma and not most else int((most or least)[:9])


def _end_of_class(pattern: str, start: int) -> int:
    """The place behind a class, which may hold classes."""
    place, depth = start + 1, 1
    place += pattern[place : place + 1] == "^"
    place += pattern[place : place + 1] == "]"  # as the first member it is text
    while place < len(pattern) and depth:
        if pattern[place] == "\\":
            place += 1
        elif pattern.startswith("[:", place):
            place = max(pattern.find(":]", place), place) + 1
        elif pattern[place] == "]":
            depth -= 1
        place += 1
    return place
