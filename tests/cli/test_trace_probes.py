"""`stack trace --nonfinite`, `--repro`, `--lens`, `--ablate`, `--patch` on a run that was really
trained, through the command line.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stackproof.cli import main, output
from stackproof.cli.load_model import open_model
from stackproof.config import NeverStop
from stackproof.museum.collection import museum_config
from stackproof.replay.bundle import ReproRecorder
from stackproof.spec.errors import GateFailed, IntegrityError
from stackproof.spec.ledger import Ledger
from stackproof.spec.records import read_record
from stackproof.train import step as steps
from stackproof.train.loop import train
from stackproof.train.start import fresh
from tests.cli.conftest import Done, Stack, tiny
from tests.trace.test_patching import Nothing
from tools.site_pages.probes import probes
from tools.site_pages.traces import sections
from tools.site_pages.world import World

STEP = 17


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file, cli_cache):
    """A run of 24 steps with a BPE tokenizer."""
    stack = Stack(tmp_path_factory.mktemp("traced"), cli_cache)
    done = stack("train", *tiny(text_file), "--run-dir", "run", "--device", "cpu", "--json")
    assert done.code == 0, done.err
    return stack.folder / "run"


@pytest.fixture
def stack(tmp_path, monkeypatch, capsys, cli_cache):
    """Runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STACKPROOF_CACHE", str(cli_cache))

    def call(*arguments):
        monkeypatch.setattr(output, "_emitted", False)
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        return Done(ended.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def broken(museum_folder, tmp_path_factory):
    """A run that ended at step 17: from there on its weights in layer 1 overflow in the gated
    product. The plant stays in the bundle's rows no longer than the run, so a replay gets it from
    `planted`.
    """
    base = museum_config(museum_folder)
    cfg = base.model_copy(update={"stop": NeverStop(), "recipe": "broken"})
    run = tmp_path_factory.mktemp("broken") / "run"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "train_step", planted())
        with pytest.raises(GateFailed):
            train(fresh(cfg, (), run, [ReproRecorder()], only=("runtime.finite",)))
    return run


def planted():
    original = steps.train_step

    def exploding(state, batches):
        if state.step + 1 == STEP:
            with torch.no_grad():
                for name in ("gate", "up"):
                    getattr(state.model.layers[1].ffn, name).weight.mul_(1e22)
        return original(state, batches)

    return exploding


def page_of(run_dir) -> str:
    """What the site shows of a record, from files in the place where evidence keeps them."""
    record, evidence = read_record(Path(run_dir) / "metadata.json"), Path("evidence")
    shutil.copytree(run_dir, evidence / record.id, dirs_exist_ok=True)
    world = SimpleNamespace(ledger=Ledger(evidence))
    world.series = partial(World.series, world)
    return probes(world, record) + sections(world, record)


@pytest.mark.parametrize(
    "arguments", [("--repro", "repro/runtime.finite-step-17"), (None, "--nonfinite")]
)
def test_a_run_that_ended_in_a_nan_is_explained_by_one_command(
    broken, stack, monkeypatch, arguments
):
    monkeypatch.setattr(steps, "train_step", planted())
    given = [broken, "--nonfinite"] if arguments[0] is None else ["--repro", broken / arguments[1]]
    done = stack("trace", *given, "--json", "--run-dir", "found")
    assert done.code == 0, done.err
    first, record = done.json["first_nonfinite"], read_record(Path("found/metadata.json"))
    assert (done.json["step"], done.json["steps_replayed"]) == (STEP, [15, 16, 17])
    assert (first["op"], first["module"], first["layer"], first["phase"]) == (
        "aten.mul_.Tensor",
        "layers.1.ffn",
        1,
        "forward",
    )
    assert (
        first["point"] == "layers.1.ffn.swiglu"
        and first["source"]["file"] == "stack/kernels/eager.py"
    )
    assert all(v["first_bad"] is None and v["max"] > 1e15 for v in first["inputs"])
    assert (
        record.kind == "trace"
        and "step 17: aten.mul_.Tensor in layers.1.ffn, forward, made the first Inf"
        in record.end_reason
    )
    assert (
        record.parents == (read_record(broken / "metadata.json").id,)
        and record.series[0].path == "nonfinite.jsonl"
    )
    page = page_of("found")
    assert (
        "first value that is not finite" in page
        and "layers.1.ffn.swiglu" in page
        and "stack/kernels/eager.py" in page.replace("&#95;", "_")
    )
    assert (
        json.loads(Path("found/nonfinite.jsonl").read_text())["first_nonfinite"]["number"]
        == first["number"]
    )
    left = done.json["left_by_run"]
    assert left["points"] > 20 and (left["why_none"], left["first_nonfinite"]) == (
        "",
        "layers.1.ffn.swiglu",
    )


def test_of_several_bundles_the_one_of_what_is_not_finite_is_taken_else_the_latest(tmp_path):
    from stackproof.cli.trace.nonfinite import newest_bundle

    assert newest_bundle(tmp_path) is None
    for name in ("runtime.loss-spike-step-90", "sampling.coherence-step-200"):
        (tmp_path / "repro" / name).mkdir(parents=True)
    assert newest_bundle(tmp_path).name == "sampling.coherence-step-200"
    (tmp_path / "repro" / "runtime.finite-step-95").mkdir()
    assert newest_bundle(tmp_path).name == "runtime.finite-step-95"
    for other in (
        "foo-step-abc",
        "foo-step-1_0",
        "foo-step-²",
        "foo-step-",
        ".writing-foo-step-7-300",
    ):
        (tmp_path / "repro" / other).mkdir()
    assert newest_bundle(tmp_path).name == "runtime.finite-step-95"


def test_for_people_it_says_where_and_shows_the_last_good_values(broken, stack, monkeypatch):
    clean = stack("trace", "--repro", broken / "repro" / "runtime.finite-step-17")
    assert clean.code == 0 and "every value of steps 15 to 17 is finite on this code" in clean.out
    monkeypatch.setattr(steps, "train_step", planted())
    done = stack("trace", broken, "--nonfinite")
    assert (
        "made the first Inf" in done.out
        and "layers.1.ffn.swiglu" in done.out
        and "eager.py:" in done.out
        and "+Inf" in done.out
    )
    assert "when the gate turned red, layers.1.ffn.swiglu was the first point" in done.out


def test_what_asks_for_the_model_itself_is_not_answered_by_an_old_bundle(
    broken, stack, monkeypatch
):
    monkeypatch.setattr(steps, "train_step", planted())
    done = stack("trace", broken, "--nonfinite", "--backward", "--json")
    assert done.code == 0 and done.json["first_nonfinite"] is None is done.json["step"]
    done = stack("trace", "--repro", broken / "repro" / "runtime.finite-step-17", "--backward")
    assert done.code == 2 and "--backward has no effect with --repro" in done.err


def test_a_finite_model_is_said_to_be_finite_forward_and_backward(folder, stack):
    forward = stack("trace", folder, "--nonfinite", "--prompt", "The object", "--json")
    both = stack("trace", folder, "--nonfinite", "--backward", "--input-ids", "1,2,3,4", "--json")
    assert (
        forward.code == both.code == 0
        and forward.json["first_nonfinite"] is None is both.json["first_nonfinite"]
    )
    assert both.json["operations"] > 1.5 * forward.json["operations"] > 100


def test_the_logit_lens_ends_in_the_model(folder, stack):
    done = stack(
        "trace", folder, "--lens", "logit", "--prompt", "The value of the object", "--json"
    )
    assert done.code == 0, done.err
    points, opened = done.json["points"], open_model(folder)
    assert [p["point"] for p in points] == [
        "embedding",
        "layers.0.resid_out",
        "layers.1.resid_out",
    ] and done.json["held_out"] == []
    ids = torch.tensor(
        [[opened.tokenizer.eos_id, *opened.tokenizer.encode("The value of the object").ids]]
    )
    assert len(done.json["tokens"]) == ids.shape[1]
    with torch.no_grad():
        probs = opened.model(ids)[0].softmax(-1)
    for at, top in enumerate(points[-1]["top"]):
        assert top[0]["id"] == int(probs[at].argmax()) and top[0]["prob"] == pytest.approx(
            float(probs[at].max()), rel=1e-5
        )
    assert points[-1]["kl_nats"] == 0.0 < points[0]["kl_nats"]
    assert "after" in stack("trace", folder, "--lens", "logit", "--run-dir", "shown").out
    page = page_of("shown")
    assert (
        page.startswith("## Logit lens")
        and page.count("layers.1.resid") == 1
        and "On held-out" not in page
    )
    lines = Path("shown/lens.jsonl").read_bytes().replace(b"embedding", b"Embedding")
    Path("shown/lens.jsonl").write_bytes(lines)
    with pytest.raises(IntegrityError, match="does not match the hash"):
        page_of("shown")


def test_the_tuned_lens_is_fitted_to_the_runs_own_corpus_written_beside_the_record_and_read_again(
    folder, stack, text_file
):
    weights = (
        folder
        / "checkpoints"
        / (folder / "checkpoints" / "latest").read_text().strip()
        / "model.safetensors"
    ).read_bytes()
    done = stack(
        "trace", folder, "--lens", "tuned", "--lens-steps", "60", "--run-dir", "lens", "--json"
    )
    assert done.code == 0, done.err
    for row in done.json["held_out"][:-1]:
        assert (
            row["tuned_loss_nats"] < row["raw_loss_nats"]
            and row["tuned_kl_nats"] < row["raw_kl_nats"]
        ), row
    record = read_record(Path("lens/metadata.json"))
    assert [o.path for o in record.outputs] == ["lens.safetensors"] and record.metric(
        "embedding.tuned_loss_nats"
    ) > 0
    assert "On held-out text" in page_of("lens")
    again = stack(
        "trace",
        folder,
        "--lens",
        "tuned",
        "--lens-file",
        "lens/lens.safetensors",
        "--run-dir",
        "again",
        "--json",
    )
    assert again.json["points"] == done.json["points"] and again.json["held_out"] == []
    assert any(i.name == "lens" for i in read_record(Path("again/metadata.json")).inputs)
    own = stack(
        "trace", folder, "--lens", "tuned", "--lens-steps", "2", "--text", text_file, "--json"
    )
    assert own.code == 0 and own.json["points"] != done.json["points"]
    step_folder = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    assert (step_folder / "model.safetensors").read_bytes() == weights


def test_ablation_is_the_model_without_the_part_and_says_what_it_writes_then(folder, stack):
    asked = (
        "trace",
        folder,
        "--prompt",
        "The value of",
        "--ablate",
        "layers.*.attention_out",
        "--ablate",
        "layers.1@-1",
    )
    done = stack(*asked, "--json", "--run-dir", "effects")
    assert done.code == 0, done.err
    rows = {e["target"]: e for e in done.json["effects"]}
    assert (
        list(rows) == ["layers.0.attention_out", "layers.1.attention_out", "layers.1@-1"]
        and done.json["baseline"] == "zeros"
    )
    opened = open_model(folder)
    opened.model.layers[0].attention = Nothing(opened.model.layers[0].attention)
    ids = torch.tensor([[opened.tokenizer.eos_id, *opened.tokenizer.encode("The value of").ids]])
    with torch.no_grad():
        logits = opened.model(ids)
    loss = float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
    assert rows["layers.0.attention_out"]["loss_nats"] == loss and rows["layers.0.attention_out"][
        "top_after"
    ]["id"] == int(logits[0, -1].argmax())
    total = sum(e["delta_nats"] for e in done.json["effects"])
    assert "replaced by zeros" in page_of("effects") and page_of("effects").count("layers.1") == 2
    assert (
        done.json["sum_delta_nats"]
        == total
        == read_record(Path("effects/metadata.json")).metric("sum_delta_nats")
    )

    sampled = stack("trace", folder, "--ablate", "layers.1", "--sample", "12", "--json").json[
        "samples"
    ]
    assert [s["without"] for s in sampled] == ["", "layers.1"] and all(s["text"] for s in sampled)
    mean = stack(
        "trace",
        folder,
        "--ablate",
        "layers.1",
        "--ablate-with",
        "mean",
        "--from",
        "Another text of some words",
        "--sample",
        "4",
    )
    assert (
        mean.code == 0
        and "tokens of the --from text" in mean.out
        and "without layers.1" in mean.out
    )


def test_patching_in_the_same_text_changes_nothing_and_another_text_comes_back_at_the_end(
    folder, stack
):
    same = stack(
        "trace",
        folder,
        "--prompt",
        "A list",
        "--patch",
        "layers.*.resid_out",
        "--from",
        "A list",
        "--json",
    ).json
    assert [e["kl_nats"] for e in same["effects"]] == [0.0, 0.0] and same[
        "sum_restored_frac"
    ] is None
    other = stack(
        "trace",
        folder,
        "--prompt",
        "A list",
        "--patch",
        "layers.*.resid_out@-1",
        "--from",
        "Every value of it",
        "--json",
    ).json
    assert (
        other["effects"][-1]["restored_frac"] == pytest.approx(1.0)
        and other["effects"][0]["restored_frac"] < 1.0
    )
    assert other["sum_restored_frac"] == sum(e["restored_frac"] for e in other["effects"])


def test_the_history_of_a_runs_points_is_on_its_page(stack, text_file):
    done = stack(
        "train", *tiny(text_file, trace__every="6"), "--run-dir", "run", "--device", "cpu", "--json"
    )
    assert done.code == 0, done.err
    page = page_of("run")
    assert (
        page.startswith("## Points over the run")
        and all(f"step {s}" in page for s in (6, 12, 18, 24))
        and "layers.1.ffn.swiglu" in page
    )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder of Hugging Face with a tokenizer, random weights."""
    from stackproof.data.tokenizer import Bytes
    from stackproof.export import huggingface
    from stackproof.model import hugging_face
    from tests.export import models

    pytest.importorskip("transformers")
    folder, model = tmp_path_factory.mktemp("theirs") / "hf", models.ours("plain", 257)
    folder.mkdir()
    huggingface.write_documents(folder, hugging_face.KINDS[0], model, Bytes(), "float32")
    huggingface.write_weights(folder, hugging_face.KINDS[0], model, "float32", 2**30)
    return folder, model


def test_a_folder_of_hugging_face_is_probed_as_its_own_model(theirs, stack):
    """The same weights in our model and in theirs: the same effects to 1e-5;
    no corpus and no sampling, and both said.
    """
    folder, model = theirs
    from stackproof.trace.patching import ablate, targets

    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    expected = ablate(model, ids, targets(model, ["layers.*.ffn.out"], 6))
    done = stack(
        "trace", folder, "--input-ids", "3,1,4,1,5,9", "--ablate", "layers.*.ffn.out", "--json"
    )
    assert done.code == 0, done.err
    assert [e["loss_nats"] for e in done.json["effects"]] == [
        pytest.approx(e.loss_nats, abs=1e-5) for e in expected
    ]
    lens = stack("trace", folder, "--prompt", "abc", "--lens", "logit", "--json").json
    assert (
        lens["points"][-1]["kl_nats"] == 0.0
        and "".join(lens["tokens"]).endswith("abc")
        and lens["model"] == str(folder)
    )
    assert (
        stack("trace", folder, "--prompt", "abc", "--nonfinite", "--backward", "--json").json[
            "first_nonfinite"
        ]
        is None
    )
    assert (
        stack("trace", f"{folder}@bfloat16", "--prompt", "abc", "--lens", "logit", "--json").json[
            "points"
        ][-1]["kl_nats"]
        == 0.0
    )
    for arguments, said in (
        (("--lens", "tuned"), "is not a run"),
        (("--ablate", "layers.0", "--sample", "3"), "a model of this stack"),
    ):
        done = stack("trace", folder, "--prompt", "abc", *arguments)
        assert done.code == 2 and said in done.err, done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("RUN", "--lens", "logit", "--expect", "x < 1"), "No such option: --expect"),
        (("RUN", "--ablate", "layers.0", "--backward"), "No such option: --backward"),
        (("RUN", "--lens", "logit", "--tokens", "last"), "No such option: --tokens"),
        (
            ("RUN", "--lens", "logit", "--nonfinite"),
            "--lens and --nonfinite select different commands",
        ),
        (("RUN", "--lens", "sharp"), "not one of 'logit', 'tuned'"),
        (("RUN", "--patch", "layers.0"), "Missing option '--from'"),
        (("RUN", "--ablate", "layers.0.atention_out"), "nearest: layers.0.attention_out"),
        (("RUN", "--ablate", "layers.0", "--ablate-with", "noise"), "not one of 'zero', 'mean'"),
        (("RUN", "--lens", "logit", "--from", "x"), "No such option: --from"),
        (("RUN", "--nonfinite", "--prompt", "x", "--device", "cpu"), "repro bundle"),
        (("RUN", "--lens", "logit", "--input-ids", "1,x"), "token ids"),
        (("RUN", "--lens", "logit", "--input-ids", "1,99999"), "vocabulary"),
        (("RUN", "--lens", "logit", "--input-ids", "1", "--prompt", "x"), "both give the tokens"),
        (("--nonfinite",), "needs a MODEL"),
        (
            ("RUN", "--lens", "logit", "--lens-file", "a"),
            "--lens-file has no effect with a logit lens",
        ),
        (("RUN", "--lens", "logit", "--text", "a"), "--text has no effect with a logit lens"),
        (
            ("RUN", "--lens", "logit", "--lens-steps", "3"),
            "--lens-steps has no effect with a logit lens",
        ),
        (("RUN", "--lens-steps", "3"), "No such option: --lens-steps"),
        (
            ("RUN", "--lens", "tuned", "--lens-file", "a", "--text", "b"),
            "--text has no effect with --lens-file",
        ),
        (
            ("RUN", "--lens", "tuned", "--lens-file", "a", "--lens-steps", "3"),
            "--lens-steps has no effect with --lens-file",
        ),
        (
            ("RUN", "--ablate", "layers.0", "--from", "x"),
            "--from has no effect with --ablate-with zero",
        ),
        (("RUN", "--repro", "a"), "MODEL has no effect with --repro"),
        (("--repro", "a", "--prompt", "x"), "--prompt has no effect with --repro"),
        (("--repro", "a", "--input-ids", "1"), "--input-ids has no effect with --repro"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_exit_code_2(folder, stack, arguments, said):
    done = stack("trace", *(folder if a == "RUN" else a for a in arguments))
    assert done.code == 2 and said in done.err, done.err


def test_a_text_too_short_for_a_lens_and_a_broken_bundle_are_data_errors(folder, stack):
    Path("short.txt").write_text("Too little.")
    done = stack("trace", folder, "--lens", "tuned", "--text", "short.txt")
    assert done.code == 3 and "too short" in done.err
    Path("nothing").mkdir()
    done = stack("trace", "--repro", "nothing")
    assert done.code == 3 and "not a repro bundle" in done.err
