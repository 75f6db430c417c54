"""A run on 112,000 shards: what it reads, states and resumes."""

import json

import pytest

from stackproof.data.manifest import write_manifest
from stackproof.spec.canonical import read_json
from stackproof.spec.files import write_atomically
from stackproof.spec.records import read_record
from tests.cli.conftest import tiny
from tests.data.simulated import document_of, link_files, make_parts

N_SHARDS = 112_000
SMALL_BYTES = 20_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of 1.2e10 tokens in 112,000 shards, in sixteen files."""
    place = make_parts(tmp_path_factory.mktemp("many"), documents=400)
    folder = link_files(place, place / "corpus")
    write_manifest(folder, document_of(place, N_SHARDS))
    return folder


def trained(stack, corpus):
    """A run of four steps with a checkpoint at each second one."""
    of_run = tiny(corpus, train__max_steps="4", schedule__warmup_steps="1", checkpoint__every="2")
    sets = [v for v in of_run if v != "--set" and not v.startswith("data.")]
    sets += ["data.verify=drawn", "eval.every=2", "sample.every=2"]
    arguments = [a for value in sets for a in ("--set", value)]
    done = stack("train", "pocket", "--data", str(corpus), "--run-dir", "run", *arguments)
    assert done.code == 0, done.err
    return stack.folder / "run"


def test_a_run_on_many_shards_states_its_manifest_and_resumes(stack, corpus):
    run = trained(stack, corpus)
    document, record = read_json(run / "run.json"), read_record(run / "metadata.json")
    shards = document["data"]["splits"]["train"]["shards"]
    assert shards["n_shards"] == N_SHARDS and len(shards["sha256"]) == 64
    assert (run / "run.json").stat().st_size < SMALL_BYTES
    assert [row.name for row in record.inputs] == ["tokenizer", "manifest"]
    gates = {g.id: g for g in record.gates}
    for gate_id in ("corpus.no-repeats", "data.integrity", "data.leakage", "tokenizer.identity"):
        found = gates[gate_id]
        assert found.verdict == "not_run" and found.measured["read_shards"] == 17
        assert found.measured["shards"] == N_SHARDS + 1
    assert gates["data.rows"].verdict == gates["data.corpus-budget"].verdict == "pass"

    weights = run / "checkpoints" / "step-00000004" / "model.safetensors"
    before = weights.read_bytes()
    done = stack("train", "--resume", "run", "--at", "2")
    assert done.code == 0, done.err
    assert weights.read_bytes() == before

    # Another hash of one shard makes other data.
    path = corpus / "manifest.json"
    manifest = path.read_bytes()
    other = json.loads(manifest)
    other["splits"]["train"]["shards"][50]["sha256"] = "0" * 64
    write_atomically(path, json.dumps(other).encode())
    done = stack("train", "--resume", "run", "--at", "2")
    write_atomically(path, manifest)
    assert done.code == 3 and "the data are not those the run was started on: splits" in done.err
