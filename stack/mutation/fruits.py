"""All values that a command writes, so that two runs can be compared bit for bit."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stackproof.spec.errors import IntegrityError

LINES, DOCUMENT = ".jsonl", ".json"
OUTPUT = "output.txt"  # what the commands printed
PRINTED = "::document"  # a line of it that is a JSON document
HASH, SIZE = ".sha256", ".bytes"
PLACE = "PLACE"  # what the path of the folder is replaced by
RECORD_ID = re.compile(r"\b[a-z]+-\d{8}T\d{6}Z-[0-9a-f]{8}\b")
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")
NUMBER = re.compile(r"[-+]?\d[\d.,_]*(e[-+]?\d+)?( ?(s|ms|min|h|seconds|minutes|hours)\b)?")
# Lines that a run prints when ten seconds have passed.
CLOCKED = re.compile(r"tok/s|gates? checked, the last")
IDENTITIES = ("id", "gate", "name", "path", "key")  # by which the entries of a list are known
# Files that only state or show what was computed. A mutant that changes no other file changes no
# weight, score, sample, log of losses, or prepared datum.
STATEMENTS = (
    "metadata.json",
    "run.json",
    "events.jsonl",
    "gates.jsonl",
    "points.jsonl",
    "SHA256SUMS",
    "README.md",
    "plan.json",
    OUTPUT,
)
# Places that only state or show, in files that hold results too: the state of gates and the marks
# of their logs in a checkpoint, and the encoder of a data set.
STATED = (
    ("state.json", ".gates."),
    *(
        ("state.json", f".run.logs.{log}.")
        for log in ("events.jsonl", "gates.jsonl", "points.jsonl")
    ),
    ("manifest.json", ".tokenizer.encoder"),
)
EXAMPLE = ".example"  # in a receipt: where the first document that was dropped begins
SCORES, SAMPLES = ".metrics.", ".samples"  # in a record; in a document that was printed
TRAINING = "run/"  # its record sums up what the logs hold; a record of another command has scores

Fruits = dict[str, str]  # by "file::place in it"


def fruits_of(folder: Path) -> Fruits:
    """All values below a folder: of JSON files each leaf, of texts each line, of others the
    SHA-256. Ids of records are numbered in the order in which they appear, moments are left out.
    """
    found: Fruits = {}
    ids: dict[str, str] = {}

    def masked(text: str) -> str:
        text = MOMENT.sub("MOMENT", text.replace(str(folder), PLACE))
        return RECORD_ID.sub(lambda m: ids.setdefault(m[0], f"RECORD-{len(ids)}"), text)

    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        name, data = str(path.relative_to(folder)), path.read_bytes()
        try:
            text = masked(data.decode())
        except UnicodeDecodeError:
            found[name] = hashlib.sha256(data).hexdigest()
            continue
        leaves = _printed(text) if name == OUTPUT else _leaves_of(path.suffix, text)
        found |= {f"{name}{key}": value for key, value in leaves}
    return found


def _leaves_of(suffix: str, text: str) -> Iterator[tuple[str, str]]:
    lines = text.splitlines()
    try:
        match suffix:
            case ".jsonl":
                tree = [json.loads(line) for line in lines]
            case ".json":
                tree = json.loads(text)
            case _:
                tree = lines
    except ValueError:
        tree = lines
    yield from _leaves(tree, "::")


def _printed(text: str) -> Iterator[tuple[str, str]]:
    """The leaves of documents, and of other lines how often each occurs: numbers are left out,
    since times are among them and records hold the others.
    """
    counts: Counter[str] = Counter()
    n_documents = 0
    for line in text.splitlines():
        try:
            document = json.loads(line)
        except ValueError:
            document = None
        if isinstance(document, dict):
            n_documents += 1
            yield from _leaves(document, f"{PRINTED}{n_documents}")
        elif not CLOCKED.search(line):
            counts[f"::{' '.join(NUMBER.sub('#', line).split())}"] += 1
    yield from ((line, str(n)) for line, n in counts.items())


def _leaves(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    match tree:
        case dict() if tree:
            for name, value in tree.items():
                yield from _leaves(value, f"{key}.{name}")
        case list() if tree:
            names = _identities(tree)
            if names != list(range(len(tree))):
                yield f"{key}[order]", repr(names)
            for name, value in zip(names, tree):
                yield from _leaves(value, f"{key}[{name}]")
        case _:
            yield key, repr(tree)


def _identities(entries: Sequence[Any]) -> list[Any]:
    """What the entries of a list are known by: a value that each has and no two share, or their
    numbers.
    """
    for field in IDENTITIES:
        names = [e.get(field) if isinstance(e, dict) else None for e in entries]
        if all(isinstance(n, str) for n in names) and len({*names}) == len(names):
            return names
    return list(range(len(entries)))


def _class_of(key: str) -> str:
    """A key without the numbers of lines and list entries."""
    return re.sub(r"\[\d+\]", "[]", key)


class Reference:
    """What clean runs of one command bring forth.

    `volatile` are the places in which they differ among each other: times, identifiers and what is
    measured of the machine. A place is exact; only where lists differ in length, so that an entry
    has another number in each, it stands for all entries. The size of a file whose hash differs is
    volatile too, since numbers of other lengths stand in it, and so is every time: a short one is
    rounded to the same in many runs. Raises IntegrityError if a result of the computation differs:
    then no difference of a mutant would mean anything.
    """

    def __init__(self, clean: Iterable[Fruits]):
        first, *others = clean
        self.fruits = first
        self.volatile: set[str] = set()
        for other in others:
            for key in _differing(first, other):
                exact = key in first and key in other
                self.volatile.add(key if exact else _class_of(key))
        self.volatile |= {
            f"{key.removesuffix(HASH)}{SIZE}" for key in self.volatile if key.endswith(HASH)
        }
        if results := sorted(filter(is_result, self.volatile)):
            raise IntegrityError(
                "clean runs of one command differ in a result",
                value=", ".join(results[:3]),
                allowed="the same weights, losses, samples, scores and data to the bit",
                next_step="stack doctor shows whether this machine repeats a run",
            )

    def differing(self, found: Fruits, volatile: Iterable[str] = ()) -> list[str]:
        """Sorted keys whose values differ from those of the clean runs. `volatile` are further
        places to leave out: those of other scenarios.
        """
        left_out = self.volatile.union(volatile)
        return [
            key
            for key in _differing(self.fruits, found)
            if key not in left_out and _class_of(key) not in left_out and not is_time(key)
        ]


def _differing(one: Fruits, other: Fruits) -> list[str]:
    return sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))


def _split(key: str) -> tuple[str, str]:
    """The name of the file without its folders, and the place."""
    file, _, place = key.partition("::")
    return file.rsplit("/", 1)[-1], place


def is_statement(key: str) -> bool:
    """Whether a value only states what was computed."""
    name, place = _split(key)
    if name == "metadata.json" and place.startswith(SCORES):
        return key.startswith(TRAINING)
    if name == OUTPUT and place.startswith("document"):
        return SAMPLES not in place
    stated = any(name == file and place.startswith(own) for file, own in STATED)
    return stated or name in STATEMENTS or (name == "manifest.json" and place.endswith(EXAMPLE))


def is_time(key: str) -> bool:
    """Whether the name of a value has the unit of a time, or of a rate."""
    leaf = key.removesuffix(".value").rpartition(".")[-1]
    return leaf == "seconds" or leaf.endswith("_s")


def is_result(key: str) -> bool:
    """Whether a value is a weight, a moment, a loss, a rate of learning, a sample, a score or a
    datum, which clean runs repeat to the bit.
    """
    name, place = _split(key)
    if is_time(key) or place.endswith("_overhead_frac.value") or name == ".lock":
        return False
    own = name == "metadata.json" and not key.startswith(TRAINING)
    scores = own and place.startswith(SCORES)
    samples = name == OUTPUT and SAMPLES in place
    named = name in ("metrics.jsonl", "samples.jsonl", "curriculum.jsonl", "audits.jsonl")
    data = key.startswith(("cache/", "exported/")) and name != "README.md"
    return scores or samples or named or data or name.endswith(".safetensors")
