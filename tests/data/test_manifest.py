"""A manifest with a value of another type is refused, and its readers can rely on the others."""

import copy
import json
from collections.abc import Iterator

import pytest

from stackproof.cli import data as verbs
from stackproof.config import ByteTokenizer, DataConfig, Files, NearDedup
from stackproof.data import account
from stackproof.data.prepare import open_folder, prepare
from stackproof.spec.errors import DataError

EXAM = "Which of the nine lighthouses on the coast was the last one to lose its keeper, and when?"
ODD = (None, True, -1, 1.5, "", "x", [], [None], {}, {"x": None})
# what is not read, or only printed
FREE = ("config.tokenizer", "config.filters", "config.decontaminate", "filters.limits")
FREE += ("filters.plugins", "corpus.kind", "corpus.license", "corpus.documents", "corpus.bytes")
FREE += ("config.decontaminate_fields", "config.split.validation_frac")
FREE += ("decontamination.sets.0.sha256", "decontamination.grams", "decontamination.canary_found")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A data set with near deduplication, dropped documents and an evaluation set."""
    folder = tmp_path_factory.mktemp("data")
    lines = [f"line {n} says something of its own about the number {n * 7}" for n in range(60)]
    (folder / "t.txt").write_text("\n".join([*lines, "short", EXAM, ""]))
    (folder / "other.bin").write_text("no text")
    (folder / "exam.txt").write_text(EXAM)
    cfg = DataConfig(
        corpus=Files(paths=(str(folder / "t.txt"),), documents="line"),
        tokenizer=ByteTokenizer(),
        dedup=NearDedup(),
        decontaminate=(str(folder / "exam.txt"),),
    )
    return prepare(cfg, cache_dir=folder / "cache").directory


def places(tree, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in a tree, without its root."""
    if path:
        yield path
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield from places(tree[key], (*path, key))


def changed(document: dict, path: tuple, value=None, *, gone: bool = False) -> dict:
    made = copy.deepcopy(document)
    at = made
    for key in path[:-1]:
        at = at[key]
    if gone:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return made


def read_all(folder) -> None:
    """What the verbs, a run and a record read of a manifest."""
    data = open_folder(folder, DataConfig(verify="size"))
    manifest = data.manifest
    for as_json in (True, False):
        verbs._print(folder, manifest, [], as_json)
    account.page(manifest, [])
    account.source_rows(manifest)
    data.inputs()
    data.evaluation_grams()


def is_free(path: tuple) -> bool:
    name = ".".join(map(str, path))
    return any(name == free or name.startswith(f"{free}.") for free in FREE)


def test_a_value_of_another_type_is_refused(built, capsys):
    path = built / "manifest.json"
    good = path.read_bytes()
    document = json.loads(good)
    assert document["decontamination"]["sets"] and document["sources"][0]["receipt"]["dropped"]
    passed = set()
    try:
        for place in places(document):
            cases = [changed(document, place, value) for value in ODD]
            cases += [changed(document, place, gone=True)]
            for case in cases:
                path.write_text(json.dumps(case))
                try:
                    read_all(built)
                except DataError:
                    continue
                passed.add(place)
            if isinstance(place[-1], str) and not is_free(place):
                path.write_text(json.dumps(changed(document, place, {"x": [1]})))
                with pytest.raises(DataError):
                    read_all(built)
                    pytest.fail(".".join(map(str, place)))
    finally:
        path.write_bytes(good)
    read_all(built)
    assert passed, "a value of the same type passes"


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("decontamination", "x", "decontamination"),
        ("decontamination.sets", {}, "decontamination.sets"),
        ("decontamination.sets.0.records", "9", "decontamination.sets.0.records"),
        ("sources.0.languages", "en", "sources.0.languages"),
        ("sources.0.languages.0", 1, "sources.0.languages.0"),
        ("sources.0.files_passed_over", 0, "sources.0.files_passed_over"),
        ("sources.0.files_passed_over.number", "0", "sources.0.files_passed_over.number"),
        ("sources.0.receipt.dropped.too-short", 1, "sources.0.receipt.dropped.too-short"),
        ("sources.0.tokens.test", 1, "sources.0.tokens.test"),
        ("sources.0.name", "other", "a shard is of the source files, which is not listed"),
        ("tokenizer.encoder", None, "tokenizer.encoder"),
        ("config.dedup.kind", "none", "config.dedup"),
        ("config.dedup.shingle_words", "5", "config.dedup.near.shingle_words"),
        ("config.split", [], "config.split"),
        ("filters.rules", 1, "filters.rules"),
    ],
)
def test_the_refusal_names_the_field(built, tmp_path, place, value, named):
    path = built / "manifest.json"
    good = path.read_bytes()
    keys = tuple(int(k) if k.isdecimal() else k for k in place.split("."))
    try:
        path.write_text(json.dumps(changed(json.loads(good), keys, value)))
        with pytest.raises(DataError, match=named.replace(".", r"\.")):
            open_folder(built, DataConfig(verify="size"))
    finally:
        path.write_bytes(good)
