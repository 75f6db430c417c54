"""`stack evaluate --suite` on a model that was really trained; training is a process of its own,
the audits are in this one.
"""

import json
import re
from pathlib import Path

import pytest

from stackproof.cli import main, output
from stackproof.museum.edit import Edit, edited
from stackproof.spec.records import read_record
from tests.cli.conftest import Done, Stack, tiny
from tests.processes import NO_PREFLIGHT

HEAD = 'name = "mine"\ntemplate = "{prompt}"\nstop = []\nmax_new_tokens = 12\n'
DOMAIN = "[[domain]]\nname = '{}'\nprompts = [{}]\n"
PROMPT = (
    "{{ id = '{}', text = '{}', answer = '''{}''', checks = [{{ kind = 'regex', pattern = "
    "'''{}''' }}] }}"
)
QUESTIONS = ("The", "And", "Name a bird.", "> What is it? / <", "Return a list of")
NEVER = DOMAIN.format("second", PROMPT.format("never", "Say the word.", "xyzzy", "xyzzy"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, text_file, cli_cache):
    """A run of 24 steps with its three checkpoints, and a suite that nobody can answer."""
    stack = Stack(tmp_path_factory.mktemp("audited"), cli_cache, NO_PREFLIGHT)
    done = stack(
        "train",
        *tiny(text_file, checkpoint__keep="3"),
        "--run-dir",
        "run",
        "--device",
        "cpu",
        "--json",
    )
    assert done.code == 0, done.err
    asked = ", ".join(PROMPT.format(f"q-{i}", q, "xyzzy", "xyzzy") for i, q in enumerate(QUESTIONS))
    (stack.folder / "none.toml").write_text(HEAD + DOMAIN.format("first", asked) + NEVER)
    return stack.folder


@pytest.fixture
def stack(run_folder, tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder in which `run` and `none.toml` are
    those of the fixture above.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("run", "none.toml"):
        (tmp_path / name).symlink_to(run_folder / name)

    def call(*arguments):
        monkeypatch.setattr(output, "_emitted", False)  # one process stands for many
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        return Done(ended.value.code or 0, *capsys.readouterr())

    return call


def record_of(name):
    return json.loads(Path(name, "metadata.json").read_text())


def lines_of(name):
    return [json.loads(line) for line in Path(name, "audits.jsonl").read_text().splitlines()]


def test_the_suite_that_comes_along_leaves_a_record(stack):
    done = stack("evaluate", "run", "--suite", "domains", "--run-dir", "domains", "--json")
    assert done.code == 0, done.err
    document, record = done.json, record_of("domains")
    assert (
        document["step"] == 24 and len(document["answers"]) == 24 and len(document["domains"]) == 6
    )
    assert (
        document["breadth"]
        == record["metrics"]["breadth"]["value"]
        == sum(d["passes"] > 0 for d in document["domains"].values())
    )
    assert (
        record["kind"] == "evaluate"
        and record["metrics"]["passes"]["n"] == 24
        and record["series"][0]["path"] == "audits.jsonl"
    )
    assert {i["name"] for i in record["inputs"]} == {"suite", "tokenizer.json", "model.safetensors"}
    assert record["inputs"][0]["path"] == "stack/evaluate/suites/domains.toml"
    assert all(
        line["grade"] is None and line["passed"] is not bool(line["faults"])
        for line in lines_of("domains")
    )


def test_every_checkpoint_is_asked_and_again_the_same(stack):
    asked = ("evaluate", "run", "--suite", "none.toml", "--every-checkpoint")
    first, again = stack(*asked, "--run-dir", "a", "--json"), stack(*asked, "--run-dir", "b")
    assert first.code == again.code == 0, first.err + again.err
    assert [(r["step"], r["breadth"]) for r in first.json["rounds"]] == [(8, 0), (16, 0), (24, 0)]
    assert first.json["stands_still"] == {"step": 8, "breadth": 0, "audits_since": 2, "lost": []}
    assert (
        "breadth has been constant at 0 since step 8" in again.out
        and "nothing matches xyzzy" in again.out
    )
    assert Path("a/audits.jsonl").read_bytes() == Path("b/audits.jsonl").read_bytes()
    assert len([i for i in record_of("a")["inputs"] if i["name"] == "model.safetensors"]) == 3


def test_a_suite_of_ones_own_is_followed_over_audits_and_graded(stack):
    """What the model says is looked up first, so that the second suite has one prompt that
    passes and one that does not.
    """
    assert (
        stack("evaluate", "run", "--suite", "none.toml", "--run-dir", "look", "--json").json[
            "breadth"
        ]
        == 0
    )
    said = next(line for line in lines_of("look") if len(line["text"]) > 3)
    mine = DOMAIN.format(
        "first", PROMPT.format("one", said["asked"], said["text"], re.escape(said["text"]))
    )
    Path("mine.toml").write_text(HEAD + mine + NEVER)
    asked = ("evaluate", "run", "--suite", "mine.toml", "--json")
    document = stack(*asked, "--run-dir", "late").json
    assert (
        document["breadth"] == 1
        and document["domains"]["first"] == {"passes": 1, "prompts": 1}
        and document["stands_still"] is None
    )
    step = "run/checkpoints/step-00000008"
    assert stack("evaluate", step, "--suite", "mine.toml", "--run-dir", "early").code == 0
    assert [
        r["step"] for r in stack(*asked, "--earlier", "early", "--run-dir", "both").json["rounds"]
    ] == [8, 24]
    refused = stack(*asked, "--earlier", "look", "--run-dir", "none")
    assert refused.code == 3 and "is not an audit of this run with this suite" in refused.err

    lines = lines_of("late")
    Path("graded.jsonl").write_text(
        "".join(json.dumps(line | {"grade": 9.5}) + "\n" for line in lines)
    )
    assert stack(*asked, "--grades", "graded.jsonl", "--run-dir", "graded").code == 0
    mean = record_of("graded")["metrics"]["mean_grade"]
    assert (mean["value"], mean["n"], mean["unit"]) == (9.5, 2, "the grader's scale")
    assert [line["grade"] for line in lines_of("graded")] == [9.5, 9.5]
    Path("early/audits.jsonl").write_text("")
    assert "was changed since it was recorded" in stack(*asked, "--earlier", "early").err


def test_what_cannot_be_asked_is_refused(stack):
    Path("bad.toml").write_text('name = "bad"\n[[domain]]\nname = "a"\nprompts = []\n')
    bad = stack("evaluate", "run", "--suite", "bad.toml", "--json")
    assert bad.code == 3 and "bad.toml" in bad.json["what"] and "domain" in bad.json["what"]
    unknown = stack("evaluate", "run", "--suite", "domain")
    assert unknown.code == 2 and "domains, or a TOML file" in unknown.err
    for beside in (
        ["--strict-oov"],
        ["--stride", "8"],
        ["--batch-size", "4"],
        ["--text", "none.toml"],
    ):
        both = stack("evaluate", "run", "--suite", "domains", *beside)
        assert both.code == 2 and f"{beside[0]} has no effect with --suite" in both.err
    alone = stack("evaluate", "run", "--every-checkpoint")
    assert alone.code == 2 and "--every-checkpoint has no effect" in alone.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("target", "old", "new", "arguments", "gate"),
    [
        (
            "stackproof.cli.evaluate:sample",
            "top_k=top_k",
            "top_k=0",
            ("sample", "run", "--top-k", "3", "--max-new-tokens", "40"),
            "sampling.drawn",
        ),
        (
            "stackproof.cli.evaluate:sample",
            'seed, "cli-sample", index),',
            '0, "cli-sample", index),',
            ("sample", "run", "--seed", "5", "--max-new-tokens", "40"),
            "sampling.drawn",
        ),
        (
            "stackproof.cli.evaluate:sample",
            "max_new_tokens=max_new_tokens",
            "max_new_tokens=max_new_tokens - 1",
            ("sample", "run", "--max-new-tokens", "120"),
            "sampling.drawn",
        ),
        (
            "stackproof.cli.load_model:open_model",
            "checkpoint.load_model(model, loaded.model)",
            "pass",
            ("trace", "run"),
            "checkpoint.opened",
        ),
        (
            "stackproof.cli.audit:audit_models",
            "opened = open_model(folder, tokenizer)",
            "opened = open_model(folders[-1], tokenizer)",
            ("evaluate", "run", "--suite", "none.toml", "--every-checkpoint"),
            "evaluation.answers",
        ),
    ],
)
def test_a_mistake_in_the_call_of_a_command_ends_it_with_exit_code_4(
    stack, target, old, new, arguments, gate
):
    """The functions that it calls are right; a command with a record states the red gate there."""
    records = () if arguments[0] == "sample" else ("--run-dir", "red")
    with edited([Edit(target, old, new)], lambda: None):
        done = stack(*arguments, *records)
    assert done.code == 4 and f"gate {gate} failed" in done.err, done.err
    if records:
        record = read_record(Path("red/metadata.json"))
        assert (record.status, record.exit_code) == ("halted", 4)
        assert [g.id for g in record.gates if g.verdict == "fail"] == [gate]
    assert stack(*arguments, *(("--run-dir", "green") if records else ())).code == 0
