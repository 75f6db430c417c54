"""Bad input and bad luck: the documented exit code, a message by the standard,
the previous checkpoint intact.
"""

import json
import resource
import subprocess
import sys

import pytest

from stackproof.spec.architecture import D_FF, ONES, TABLE, Dim, Part, Seen, Value, Vector
from tests.cli.conftest import Stack, tiny
from tests.processes import HANGING_S, NO_PREFLIGHT, STACK, preflight_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_file, cli_cache):
    """A finished small run; tests copy it before they damage it."""
    stack = Stack(tmp_path_factory.mktemp("finished"), cli_cache, NO_PREFLIGHT)
    done = stack("train", *tiny(text_file), "--run-dir", "run", "--json")
    assert done.code == 0, done.err
    return stack


@pytest.fixture
def run(finished, tmp_path):
    import shutil

    shutil.copytree(finished.folder / "run", tmp_path / "run")
    return Stack(tmp_path, finished.environment["STACKPROOF_CACHE"])


def assert_standard(done, code: int, *words: str) -> None:
    """Exit code, and a message with a cause and a next step or an allowed value; no traceback."""
    assert done.code == code, f"exit {done.code}\n{done.err}"
    assert "Traceback" not in done.err
    assert "error:" in done.err and ("next " in done.err or "allowed" in done.err)
    for word in words:
        assert word in done.err, done.err


def test_unknown_key_names_the_nearest(stack):
    assert_standard(
        stack("train", "--set", "optim.learning_rate=3"), 2, "optim.learning_rate", "optim.lr"
    )
    assert_standard(stack("train", "--set", "train.max_step=3"), 2, "train.max_steps")
    assert_standard(stack("train", "pockets"), 2, "pocket")


def test_json_errors_are_one_document_on_stdout(stack):
    done = stack("train", "--set", "optim.learning_rate=3", "--json")
    assert done.code == 2 and done.json["exit_code"] == 2 and done.json["error"] == "ConfigError"


def test_dry_run_shows_every_override(stack):
    done = stack(
        "train",
        "--dry-run",
        "--json",
        "--set",
        "optim.lr=1e-3",
        "--set",
        "train.max_steps=77",
        "--device",
        "cpu",
    )
    assert done.code == 0
    assert (
        done.json["config"]["optim"]["lr"] == 1e-3
        and done.json["config"]["train"]["max_steps"] == 77
    )
    assert [o["key"] for o in done.json["overrides"]] == ["optim.lr", "train.max_steps", "device"]


def gain(*shape) -> dict[str, Part]:
    return {"rmsnorm": Part((Vector("weight", shape, ONES),))}


BROKEN = {
    "an unknown symbol": (
        gain(Dim(("d_modle",))),
        "the weight weight of model.norm.kind = rmsnorm",
    ),
    "a name for a Dim": (gain("d_model"), "'d_model'"),
    "a section for a size": (gain(Dim(("ffn",))), "names=('ffn',)"),
    "a Dim for a shape": ({"rmsnorm": Part((Vector("weight", D_FF, ONES),))}, "names=('d_ff',)"),
    "an unknown width": (
        {"rmsnorm": Part(values=(Value("", Seen.OUTPUT, "", Dim(("d_modle",))),))},
        "the value attention_norm",
    ),
    "no entry": ({"rmsnrm": Part()}, "no entry for model.norm.kind = rmsnorm"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_entry_of_the_architecture_table_is_named(in_process, monkeypatch, broken):
    """By file, entry and value, with what is allowed."""
    entries, words = BROKEN[broken]
    code, sound = in_process("train", "--dry-run")
    assert code == 0 and sound["derived"]["n_params"] > 0
    monkeypatch.setitem(TABLE, "norm", entries)
    code, error = in_process("train", "--dry-run")
    assert code == error["exit_code"] == 6 and error["error"] == "IntegrityError"
    assert "spec/architecture.py" in error["what"] and words in f"{error['what']} {error['value']}"
    allowed = "rmsnrm" if broken == "no entry" else "d_model"
    assert allowed in error["allowed"] and "spec/architecture.py" in error["next_step"]


def test_absent_gpu_is_an_error_not_a_fallback(stack, text_file):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert_standard(stack("train", *tiny(text_file), "--device", "cuda"), 7, "CUDA")


def test_exhausted_corpus_with_error(stack, text_file):
    sets = tiny(text_file, **{"data__on_exhausted": "error", "train__max_steps": "100000"})
    assert_standard(stack("train", *sets), 3, "on_exhausted")


def test_resume_with_a_changed_learning_rate(run):
    before = (run.folder / "run" / "checkpoints" / "latest").read_text()
    assert_standard(
        run("train", "--resume", "run", "--set", "optim.lr=0.5"), 2, "optim.lr", "--fork"
    )
    assert (run.folder / "run" / "checkpoints" / "latest").read_text() == before


def test_a_dry_run_of_a_fork_takes_a_step_folder_as_the_fork_does(run):
    step = (run.folder / "run" / "checkpoints" / "latest").read_text().strip()
    fork = ("train", "--fork", f"run/checkpoints/{step}", "--set", "optim.lr=1e-3")
    done = run(*fork, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert (done.json["config"]["model"]["d_model"], done.json["config"]["optim"]["lr"]) == (
        32,
        1e-3,
    )


def test_flipped_bit_in_a_checkpoint(run):
    path = run.folder / "run" / "checkpoints" / "step-00000024" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x10
    path.write_bytes(bytes(data))
    for verb in (
        ["train", "--resume", "run"],
        ["evaluate", "run"],
        ["sample", "run"],
        ["inspect", "run"],
    ):
        assert_standard(run(*verb), 5, "model.safetensors")
    assert run("inspect", "run/checkpoints/step-00000016", "--json").json["checksum"] == "VALID"


def test_pickle_offered_as_checkpoint(run):
    import pickle

    (run.folder / "weights.pt").write_bytes(pickle.dumps({"a": 1}))
    assert_standard(run("evaluate", "weights.pt"), 5, "pickle")
    (run.folder / "run" / "checkpoints" / "step-00000024" / "model.safetensors").write_bytes(
        pickle.dumps({"a": 1})
    )
    assert_standard(run("evaluate", "run"), 5)


def test_another_tokenizer_at_evaluation(run, text_file):
    from stackproof.config import BpeTokenizer
    from stackproof.data.tokenizer import make_tokenizer

    other = make_tokenizer(
        BpeTokenizer(vocab_size=384), ["entirely other words make entirely other merges " * 50] * 40
    )
    other.save(run.folder / "other.json")
    assert_standard(run("evaluate", "run", "--tokenizer", "other.json"), 3, "tokenizer")


def test_truncated_shard(stack, text_file, tmp_path):
    private = Stack(tmp_path, tmp_path / "cache", NO_PREFLIGHT)
    assert private("train", *tiny(text_file, train__max_steps="9"), "--run-dir", "a").code == 0
    shard = next((tmp_path / "cache").rglob("train-*.safetensors"))
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:-64])
    assert_standard(
        private("train", *tiny(text_file, train__max_steps="9"), "--run-dir", "b"), 3, "train-"
    )


FULL = """
import resource, signal, sys
from stackproof.train import loop

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
when, n_bytes = sys.argv[1], int(sys.argv[2])
fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
if when == "at the start":
    fill()
save = loop.save
loop.save = lambda trainer: (fill(), save(trainer))
del sys.argv[1:3]
"""


@pytest.mark.parametrize(
    ("when", "n_bytes", "steps"),
    [
        ("at the start", 100_000, 0),
        ("at the first save", 100_000, 3),
        ("at the first save", 20_000, 3),
    ],
)
def test_full_disk_during_a_save(run, text_file, when, n_bytes, steps):
    """The kernel refuses to let any file grow beyond a size: every checkpoint write fails as on a
    full disk; at 20 kB the record's too.
    """
    latest = (run.folder / "run" / "checkpoints" / "latest").read_text()
    sets = tiny(text_file, **{"checkpoint__every": "3", "train__max_steps": "9"})
    done = run(
        when,
        str(n_bytes),
        "train",
        *sets,
        "--run-dir",
        "full",
        code=FULL + (NO_PREFLIGHT if steps else STACK),
    )
    assert done.code == 5, done.err
    assert "could not be written" in done.err and "Traceback" not in done.err
    full, series = run.folder / "full", run.folder / "full" / "metrics.jsonl"
    assert (
        not list(full.glob("checkpoints/step-*"))
        and (series.read_bytes().count(b"\n") if series.is_file() else 0) == steps
    )
    assert (
        n_bytes < 100_000 or json.loads((full / "metadata.json").read_text())["status"] == "failed"
    )
    assert (run.folder / "run" / "checkpoints" / "latest").read_text() == latest
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_nan_planted_at_step_seven(tmp_path, text_file, cli_cache):
    """Halted at the very step, exit code 4, the record names the gate,
    the checkpoint of before is good.
    """
    code = (
        "import sys; from stackproof.museum.plant import load_museum; from stackproof.cli import "
        "main\n"
        "with load_museum()['runtime.nan-in-a-weight'].apply(): main(sys.argv[1:])"
    )
    stack = Stack(tmp_path, cli_cache)
    sets = tiny(text_file, checkpoint__every="3")
    # The plant lives in the train step, so preflight's short runs do not reach step seven.
    done = stack("train", *sets, "--run-dir", "run", "--json", code=code)
    assert done.code == 4, done.err
    record = json.loads((tmp_path / "run" / "metadata.json").read_text())
    finite = next(g for g in record["gates"] if g["id"] == "runtime.finite")
    assert (
        record["status"] == "halted"
        and finite["verdict"] == "fail"
        and finite["first_failure_step"] == 7
    )
    events = [
        json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    ]
    assert any(e["event"] == "nonfinite" and e["parameters"] for e in events)
    assert stack("inspect", "run", "--json").json["step"] == 6


@pytest.mark.parametrize(("level", "code"), [("off", 0), ("full", 0), ("some", 2)])
def test_contract_levels(stack, text_file, level, code):
    """Conditions on public functions can be switched off or read whole tensors;
    another word is refused. Read at import. All gates run under whole tensors alone.
    """
    program = ("-c", NO_PREFLIGHT) if level == "off" else ("-m", "stackproof")
    command = [
        sys.executable,
        *program,
        "train",
        *tiny(text_file, train__max_steps="9"),
        "--run-dir",
        "run",
    ]
    environment = stack.environment | {"STACK_CONTRACTS": level, "OMP_NUM_THREADS": "1"}
    where = {"cwd": stack.folder, "env": environment, "timeout": HANGING_S}
    done = subprocess.run(command, capture_output=True, text=True, **where)
    assert done.returncode == code, done.stderr
    assert (
        code
        or json.loads((stack.folder / "run/metadata.json").read_text())["environment"][
            "contracts_level"
        ]
        == level
    )


def test_run_directory_is_never_overwritten(run, text_file):
    assert_standard(run("train", *tiny(text_file), "--run-dir", "run"), 2, "already holds a run")


def test_a_corpus_too_small_is_refused_and_a_waiver_with_its_reason_is_in_the_record(
    stack, text_file
):
    large = {"model__d_ff": "1024", "data__split__validation_frac": "0.8"}
    large = tiny(
        text_file, **large, train__max_steps="2", schedule__warmup_steps="1", sample__every="2"
    )
    budget = preflight_of("data.corpus-budget")
    refused = stack("train", *large, "--run-dir", "refused", code=budget)
    assert_standard(refused, 4, "data.corpus-budget", "unique tokens for")
    waiver = (
        'gates.waive=[{id="data.corpus-budget", reason="a test of the waiver", '
        'expires="2999-01-01"}]'
    )
    assert (
        stack(
            "train",
            *large,
            "--set",
            waiver.replace("a test of the waiver", ""),
            "--run-dir",
            "bare",
        ).code
        == 2
    )
    waived = ("--set", waiver, "--run-dir", "waived", "--json")
    done = stack("train", *large, *waived, code=budget)
    assert done.code == 0, done.err
    record = json.loads((stack.folder / "waived" / "metadata.json").read_text())
    (gate,) = [g for g in record["gates"] if g["id"] == "data.corpus-budget"]
    assert gate["verdict"] == "fail" and gate["waiver"]["reason"] == "a test of the waiver"


def test_a_tracker_is_chosen_by_name_and_another_name_is_refused(stack, text_file):
    sets = tiny(text_file, train__max_steps="9")
    assert_standard(
        stack("train", *sets, "--tracker", "tensorbored", "--run-dir", "a"),
        2,
        "tensorbored",
        "tensorboard",
    )
    assert not (stack.folder / "a").exists()
    tracked = ("train", *sets, "--tracker", "tensorboard", "--run-dir", "b", "--json")
    done = stack(*tracked, code=NO_PREFLIGHT)
    assert done.code == 0, done.err
    assert list((stack.folder / "b" / "tensorboard").glob("events.out.tfevents.*"))
