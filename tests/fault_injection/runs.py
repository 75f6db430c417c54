"""Training runs of a few seconds that faults are injected into, and how two of them compare."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.cli.conftest import tiny
from tests.processes import NO_PREFLIGHT, Done
from tools.same_numbers import MASKED

ARM = "from tests.fault_injection import file_calls\nfile_calls.arm()\n"
UNDER_FAULT = ARM + NO_PREFLIGHT
DOCUMENTED = {0, 2, 3, 4, 5, 6, 7, 75, 130}
# What a run looks at or keeps in its own way each time; the history of resumes is in events.jsonl.
OF_PROCESS = (".allocator", "code.diff_sha256", "events.jsonl", ".metrics.ranks_")
TIMES = ("tokens_per_s", "communication_frac", "exposed_communication_frac")
SHARD = "shard-"
OWN = ("events.jsonl", "output.log")  # with the history of each start
# Ranks are compared at the start of each process, so that a resume adds comparisons.
OF_RANKS = re.compile(r"\.gates\.distributed\..*\.(checks|heartbeat_last_step|measured\..*)")
KEPT = ("samples.jsonl", "gates.jsonl", "curriculum.jsonl", "points.jsonl", "tokenizer.json")


def training(text_file: Path, **changes: str) -> list[str]:
    """The arguments of a run of nine steps that saves, evaluates, samples and traces."""
    every = {f"{name}__every": "3" for name in ("checkpoint", "eval", "sample")}
    short = {"train__max_steps": "9", "trace__every": "4", "checkpoint__keep": "2"}
    return ["train", *tiny(text_file, **short | every | changes), "--run-dir", "run"]


def again(folder: Path, arguments: list[str]) -> list[str]:
    """How the run of a folder goes on: resumed, or begun again if it took no step."""
    begun = (folder / "run" / "run.json").is_file()
    return ["train", "--resume", "run"] if begun else arguments


def assert_documented(done: Done, told: str) -> None:
    """The command ended with a documented code and no traceback."""
    assert done.code in DOCUMENTED and "Traceback" not in done.err, f"{told}: {done.err[-2000:]}"


def assert_same_end(straight: Path, other: Path, told: str) -> None:
    """Two runs left the same files, logs, weights and record, times aside."""
    left, right = (sorted(_names(run)) for run in (straight, other))
    assert left == right, (told, sorted(set(left) ^ set(right)))
    for name in KEPT:
        if (straight / name).is_file():
            assert (straight / name).read_bytes() == (other / name).read_bytes(), (told, name)
    assert_same_training(straight, other, told)
    for name in ("latest", "best"):
        assert (straight / "checkpoints" / name).read_bytes() == (
            other / "checkpoints" / name
        ).read_bytes(), told
    records = [_leaves(json.loads((r / "metadata.json").read_bytes())) for r in (straight, other)]
    keys = records[0].keys() | records[1].keys()
    apart = {k: [r.get(k) for r in records] for k in keys}
    apart = {k: values for k, values in apart.items() if values[0] != values[1]}
    assert not apart, (told, apart)


def assert_same_training(straight: Path, other: Path, told: str) -> None:
    """Two runs have the same losses, texts and tensors of steps that both have saved, the last one
    among them.
    """
    for rank in (".", *(p.relative_to(straight) for p in straight.glob("ranks/*"))):
        assert _metrics(straight / rank) == _metrics(other / rank), (told, rank)
    assert (straight / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes(), told
    left, right = ({p.name: p for p in r.glob("checkpoints/step-*")} for r in (straight, other))
    assert max(left) == max(right), told
    for step in left.keys() & right.keys():
        for path in left[step].glob("*.safetensors"):
            assert _content(path) == _content(right[step] / path.name), (told, path)


def _content(path: Path) -> bytes | tuple[dict, bytes]:
    """The bytes of a file of tensors; of a shard its header and data, since the library that writes
    it gives the keys of the header in any order.
    """
    data = path.read_bytes()
    if not path.name.startswith(SHARD):
        return data
    begin = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:begin]), data[begin:]


def _names(run: Path) -> list[str]:
    found = (p.relative_to(run).as_posix() for p in run.rglob("*"))
    return [name for name in found if not name.endswith(OWN) and name != "ranks/00000"]


def _metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def _leaves(record: dict[str, Any]) -> dict[str, Any]:
    """The values of a record by dotted path, without times and what depends on the process."""
    return {
        path: value
        for path, plain, value in _walk(record, "", ".record")
        if not any(f"{masked}." in f"{plain}." for masked in MASKED)
        and not any(word in path for word in OF_PROCESS)
        and not OF_RANKS.fullmatch(path)
        and not (f"/{SHARD}" in path and path.endswith(".sha256"))
    }


def _walk(tree: Any, path: str, plain: str) -> Iterator[tuple[str, str, Any]]:
    """(path with the ids of list items, path without them, value) of every value."""
    match tree:
        case dict():
            for key, value in tree.items():
                yield from _walk(value, f"{path}.{key}", f"{plain}.{key}")
        case list():
            for i, value in enumerate(tree):
                named = isinstance(value, dict) and (value.get("id") or value.get("path"))
                yield from _walk(value, f"{path}.{named or i}", plain)
        case _:
            yield path, plain, tree
