"""A table of shards in blocks gives what a listed one gives, reads what is needed of it, and
refuses what its manifest does not describe.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from stackproof.config import DataConfig, Files
from stackproof.contracts.gate import call_check
from stackproof.data import manifest, shard_table
from stackproof.data.packing import ConcatenatedStream, PackedStream
from stackproof.data.prepare import JUDGED_SHARDS, open_folder, prepare
from stackproof.data.shard_table import ShardTable, write_blocks
from stackproof.data.subject import data_set_subject
from stackproof.spec.canonical import canonical_json, read_json
from stackproof.spec.errors import DataError
from stackproof.train.start import _refuse_other_data
from tests.data.simulated import FILES, document_of, link_files, make_parts, text_of
from tests.data.test_shards import VOCAB, written

OVER_ALL_SHARDS = (
    "corpus.filters corpus.no-repeats corpus.packing data.integrity data.leakage tokenizer.identity"
).split()


def two_sources(folder: Path) -> dict:
    """A split of 30 shards of unequal lengths, the last 11 of another source."""
    split = written(folder, [([n] * (7 + 3 * n % 50), n) for n in range(90)], max_tokens=60)
    assert len(split["shards"]) > 25
    for entry in split["shards"][-11:]:
        entry["source"] = "other"
    return split


@pytest.fixture
def blocks(tmp_path, monkeypatch):
    """A split that lists its shards, and the same in blocks of four."""
    monkeypatch.setattr(shard_table, "BLOCK_SHARDS", 4)
    split = two_sources(tmp_path)
    return split, split | {"shards": write_blocks(tmp_path, "train", split["shards"])}


@pytest.mark.parametrize("kind", [ConcatenatedStream, PackedStream])
@pytest.mark.parametrize("seq_len", [5, 16, 32])
def test_blocks_give_what_a_list_gives(tmp_path, blocks, kind, seq_len):
    listed, blocked = (kind(tmp_path, split, VOCAB) for split in blocks)
    assert list(blocked.shards) == [
        {k: e[k] for k in ("tokens", "documents", "bytes", "sha256", "path", "source")}
        for e in blocks[0]["shards"]
    ]
    assert len(blocks[1]["shards"]) < len(blocked.shards) == len(listed.shards)
    n = listed.n_windows(seq_len)
    assert n == blocked.n_windows(seq_len) > 0 and listed.spans(seq_len) == blocked.spans(seq_len)
    numbers = np.random.default_rng(0).permutation(n)
    for a, b in zip(
        vars(listed.rows(numbers, seq_len)).values(), vars(blocked.rows(numbers, seq_len)).values()
    ):
        assert np.array_equal(a, b)
    for name in ("shard_windows", "n_labels", "dropped_tokens", "padding"):
        assert getattr(listed, name)(seq_len) == getattr(blocked, name)(seq_len)
    for name in ("document_starts", "document_hashes", "tokenizer_sha256", "paths"):
        assert np.array_equal(getattr(listed, name), getattr(blocked, name))
    assert list(listed.documents()) == list(blocked.documents())
    rng = np.random.default_rng(1)
    for start, stop in np.sort(rng.integers(0, listed.n_tokens + 1, (50, 2))).tolist():
        tokens = listed.token_range(start, stop)
        assert len(tokens) == stop - start
        assert np.array_equal(tokens, blocked.token_range(start, stop))


def test_a_block_is_read_when_one_of_its_shards_is_needed(tmp_path, blocks, monkeypatch):
    opened = []
    read = shard_table.read_bytes
    monkeypatch.setattr(
        shard_table, "read_bytes", lambda path, n: opened.append(path.name) or read(path, n)
    )
    stream = ConcatenatedStream(tmp_path, blocks[1], VOCAB)
    assert stream.n_windows(16) and stream.spans(16) and opened == ["train-00000.shards"]
    stream.rows(np.array([stream.n_windows(16) - 1]), 16)
    assert opened == ["train-00000.shards", blocks[1]["shards"][-1]["path"]]
    stream.n_windows(17)  # is not counted in blocks
    assert sorted(opened) == sorted(e["path"] for e in blocks[1]["shards"])


@pytest.mark.parametrize("key", ["sha256", "n_shards", "tokens", "documents", "windows", "bytes"])
def test_a_block_that_contradicts_its_manifest_is_refused(tmp_path, blocks, key):
    entries = blocks[1]["shards"]
    before = entries[2][key]
    match key:
        case "sha256":
            entries[2][key] = before[::-1]
        case "windows":
            entries[2][key] = [before[0] + 1, *before[1:]]
        case _:
            entries[2][key] = before - 1
    table = ShardTable(tmp_path, entries)
    with pytest.raises(DataError, match=r"train-00002\.shards is not the block"):
        table[int(table.first[2])]
    entries[2][key] = before
    assert ShardTable(tmp_path, entries)[8]["path"] == "train-00008.safetensors"


def test_a_changed_block_is_refused(tmp_path, blocks):
    path = tmp_path / "train-00001.shards"
    data = bytearray(path.read_bytes())
    data[3 * len(data) // 4] ^= 1
    path.write_bytes(data)
    table = ShardTable(tmp_path, blocks[1]["shards"])
    assert table[3] and table[8]
    with pytest.raises(DataError, match=r"train-00001\.shards is not the block"):
        table[4]
    path.unlink()
    with pytest.raises(DataError, match=r"train-00001\.shards is not the block"):
        table[4]


def test_a_block_names_no_file_outside_of_its_folder(tmp_path, blocks):
    for name in ("../x", "/x", "..", "a\x01"):
        entries = [e | {"path": name} for e in blocks[0]["shards"][:2]]
        table = ShardTable(tmp_path, write_blocks(tmp_path, "train", entries))
        with pytest.raises(DataError, match="outside of the folder"):
            table[0]


def test_a_sample_holds_shards_of_every_source_and_their_ends(tmp_path, blocks):
    table = ShardTable(tmp_path, blocks[1]["shards"])
    sampled = table.sample(6)
    assert [e["source"] for e in sampled].count("other") == 3 and len(sampled) == 6
    assert len({e["path"] for e in sampled}) == 6
    assert {e["source"] for e in table.sample(1)} == {"all", "other"}
    assert table.sample(len(table)) == list(table)


# --- gates over a sample --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("simulated"))


@pytest.fixture
def corpus_of(parts, tmp_path, monkeypatch):
    """A corpus of `n` shards, in blocks if it has more than 16, opened with data.verify."""
    monkeypatch.setattr(manifest, "LISTED_SHARDS", 16)

    def opened(n: int, verify: str, change=lambda document: None):
        folder = link_files(parts, tmp_path / f"{n}-{verify}")
        document = document_of(parts, n)
        change(document)
        manifest.write_manifest(folder, document)
        return open_folder(folder, DataConfig(verify=verify))

    return opened


def verdict(spec, data, gate_id):
    return call_check(spec.gates[gate_id], data_set_subject(data, 64))


@pytest.mark.parametrize("gate_id", OVER_ALL_SHARDS)
def test_green_on_a_sample_is_not_run_and_states_the_sample(spec, corpus_of, gate_id):
    few = verdict(spec, corpus_of(FILES, "drawn"), gate_id)
    assert few.outcome == "pass" and "shards" not in few.measured, few.message
    many = verdict(spec, corpus_of(4000, "drawn"), gate_id)
    assert many.outcome == "not_run"
    read = {k: many.measured[k] for k in ("read_shards", "shards")}
    assert read == {"read_shards": JUDGED_SHARDS + 1, "shards": 4001}
    assert "17 of 4001 shards" in many.message


def test_red_on_a_sample_stays_red(spec, corpus_of):
    def repeat(document):
        entries = document["splits"]["train"]["shards"]
        entries[:] = [entries[0]] * len(entries)

    data = corpus_of(4000, "drawn", repeat)
    found = verdict(spec, data, "corpus.no-repeats")
    assert found.outcome == "fail" and found.measured["repeated"] == 40 * (JUDGED_SHARDS - 1)


def test_full_verification_judges_all_shards(spec, corpus_of):
    """The corpus of 40 shards in 16 files holds documents twice, where the sample holds none."""
    drawn = verdict(spec, corpus_of(40, "drawn"), "corpus.no-repeats")
    assert drawn.outcome == "not_run" and drawn.measured["repeated"] == 0
    found = verdict(spec, corpus_of(40, "full"), "corpus.no-repeats")
    assert found.outcome == "fail" and found.measured["repeated"] == 24 * 40


@pytest.mark.parametrize("verify", ["size", "full"])
def test_verification_reaches_the_shards_of_blocks(corpus_of, verify):
    def other(document):
        entries = document["splits"]["train"]["shards"]
        wrong = {"size": {"bytes": 1}, "full": {"sha256": "0" * 64}}
        entries[23] = entries[23] | wrong[verify]

    assert corpus_of(40, "drawn", other)
    with pytest.raises(DataError, match=r"truncated or padded|was changed since"):
        corpus_of(40, verify, other)


# --- the manifest ---------------------------------------------------------------------------------


def test_a_build_writes_blocks_of_many_shards(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("\n".join(map(text_of, range(400))))
    cfg = DataConfig(corpus=Files(paths=(str(tmp_path / "text"),), documents="line"))
    listed = prepare(cfg, cache_dir=tmp_path / "a")
    monkeypatch.setattr(manifest, "LISTED_SHARDS", 0)
    blocked = prepare(cfg, cache_dir=tmp_path / "b")
    assert (blocked.directory / "train-00000.shards").is_file()
    assert listed.directory.name == blocked.directory.name
    for a, b in ((listed.train, blocked.train), (listed.validation, blocked.validation)):
        assert list(a.shards) == list(b.shards) and a.n_windows(64) == b.n_windows(64) > 0
    assert prepare(cfg, cache_dir=tmp_path / "b").manifest == blocked.manifest


def test_a_manifest_in_blocks_is_read_back_and_a_wrong_block_names_its_field(parts, tmp_path):
    folder = link_files(parts, tmp_path / "many")
    made = manifest.write_manifest(folder, document_of(parts, manifest.LISTED_SHARDS + 1))
    path = folder / "manifest.json"
    assert manifest.read_manifest(path) == made and path.stat().st_size < 10_000
    assert "n_shards" not in made["splits"]["validation"]["shards"][0]
    for key, value in (("windows", [1]), ("n_shards", 0), ("sha256", "x"), ("path", "../x")):
        wrong = json.loads(path.read_bytes())
        wrong["splits"]["train"]["shards"][1][key] = value
        (tmp_path / "wrong.json").write_bytes(canonical_json(wrong))
        with pytest.raises(Exception, match=f"shards.1.block.{key}"):
            manifest.read_manifest(tmp_path / "wrong.json")


def test_a_run_states_number_and_hash_of_many_shards(parts, tmp_path):
    few = document_of(parts, manifest.LISTED_SHARDS)
    assert manifest.stated(few) == few, "as listed"
    many = document_of(parts, manifest.LISTED_SHARDS + 1)
    shards = manifest.stated(many)["splits"]["train"]["shards"]
    assert set(shards) == {"n_shards", "sha256"} and shards["n_shards"] == len(
        many["splits"]["train"]["shards"]
    )
    other = json.loads(json.dumps(many))
    other["splits"]["train"]["shards"][5]["sha256"] = "0" * 64
    assert manifest.stated(other)["splits"]["train"]["shards"]["sha256"] != shards["sha256"]
    folder = link_files(parts, tmp_path / "many")
    blocks = manifest.write_manifest(folder, many)
    assert manifest.stated(blocks)["splits"]["train"]["shards"]["n_shards"] == shards["n_shards"]
    assert read_json(folder / "manifest.json") == blocks


@pytest.mark.parametrize("listed", [True, False])
def test_a_resume_accepts_a_full_list_and_a_stated_one_of_the_same_shards(parts, listed):
    many = document_of(parts, manifest.LISTED_SHARDS + 1)
    then = many if listed else manifest.stated(many)
    trainer = SimpleNamespace(dataset=SimpleNamespace(manifest=many))
    _refuse_other_data(trainer, {"data": then})
    trainer.dataset.manifest = json.loads(json.dumps(many))
    trainer.dataset.manifest["splits"]["train"]["shards"][5]["sha256"] = "0" * 64
    with pytest.raises(DataError, match="splits differ"):
        _refuse_other_data(trainer, {"data": then})
