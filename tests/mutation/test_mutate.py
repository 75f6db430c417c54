"""The engine of mutation on a command that takes no time: what it draws, and how it judges."""

import json
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from stackproof.cli import main, output
from stackproof.config import Cosine
from stackproof.mutation import scenarios
from stackproof.mutation.fruits import Reference, fruits_of, is_statement
from stackproof.mutation.mutate import OUTCOMES, mutate, survey
from stackproof.mutation.report import by, tally, wilson
from stackproof.mutation.sites import Mutant, draw, mutants_of
from stackproof.mutation.trial import Scenario, trials
from stackproof.spec.errors import DataError, GateFailed, IntegrityError
from stackproof.spec.records import read_record
from stackproof.train import schedule

WARM_UP, MAX_STEPS, PEAK = 4, 12, 1.0
COSINE = Cosine(warmup_steps=WARM_UP)


def rates() -> list[float]:
    return [
        schedule.lr_at(step, peak=PEAK, schedule=COSINE, max_steps=MAX_STEPS)
        for step in range(1, MAX_STEPS + 1)
    ]


def train(folder: Path, cfg, only) -> list[str]:
    """Write the rates of a run. Its only gate judges that of the last step."""
    found = rates()
    (folder / "run").mkdir()
    (folder / "run/metrics.jsonl").write_text("".join(f'{{"lr": {rate}}}\n' for rate in found))
    (folder / "run/metadata.json").write_text(json.dumps({"took": time.time_ns(), "n": len(found)}))
    if only is None and found[-1] > 0.4:
        raise GateFailed("schedule.last", what=f"the last rate is {found[-1]}")
    return []


SCENARIO = Scenario("rates", None, {"train": train})


def run(jobs, folder, **options):
    """What became of each job, in order."""
    return [t for _, t in sorted(trials(jobs, folder, at_once=2, **{"cpu_s": 60} | options))]


def ended(command, folder: Path):
    """How a command ends."""
    (trial,) = run([(Scenario("one", None, {"train": command}), None, None)], folder)
    return trial.ending


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The command without a mutant, surveyed."""
    return survey([SCENARIO], tmp_path_factory.mktemp("clean"), 2, lambda name: None)


@pytest.fixture(scope="module")
def judged(clean, tmp_path_factory):
    """Every mutant of the functions that the command runs."""
    return list(mutate(clean, tmp_path_factory.mktemp("mutants"), 10_000, 0, 2))


def test_only_lines_that_ran_are_changed(clean):
    trace = clean[0].trace
    assert "stackproof.train.schedule:remaining" in trace
    targets = {m.target for m in draw(trace, 10_000, 0)}
    assert {t.split(":")[0] for t in targets} == {"stackproof.train.schedule"}
    diffs = [
        m.diff
        for m in mutants_of(
            "stackproof.train.schedule:remaining", trace["stackproof.train.schedule:remaining"]
        )
    ]
    assert any("math.sin" in diff for diff in diffs)
    assert not any("decay_shape" in diff for diff in diffs), "a branch that no run takes"


def test_a_draw_is_repeated_by_its_seed_alone(clean):
    trace = clean[0].trace
    assert draw(trace, 8, 3) == draw(trace, 8, 3) != draw(trace, 8, 4)
    assert len(set(draw(trace, 10_000, 3))) == len(draw(trace, 10_000, 3))


def test_each_mutant_is_judged_by_what_a_user_gets(judged):
    assert {j.outcome for j in judged} >= {"caught", "survivor", "equivalent", "crashed"}
    for j in judged:
        if j.outcome == "survivor":
            assert any(key.startswith("run/metrics.jsonl::") for key in j.differing)
        if j.outcome == "caught":
            assert (j.ending.red, j.ending.moment) == ("schedule.last", "before step 1")
        if j.outcome in ("equivalent", "alarm"):
            assert j.differing == ()
    outcome = {j.mutant.diff: j.outcome for j in judged}
    (sine,) = (o for diff, o in outcome.items() if "math.sin" in diff)
    assert sine == "caught", "0.5 · (1 + sin π) is 0.5 at the last step"


def test_the_stack_of_this_process_is_not_changed(clean, tmp_path):
    before = rates()
    mutant = next(m for m in draw(clean[0].trace, 100, 0) if m.operator == "arithmetic")
    trial = run([(SCENARIO, mutant, ())], tmp_path)[0]
    assert trial.ending.kind in ("completed", "crashed")
    assert rates() == before
    assert not list((tmp_path / "trials").iterdir()), "folders of trials are removed"


def test_an_ending_states_who_raised_it(tmp_path):
    def refused(folder, cfg, only):
        raise DataError("a shard is damaged")

    def crashed(folder, cfg, only):
        raise ValueError("3")

    def hung(folder, cfg, only):
        while True:
            pass

    def killed(folder, cfg, only):
        os._exit(1)

    def warned(folder, cfg, only):
        return ["runtime.clock"]

    assert ended(refused, tmp_path).kind == "refused"
    assert ended(crashed, tmp_path).kind == "crashed"
    assert ended(killed, tmp_path).kind == "hung"
    assert list(ended(warned, tmp_path).warned) == ["runtime.clock"]
    (trial,) = run([(Scenario("one", None, {"train": hung}), None, None)], tmp_path, cpu_s=1)
    assert trial.ending.kind == "hung"


def test_a_stack_that_is_not_green_is_not_mutated(tmp_path):
    def red(folder, cfg, only):
        (folder / "run").mkdir()
        if only is None:
            raise GateFailed("schedule.last", what="red without a mutant")
        return []

    with pytest.raises(IntegrityError, match="not green without a mutant"):
        survey([Scenario("red", None, {"train": red})], tmp_path, 2, lambda name: None)


def test_values_that_clean_runs_differ_in_are_not_compared(tmp_path):
    def fruits(name, at, loss):
        folder = tmp_path / name
        folder.mkdir()
        lines = [{"at": at, "loss": loss, "path": str(folder / "x")}, {"at": 0, "loss": loss}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "weights.bin").write_bytes(b"0")
        return fruits_of(folder)

    reference = Reference([fruits("a", 1, 0.5), fruits("b", 2, 0.5), fruits("c", 3, 0.5)])
    assert reference.differing(fruits("d", 4, 0.5)) == []
    changed = fruits("e", 4, 0.25)
    assert reference.differing(changed) == ["metrics.jsonl::[0].loss", "metrics.jsonl::[1].loss"]
    del changed["weights.bin"]
    assert "weights.bin" in reference.differing(changed)
    assert (
        Reference([{"m::.f.sha256": "1"}, {"m::.f.sha256": "2"}]).differing(
            {"m::.f.sha256": "3", "m::.f.bytes": "4"}
        )
        == []
    )
    assert Reference([{"r::.environment.threads": "1"}]).differing({}) == []
    assert is_statement("run/checkpoints/step-6/state.json::.gates.loss.first.measured.gap_nats")
    assert not is_statement("run/checkpoints/step-6/state.json::.stopper.best")
    assert is_statement("run/metadata.json::.claim")
    assert not is_statement("evaluated/metadata.json::.metrics.bits_per_byte.value")
    assert not is_statement("run/metrics.jsonl::[0].loss")


def test_a_draw_leaves_a_record_and_prints_its_survivors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scenarios, "scenarios", lambda texts, verb, names: [SCENARIO])
    arguments = ["gates", "mutate", "--n", "12", "--seed", "5", "--run-dir", str(tmp_path / "r")]
    monkeypatch.setattr(output, "_emitted", False)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code
    text = capsys.readouterr().out
    record = read_record(tmp_path / "r/metadata.json")
    rows = [json.loads(line) for line in (tmp_path / "r/mutants.jsonl").read_text().splitlines()]
    assert (record.kind, record.config["seed"], len(rows)) == ("mutation", 5, 12)
    counts = Counter(row["outcome"] for row in rows)
    assert {o: record.metrics[f"n_{o}"].value for o in OUTCOMES} == {o: counts[o] for o in OUTCOMES}
    assert "Mutants, seed 5" in text and text.count("survivor: ") == counts["survivor"] > 0


def test_an_unknown_configuration_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(output, "_emitted", False)
    with pytest.raises(SystemExit) as ended:
        main(["gates", "mutate", "--config", "other", "--json"])
    assert ended.value.code == 2 and "bfloat16" in json.loads(capsys.readouterr().out)["allowed"]


def test_rates_count_what_raised_no_error(judged):
    whole = tally(judged)
    counts = whole["counts"]
    assert sum(counts.values()) == len(judged)
    assert list(counts) == list(OUTCOMES)
    share = whole["caught_frac"]
    assert share["k"] == counts["caught"]
    assert share["n"] == counts["caught"] + counts["survivor"] + counts["warned"]
    assert 0 <= share["low"] < share["value"] < share["high"] <= 1
    assert list(by(judged, "package")) == ["train"]
    stated = [*judged, replace_outcome(judged[0], "statement")]
    assert tally(stated)["caught_or_stated_frac"]["n"] == whole["caught_or_stated_frac"]["n"] + 1


def replace_outcome(one, outcome):
    return one._replace(outcome=outcome, mutant=replace(one.mutant, operator="other"))


@pytest.mark.parametrize("k, n", [(44, 50), (1, 7), (0, 10), (10, 10)])
def test_ends_of_an_interval_are_the_shares_that_are_just_possible(k, n):
    # by the definition of the interval: |k/n − p| = z · √(p (1 − p) / n)
    for end in wilson(k, n):
        assert (k / n - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, abs=1e-12)
    low, high = wilson(k, n)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1 and low < high


def test_a_mutant_names_its_package():
    assert Mutant("stackproof.data.packing:f", 1, "axis", "", "").package == "data"
