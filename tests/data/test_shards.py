"""Shards: what is written is what is read, window by window,
and a damaged or foreign one is refused.
"""

import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from stackproof import tensorfile
from stackproof.contracts.conditions import ContractError
from stackproof.data import shards
from stackproof.data.packing import ConcatenatedStream, PackedStream
from stackproof.data.shards import TokenStream, pack_ids, write_split
from stackproof.spec.canonical import sha256_file
from stackproof.spec.errors import DataError

VOCAB = 70_000


class Wide:
    """A tokenizer of 70,000 ids, for the wide storage type."""

    vocab_size, eos_id, sha256 = VOCAB, 69_999, "ab" * 32


def written(folder, documents, **options) -> dict:
    """The manifest's entry of a split made of (ids, document hash) pairs."""
    entries = [
        e | {"source": "all"} for e in write_split(folder, "train", documents, Wide, **options)
    ]
    sums = {k: sum(e[k] for e in entries) for k in ("tokens", "documents")}
    return {**sums, "bytes": 0, "shards": entries}


def test_the_highest_id_survives_and_one_above_is_refused(tmp_path):
    stream = TokenStream(tmp_path, written(tmp_path, [([0, 69_998, 65_536], 1)]), VOCAB)
    assert stream.token_range(0, 5).tolist() == [69_999, 0, 69_998, 65_536, 69_999]
    with pytest.raises(DataError, match="outside the vocabulary"):
        pack_ids([VOCAB], VOCAB)


def test_windows_tile_every_shard(tmp_path):
    split = written(
        tmp_path, [(list(range(n, n + 10)), n) for n in range(0, 100, 10)], max_tokens=40
    )
    entries = split["shards"]
    assert len(entries) == 3 and all(
        sha256_file(tmp_path / e["path"]) == e["sha256"] for e in entries
    )
    stream = TokenStream(tmp_path, split, VOCAB)
    n = stream.n_windows(5)
    windows = stream.windows(np.arange(n), 5)
    assert windows.shape == (n, 6) and n == sum((e["tokens"] - 1) // 5 for e in entries)
    flat = stream.token_range(0, stream.n_tokens)
    first = entries[0]["tokens"]
    assert np.array_equal(windows[0], flat[:6]) and np.array_equal(
        windows[(first - 1) // 5], flat[first : first + 6]
    )


def test_rows_of_concatenated_documents_are_windows_and_their_next_tokens(tmp_path):
    stream = ConcatenatedStream(
        tmp_path,
        written(tmp_path, [(list(range(n, n + 10)), n) for n in range(0, 100, 10)], max_tokens=40),
        VOCAB,
    )
    numbers = np.array([6, 0, 3])
    rows, windows = stream.rows(numbers, 5), stream.windows(numbers, 5)
    assert (
        np.array_equal(rows.input_ids, windows[:, :-1])
        and np.array_equal(rows.labels, windows[:, 1:])
        and rows.document_ids is None
    )


def test_shards_of_another_width_or_with_foreign_ids_are_refused(tmp_path):
    split = written(tmp_path, [([0, 69_998, 65_536], 1)])
    with pytest.raises(DataError, match="stores tokens as uint32"):
        TokenStream(tmp_path, split, 300)
    narrower = TokenStream(tmp_path, split, 69_000)
    for read in (lambda: narrower.token_range(0, 5), lambda: narrower.window(0, 4)):
        with pytest.raises(DataError, match="token id 69999"):
            read()


def test_a_shard_of_another_length_than_the_manifest_says_is_refused(tmp_path):
    split = written(tmp_path, [(list(range(20)), 1)])
    split["shards"][0]["tokens"] += 1
    with pytest.raises(DataError, match=r"uint32 \(22,\)"):
        TokenStream(tmp_path, split, VOCAB)


STARTS, HASHES = "document_starts", "document_hashes"


def read_arrays(folder, split) -> None:
    """Read every array of the shards."""
    for kind in (ConcatenatedStream, PackedStream):
        stream = kind(folder, split, VOCAB)
        stream.window(0, 4), stream.document_starts, stream.document_hashes, stream.rows([0], 4)


@pytest.mark.parametrize(
    ("name", "spoil", "why"),
    [
        ("tokens", lambda a: a.reshape(-1, 1), r"uint32 \(25, 1\)"),
        ("tokens", lambda a: a.astype(np.float32), "float32"),
        (STARTS, lambda a: a.astype(np.float64), "float64"),
        (STARTS, lambda a: a.reshape(1, -1), r"int64 \(1, 3\)"),
        (STARTS, lambda a: a.astype(np.int32), "int32"),
        (STARTS, lambda a: a[:2], r"int64 \(2,\)"),
        (STARTS, lambda a: a[::-1].copy(), "do not rise"),
        (STARTS, lambda a: a - 1, "do not rise within"),
        (STARTS, lambda a: a + 100, "do not rise within"),
        (HASHES, lambda a: a.reshape(-1, 1), r"int64 \(3, 1\)"),
        (HASHES, lambda a: a.view(np.uint64), "uint64"),
    ],
)
def test_an_array_of_a_shard_that_no_build_writes_is_refused(tmp_path, name, spoil, why):
    split = written(tmp_path, [(list(range(7)), n) for n in range(3)])
    read_arrays(tmp_path, split)
    path = tmp_path / split["shards"][0]["path"]
    arrays = {n: np.array(tensorfile.memmap(path, n)) for n in ("tokens", STARTS, HASHES)}
    tensorfile.write(path, arrays | {name: spoil(arrays[name])}, {})
    with pytest.raises(DataError, match=f"{name}.* {why}"):
        read_arrays(tmp_path, split)


def test_a_window_outside_the_stream_is_refused(tmp_path):
    stream = TokenStream(tmp_path, written(tmp_path, [(list(range(20)), 1)]), VOCAB)
    assert stream.n_windows(5) == 4 and stream.window(3, 5).tolist() == [14, 15, 16, 17, 18, 19]
    for number in (-1, 4):
        with pytest.raises(ContractError):
            stream.window(number, 5)


def test_document_starts_point_behind_an_end_of_text_in_every_shard(tmp_path):
    split = written(tmp_path, [([n] * (n + 1), n) for n in range(30)], max_tokens=60)
    stream = TokenStream(tmp_path, split, VOCAB)
    flat = stream.token_range(0, split["tokens"])
    assert len(split["shards"]) > 3 and [int(flat[s]) for s in stream.document_starts] == list(
        range(30)
    )
    assert all(flat[s - 1] == Wide.eos_id for s in stream.document_starts)


def test_shards_are_numbered_from_where_they_are_told_to(tmp_path):
    split = written(tmp_path, [([n] * 30, n) for n in range(4)], max_tokens=60, first_number=7)
    assert [e["path"] for e in split["shards"]] == [
        "train-00007.safetensors",
        "train-00008.safetensors",
    ]


# --- many shards ----------------------------------------------------------------------------------


def forty(folder) -> dict:
    split = written(folder, [([n] * 30, n) for n in range(80)], max_tokens=60)
    assert len(split["shards"]) == 40
    return split


def test_more_shards_than_may_be_mapped_are_read_alike(tmp_path, monkeypatch):
    split = forty(tmp_path)
    every = ConcatenatedStream(tmp_path, split, VOCAB)
    monkeypatch.setattr(shards, "MAX_MAPPED", 3)
    few = ConcatenatedStream(tmp_path, split, VOCAB)
    assert few._tokens._recent.cache_info().currsize == 1, "opening maps the first shard only"
    numbers = np.random.default_rng(0).permutation(few.n_windows(8))
    assert np.array_equal(few.rows(numbers, 8).labels, every.rows(numbers, 8).labels)
    assert (
        few._tokens._recent.cache_info().currsize
        == 3
        < every._tokens._recent.cache_info().currsize
        == 40
    )


READ_ALL = """
import json, resource, sys
from pathlib import Path
import numpy as np
from stackproof.data import shards
from stackproof.data.packing import ConcatenatedStream, PackedStream
folder, limit, mapped = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
if mapped:
    shards.mappable = lambda: mapped
stream = ConcatenatedStream(folder, json.loads((folder / "split.json").read_text()), 70_000)
print(int(stream.rows(np.arange(stream.n_windows(8)), 8).labels.sum()))
"""


def test_a_small_limit_on_open_files_is_respected_by_default_and_named_where_it_is_hit(tmp_path):
    """Forty shards under 32 descriptors: read whole by default; with every shard kept open the
    error blames the limit, not the shard.
    """
    split = forty(tmp_path)
    (tmp_path / "split.json").write_text(json.dumps(split))
    stream = ConcatenatedStream(tmp_path, split, VOCAB)
    expected = int(stream.rows(np.arange(stream.n_windows(8)), 8).labels.sum())

    def read(mapped: int) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", READ_ALL, str(tmp_path), "32", str(mapped)],
            capture_output=True,
            text=True,
        )

    bounded, greedy = read(0), read(1000)
    assert bounded.returncode == 0 and int(bounded.stdout) == expected, bounded.stderr
    assert (
        greedy.returncode != 0
        and "DataError" in greedy.stderr
        and "ulimit -n" in greedy.stderr
        and "delete" not in greedy.stderr
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 32, "the limit was the child's alone"
