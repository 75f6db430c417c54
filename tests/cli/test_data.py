"""`stack data …` and `stack tokenizer …` as a user runs them: a mixture built by one command, bad
input named, nothing lost.
"""

import gzip
import json
import shutil
import signal
import time

import pytest

from stackproof.museum.collection import museum_texts
from tests.cli.conftest import Stack
from tests.cli.test_train_errors import assert_standard
from tests.processes import NO_PREFLIGHT, Command

EXAM = (
    "Which of the nine lighthouses on the northern coast was the last one to lose its keeper, and "
    "in which year was that?"
)
MIXTURE = """
decontaminate = ["exam.jsonl"]

[[source]]
name = "plain"
paths = ["plain.txt"]
documents = "paragraph"
license = "CC0-1.0"
weight = 2
cap = 0.7
floor = 0.2

[[source]]
name = "records"
paths = ["records.jsonl.gz"]
text_field = "body.text"
license = "MIT"
cap = 0.6
floor = 0.1

[tokenizer]
kind = "bpe"
vocab_size = 384

[split]
kind = "document-hash"
validation_frac = 0.3
"""


def write_sources(folder) -> None:
    """Two sources with a repeat, an exam text, a too short one and bytes
    that are no text among them.
    """
    texts = [t[:3000] for t in museum_texts()]
    half = len(texts) // 2
    (folder / "plain.txt").write_bytes(
        "\n\n".join([*texts[:half], "short", f"It says: {EXAM}"]).encode()
        + b"\n\nbad \xff bytes in here\n"
    )
    records = [{"body": {"text": t}} for t in [*texts[half:], texts[half]]]
    (folder / "records.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode())
    )
    (folder / "exam.jsonl").write_text(json.dumps({"question": EXAM}) + "\n")
    (folder / "mix.toml").write_text(MIXTURE)


@pytest.fixture(scope="module")
def built(tmp_path_factory, cli_cache):
    """A folder with a built mixture and the answer of the command that built it."""
    folder = tmp_path_factory.mktemp("mixture")
    write_sources(folder)
    stack = Stack(folder, cli_cache)
    done = stack("data", "build", "mix.toml", "--out", "mix", "--json")
    assert done.code == 0, done.err
    return stack, done.json


def test_one_command_builds_a_mixture_and_accounts_for_every_document(built):
    stack, document = built
    rows = {r["source"]: r for r in document["sources"]}
    assert {"too-short", "not-utf8", "in-evaluation-set"} <= set(rows["plain"]["reasons"])
    assert rows["records"]["reasons"] == {"exact-repeat": 1}
    for row in rows.values():
        assert row["in"] == row["out"] + sum(row["reasons"].values()) and row["dropped"] == sum(
            row["reasons"].values()
        )
    assert all(g["verdict"] == "pass" for g in document["gates"]), document["gates"]
    record = json.loads((stack.folder / "mix" / "metadata.json").read_text())
    assert record["kind"] == "data" and record["status"] == "completed"
    assert {i["license"] for i in record["inputs"]} == {"CC0-1.0", "MIT"}
    sources = [
        json.loads(line)
        for line in (stack.folder / "mix" / "sources.jsonl").read_text().splitlines()
    ]
    assert "plain.txt" in sources[0]["dropped"]["not-utf8"]["example"]


def test_building_again_reads_nothing_and_another_plan_is_refused(built):
    stack, document = built
    again = stack("data", "build", "mix.toml", "--out", "mix", "--json")
    assert again.code == 0 and again.json["sources"] == document["sources"]
    assert_standard(
        stack("data", "build", "plain.txt", "--out", "mix"), 2, "already holds another data set"
    )


def test_show_report_and_verify_agree(built):
    stack, document = built
    for verb in (("data", "show"), ("data", "report"), ("data", "verify")):
        done = stack(*verb, "mix", "--json")
        assert done.code == 0 and done.json["sources"] == document["sources"], done.err
    page = (stack.folder / "mix" / "report.html").read_text()
    assert "in-evaluation-set" in page and "CC0-1.0" in page and "<script" not in page


def test_verify_names_a_changed_shard(built, tmp_path):
    stack, _ = built
    shutil.copytree(stack.folder / "mix", tmp_path / "mix")
    shard = next((tmp_path / "mix").glob("train-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    assert_standard(stack("data", "verify", str(tmp_path / "mix")), 3, shard.name)


def test_overlap_counts_and_needs_a_canary(built):
    stack, _ = built
    seen = museum_texts()[0][:2000]
    (stack.folder / "seen.jsonl").write_text(
        json.dumps({"text": seen}) + "\n" + json.dumps({"text": EXAM}) + "\n"
    )
    found = stack("data", "overlap", "mix", "--against", "seen.jsonl", "--json")
    assert (
        found.code == 0
        and found.json["canary_found"]
        and found.json["evaluation_texts_touched"] <= 1
    )
    (stack.folder / "words.jsonl").write_text(json.dumps({"text": "too few words"}) + "\n")
    assert_standard(
        stack("data", "overlap", "mix", "--against", "words.jsonl"), 3, "did not find the canary"
    )


def test_training_on_the_folder_with_a_bandit_and_continuing_it(built):
    stack, _ = built
    sizes = {
        "model.d_model": "32", "model.n_layers": "1", "model.head_dim": "8", "model.d_ff": "64",
        "model.max_seq_len": "64",
        "train.tokens_per_step": "512", "train.micro_batch_size": "4", "train.max_steps": "24",
        "schedule.warmup_steps": "4",
        "eval.every": "12", "eval.batches": "4", "eval.batch_size": "4", "stop.kind": "never",
        "sample.every": "8",
        "sample.max_new_tokens": "16", "checkpoint.every": "6", "curriculum.kind": "bandit",
        "curriculum.probe_every": "3",
        "curriculum.probe_windows": "2", "curriculum.warmup_steps": "4",
        "curriculum.warmup_sources": '["plain"]',
        "curriculum.caps.plain": "1.0",
    }  # fmt: skip
    sets = [a for k, v in sizes.items() for a in ("--set", f"{k}={v}")]
    for dry in ([], ["--dry-run"]):
        assert_standard(
            stack("train", "--data", "mix", *sets, "--set", "curriculum.caps.plane=0.2", *dry),
            2,
            "plane",
            "plain, records",
        )
    process = stack.begin("train", "--data", "mix", *sets, "--run-dir", "run", code=NO_PREFLIGHT)
    wait_for(stack.folder / "run" / "checkpoints" / "step-00000012", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    resumed = stack("train", "--resume", "run", "--json")
    assert resumed.code == 0, resumed.err
    whole = stack(
        "train", "--data", "mix", *sets, "--run-dir", "whole", "--json", code=NO_PREFLIGHT
    )
    assert whole.code == 0, whole.err
    for name in (
        "curriculum.jsonl",
        "checkpoints/step-00000024/model.safetensors",
        "checkpoints/step-00000024/state.safetensors",
    ):
        assert (stack.folder / "run" / name).read_bytes() == (
            stack.folder / "whole" / name
        ).read_bytes(), name
    lines = [
        json.loads(x) for x in (stack.folder / "run" / "curriculum.jsonl").read_text().splitlines()
    ]
    rows = [x for x in lines if x["event"] == "rows"]
    assert (
        len(rows) == 24
        and all(set(x["rows"]) == {"plain"} for x in rows[:4])
        and "records" in rows[5]["rows"]
    )
    assert sum(x["event"] == "turn" for x in lines) == 8
    check_continued(stack)


def check_continued(stack) -> None:
    """The run goes on from step 12 under other shares: history kept, samples and state archived,
    weights those of the checkpoint.
    """
    parent = "run/checkpoints/step-00000018"
    other = stack("train", "--polish", parent, "--set", "optim.lr=1e-3", "--run-dir", "no")
    assert_standard(other, 2, "optim.lr")
    changes = (
        "curriculum.caps.plain=0.5",
        "curriculum.floors.records=0.4",
        "curriculum.warmup_steps=0",
        "curriculum.warmup_sources=[]",
    )
    done = stack(
        "train",
        "--continue-from",
        parent,
        *[a for c in changes for a in ("--set", c)],
        "--run-dir",
        "continued",
        "--json",
    )
    assert done.code == 0, done.err
    folder, table = (
        stack.folder / "continued",
        json.loads((stack.folder / "continued" / "continuation.json").read_text()),
    )
    steps = [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 25))
    before, after = (
        (stack.folder / r / "metrics.jsonl").read_text().splitlines()[:18]
        for r in ("run", "continued")
    )
    assert before == after
    shares = {(r["source"], r["share"]): (r["old"], r["new"]) for r in table["shares"]}
    assert (
        shares[("plain", "cap")] == (1.0, 0.5)
        and shares[("records", "floor")] == (0.1, 0.4)
        and len(shares) == 6
    )
    assert {r["key"] for r in table["keys"]} == {
        "curriculum.warmup_steps",
        "curriculum.warmup_sources",
    }
    record = json.loads((folder / "metadata.json").read_text())
    archived = {
        o["path"]: o["sha256"] for o in record["outputs"] if o["path"].startswith("archive/")
    }
    assert {p.removeprefix("archive/"): h for p, h in archived.items()} == table[
        "archived"
    ] and len(archived) == 2
    assert record["parents"] and record["parents"][0] == table["parent"]
    late = [
        json.loads(x)
        for x in (folder / "curriculum.jsonl").read_text().splitlines()
        if json.loads(x)["step"] > 18
    ]
    drawn = [x["rows"] for x in late if x["event"] == "rows"]
    assert sum(r.get("plain", 0) for r in drawn) <= 0.5 * 6 * 8 + 2 and len(drawn) == 6


def wait_for(path, process: Command) -> None:
    for _ in range(4000):
        if (path / "manifest.json").is_file():
            return
        assert process.poll() is None, process.wait().err
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written")


def test_bad_mixtures_are_named(stack):
    write_sources(stack.folder)
    for change, words in (
        (('name = "records"', 'name = "plain"'), ("two sources are called plain",)),
        (("floor = 0.1", "floor = 0.85"), ("records", "floor")),
        (("cap = 0.6\nfloor = 0.1", "cap = 1.0\nfloor = 0.9"), ("floors", "1.1")),
        (("text_field", "text_feeld"), ("text_feeld", "text_field")),
        (('paths = ["plain.txt"]', 'paths = ["nothing.txt"]'), ("nothing.txt",)),
        (("cap = 0.7\nfloor = 0.2", "cap = 0.1\nfloor = 0.0"), ("caps",)),
    ):
        (stack.folder / "bad.toml").write_text(MIXTURE.replace(*change))
        done = stack("data", "build", "bad.toml", "--out", "bad")
        assert done.code in (2, 3) and "Traceback" not in done.err, done.err
        assert all(w in done.err for w in words), done.err


def test_a_record_without_its_field_names_file_and_line_and_the_build_goes_on_once_mended(stack):
    write_sources(stack.folder)
    good = (stack.folder / "records.jsonl.gz").read_bytes()
    (stack.folder / "records.jsonl.gz").write_bytes(
        gzip.compress(gzip.decompress(good) + b'{"other": 1}\n')
    )
    n = gzip.decompress(good).count(b"\n") + 1
    assert_standard(
        stack("data", "build", "mix.toml", "--out", "mix"),
        3,
        "records.jsonl.gz",
        f"line {n}",
        "body.text",
    )
    assert not (stack.folder / "mix" / "manifest.json").exists()
    (stack.folder / "records.jsonl.gz").write_bytes(good)
    assert stack("data", "build", "mix.toml", "--out", "mix").code == 0


def test_what_else_a_folder_or_a_command_line_holds_is_refused(built):
    stack, _ = built
    (stack.folder / "foreign").mkdir()
    (stack.folder / "foreign" / "mine.txt").write_text("something else")
    assert_standard(
        stack("data", "build", "plain.txt", "--out", "foreign"),
        2,
        "foreign holds something else",
        "mine.txt",
    )
    assert_standard(
        stack("data", "build", "mix.toml", "plain.txt", "--out", "none"),
        2,
        "a mixture file cannot be combined",
    )
    assert_standard(
        stack("data", "overlap", "mix", "--against", "nosuch.jsonl"),
        3,
        "there is no evaluation set nosuch.jsonl",
    )


def test_an_empty_source_is_an_error_with_its_drops(stack):
    (stack.folder / "empty.txt").write_text("  \n")
    assert_standard(
        stack("data", "build", "empty.txt", "--out", "out"),
        3,
        "nothing is left of source",
        "dropped as empty",
    )


def test_tokenizer_train_and_show(stack):
    write_sources(stack.folder)
    # it is not UTF-8
    assert_standard(stack("tokenizer", "train", "plain.txt", "--out", "t.json"), 3, "no document")
    text = (stack.folder / "plain.txt").read_bytes().replace(b"\xff", b"")
    (stack.folder / "clean.txt").write_bytes(text)
    done = stack(
        "tokenizer",
        "train",
        "clean.txt",
        "--out",
        "c.json",
        "--vocab-size",
        "400",
        "--special",
        "<|user|>",
        "--json",
    )
    assert (
        done.code == 0
        and done.json["vocab_size"] == 400
        and done.json["control_tokens"] == {"0": "<|endoftext|>", "1": "<|user|>"}
    )
    shown = stack("tokenizer", "show", "c.json", "--json")
    assert shown.json["sha256"] == done.json["sha256"]
    assert_standard(stack("tokenizer", "train", "clean.txt", "--out", "c.json"), 2, "exists")
    assert_standard(stack("tokenizer", "show", "clean.txt"), 3, "not a tokenizer")
