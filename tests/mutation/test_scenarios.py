"""The comparison on a real scenario: clean runs repeat it, and each kind of result counts."""

import inspect
import re
import textwrap
from contextlib import ExitStack

import pytest
import typer

from stackproof.cli import app
from stackproof.config import load_config
from stackproof.museum.edit import find
from stackproof.museum.prove import workshop
from stackproof.mutation import scenarios
from stackproof.mutation.fruits import Reference, is_result, is_statement
from stackproof.mutation.mutate import Clean, _judged
from stackproof.mutation.sites import Mutant, in_place
from stackproof.mutation.trial import Job, Limits, Scenario, concurrently
from stackproof.recipes import recipe

LIMITS = Limits(cpu_s=300, wall_s=3000)
SMALL = scenarios.Configuration(
    scenarios.PLAIN | scenarios.ADAMW | {"data.tokenizer.kind": "byte", "model.dropout": 0.0},
    (
        ("train", "--resume", scenarios.RUN, "--at", "6"),
        ("export", scenarios.RUN, "--out", "{folder}/exported", "--run-dir", "{folder}/of-export"),
        scenarios.EVALUATE,
        scenarios.SAMPLE,
    ),
)
# Mutants of what is written, each with the only kind of place in which it shows.
WRITTEN = {
    "run/metrics.jsonl::[0].loss_nats": (
        "stackproof.train.callbacks:RunLog.on_step_end",
        "**report.log_line()",
        '**(report.log_line() | {"loss_nats": 0.5})',
    ),
    "run/samples.jsonl::[0].text": (
        "stackproof.train.callbacks:RunLog.on_sample",
        '"text": sample.text',
        '"text": sample.text[:-1]',
    ),
    "evaluated/metadata.json::.metrics.loss_nats.value": (
        "stackproof.evaluate.bits_per_byte:evaluate_text",
        "loss_nats=result.loss_nats",
        "loss_nats=result.loss_nats * 2",
    ),
    "cache/data/ID/manifest.json::.corpus.documents": (
        "stackproof.data.build:_Build._manifest",
        '"documents": whole["documents_out"]',
        '"documents": whole["documents_out"] + 1',
    ),
}
# A mutant of what is computed, with the kinds of places in which it must show.
COMPUTED = (
    "stackproof.train.schedule:warmup_factor",
    "step / schedule.warmup_steps",
    "step / (2 * schedule.warmup_steps)",
)
SHOWN = (
    "run/metrics.jsonl::[0].lr",
    "run/metrics.jsonl::[1].loss_nats",
    "run/checkpoints/step-00000012/model.safetensors",
    "run/checkpoints/step-00000012/state.safetensors",
    "exported/model.safetensors",
    "evaluated/metadata.json::.metrics.bits_per_byte.value",
    "output.txt::document1.samples[0].text",
)


def verb(words) -> None:
    typer.main.get_command(app).main(list(words), prog_name="stack", standalone_mode=False)


def edited(target: str, old: str, new: str) -> Mutant:
    source = textwrap.dedent(inspect.getsource(find(target).function))
    assert source.count(old) == 1, target
    return Mutant(target, 0, "constant", source.replace(old, new), "")


def with_mutants(scenario: Scenario, mutants) -> Scenario:
    """The scenario on several mutants at once, which touch different results."""

    def on_all(command):
        def perform(folder):
            with ExitStack() as stack:
                for mutant in mutants:
                    stack.enter_context(in_place(mutant))
                command(folder)

        return perform

    return Scenario(scenario.name, {n: on_all(c) for n, c in scenario.commands.items()})


@pytest.fixture(scope="module")
def small():
    """Trials without gates of the small scenario: two clean ones, one on mutants of what is written
    and one on a mutant of what is computed.
    """
    written = [edited(*mutant) for mutant in WRITTEN.values()]

    def one(scenario):
        return (yield Job(scenario, LIMITS, gated=False))

    with workshop() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenarios, "CONFIGURATIONS", {"small": SMALL})
        (made,) = scenarios.scenarios(root, verb, ["small"])
        of = [made, made, with_mutants(made, written), with_mutants(made, [edited(*COMPUTED)])]
        return [t for s in of for t in concurrently([one(s)], root, 1)]


def general(key: str) -> str:
    """A place without the name of the prepared data and the numbers of lines."""
    return re.sub(r"data/[0-9a-f]+/", "data/ID/", re.sub(r"\[\d+\]", "[0]", key))


@pytest.mark.slow
def test_results_of_a_real_scenario_are_repeated_and_compared(small):
    clean, again, *_ = (trial.fruits for trial in small)
    reference = Reference([clean, again])
    results = {key for key in clean if is_result(key)}
    assert {general(key) for key in (*WRITTEN, *SHOWN)} <= {general(key) for key in results}
    assert not results & reference.volatile
    assert reference.differing(again) == []
    assert len(reference.volatile) < 0.02 * len(clean), "times, hashes of logs and of records"


@pytest.mark.slow
def test_a_real_trial_without_gates_has_none_in_any_command(small):
    for trial in small:
        assert (trial.ending.kind, trial.ending.command) == ("completed", "sample")
    gates = {key: v for key, v in small[0].fruits.items() if key.endswith("metadata.json::.gates")}
    records = "run", "of-export", "evaluated"
    assert gates == {f"{name}/metadata.json::.gates": "[]" for name in records}
    events = [v for k, v in small[0].fruits.items() if k.startswith("run/events.jsonl")]
    assert "'resumed'" in events


@pytest.mark.slow
def test_a_mutant_of_each_kind_of_result_is_a_survivor(small):
    clean, again, written, computed = small
    reference = Reference([clean.fruits, again.fruits])
    found = [k for k in reference.differing(written.fruits) if not is_statement(k)]
    beside = {general(k) for k in found if "/state.json::.run.logs.samples.jsonl" not in k}
    assert beside == set(WRITTEN)
    assert set(SHOWN) <= set(reference.differing(computed.fruits))
    for trial in (written, computed):
        assert outcome(reference, trial) == ("survivor", "result")
    assert outcome(reference, again) == ("equivalent", "")


def outcome(reference: Reference, trial) -> tuple[str, str]:
    """The judgement of a mutant with this trial, in which no gate turned red."""
    clean = Clean(Scenario("small", {}), {}, reference, reference, LIMITS)
    task = _judged(edited(*COMPUTED), [clean], frozenset())
    try:
        next(task)
        while True:
            task.send(trial)
    except StopIteration as done:
        return done.value.outcome, done.value.effect


@pytest.mark.parametrize("name", scenarios.CONFIGURATIONS)
def test_a_run_file_gives_its_configuration(name, tmp_path):
    made = scenarios.configuration(name, tmp_path)
    (tmp_path / "run.toml").write_text(scenarios.run_file(made))
    read, _ = load_config(recipe(scenarios.BASE), run_file=tmp_path / "run.toml")
    assert read.to_dict() == made.to_dict() | {"recipe": scenarios.BASE}
    assert made.train.max_steps == scenarios.LAST
