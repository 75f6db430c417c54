"""A series of another form is a documented error of the site, with its file and line, or a page."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from stackproof.spec.errors import IntegrityError
from stackproof.spec.ledger import Ledger
from stackproof.spec.series import KINDS, parse_series
from tests.site import small_repository
from tools.site_pages import home
from tools.site_pages.data import data_index
from tools.site_pages.proof import matrix_page
from tools.site_pages.runs import run_page
from tools.site_pages.world import World, load_world

ODD = (None, True, -1, 1.5, "x", [], [1], {}, {"x": [1]})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("site")
    small_repository.write_repository(root)
    small_repository.add_evidence(root)
    return load_world(root, root / "evidence")


@pytest.fixture
def spoil(world, monkeypatch):
    """Puts a line in the place of the first one of a series."""
    read = Ledger.series

    def put(record_id: str, name: str, line) -> None:
        def series(self, record, series):
            data = read(self, record, series)
            if (record.id, series.path) != (record_id, name):
                return data
            return json.dumps(line).encode() + data[data.index(b"\n") :]

        monkeypatch.setattr(Ledger, "series", series)

    return put


def all_series(world: World) -> Iterator[tuple]:
    for record in world.records.values():
        for series in record.series:
            yield record, series.path, json.loads(_first(world, record.id, series.path))


def _first(world: World, record_id: str, name: str) -> bytes:
    return (Path(world.ledger.directory) / record_id / name).read_bytes().split(b"\n")[0]


def variants(line: dict) -> Iterator:
    yield from (*ODD, "text")
    for key, value in line.items():
        yield {k: v for k, v in line.items() if k != key}
        inner = value if isinstance(value, dict) else {}
        for odd in ODD:
            yield line | {key: odd}
            for name in list(inner)[:3]:
                made = copy.deepcopy(line)
                made[key][name] = odd
                yield made


def build(world: World, record) -> None:
    run_page(world, record)
    data_index(world)
    matrix_page(world)
    home.last_run(world, "index.md")
    home.BLOCKS["mutants"](world, "index.md")


def test_no_form_of_a_line_ends_the_build_with_another_error(world, spoil):
    refused = passed = 0
    for record, name, line in all_series(world):
        for made in variants(line):
            spoil(record.id, name, made)
            try:
                build(world, record)
                passed += 1
            except IntegrityError as e:
                assert record.id in e.what
                refused += 1
    assert refused > passed / 10 > 0


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ([1], "metrics.jsonl:1: Input should be"),
        ("x", "metrics.jsonl:1: Input should be"),
        ({"step": "1", "loss_nats": 2.0}, "metrics.jsonl:1: field step"),
        ({"step": True, "loss_nats": 2.0}, "metrics.jsonl:1: field step"),
        ({"step": 1, "loss_nats": "two"}, "metrics.jsonl:1: field loss_nats"),
        ({"step": 1, "val_loss_nats": [2.0]}, "metrics.jsonl:1: field val_loss_nats"),
    ],
)
def test_the_error_names_file_line_and_field(world, spoil, line, named):
    record = next(r for r, name, _ in all_series(world) if name == "metrics.jsonl")
    spoil(record.id, "metrics.jsonl", line)
    with pytest.raises(IntegrityError, match=named.replace(".", r"\.")):
        run_page(world, record)


def test_what_a_run_writes_for_numbers_that_are_not_finite_is_read():
    for value in ("NaN", "Infinity", "-Infinity", "9007199254740993", 1, 2.5, None):
        data = json.dumps({"step": 1, "loss_nats": value}).encode()
        assert parse_series(data, "metrics.jsonl", origin="x")[0]["loss_nats"] == value


@pytest.mark.parametrize("name", [*KINDS, "other.jsonl"])
def test_a_line_of_any_series_is_an_object(name):
    for line in (b"[]", b"1", b'"x"', b"null"):
        with pytest.raises(IntegrityError, match="x:1"):
            parse_series(line, name, origin="x")
