"""The top-level form `stack trace MODEL …` prints the documents, and writes the records,
of the files in `golden/`.

They were recorded before the verb had subcommands.
Text, integers and keys are compared exactly; floats within the rounding of another processor.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import typer

from stackproof.cli import main
from stackproof.cli.trace import app
from stackproof.data.tokenizer import Bytes
from stackproof.export import huggingface
from stackproof.model import hugging_face
from stackproof.spec.errors import UsageError
from stackproof.spec.records import read_record
from tests.export import models

GOLDEN = Path(__file__).parent / "golden"
IDS = ("--input-ids", "5,80,3,9,77,42")
FEW = ("--points", "layers.1.ffn.*", "--points", "layers.0.scores")
CASES = {
    "stats": ("run", "--prompt", "What is 2+2?", *FEW),
    "stats-backward": (
        "run",
        *IDS,
        "--backward",
        "--points",
        "layers.1.ffn.up",
        "--points",
        "logits",
    ),
    "stats-last-token": (
        "run",
        *IDS,
        "--tokens",
        "last",
        "--points",
        "logits",
        "--csv",
        "figures.csv",
    ),
    "stats-expect": (
        "run",
        *IDS,
        *FEW,
        "--expect",
        "layers.1.ffn.up.std < 1e9",
        "--expect",
        "layers.1.ffn.out.std > 1e9",
    ),
    "compare": ("broken", "--against", "run", *IDS, *FEW),
    "compare-backward": (
        "broken",
        "--against",
        "run",
        *IDS,
        "--backward",
        "--points",
        "layers.1.ffn.*",
    ),
    "compare-mode": (
        "run",
        "--against",
        "self@float64",
        *IDS,
        *FEW,
        "--expect",
        "layers.1.ffn.up.added_err < 1e-3",
    ),
    "compare-swap": ("run@bfloat16", "--against", "run", *IDS, *FEW, "--swap", "layers.1.ffn=fp32"),
    "swap": ("run", "--swap", "layers.1.attention=reference", *IDS, *FEW),
    "bisect": ("broken", "--against", "run", "--bisect", *IDS),
    "weights": ("run", "--weights", "--expect", "layers.1.ffn.up.weight.rms < 0.01"),
    "weights-against": ("broken", "--weights", "--against", "run"),
    "nonfinite": ("run", "--nonfinite", *IDS),
    "nonfinite-backward": ("run", "--nonfinite", "--backward", "--prompt", "a list"),
    "lens-logit": ("run", "--lens", "logit", *IDS),
    "lens-tuned": ("run", "--lens", "tuned", "--text", "text.txt", "--lens-steps", "2", *IDS),
    "lens-file": ("run", "--lens", "tuned", "--lens-file", "lens-tuned/lens.safetensors", *IDS),
    "ablate": ("run", "--ablate", "layers.*.ffn.out", "--ablate", "layers.1@-1", *IDS),
    "ablate-mean": (
        "run",
        "--ablate",
        "layers.1",
        "--ablate-with",
        "mean",
        "--from",
        "Another text",
        "--sample",
        "4",
        *IDS,
    ),
    "patch": (
        "run",
        "--patch",
        "layers.*.resid_out@-1",
        "--from",
        "Every value",
        "--prompt",
        "A list",
    ),
}
FORMS = {  # the same through a command
    "stats": ("trace", "stats", "run", "--prompt", "What is 2+2?", *FEW),
    "compare": ("trace", "compare", "broken", "--against", "run", *IDS, *FEW),
    "bisect": ("trace", "bisect", "--against", "run", *IDS, "broken"),
    "weights-against": ("trace", "weights", "broken", "--against", "run"),
    "nonfinite": ("trace", "nonfinite", "run", *IDS),
    "lens-logit": ("trace", "lens", "run", *IDS),
    "ablate": ("trace", "ablate", "run", "layers.*.ffn.out", "layers.1@-1", *IDS),
    "patch": (
        "trace",
        "patch",
        "run",
        "layers.*.resid_out@-1",
        "--from",
        "Every value",
        "--prompt",
        "A list",
    ),
}
# how long it took, and how many operations this version of torch has for it
UNSTABLE = {"seconds", "operations"}
FREE = 0.5  # what rounding may take of a bound and not be told from nothing


def digest(document, record):
    """The document and what identifies its record, without ids and clocks."""
    document = {k: "…" if k in UNSTABLE | {"record", "run_dir"} else v for k, v in document.items()}
    return {
        "document": document,
        "record": {
            "kind": record.kind,
            "claim": record.claim,
            "not_covered": list(record.not_covered),
            "status": record.status,
            "end_reason": record.end_reason if "operations" not in record.end_reason else "…",
            "exit_code": record.exit_code,
            "trace": record.config["trace"],
            "config": sorted(record.config),
            "environment": sorted(record.environment),
            "parents": len(record.parents),
            "metrics": {n: m.unit for n, m in record.metrics.items()},
            "inputs": sorted(a.name for a in record.inputs),
            "outputs": sorted(a.name for a in record.outputs),
            "series": [s.path for s in record.series],
        },
    }


def assert_alike(found, golden, where=""):
    match golden:
        case dict():
            assert isinstance(found, dict) and list(found) == list(golden), (
                f"{where}: {list(found)}"
            )
            for key, value in golden.items():
                assert_alike(found[key], value, f"{where}.{key}")
        case list():
            assert isinstance(found, list) and len(found) == len(golden), where
            for i, value in enumerate(golden):
                assert_alike(found[i], value, f"{where}[{i}]")
        case float() if isinstance(found, int | float):
            tolerance = FREE if where.endswith("excess") else 1e-4
            assert math.isclose(found, golden, rel_tol=1e-2, abs_tol=tolerance), (
                f"{where}: {found} and {golden}"
            )
        case _:
            assert found == golden and type(found) is type(golden), (
                f"{where}: {found!r} and {golden!r}"
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one model, and of the same model with one row of one matrix corrupted."""
    folder, model = tmp_path_factory.mktemp("golden"), models.ours("plain", 257)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    for run in ("run", "broken"):
        (folder / "hf").mkdir()
        huggingface.write_documents(folder / "hf", hugging_face.KINDS[0], model, Bytes(), "float32")
        huggingface.write_weights(folder / "hf", hugging_face.KINDS[0], model, "float32", 2**30)
        with pytest.raises(SystemExit) as ended:
            main(["import", str(folder / "hf"), "--out", str(folder / run)])
        assert not ended.value.code
        shutil.rmtree(folder / "hf")
        with torch.no_grad():
            model.layers[1].ffn.up.weight[3] += 0.5
    return folder


@pytest.fixture
def told(in_process, folder, monkeypatch):
    """The digest of a command, after the same through JSON."""
    monkeypatch.chdir(folder)

    def run(*arguments, run_dir):
        code, document = in_process(*arguments, "--run-dir", run_dir)
        assert code == 0, document
        return json.loads(
            json.dumps(digest(document, read_record(folder / run_dir / "metadata.json")))
        )

    return run


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def test_the_top_level_form_prints_and_records_what_it_did_before(told):
    for name, arguments in CASES.items():
        assert_alike(told("trace", *arguments, run_dir=name), golden(name), name)


@pytest.mark.parametrize("name", FORMS)
def test_a_command_is_what_its_option_selects(told, name):
    assert_alike(told(*FORMS[name], run_dir=f"command-{name}"), golden(name), name)


def test_another_value_another_key_and_another_type_are_told_apart():
    for found in (
        {"a": 1.2},
        {"b": 1.0},
        {"a": "1.0"},
        {"a": 1.0, "b": 2},
        {"a": [1.0]},
        {"a": None},
    ):
        with pytest.raises(AssertionError):
            assert_alike(found, {"a": 1.0})
    assert_alike({"a": 1.001}, {"a": 1.0})


def test_a_folder_named_like_a_command_is_given_as_a_path(told, folder):
    shutil.copytree(folder / "run", folder / "lens")
    digested = told("trace", "./lens", *IDS, "--points", "logits", run_dir="as-path")
    assert digested["document"]["model"] == "./lens" and digested["record"]["kind"] == "trace"


@pytest.mark.parametrize(
    ("given", "routed"),
    [
        ("run", "stats run"),
        ("--prompt text run --json", "stats --prompt text run --json"),
        ("run --against other", "compare run --against other"),
        ("run --swap=layers.0=eager", "compare run --swap=layers.0=eager"),
        ("--bisect run --against other", "bisect run --against other"),
        ("run --weights --against other", "weights run --against other"),
        ("--repro bundle", "nonfinite --repro bundle"),
        ("run --nonfinite --repro bundle", "nonfinite run --repro bundle"),
        ("--lens logit run", "lens run logit"),
        ("--lens=tuned run --text file", "lens run --text file tuned"),
        ("run --ablate a --sample 3 --ablate=b", "ablate run --sample 3 a b"),
        ("run --patch a@-1 --from text", "patch run --from text a@-1"),
        ("run --prompt --lens", "stats run --prompt --lens"),  # the value of an option
        ("run --prompt=--weights", "stats run --prompt=--weights"),
        ("compar run", "stats compar run"),  # click refuses the second argument
    ],
)
def test_the_options_select_the_command_and_the_rest_is_passed_on(given, routed):
    group = typer.main.get_command(app)
    assert group.routed(given.split()) == routed.split()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("run --lens logit --weights", "--lens and --weights"),
        ("--ablate a", "--ablate needs a MODEL"),
    ],
)
def test_options_that_select_no_command_or_two_are_refused(given, said):
    with pytest.raises(UsageError, match=said):
        typer.main.get_command(app).routed(given.split())


def test_help_lists_the_commands_and_says_what_a_model_alone_means():
    from typer.testing import CliRunner

    told = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert "`stack trace MODEL` alone means `stack trace stats MODEL`" in told
    assert all(
        f" {name} " in told
        for name in (
            "stats",
            "compare",
            "bisect",
            "nonfinite",
            "lens",
            "ablate",
            "patch",
            "weights",
        )
    )
