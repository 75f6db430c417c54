"""`stack export` and `stack import` in one process: records, exit codes,
and what works on an imported model.
"""

import json
from dataclasses import replace

import pytest

from stackproof.cli import main
from stackproof.data.tokenizer import Bytes, train_bpe
from stackproof.export import parity, vocabulary
from stackproof.model import hugging_face
from stackproof.model.build import n_parameters
from stackproof.spec.records import Metric, read_record
from tests.export import models
from tests.subjects import altered


@pytest.fixture
def stack(in_process):
    return in_process


@pytest.fixture
def run_dir(stack, tmp_path):
    """A run directory, made by importing a random model of ours with a byte tokenizer."""
    from stackproof.export import huggingface

    source, kind, model = tmp_path / "source", hugging_face.KINDS[0], models.ours("plain", 257)
    source.mkdir()
    huggingface.write_documents(source, kind, model, Bytes(), "float32")
    huggingface.write_weights(source, kind, model, "float32", 2**30)
    assert stack("import", source, "--out", tmp_path / "run")[0] == 0
    return tmp_path / "run"


def verdicts(document):
    return {g["id"]: g["verdict"] for g in document["gates"]}


@pytest.fixture
def compares():
    pytest.importorskip(
        "transformers",
        reason="parity is measured against transformers: pip install 'stackproof[hf]'",
    )


def test_export_writes_a_folder_and_a_record(stack, run_dir, tmp_path, compares):
    code, said = stack(
        "export", run_dir, "--out", "hf/out", "--dtype", "bfloat16", "--max-shard-bytes", 20_000
    )
    assert (
        code == 0
        and set(verdicts(said).values()) == {"pass"}
        and said["architecture"] == "LlamaForCausalLM"
    )
    record, parent = (
        read_record(tmp_path / said["record_dir"] / "metadata.json"),
        read_record(run_dir / "metadata.json"),
    )
    assert (
        record.kind == "export"
        and record.parents == (parent.id,)
        and record.metric("rounding_abs_error") > 0
    )
    assert {a.path for a in record.outputs} == {f"hf/out/{f}" for f in said["files"]}
    assert (
        sorted(p.name for p in (tmp_path / "hf" / "out").iterdir()) == said["files"]
        and len(said["files"]) > 8
    )
    card = (tmp_path / "hf" / "out" / "README.md").read_text()
    assert (
        parent.id in card
        and record.id in card
        and "bfloat16" in card
        and "not compared" not in card
    )


def test_a_card_has_no_figures_of_another_step(run_dir):
    from stackproof.export.card import _of_run

    made = read_record(run_dir / "metadata.json")
    figures = {"steps": Metric(value=9, unit="steps"), "loss": Metric(value=2.5, unit="nats")}
    record = made.model_copy(update={"metrics": figures})
    assert "2.5" in "".join(_of_run(record, 9))
    other = "".join(_of_run(record, 8))
    assert "2.5" not in other and "after step 9" in other and "after step 8" in other


def test_an_import_can_be_inspected_evaluated_sampled_and_exported_again(stack, run_dir, tmp_path):
    assert stack("inspect", run_dir)[1]["checksum"] == "VALID"
    (tmp_path / "text.txt").write_text("a text that nobody has learned")
    assert stack("evaluate", run_dir, "--text", "text.txt")[1]["bytes"] == 30
    assert (
        stack("sample", run_dir, "--temperature", 0, "--max-new-tokens", 8)[1]["samples"][0][
            "tokens"
        ]
        <= 8
    )
    record = read_record(run_dir / "metadata.json")
    assert (
        record.kind == "import"
        and record.succeeded
        and record.metric("n_params") == n_parameters(models.ours("plain", 257))
    )
    assert stack("train", "--resume", run_dir)[1]["status"] == "completed"  # nothing is left to do


def test_an_imported_model_is_not_begun_again(stack, run_dir):
    code, document = stack("train", "--resume", str(run_dir), "--at", "0")
    assert code == 5 and "no data and no n_eval_batches to continue with" in str(document)


def test_an_imported_model_is_trained_on_with_its_own_tokenizer(
    stack, run_dir, tmp_path, text_file
):
    """Through the session, with no gate installed: what is tested is that
    the checkpoint is taken up.
    """
    import torch

    from stackproof.config import load_config
    from stackproof.train import checkpoint, start
    from stackproof.train.loop import train
    from stackproof.train.start import fresh

    sets = (
        "train.max_steps=2 train.tokens_per_step=160 train.micro_batch_size=2 "
        "schedule.warmup_steps=1 eval.every=1 eval.batches=2"
    )
    sets += (
        " stop.expected_gain_nats=0.5 sample.every=2 checkpoint.every=1 data.corpus.kind=files "
        f'data.corpus.paths=["{text_file}"]'
    )
    cfg, overrides = load_config(start.read_config(run_dir), sets=tuple(sets.split()))
    record = train(fresh(cfg, overrides, tmp_path / "tuned", parent=run_dir, only=()))
    assert record.succeeded and record.parents == (read_record(run_dir / "metadata.json").id,)
    first, last = (checkpoint.load(checkpoint.find(d)) for d in (run_dir, tmp_path / "tuned"))
    assert (
        first.state["tokenizer_sha256"] == last.state["tokenizer_sha256"]
        and last.state["step"] == 2
    )
    moved = [float((first.model[n] - last.model[n]).abs().max()) for n in first.model]
    assert 0 < max(moved) < 1e-3 and not torch.equal(
        first.model["embed.weight"], last.model["embed.weight"]
    )


def test_an_imported_published_model_keeps_its_tokenizer(stack, tmp_path, compares):
    import transformers

    bpe = train_bpe(300, ["the quick brown fox jumps over the lazy dog, again and again"] * 30)
    family = transformers.Qwen2Config(
        **(models.SIZES | {"vocab_size": 320, "eos_token_id": bpe.eos_id})
    )
    transformers.Qwen2ForCausalLM(family).save_pretrained("published")
    (tmp_path / "published" / "tokenizer.json").write_text(vocabulary.to_library(bpe).to_str())
    code, said = stack("import", "published", "--out", "run", "--max-seq-len", 24)
    reserved = 320 - bpe.vocab_size
    assert (
        code == 0
        and said["vocab_size"] == 320
        and said["tokenizer"] == [f"{reserved} reserved ids added to the vocabulary"]
    )
    assert verdicts(said) == {"export.logit-parity": "pass"}
    assert (
        json.loads((tmp_path / "run" / "run.json").read_text())["config"]["model"]["max_seq_len"]
        == 24
    )
    assert stack("sample", "run", "--prompt", "the quick", "--max-new-tokens", 4)[0] == 0


@pytest.mark.parametrize("prefix", ["module._orig_mod.", ""])
def test_names_that_transformers_cannot_read_are_compared_under_plain_ones(
    stack, run_dir, tmp_path, compares, prefix
):
    import torch

    from stackproof import tensorfile

    path = tmp_path / "source" / "model.safetensors"
    tensors = {
        prefix + n: torch.from_numpy(tensorfile.memmap(path, n).copy())
        for n in tensorfile.read_header(path).tensors
    }
    tensors |= {prefix + "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    tensorfile.write(path, tensors, {})
    code, said = stack("import", "source", "--out", "again")
    assert code == 0 and verdicts(said) == {"export.logit-parity": "pass"}
    assert said["renamed_tensors"] == (len(tensors) if prefix else 1)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_weights_misread_at_import_are_seen_under_any_names(
    stack, run_dir, tmp_path, compares, monkeypatch, prefix
):
    """Rotary pairs taken for neighbours, as other code bases lay them out.
    What is compared is what the files hold.
    """
    import torch

    from stackproof import tensorfile
    from stackproof.export import reading

    path = tmp_path / "source" / "model.safetensors"
    tensorfile.write(
        path,
        {
            prefix + n: torch.from_numpy(tensorfile.memmap(path, n).copy())
            for n in tensorfile.read_header(path).tensors
        },
        {},
    )
    honest = reading.to_ours

    def interleaved(row, tensor, shapes):
        parts = honest(row, tensor, shapes)
        return {
            n: torch.cat((p[::2], p[1::2])) if n.endswith("attention.q.weight") else p
            for n, p in parts.items()
        }

    monkeypatch.setattr(reading, "to_ours", interleaved)
    code, said = stack("import", "source", "--out", "again")
    assert code == 6 and "export.logit-parity" in said["what"]


@pytest.mark.parametrize("verb", ["export", "import"])
def test_a_red_comparison_ends_with_six_and_leaves_a_record_only(
    stack, run_dir, tmp_path, compares, monkeypatch, verb
):
    witness = parity.witness

    def drifting(folder):
        read = witness(folder)
        model = altered(read.model, logits=lambda ids, last: read.model.logits(ids, last) + 1e-3)
        return replace(read, model=model)

    stack("export", run_dir, "--out", "good")
    monkeypatch.setattr(parity, "witness", drifting)
    source = {"export": run_dir, "import": tmp_path / "good"}[verb]
    code, said = stack(verb, source, "--out", "bad/out")
    assert code == 6 and said["error"] == "IntegrityError" and "export.logit-parity" in said["what"]
    assert not (tmp_path / "bad" / "out").exists()
    records = [read_record(p) for p in tmp_path.glob(f"runs/{verb}-*/metadata.json")]
    failed = [r for r in records if r.exit_code == 6]
    assert len(failed) == 1 and failed[0].status == "failed" and failed[0].id in said["value"]


def test_without_transformers_it_is_said_and_never_a_pass(
    stack, run_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(parity, "available", lambda: False)
    code, said = stack("export", run_dir, "--out", "out")
    assert code == 0 and verdicts(said) == {
        "checkpoint.opened": "pass",
        "export.logit-parity": "not_run",
        "export.folder": "not_run",
    }
    record = read_record(tmp_path / said["record_dir"] / "metadata.json")
    assert "NOT compared" in record.end_reason and record.environment["transformers"] is None
    assert "not compared" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(["import", "out", "--out", "again"])
    assert "NOT compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("export", "run", "--out", "full"), 2, "not an empty folder"),
        (("export", "run", "--out", "new", "--to", "gguf"), 2, "unknown export format"),
        (("export", "run", "--out", "new", "--dtype", "float8"), 2, "unknown export format"),
        (("import", "source", "--out", "run"), 2, "not an empty folder"),
        (("import", "absent", "--out", "new"), 2, "FOLDER names nothing"),
        (("import", "source", "--out", "new", "--tokenizer", "absent.json"), 2, "absent.json"),
        (("import", "source", "--out", "new", "--max-seq-len", "41"), 2, "cannot be reduced"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    stack, run_dir, tmp_path, arguments, code, says
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    got, said = stack(*arguments)
    assert got == code and says in said["what"] + str(said["value"])
    assert (
        not (tmp_path / "new").exists() and (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    )


def test_the_record_of_another_run_is_not_taken_for_the_models(stack, run_dir, tmp_path):
    text = (run_dir / "metadata.json").read_text()
    (run_dir / "metadata.json").write_text(text.replace('"id":"import-2', '"id":"import-3'))
    assert stack("export", run_dir, "--out", "out")[0] == 6, "changed after the run ended"
    (run_dir / "SHA256SUMS").unlink()
    assert stack("export", run_dir, "--out", "out")[0] == 0
    assert "record of the run is not beside" in (tmp_path / "out" / "README.md").read_text()
