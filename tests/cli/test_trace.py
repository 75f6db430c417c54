"""`stack trace` in one process: documents, records, exit codes, ways to compare, checks, cures,
predictions.
"""

import csv
import json
import math
import sys

import numpy as np
import pytest
import torch

from stackproof.cli import main, output, rerun
from stackproof.data.tokenizer import Bytes
from stackproof.export import huggingface, parity
from stackproof.model import hugging_face
from stackproof.museum.plant import load_museum, swap
from stackproof.spec.records import read_record
from stackproof.trace import model_variant
from tests.export import models
from tests.processes import Forking


@pytest.fixture
def stack(in_process):
    return in_process


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """The same as a person sees it, on a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output.stdout, "_width", 200)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        assert not ended.value.code
        return capsys.readouterr().out

    return run


def folder_of(model, path):
    kind = hugging_face.KINDS[0]
    path.mkdir()
    huggingface.write_documents(path, kind, model, Bytes(), "float32")
    huggingface.write_weights(path, kind, model, "float32", 2**30)
    return path


@pytest.fixture
def model():
    return models.ours("plain", 257)


@pytest.fixture
def hf(model, tmp_path):
    return folder_of(model, tmp_path / "hf")


@pytest.fixture
def run_dir(stack, hf, tmp_path):
    assert stack("import", hf, "--out", tmp_path / "run")[0] == 0
    return tmp_path / "run"


@pytest.fixture
def broken(model, stack, tmp_path):
    """The same run with one row of one matrix corrupted."""
    with torch.no_grad():
        model.layers[1].ffn.up.weight[3] += 0.5
    folder_of(model, tmp_path / "broken-hf")
    assert stack("import", tmp_path / "broken-hf", "--out", tmp_path / "broken")[0] == 0
    return tmp_path / "broken"


SHORT = ("--input-ids", "5,80,3,9,77,42,11,6,200,33")


def test_one_model_by_itself(stack, run_dir, tmp_path):
    code, document = stack(
        "trace", run_dir, "--prompt", "What is 2+2?", "--csv", "figures.csv", "--run-dir", "traced"
    )
    assert code == 0 and len(document["points"]) == 39 and document["first_anomaly"] is None
    one = next(p for p in document["points"] if p["point"] == "layers.1.ffn.swiglu")
    assert {
        "point",
        "layer",
        "stats",
        "support",
        "ratio_to_previous",
        "robust_z",
        "baseline",
        "operation",
    } <= one.keys()
    assert (
        one["support"]["shape"] == [1, 13, 56]
        and one["stats"]["n"] == 13 * 56
        and one["baseline"] == "layer 0"
    )
    assert document["input_ids"][1:] == list(b"What is 2+2?")
    record = read_record(tmp_path / "traced" / "metadata.json")
    assert (
        record.kind == "trace"
        and record.parents
        and record.config["trace"]["prompt"] == "What is 2+2?"
    )
    assert [s.path for s in record.series] == ["points.jsonl"] and {
        o.name for o in record.outputs
    } == {"trace.json", "figures.csv"}
    assert {i.name for i in record.inputs} == {"model.safetensors", "tokenizer.json"}
    with open("figures.csv", encoding="utf-8") as f:
        lines = list(csv.DictReader(f))
    assert (
        len(lines) == 39 and float(lines[5]["stats.std"]) == document["points"][5]["stats"]["std"]
    )


def test_the_same_trace_again_is_the_same_to_the_byte(stack, run_dir, broken, tmp_path):
    for arguments in ((run_dir, "--backward"), (broken, "--against", run_dir)):
        series = []
        for i in range(2):
            code, _ = stack("trace", *arguments, *SHORT, "--run-dir", f"again-{len(arguments)}-{i}")
            record = read_record(tmp_path / f"again-{len(arguments)}-{i}" / "metadata.json")
            series.append(record.series)
            assert code == 0 and record.config["trace"]["ids"] == [
                int(i) for i in SHORT[1].split(",")
            ]
        assert series[0] == series[1] and series[0][0].path == "points.jsonl"


def test_a_record_is_never_written_over(stack, run_dir, tmp_path):
    before = {p: p.read_bytes() for p in run_dir.iterdir() if p.is_file()}
    for asked in (
        ("trace", run_dir),
        ("trace", run_dir, "--weights"),
        ("trace", run_dir, "--lens", "logit"),
        ("evaluate", run_dir),
    ):
        code, document = stack(*asked, "--run-dir", run_dir)
        assert code == 2 and "already holds a record" in document["what"], asked
    assert before == {p: p.read_bytes() for p in run_dir.iterdir() if p.is_file()}


def test_one_token_is_no_anomaly_and_one_point_is_not_called_in_line(stack, run_dir):
    code, document = stack("trace", run_dir, "--input-ids", "1")
    assert code == 0 and not any(
        line["anomalous"] for line in document["points"] if line["slot"] == "entropy"
    )
    code, document = stack("trace", run_dir, *SHORT, "--points", "layers.1.ffn.swiglu")
    assert code == 0 and document["verdict"].startswith("these points have no baseline")
    code, document = stack("trace", run_dir, "--tokens", "last", "--backward", *SHORT)
    assert code == 2 and "no next-token loss" in document["what"]


def test_for_people_gradients_and_their_loss_stand_in_the_table(said, run_dir):
    told = said("trace", run_dir, *SHORT, "--backward", "--run-dir", "seen")
    assert (
        "gradient rms" in told
        and " nats" in told.splitlines()[0]
        and "gradient rms" not in said("trace", run_dir, *SHORT)
    )


def test_a_figure_that_is_no_number_refutes(stack, model, tmp_path):
    with torch.no_grad():
        model.layers[1].ffn.up.weight[3] = math.nan
    expected = ("--expect", "layers.1.ffn.up.std < 1", "--expect", "layers.0.ffn.up.std < 1e9")
    code, document = stack("trace", folder_of(model, tmp_path / "nan"), *SHORT, *expected)
    assert code == 0 and [e["verdict"] for e in document["expectations"]] == [
        "refuted",
        "confirmed",
    ]


@pytest.mark.parametrize(("check", "code"), [("import nothing_like_it", 2), ("", 0)])
def test_a_check_that_calls_the_right_side_bad_is_no_check(
    stack, said, run_dir, broken, tmp_path, check, code
):
    (tmp_path / "check.py").write_text(check)
    asked = (
        "trace",
        broken,
        "--against",
        run_dir,
        "--bisect",
        "--check",
        f"{sys.executable} check.py",
        *SHORT,
    )
    found, document = stack(*asked)
    assert found == code
    if code:
        assert (
            "cannot separate good from bad" in document["what"]
            and "nothing_like_it" in document["value"]
        )
    else:
        assert (
            document["guilty"] == []
            and "the tested side passes the check" in document["conclusion"]
            and "no error to locate" in said(*asked)
        )


def test_gradients_and_the_last_token(stack, run_dir):
    code, document = stack(
        "trace", run_dir, *SHORT, "--backward", "--points", "layers.*.attention_out"
    )
    assert (
        code == 0
        and document["loss_nats"] > 0
        and all(p["grad"]["rms"] > 0 for p in document["points"])
    )
    code, document = stack("trace", run_dir, *SHORT, "--tokens", "last", "--points", "logits")
    assert (
        document["points"][0]["support"]["tokens"] == "last"
        and document["points"][0]["stats"]["n"] == 257
    )


def test_predictions_are_judged_and_a_wrong_one_is_refused_before_anything_runs(stack, run_dir):
    expected = [
        "layers.1.ffn.swiglu.std < 1e9",
        "layers.1.ffn.swiglu.std > 1e9",
        "layers.0.q.ratio_to_previous < 3",
    ]
    code, document = stack(
        "trace", run_dir, *SHORT, *(a for e in expected for a in ("--expect", e))
    )
    assert code == 0 and [e["verdict"] for e in document["expectations"]] == [
        "confirmed",
        "refuted",
        "not_run",
    ]
    for wrong in (
        "layers.1.ffn.swiglu.std",
        "layers.1.q.speed < 1",
        "layers.1.q.std = 1",
        "layers.1.q.std < many",
        "layers.7.q.std < 1",
    ):
        code, document = stack("trace", run_dir, *SHORT, "--expect", wrong)
        assert code == 2 and document["error"] == "UsageError", wrong


def test_a_run_against_its_export_agrees_and_a_broken_one_is_named(
    stack, run_dir, broken, hf, tmp_path
):
    code, document = stack("trace", run_dir, "--against", hf, *SHORT)
    assert (
        code == 0
        and document["first_divergence"] is None
        and document["suspects"] == []
        and document["logits"]["rel_err"] < 2e-6
    )
    code, document = stack(
        "trace", broken, "--against", hf, "--bisect", "--run-dir", "compared", *SHORT
    )
    assert code == 0 and document["first_divergence"]["point"] == "layers.1.ffn.up"
    assert [g["point"] for g in document["guilty"]] == ["layers.1.ffn.up"] and document["guilty"][
        0
    ]["operation"] == "up projection"
    assert {"point", "rel_err", "cosine", "added_err"} <= document["points"][0].keys() and document[
        "runs"
    ] <= 9
    assert {"id", "hypothesis", "verdict", "evidence"} == document["chain"][0].keys()
    record = read_record(tmp_path / "compared" / "metadata.json")
    assert record.kind == "compare" and len(record.config) == 3 and record.metric("suspects") == 1
    code, document = stack(
        "trace",
        broken,
        "--against",
        run_dir,
        "--expect",
        "layers.1.ffn.up.added_err < 1e-6",
        *SHORT,
    )
    assert (
        document["expectations"][0]["verdict"] == "refuted"
        and document["first_divergence"]["point"] == "layers.1.ffn.up"
    )


def test_gradients_are_compared_and_a_wrong_derivative_is_named(
    stack, run_dir, tmp_path, monkeypatch
):
    from stackproof.kernels import dispatch

    code, document = stack(
        "trace", run_dir, "--against", "self@float64", "--backward", "--run-dir", "right", *SHORT
    )
    found, derived = document["gradients"], ("scores", "entropy", "ffn.silu")
    assert (
        code == 0
        and found["first"] is None
        and found["suspects"] == []
        and len(found["parameters"]) > 10
    )
    assert [line["point"] for line in found["points"]][::-1] == [
        p["point"] for p in document["points"] if p["slot"] not in derived
    ]
    record = read_record(tmp_path / "right" / "metadata.json")
    assert [s.path for s in record.series] == ["points.jsonl", "gradients.jsonl"]

    original = dispatch.swiglu

    class HalfBack(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    monkeypatch.setattr(
        model_variant,
        "reference_kernels",
        lambda: swap(dispatch, "swiglu", lambda gate, up: original(HalfBack.apply(gate), up)),
    )
    code, document = stack(
        "trace", f"{run_dir}@reference", "--against", run_dir, "--backward", *SHORT
    )
    first = document["gradients"]["first"]
    assert (
        code == 0
        and document["first_divergence"] is None
        and first["point"].endswith("ffn.gate")
        and first["read_by"] == "gated product"
    )
    assert {s.partition(".")[2].partition(".")[2] for s in document["gradients"]["suspects"]} == {
        "ffn.gate"
    }


@pytest.mark.parametrize("way", ["float64", "bfloat16", "reference"])
def test_the_same_weights_another_way(stack, run_dir, way):
    code, document = stack("trace", f"{run_dir}@{way}", "--against", run_dir, *SHORT)
    assert code == 0 and document["first_divergence"] is None and document["logits"]["rel_err"] > 0
    code, other = stack("trace", run_dir, "--against", f"self@{way}", *SHORT)
    assert code == 0 and other["logits"]["rel_err"] == pytest.approx(
        document["logits"]["rel_err"], rel=0.05
    )


@pytest.mark.slow
def test_compiled_blocks_are_compared_between_blocks(stack, run_dir):
    eager = ("--swap", "layers.0=eager", "--swap", "layers.1=eager")
    code, document = stack("trace", f"{run_dir}@compiled", "--against", run_dir, *SHORT, *eager)
    assert code == 0 and document["first_divergence"] is None and document["logits"]["rel_err"] > 0
    assert document["swaps"]["logits_rel_err_after"] == 0, (
        "with every block eager it is the same computation"
    )
    assert [p["point"] for p in document["points"]] == [
        "embedding",
        "layers.0.resid_out",
        "layers.1.resid_out",
        "final_norm",
        "logits",
    ]


def test_a_cure_is_tried(stack, run_dir, said):
    code, document = stack(
        "trace",
        f"{run_dir}@bfloat16",
        "--against",
        run_dir,
        *SHORT,
        "--swap",
        "layers.1.ffn=fp32",
        "--swap",
        "layers.0=fp32",
    )
    swaps = document["swaps"]
    assert (
        code == 0
        and swaps["logits_rel_err_after"] < swaps["logits_rel_err_before"]
        and not swaps["cured"]
    )
    code, document = stack("trace", run_dir, "--swap", "layers.1.attention=reference", *SHORT)
    assert code == 0 and 0 < document["logits"]["rel_err"] < 1e-6
    untouched = [p for p in document["points"] if p["layer"] == 0]
    assert all(p["rel_err"] == 0 for p in untouched)
    for wrong in (
        "layers.1.attention",
        "layers.9.ffn=reference",
        "layers.1.ffn=faster",
        "layers.1.ffn=eager",
    ):
        assert stack("trace", run_dir, "--swap", wrong, *SHORT)[0] == 2


def test_a_command_decides(stack, run_dir, broken, tmp_path):
    """The check reads the file with another library's eyes: it knows only the logits it wants."""
    from stackproof.cli.load_model import open_model

    ids = [int(i) for i in SHORT[1].split(",")]
    with torch.no_grad():
        right = open_model(run_dir).model(torch.tensor([ids]))
    np.save(tmp_path / "right.npy", right.numpy())
    script = tmp_path / "check.py"
    script.write_text(
        "import sys, numpy, safetensors.numpy\n"
        "logits = safetensors.numpy.load_file(sys.argv[1])['logits']\n"
        f"sys.exit(int(not numpy.allclose(logits, numpy.load({str(tmp_path / 'right.npy')!r}), "
        "atol=1e-4)))\n"
    )
    code, document = stack(
        "trace",
        broken,
        "--against",
        run_dir,
        "--bisect",
        "--check",
        f"{sys.executable} {script}",
        *SHORT,
    )
    assert code == 0 and [g["point"] for g in document["guilty"]] == ["layers.1.ffn.up"]
    code, document = stack(
        "trace",
        broken,
        "--against",
        run_dir,
        "--bisect",
        "--check",
        f"{sys.executable} -c 'raise SystemExit(3)'",
        *SHORT,
    )
    assert code == 2 and "exit code 3" in document["value"]
    assert stack("trace", broken, "--against", run_dir, "--check", "true", *SHORT)[0] == 2


def test_what_has_no_effect_is_refused(stack, run_dir, hf):
    for arguments in (
        (run_dir, "--bisect"),
        (run_dir, "--against", "self"),
        (run_dir, "--against", run_dir.parent / "nowhere"),
        (run_dir, "--against", "self@faster"),
        (f"{run_dir}@faster",),
        (run_dir, "--against", hf, "--backward"),
        (run_dir, "--tokens", "first"),
        (run_dir, "--points", "layers.0.swigloo"),
        (run_dir, "--input-ids", "1,900"),
        (run_dir, "--input-ids", "1,x"),
        (run_dir, "--input-ids", "1,2", "--prompt", "a"),
        (run_dir, "--prompt", "x" * 400),
        (f"{hf}@reference",),
    ):
        code, document = stack("trace", *arguments)
        assert (code == 2 and document["next_step"]) or document["allowed"] or document["what"], (
            arguments
        )


def test_a_folder_that_transformers_would_fill_in_is_refused(stack, hf):
    from safetensors.torch import load_file, save_file

    tensors = load_file(hf / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    code, document = stack("trace", hf, *SHORT)
    assert code == 5 and "up_proj" in document["value"]


def test_without_transformers_a_folder_is_refused_with_the_line_to_install(stack, hf, monkeypatch):
    monkeypatch.setattr(parity, "available", lambda: False)
    code, document = stack("trace", hf, *SHORT)
    assert code == 7 and "stackproof[hf]" in document["next_step"]


def test_people_see_a_table_a_heat_map_and_the_verdict(said, run_dir, broken):
    text = said("trace", run_dir, *SHORT)
    assert (
        "layers.1.ffn.swiglu" in text and "┌ resid_out" in text and "no layer is anomalous" in text
    )
    text = said("trace", broken, "--against", run_dir, "--bisect", *SHORT)
    assert (
        "first to err: layers.1.ffn.up, the up projection" in text
        and "eliminated" in text
        and "cause: layers.1.ffn.up" in text
    )


def test_a_kernel_that_errs_is_named_with_the_way_in_which_it_errs(stack, said, run_dir):
    asked = ("trace", str(run_dir), "--against", "self@reference", *SHORT)
    with load_museum()["model.missing-scale"].apply():
        code, document = stack(*asked)
        text = said(*asked)
    assert code == 0 and document["first_divergence"]["point"] == "layers.0.attention_mixed"
    assert document["way"] == "scores are not scaled" and document["runs"] == 4
    assert "head expansion and mixing of values: scores are not scaled" in text
    code, document = stack(*asked)
    assert (
        code == 0
        and document["first_divergence"] is None
        and document["way"] is None
        and document["runs"] == 3
    )


def test_parameters_are_shown_with_their_change_and_nothing_is_run(stack, said, run_dir, broken):
    code, document = stack(
        "trace",
        broken,
        "--weights",
        "--against",
        run_dir,
        "--expect",
        "layers.1.ffn.up.weight.rms < 0.01",
    )
    assert code == 0 and document["expectations"][0]["verdict"] == "refuted"
    moved = {p["point"]: p["update_ratio"] for p in document["points"] if p["update_ratio"]}
    assert list(moved) == ["layers.1.ffn.up.weight"] and document["record"].startswith("trace-")
    assert "÷ rms before" in said(
        "trace", broken, "--weights", "--against", run_dir, "--run-dir", "seen"
    )
    assert "÷ rms before" not in said("trace", broken, "--weights", "--run-dir", "alone")
    for option in (
        ("--prompt", "a"),
        ("--tokens", "last"),
        ("--swap", "layers.0.ffn=reference"),
        ("--check", "true"),
    ):
        code, document = stack("trace", broken, "--weights", *option)
        assert (
            code == 2
            and f"No such option: {option[0]}" in document["what"]
            and document["next_step"] == "stack trace weights --help"
        )
    for way in (
        (f"{broken}@bfloat16", "--weights"),
        (broken, "--weights", "--against", "self@bfloat16"),
    ):
        code, document = stack("trace", *way)
        assert code == 2 and "@MODE" in document["next_step"], way


def test_other_words_for_an_operation_are_no_other_figures(tmp_path):
    line = {
        "point": "layers.0.q",
        "operation": "query projection",
        "stats": {"std": 2.0},
        "verdict": "kept",
    }
    changes = {
        "same": {},
        "words": {"operation": "q"},
        "figure": {"stats": {"std": 1.0}},
        "verdict": {"verdict": "x"},
        "name": {"point": "k"},
    }
    for name, change in changes.items():
        (tmp_path / name).write_text(json.dumps(line | change))
    same = (tmp_path / "same").read_bytes()
    apart = {
        name: rerun.largest_difference(same, (tmp_path / name).read_bytes(), name)[0]
        for name in changes
    }
    assert apart == {
        "same": 0.0,
        "words": 0.0,
        "figure": 0.5,
        "verdict": math.inf,
        "name": math.inf,
    }


def test_a_trace_is_repeated_from_its_record_and_another_model_is_found_out(
    stack, run_dir, broken, tmp_path, monkeypatch
):
    asked = (
        "trace",
        str(run_dir),
        "--prompt",
        "a list of it",
        "--run-dir",
        "seen",
        "--csv",
        "figures.csv",
    )
    monkeypatch.setattr(sys, "argv", ["stack", *asked])  # what a record takes for its command
    assert stack(*asked)[0] == 0
    (tmp_path / "figures.csv").unlink()
    code, document = stack("evidence", "rerun", "seen", "--run-dir", "again")
    assert code == 0 and document["ok"] and [c["now"] for c in document["compared"]][-1] == 0.0, (
        document
    )
    assert (
        not (tmp_path / "figures.csv").exists() and (tmp_path / "again" / "points.jsonl").is_file()
    )

    # The first rerun is a process as a user has it; the others are forks with the same arguments.
    monkeypatch.setattr(rerun, "subprocess", Forking())
    probes = {
        "lens": ("--lens", "logit"),
        "ablated": ("--ablate", "layers.*.ffn.out"),
        "finite": ("--nonfinite",),
    }
    for name, options in probes.items():
        asked = ("trace", str(run_dir), "--prompt", "a list of it", *options, "--run-dir", name)
        monkeypatch.setattr(sys, "argv", ["stack", *asked])
        assert stack(*asked)[0] == 0
        code, document = stack("evidence", "rerun", name, "--run-dir", f"{name}-again")
        assert code == 0 and document["ok"] and document["compared"][-1]["now"] == 0.0, document
    lines = (tmp_path / "lens" / "lens.jsonl").read_text()
    assert (
        stack("evidence", "rerun", "lens", "--run-dir", "lens-again")[0] == 2
        and (tmp_path / "lens" / "lens.jsonl").read_text() == lines
    )

    run_dir.rename(tmp_path / "put-aside")
    broken.rename(run_dir)
    code, document = stack("evidence", "rerun", "seen", "--run-dir", "other")
    assert (
        code == 6
        and not document["ok"]
        and {c["what"]: c["equal"] for c in document["compared"]}["input model.safetensors"]
        is False
    )
    assert (
        document["compared"][-1]["what"].startswith("points.jsonl (")
        and document["compared"][-1]["now"] > rerun.REL_TOLERANCE
    )
    with open(tmp_path / "seen" / "points.jsonl", "ab") as f:
        f.write(b"{}\n")
    code, document = stack("evidence", "rerun", "seen", "--run-dir", "third")
    assert (
        code == 6
        and "changed since it was recorded" in document["what"]
        and not (tmp_path / "third").exists()
    )
