"""Gates of exports against real folders and real damage."""

import json

import pytest
import torch

from stackproof import tensorfile
from stackproof.contracts.gate import call_check
from stackproof.contracts.subject import Subject
from stackproof.data.tokenizer import Bytes, Chars, train_bpe
from stackproof.export import huggingface, parity
from stackproof.model import hugging_face
from stackproof.museum.plant import load_museum
from stackproof.spec.canonical import sha256_file
from stackproof.spec.errors import GateFailed
from tests.export import models
from tests.subjects import altered, changed

# imports are proven in the museum
PLANTS = [
    p for p in load_museum() if p.startswith("export.") and not p.startswith("export.import-")
]


def keeper(spec, only=None):
    from stackproof.contracts.keeper import Gatekeeper

    return Gatekeeper(spec, kind="export", only=only)


@pytest.fixture
def folder(spec, tmp_path):
    model = models.ours("plain", 257)
    huggingface.export(
        model,
        Bytes(),
        tmp_path / "out",
        keeper(spec),
        max_shard_bytes=30_000,
        card=lambda folder, made: None,
    )
    return tmp_path / "out"


@pytest.fixture
def written(folder, monkeypatch):
    """The folder where the other library is not installed."""
    monkeypatch.setattr(parity, "available", lambda: False)
    return Subject(exported=parity.Written(models.ours("plain", 257), folder, "F32", Bytes()))


@pytest.fixture
def compared(folder):
    pytest.importorskip("transformers", reason="the witness: pip install 'stackproof[hf]'")
    return Subject(exported=parity.Written(models.ours("plain", 257), folder, "F32", Bytes()))


def test_folder_is_green_on_a_real_export_and_not_run_without_a_comparison(spec, written):
    gate = spec.gates["export.folder"]
    assert call_check(gate, written).outcome == "not_run"
    read = {p.name: sha256_file(p) for p in written.exported.folder.glob("*.safetensors")}
    verdict = call_check(gate, changed(written, exported={"compared_sha256": read}))
    assert verdict.outcome == "pass", verdict.message
    assert verdict.measured["shards"] > 2 and verdict.measured["compared"]


SETTINGS = [
    ("config.json", "bos_token_id", 255),
    ("config.json", "eos_token_id", 255),
    ("config.json", "vocab_size", 258),
    ("config.json", "torch_dtype", "bfloat16"),
    ("config.json", "max_position_embeddings", 1),
    ("config.json", "hidden_size", 49),
    ("config.json", "num_hidden_layers", 3),
    ("config.json", "num_attention_heads", 2),
    ("config.json", "num_key_value_heads", 4),
    ("config.json", "head_dim", 24),
    ("config.json", "intermediate_size", 57),
    ("config.json", "rms_norm_eps", 1e-5),
    ("config.json", "tie_word_embeddings", False),
    ("config.json", "rope_theta", 1e6),
    ("config.json", "initializer_range", 0.02),
    ("config.json", "architectures", ["MistralForCausalLM"]),
    ("config.json", "model_type", "mistral"),
    ("generation_config.json", "bos_token_id", 255),
    ("generation_config.json", "eos_token_id", [256, 255]),
    ("generation_config.json", "max_length", 1),
    ("tokenizer_config.json", "model_max_length", 1),
    ("tokenizer_config.json", "bos_token", "a"),
    ("tokenizer_config.json", "eos_token", None),
    ("tokenizer_config.json", "clean_up_tokenization_spaces", True),
    ("tokenizer_config.json", "tokenizer_class", "LlamaTokenizer"),
]
UNDECLARED = [
    *((f"{name}.json", "pad_token_id", 0) for name in ("config", "generation_config")),
    ("tokenizer_config.json", "pad_token_id", 0),
    ("tokenizer_config.json", "pad_token", "<|endoftext|>"),
    ("tokenizer_config.json", "add_bos_token", True),
    ("generation_config.json", "temperature", 0.2),
    ("generation_config.json", "do_sample", True),
    ("config.json", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
]


@pytest.mark.parametrize(("name", "key", "other"), SETTINGS)
def test_folder_is_red_on_each_setting_of_another_model(spec, folder, written, name, key, other):
    gate, document = spec.gates["export.folder"], json.loads((folder / name).read_text())
    assert call_check(gate, written).outcome == "not_run"
    for changed_document in (
        document | {key: other},
        {k: document[k] for k in document if k != key},
    ):
        (folder / name).write_text(json.dumps(changed_document))
        verdict = call_check(gate, written)
        assert verdict.outcome == "fail", changed_document
        assert f"{name}: {key}" in verdict.message
        assert verdict.measured["wrong_settings"] == 1


@pytest.mark.parametrize(("name", "key", "value"), UNDECLARED)
def test_folder_is_red_on_a_setting_that_no_reader_needs(spec, folder, written, name, key, value):
    document = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(document | {key: value}))
    verdict = call_check(spec.gates["export.folder"], written)
    assert verdict.outcome == "fail" and f"{name}: {key}" in verdict.message


@pytest.mark.parametrize("name", models.OURS)
def test_folder_is_green_on_each_architecture(spec, tmp_path, monkeypatch, name):
    monkeypatch.setattr(parity, "available", lambda: False)
    for dtype in ("float32", "bfloat16"):
        made = huggingface.export(
            models.ours(name, 257),
            Bytes(),
            tmp_path / dtype,
            keeper(spec, ("export.folder",)),
            dtype=dtype,
            card=lambda folder, made: None,
        )
        (found,) = [g for g in made.gates if g.id == "export.folder"]
        assert found.verdict == "not_run" and "is complete" in found.message


def exported_with(tokenizer, folder):
    """A gate's subject: a folder that was written with a tokenizer."""
    model = models.ours("plain", tokenizer.vocab_size)
    folder.mkdir()
    huggingface.write_documents(
        folder, hugging_face.kind_for(model.cfg), model, tokenizer, "float32"
    )
    huggingface.write_weights(folder, hugging_face.kind_for(model.cfg), model, "float32", 2**30)
    return Subject(exported=parity.Written(model, folder, "F32", tokenizer))


TOKENIZERS = {
    "bytes": Bytes,
    "characters": lambda: Chars("abcde fgh.é"),
    "merges": lambda: train_bpe(300, ["the cat sat on the mat " * 9, "naïve, 漢字 " * 5]),
}


@pytest.fixture(params=TOKENIZERS)
def tokenized(request, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "available", lambda: False)
    return exported_with(TOKENIZERS[request.param](), tmp_path / "tokenized")


def swapped(document, a="a", b="c"):
    ids = document["model"]["vocab"]
    return document | {"model": document["model"] | {"vocab": ids | {a: ids[b], b: ids[a]}}}


PADDING = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
OTHER_TOKENIZER = {
    "two ids swapped": (swapped, "'a' is"),
    "truncation": (lambda d: d | {"truncation": TRUNCATION}, "truncation is"),
    "padding": (lambda d: d | {"padding": PADDING}, "padding is"),
    "lower case": (lambda d: d | {"normalizer": {"type": "Lowercase"}}, "have other ids"),
    "a token more": (
        lambda d: d | {"added_tokens": d["added_tokens"] + [NEW_TOKEN]},
        "1 tokens have another id, first '<|new|>'",
    ),
}
NEW_TOKEN = {"id": 5000, "content": "<|new|>", "special": True, "normalized": False}
NEW_TOKEN |= {"single_word": False, "lstrip": False, "rstrip": False}


def test_folder_is_green_with_each_tokenizer(spec, tokenized):
    verdict = call_check(spec.gates["export.folder"], tokenized)
    assert verdict.outcome == "not_run" and "is complete" in verdict.message


@pytest.mark.parametrize("mistake", OTHER_TOKENIZER)
def test_folder_is_red_on_another_tokenizer(spec, tokenized, mistake):
    change, fault = OTHER_TOKENIZER[mistake]
    path = tokenized.exported.folder / "tokenizer.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    verdict = call_check(spec.gates["export.folder"], tokenized)
    assert verdict.outcome == "fail" and "tokenizer.json: " in verdict.message
    assert fault in verdict.message


def test_folder_is_red_on_merges_in_another_order(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "available", lambda: False)
    subject = exported_with(TOKENIZERS["merges"](), tmp_path / "merges")
    path = subject.exported.folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"].reverse()
    path.write_text(json.dumps(document))
    verdict = call_check(spec.gates["export.folder"], subject)
    assert verdict.outcome == "fail" and "tokenizer.json: " in verdict.message


def test_folder_is_red_on_a_stranger_and_on_another_type(spec, written, folder):
    gate = spec.gates["export.folder"]
    assert "BF16" in call_check(gate, changed(written, exported={"dtype": "BF16"})).message
    fewer = changed(written, exported={"live_shapes": written.exported.live_shapes[1:]})
    assert call_check(gate, fewer).outcome == "fail"
    (folder / "optimizer.pt").write_bytes(b"PK\x03\x04")
    assert "optimizer.pt" in call_check(gate, written).message


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        hugging_face.INDEX,
    ],
)
def test_folder_is_red_without_a_document(spec, written, folder, name):
    (folder / name).unlink()
    assert call_check(spec.gates["export.folder"], written).outcome == "fail"


def test_folder_is_red_on_an_index_that_miscounts(spec, written, folder):
    index = json.loads((folder / hugging_face.INDEX).read_text())
    index["metadata"]["total_size"] += 4
    (folder / hugging_face.INDEX).write_text(json.dumps(index))
    assert "bytes" in call_check(spec.gates["export.folder"], written).message


def test_folder_is_red_on_bytes_that_were_not_compared(spec, compared, folder):
    gate = spec.gates["export.folder"]
    verdict = call_check(gate, compared)
    assert verdict.outcome == "pass" and verdict.measured["compared"]
    path = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    verdict = call_check(gate, compared)
    assert verdict.outcome == "fail" and verdict.measured["changed_files"] == 1
    assert path.name in verdict.message


def test_parity_is_green_on_a_real_export(spec, compared):
    verdict = call_check(spec.gates["export.logit-parity"], compared)
    assert verdict.outcome == "pass", verdict.message
    assert (
        0 < verdict.measured["logit_abs_error"] < 1e-5
        and verdict.measured["lengths"] == "1 5 10 20 40"
    )


def test_parity_is_red_on_one_changed_weight(spec, compared):
    """Up to the rounding of float32: one entry of one matrix, by a twentieth of its spread."""
    model = models.ours("plain", 257)
    with torch.no_grad():
        model.layers[0].attention.q.weight[3, 5] += 0.05 * model.layers[0].attention.q.weight.std()
    other = changed(compared, exported={"ours": parity.Ours(model)})
    assert call_check(spec.gates["export.logit-parity"], other).outcome == "fail"


def test_parity_is_red_on_nan_on_complaints_and_on_other_text(spec, compared):
    gate, theirs = spec.gates["export.logit-parity"], compared.exported.theirs

    def judged(**changes):
        return call_check(gate, changed(compared, exported=changes)).message

    lost = altered(theirs, logits=lambda ids, last: theirs.logits(ids, last) * float("nan"))
    assert "cannot be compared" in judged(theirs=lost)
    assert "missing keys x" in judged(their_complaints="missing keys x")
    assert "differs" in judged(theirs=altered(theirs, continuation=lambda prompt, n: [0] * n))


def test_a_folder_the_other_library_cannot_read_is_red(spec, compared, folder):
    (folder / "config.json").write_text("{")
    subject = Subject(exported=parity.Compared(models.ours("plain", 257), folder))
    verdict = call_check(spec.gates["export.logit-parity"], subject)
    assert verdict.outcome == "fail" and "complains" in verdict.message


def test_without_the_other_library_nothing_is_called_a_pass(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "available", lambda: False)
    gates = keeper(spec)
    huggingface.export(
        models.ours("plain", 257), Bytes(), tmp_path / "out", gates, card=lambda folder, made: None
    )
    found = {g.id: g for g in gates.results()}
    assert {gate_id: result.verdict for gate_id, result in found.items()} == {
        "checkpoint.opened": "not_run",
        "export.logit-parity": "not_run",
        "export.folder": "not_run",
    }
    assert "was not compared" in found["export.folder"].message
    assert "their_complaints" in found["export.logit-parity"].message


@pytest.mark.parametrize("plant_id", PLANTS)
def test_each_plant_is_stopped_and_nothing_is_left(spec, tmp_path, plant_id):
    plant = load_museum()[plant_id]
    if plant_id not in ("export.shard-left-out", "export.second-head"):
        pytest.importorskip("transformers", reason="the witness: pip install 'stackproof[hf]'")
    model = models.ours("untied" if plant_id == "export.matrix-transposed" else "plain", 257)
    with plant.apply(), pytest.raises(GateFailed) as red:
        huggingface.export(
            model,
            Bytes(),
            tmp_path / "place" / "out",
            keeper(spec, (plant.gate,)),
            card=lambda folder, made: None,
        )
    assert red.value.gate_id == plant.gate and list((tmp_path / "place").iterdir()) == []


def test_a_hash_of_a_weight_file_is_that_of_its_bytes(folder):
    from stackproof.contracts.export import _weights_sha256, header_of
    from stackproof.spec.canonical import sha256_file

    for path in folder.glob("*.safetensors"):
        assert _weights_sha256(folder)[path.name] == sha256_file(path)
        assert {n: tuple(e["shape"]) for n, e in header_of(path).items()} == {
            n: e.shape for n, e in tensorfile.read_header(path).tensors.items()
        }
