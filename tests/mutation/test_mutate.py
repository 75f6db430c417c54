"""The engine of mutation on commands that take no time: what it draws, and how it judges."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from stackproof.cli import main, output
from stackproof.config import Cosine
from stackproof.contracts.keeper import Gatekeeper
from stackproof.mutation import mutate as engine
from stackproof.mutation import scenarios
from stackproof.mutation.mutate import Clean, Judged, _judged, mutate, survey
from stackproof.mutation.sites import Mutant, draw, mutants_of
from stackproof.mutation.trial import Ending, Job, Limits, Scenario, Trial, concurrently
from stackproof.spec.errors import DataError, GateFailed, IntegrityError
from stackproof.spec.gates import load_spec
from stackproof.spec.mutants import MOMENTS, OUTCOMES, tallies, tally
from stackproof.spec.records import Code, read_record
from stackproof.train import schedule

WARM_UP, MAX_STEPS, PEAK = 4, 12, 1.0
COSINE = Cosine(warmup_steps=WARM_UP)
LIMITS = Limits(cpu_s=60, wall_s=600)
GATE, SPEC = "loss.golden", load_spec()


def rates() -> list[float]:
    return [
        schedule.lr_at(step, peak=PEAK, schedule=COSINE, max_steps=MAX_STEPS)
        for step in range(1, MAX_STEPS + 1)
    ]


def gated() -> bool:
    """Whether commands install gates."""
    return bool(Gatekeeper(SPEC, kind="export", only=None).states)


def red(folder: Path, step: int | None, gate: str = GATE) -> None:
    """A gate turns red as in a run."""
    (folder / "run").mkdir(exist_ok=True)
    line = {"gate": gate, "step": step, "verdict": "fail"}
    (folder / "run/gates.jsonl").write_text(json.dumps(line) + "\n")
    raise GateFailed(gate, what="it is wrong")


def train(folder: Path) -> None:
    """Write the rates of a run. Its only gate judges that of the last step."""
    found = rates()
    (folder / "run").mkdir()
    (folder / "run/metrics.jsonl").write_text("".join(f'{{"lr": {rate}}}\n' for rate in found))
    (folder / "run/metadata.json").write_text(json.dumps({"wall_s": time.time(), "n": len(found)}))
    if gated() and found[-1] > 0.4:
        red(folder, None)


def scenario(*commands, name: str = "one") -> Scenario:
    names = ("train", "resume", "export")
    return Scenario(name, dict(zip(names, commands)))


SCENARIO = scenario(train, name="rates")


def run(jobs, folder, at_once: int = 2) -> list[Trial]:
    """The trials of jobs, in order."""

    def one(number, job):
        return number, (yield job)

    tasks = (one(number, job) for number, job in enumerate(jobs))
    return [trial for _, trial in sorted(concurrently(tasks, folder, at_once), key=lambda x: x[0])]


def trial_of(folder: Path, *commands, gated: bool = True, limits: Limits = LIMITS) -> Trial:
    """The trial of commands."""
    (trial,) = run([Job(scenario(*commands), limits, gated=gated)], folder)
    return trial


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
        if j.outcome in ("survivor", "caught"):
            assert j.effect == "result"
            assert any(key.startswith("run/metrics.jsonl::") for key in j.differing)
        if j.outcome == "caught":
            assert (j.ending.red, j.ending.moment) == (GATE, "before step 1")
        if j.outcome in ("equivalent", "crashed"):
            assert (j.differing, j.effect) == ((), "")
    outcome = {j.mutant.diff: j.outcome for j in judged}
    (sine,) = (o for diff, o in outcome.items() if "math.sin" in diff)
    assert sine == "caught", "0.5 · (1 + sin π) is 0.5 at the last step"


def test_the_stack_of_this_process_is_not_changed(clean, tmp_path):
    before = rates()
    mutant = next(m for m in draw(clean[0].trace, 100, 0) if m.operator == "arithmetic")
    trial = run([Job(SCENARIO, LIMITS, mutant)], tmp_path)[0]
    assert trial.ending.kind in ("completed", "crashed", "red")
    assert rates() == before and gated()
    assert not list((tmp_path / "trials").iterdir()), "folders of trials are removed"


def test_no_command_has_gates_in_a_trial_without(tmp_path):
    def states_gates(folder):
        (folder / f"{time.time_ns()}.json").write_text(json.dumps({"gated": gated()}))

    commands = [states_gates] * 3
    for with_gates in (True, False):
        fruits = trial_of(tmp_path, *commands, gated=with_gates).fruits
        stated = [value for key, value in fruits.items() if key.endswith("::.gated")]
        assert stated == [repr(with_gates)] * 3


def test_an_ending_states_who_raised_it(tmp_path):
    def refused(folder):
        raise DataError("a shard is damaged")

    def crashed(folder):
        raise ValueError("3")

    def killed(folder):
        os._exit(1)

    def ended_by_the_system(folder):
        signal.raise_signal(signal.SIGKILL)

    def warned(folder):
        (folder / "run").mkdir()
        gates = [{"id": "runtime.clock", "verdict": "fail"}, {"id": GATE, "verdict": "pass"}]
        (folder / "run/metadata.json").write_text(json.dumps({"gates": gates}))

    ending = trial_of(tmp_path, refused).ending
    assert (ending.kind, ending.exit_code) == ("refused", DataError.exit_code)
    assert trial_of(tmp_path, crashed).ending.kind == "crashed"
    assert trial_of(tmp_path, killed).ending.kind == "crashed"
    ending = trial_of(tmp_path, ended_by_the_system).ending
    assert ending.kind == "crashed" and "with -9" in ending.error
    assert list(trial_of(tmp_path, warned).ending.warned) == ["runtime.clock"]


def test_what_takes_too_long_is_hung(tmp_path):
    def busy(folder):
        while True:
            pass

    def sleeps(folder):
        time.sleep(10_000)

    assert trial_of(tmp_path, busy, limits=Limits(1, 600)).ending.kind == "hung"
    assert trial_of(tmp_path, sleeps, limits=Limits(60, 1)).ending.kind == "hung"


def test_a_red_gate_counts_where_another_error_follows_from_it(tmp_path):
    def refuses_to_write(folder):
        try:
            red(folder, 3)
        except GateFailed as e:
            raise IntegrityError("it was not written") from e

    def breaks_at_its_end(folder):
        try:
            red(folder, 3)
        finally:
            raise ValueError("the record could not be closed")

    def hangs_afterwards(folder):
        # Threads that end with the process must not decide: ending.json was written.
        import threading

        threading.Thread(target=lambda: time.sleep(10_000)).start()
        red(folder, 3)

    for command in (refuses_to_write, breaks_at_its_end, hangs_afterwards):
        ending = trial_of(tmp_path, command).ending
        assert (ending.kind, ending.red, ending.moment) == ("red", GATE, "step 3")


def test_the_moment_is_that_of_the_first_red_verdict(tmp_path):
    def at_the_end(folder):
        train(folder)
        raise GateFailed(GATE, what="the run ended without one verdict")

    def afterwards(folder):
        raise GateFailed(GATE, what="the folder holds other weights")

    def moment(*commands):
        return trial_of(tmp_path, *commands).ending.moment

    assert moment(lambda folder: red(folder, None)) == "before step 1"
    assert moment(lambda folder: red(folder, 7)) == "step 7"
    assert moment(at_the_end) == "at the end"
    assert moment(train, train_again, afterwards) == "export"
    rows = [row("caught", moment=m) for m in ("before step 1", "step 7", "at the end", "export")]
    assert tally(rows)["moments"] == dict.fromkeys(MOMENTS, 1)


def train_again(folder: Path) -> None:
    return None


def test_a_child_has_no_input_and_cannot_fill_the_disk(tmp_path):
    def reads(folder):
        (folder / "read.json").write_text(json.dumps(os.read(0, 1).decode()))

    def writes(folder):
        with open(folder / "big", "wb") as file:
            file.seek(2 * 2**30)
            file.write(b"1")
        (folder / "big").unlink()

    mine, (theirs, write) = os.dup(0), os.pipe()
    os.write(write, b"yes")
    os.dup2(theirs, 0)
    try:
        assert trial_of(tmp_path, reads).fruits["read.json::"] == "''"
    finally:
        for end in (os.dup2(mine, 0) or mine, theirs, write):
            os.close(end)
    assert "File too large" in trial_of(tmp_path, writes).ending.error


HELD = """
import os, sys, time
from pathlib import Path
from stackproof.mutation.trial import Job, Limits, Scenario, concurrently

def forks(folder):
    if os.fork() == 0:
        time.sleep(10_000)
    Path(sys.argv[1], "pids").write_text(f"{os.getpid()} {os.getpgid(0)}")
    time.sleep(10_000)

def task(command):
    return (yield Job(Scenario("one", {"train": command}), Limits(60, 600)))

def stops():
    while not Path(sys.argv[1], "pids").exists():
        time.sleep(0.01)
    raise KeyboardInterrupt
    yield

def tasks():
    yield task(forks)
    yield stops()

list(concurrently(tasks(), Path(sys.argv[1]), 2))
"""


def test_no_child_outlives_a_command_that_is_interrupted(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HELD, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert "KeyboardInterrupt" in done.stderr
    child, group = map(int, (tmp_path / "pids").read_text().split())
    assert child == group, "it has a group of its own"
    assert members(group) == []
    assert not list((tmp_path / "trials").iterdir())


def test_a_child_ends_with_its_parent(tmp_path):
    script = HELD.replace("raise KeyboardInterrupt", "os._exit(0)")
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=300)
    child, group = map(int, (tmp_path / "pids").read_text().split())
    try:
        for _ in range(30_000):  # without the request to the kernel it would sleep on
            if child not in members(group):
                break
            time.sleep(0.01)
        assert child not in members(group)
    finally:
        os.killpg(group, signal.SIGKILL)  # what the command had started itself


def members(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, own = path.read_text().rpartition(")")[2].split()[:3]
            found += [int(path.parent.name)] if int(own) == group and state != "Z" else []
    return found


def test_a_draw_ends_if_the_code_of_the_checkout_changes(clean, tmp_path, monkeypatch):
    states = iter([Code(commit="a" * 40, dirty=False)] * 2 + [Code(commit="b" * 40, dirty=False)])
    monkeypatch.setattr(engine, "code_state", lambda: next(states))
    judging = mutate(clean, tmp_path, 5, 0, 1)
    assert next(judging).outcome in OUTCOMES
    with pytest.raises(IntegrityError, match="the code changed while mutants were tried"):
        next(judging)


def test_a_stack_that_is_not_green_is_not_mutated(tmp_path):
    def is_red(folder):
        if gated():
            red(folder, None)

    def dies(folder):
        os._exit(3)

    for command, word in ((is_red, "red without|red"), (dies, "ended with 3")):
        with pytest.raises(IntegrityError, match="not green without a mutant") as raised:
            survey([scenario(command)], tmp_path, 2, lambda name: None)
        assert any(w in str(raised.value.value) for w in word.split("|"))


# --- the judgement of one mutant ------------------------------------------------------------------

MUTANT = Mutant("stackproof.train.schedule:lr_at", 1, "constant", "", "- 1\n+ 2")
LOSS, CLAIM = "run/metrics.jsonl::[0].loss_nats", "run/metadata.json::.claim"
CLEAN = {LOSS: "1.0", CLAIM: "'x'"}


class Answers:
    """A scenario of which the trials are given: without gates, and with them."""

    def __init__(self, bare, gated=None, name="one"):
        from stackproof.mutation.fruits import Reference

        self.given = {False: bare, True: gated or bare}
        reference = Reference([CLEAN, CLEAN])
        self.clean = Clean(Scenario(name, {}), {}, reference, reference, LIMITS)


def judge(*scenarios: Answers) -> tuple[Judged, list[tuple[str, bool]]]:
    """The judgement of a mutant in scenarios of which the trials are given, and which were run."""
    by_name = {f"{n}": s for n, s in enumerate(scenarios)}
    for name, own in by_name.items():
        own.clean.scenario = Scenario(name, {})
    task, trial, ran = _judged(MUTANT, [s.clean for s in scenarios], frozenset()), None, []
    try:
        while True:
            job = task.send(trial)
            ran.append((job.scenario.name, job.gated))
            trial = by_name[job.scenario.name].given[job.gated]
    except StopIteration as done:
        return done.value, ran


def trial(kind: str = "completed", *, changes: tuple[str, ...] = (), **ending) -> Trial:
    fruits = CLEAN | dict.fromkeys(changes, "other")
    return Trial(Ending(kind, **ending), 1.0, fruits if kind == "completed" else {})


SAME, STATED, CHANGED = trial(), trial(changes=(CLAIM,)), trial(changes=(LOSS, CLAIM))
RED, CRASHED = trial("red", red=GATE), trial("crashed")
REFUSED = trial("refused", exit_code=3)


def outcome(*scenarios: Answers) -> tuple[str, str, str]:
    found, _ = judge(*scenarios)
    return found.outcome, found.effect, found.scenario


def test_a_gate_is_credited_only_where_a_mutant_is_silent_without_it():
    assert outcome(Answers(CHANGED, RED)) == ("caught", "result", "0")
    assert outcome(Answers(STATED, RED)) == ("caught", "statement", "0")
    assert outcome(Answers(SAME, RED)) == ("alarm", "", "0")
    assert outcome(Answers(SAME, trial(warned=("runtime.clock",), changes=(CLAIM,))))[0] == "alarm"
    assert outcome(Answers(CRASHED, RED)) == ("crashed", "", "0")
    found, _ = judge(Answers(REFUSED, RED))
    assert (found.outcome, found.ending.kind) == ("refused", "red"), "a gate spoke first"
    assert not tally([found.row()])["blaming_frac"]["k"]
    found, _ = judge(Answers(REFUSED, REFUSED))
    assert tally([found.row()])["blaming_frac"]["k"] == 1


def test_a_silent_mutant_is_one_that_is_silent_with_gates():
    assert outcome(Answers(CHANGED)) == ("survivor", "result", "0")
    assert outcome(Answers(CHANGED, CRASHED)) == ("crashed", "", "0")
    assert outcome(Answers(CHANGED, SAME)) == ("equivalent", "", "0")
    warned = trial(warned=("runtime.clock",), changes=(LOSS,))
    assert outcome(Answers(CHANGED, warned)) == ("warned", "result", "0")
    assert outcome(Answers(SAME, STATED)) == ("statement", "statement", "0")


def test_equivalents_and_statements_are_tried_in_further_scenarios():
    assert outcome(Answers(SAME), Answers(CHANGED)) == ("survivor", "result", "1")
    assert outcome(Answers(STATED), Answers(CHANGED)) == ("survivor", "result", "1")
    assert outcome(Answers(STATED), Answers(SAME)) == ("statement", "statement", "0")
    assert outcome(Answers(SAME), Answers(SAME)) == ("equivalent", "", "0")
    assert outcome(Answers(SAME), Answers(CRASHED)) == ("crashed", "", "1")


def test_an_error_is_final_where_it_comes_first_and_no_silent_one_is_forgotten_for_it():
    assert outcome(Answers(CRASHED), Answers(CHANGED)) == ("crashed", "", "0")
    assert outcome(Answers(STATED), Answers(CRASHED)) == ("statement", "statement", "0")


def test_a_survivor_ends_the_search_and_only_what_is_needed_is_run():
    assert judge(Answers(CHANGED), Answers(CHANGED))[1] == [("0", False), ("0", True)]
    assert judge(Answers(CRASHED))[1] == [("0", False)]
    assert judge(Answers(SAME), Answers(SAME))[1] == [("0", False), ("1", False), ("0", True)]
    twice = [("0", False), ("0", True), ("0", True)]
    assert judge(Answers(STATED), Answers(STATED))[1] == [*twice, ("1", False)]


def test_a_statement_is_one_that_a_second_trial_repeats():
    class Once(Answers):
        """Its first trial with gates differs in a statement, the second one does not."""

        def __init__(self):
            super().__init__(STATED)
            self.given = self
            self.trials = {False: [STATED], True: [STATED, SAME, SAME]}

        def __getitem__(self, gated):
            return self.trials[gated].pop(0)

    assert outcome(Once()) == ("equivalent", "", "0")


# --- the rates and the verb -----------------------------------------------------------------------


def row(outcome: str, effect: str = "result", package: str = "train", **ending) -> dict:
    return {
        "outcome": outcome,
        "effect": effect,
        "ending": ending,
        "package": package,
        "scenario": "museum",
        "operator": "axis",
    }


def test_rates_count_what_raised_no_error():
    rows = [row("caught", moment="before step 1")] * 3 + [row("caught", moment="step 2")]
    rows += [row("survivor"), row("warned")]
    rows += [row("statement", "statement"), row("caught", "statement", moment="step 1")]
    rows += [row("refused", "", exit_code=3), row("refused", "", exit_code=6), row("crashed", "")]
    rows += [row("equivalent", ""), row("alarm", "")]
    whole = tally(rows)
    counted = {name: (whole[name]["k"], whole[name]["n"]) for name in whole if "_frac" in name}
    assert counted == {
        "caught_frac": (4, 6),
        "caught_or_stated_frac": (5, 8),
        "early_frac": (3, 5),
        "blaming_frac": (1, 3),
    }
    assert sum(whole["counts"].values()) == len(rows) and tuple(whole["counts"]) == OUTCOMES
    found = whole["caught_frac"]
    assert 0 < found["low"] < found["value"] < found["high"] < 1
    by = tallies([*rows, row("survivor", package="data")], "package")
    assert {name: own["caught_frac"]["n"] for name, own in by.items()} == {"data": 1, "train": 6}


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


@pytest.mark.parametrize("k, n", [(44, 50), (1, 7), (0, 10), (10, 10)])
def test_ends_of_an_interval_are_the_shares_that_are_just_possible(k, n):
    # by the definition of the interval: |k/n − p| = z · √(p (1 − p) / n)
    found = tally([row("caught")] * k + [row("survivor")] * (n - k))["caught_frac"]
    low, high = found["low"], found["high"]
    for end in (low, high):
        assert (k / n - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, abs=1e-12)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1 and low < high


def test_a_mutant_names_its_package():
    assert replace(MUTANT, target="stackproof.data.packing:f").package == "data"
