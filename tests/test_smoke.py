"""A real model from nothing through the real command line: train, continue, inspect, sample,
evaluate.

The pangram corpus, one layer, two heads, width 32, block 32, five iterations.
It learns nothing; it proves the wiring.
"""

import json

import pytest

from stackproof.config import Pangram
from stackproof.data import corpus
from tests.cli.conftest import Stack

REASON = "the pangram repeats itself, so its split cannot be disjoint and its tokens are few"
WAIVERS = ",".join(
    f'{{id="{gate}", reason="{REASON}", expires="2999-01-01"}}'
    for gate in ("data.leakage", "data.corpus-budget")
)
VALUES = {
    "data.corpus.kind": "pangram",
    "data.split.kind": "tail",
    "data.split.validation_frac": "0.1",
    "data.tokenizer.kind": "char",
    "model.d_model": "32",
    "model.n_layers": "1",
    "model.n_heads": "2",
    "model.n_kv_heads": "1",
    "model.head_dim": "16",
    "model.d_ff": "64",
    "model.max_seq_len": "32",
    "train.max_steps": "5",
    "train.tokens_per_step": "128",
    "train.micro_batch_size": "4",
    "schedule.warmup_steps": "2",
    "eval.every": "5",
    "eval.batches": "4",
    "eval.batch_size": "4",
    "stop.kind": "never",
    "sample.every": "5",
    "sample.max_new_tokens": "16",
    "checkpoint.every": "5",
    "gates.waive": f"[{WAIVERS}]",
}
SETS = [part for key, value in VALUES.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder after training five steps and continuing to ten."""
    folder = tmp_path_factory.mktemp("smoke")
    stack = Stack(folder, folder / "cache")
    first = stack("train", *SETS, "--run-dir", "run", "--device", "cpu", "--json")
    assert first.code == 0, first.err
    again = stack(
        "train", "--fork", "run", "--set", "train.max_steps=10", "--run-dir", "longer", "--json"
    )
    assert again.code == 0, again.err
    return stack, first.json, again.json


def test_pangram_corpus_has_the_declared_shape():
    (document,) = corpus.read_documents(Pangram())
    assert len(document.text) == 9000 and len(set(document.text)) == 28


def test_training_leaves_a_record_without_red_or_unasked_gates(trained):
    stack, first, _ = trained
    record = json.loads((stack.folder / "run" / "metadata.json").read_text())
    waived = {"data.leakage", "data.corpus-budget"}
    verdicts = {g["id"]: g["verdict"] for g in record["gates"]}
    assert first["status"] == "completed" and record["metrics"]["steps"]["value"] == 5
    assert len(verdicts) >= 18 and verdicts.pop("runtime.learned") == "not_run", (
        "five steps are too few to have learned"
    )
    assert all(v == "pass" for g, v in verdicts.items() if g not in waived)
    assert (
        record["config"]["model"]["d_model"] == 32
        and record["metrics"]["vocab_size"]["value"] == 29
    )


def test_continuing_goes_on_at_step_six(trained):
    stack, _, _ = trained
    steps = [
        json.loads(line)["step"]
        for line in (stack.folder / "longer" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [6, 7, 8, 9, 10]


def test_checkpoint_holds_the_declared_parts(trained):
    stack, _, _ = trained
    folder = stack.folder / "run" / "checkpoints" / "step-00000005"
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "state.json",
        "state.safetensors",
    ]
    state = json.loads((folder / "state.json").read_text())
    assert {"step", "cursor", "scaler", "stopper", "gates", "config", "tokenizer_sha256"} <= set(
        state
    )
    inspected = stack("inspect", "run", "--json").json
    assert (
        inspected["checksum"] == "VALID" and inspected["n_params"] == inspected["n_params_formula"]
    )


def test_sample_and_evaluate_answer(trained):
    stack, _, _ = trained
    sampled = stack("sample", "run", "--prompt", "the ", "--max-new-tokens", "12", "--json")
    assert sampled.code == 0 and 0 < len(sampled.json["samples"][0]["text"]) <= 12
    evaluated = stack("evaluate", "run", "--json")
    assert evaluated.code == 0 and evaluated.json["dropped_chars"] == 0
    # 28 letters and the end of text: an untrained model is near log2(29) = 4.86 bits per character.
    assert 3.0 < evaluated.json["bits_per_char"] < 5.4
