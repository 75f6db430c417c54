"""Tries, budgets and ranking of a sweep; shares and memory ratios of training."""

import math
from argparse import Namespace

import pytest
import sweep
import training
from shapes import SHAPES


def options(**given) -> Namespace:
    return Namespace(
        **{
            "recipe": "tiny",
            "file": None,
            "tries": [],
            "set": [],
            "seeds": None,
            "tokens": 81920,
            "seconds": None,
        }
        | given
    )


def test_tries_come_from_the_file_and_the_command_line(tmp_path):
    file = tmp_path / "tries.toml"
    file.write_text(
        "tries = ['optim.lr=2e-3 model.n_layers=2']\nsets = ['device=cpu']\nseeds = [4, 5]\n"
    )
    tries, common, seeds = sweep.read_tries(
        options(file=file, tries=["", "sample.prompt='a b'"], set=["seed=1"])
    )
    assert tries == [("optim.lr=2e-3", "model.n_layers=2"), (), ("sample.prompt=a b",)]
    assert common == ("device=cpu", "seed=1") and seeds == [4, 5]
    assert sweep.read_tries(options(tries=[""], seeds=[9]))[2] == [9] and sweep.read_tries(
        options(tries=[""])
    )[2] == [1]


def test_a_file_with_an_unknown_key_and_no_try_at_all_are_refused(tmp_path):
    file = tmp_path / "tries.toml"
    file.write_text("trys = ['optim.lr=2e-3']\n")
    with pytest.raises(SystemExit, match="trys is not known"):
        sweep.read_tries(options(file=file))
    with pytest.raises(SystemExit, match="nothing to try"):
        sweep.read_tries(options())


def test_a_budget_of_tokens_gives_whole_steps_of_the_tried_size(tmp_path):
    assert sweep.steps_within(options(), (), tmp_path) == 20
    assert sweep.steps_within(options(), ("train.tokens_per_step=8192",), tmp_path) == 10
    assert sweep.steps_within(options(tokens=1), (), tmp_path) == 2


def test_a_budget_of_seconds_follows_the_measured_rate(tmp_path, monkeypatch):
    metric = Namespace(value="2048.0")
    monkeypatch.setattr(
        sweep,
        "finished_run",
        lambda *a: Namespace(succeeded=True, metrics={"tokens_per_s": metric}),
    )
    assert sweep.steps_within(options(tokens=None, seconds=60.0), (), tmp_path) == 30
    monkeypatch.setattr(
        sweep,
        "finished_run",
        lambda *a: Namespace(succeeded=False, status="halted", end_reason="a gate", metrics={}),
    )
    with pytest.raises(SystemExit, match="halted: a gate"):
        sweep.steps_within(options(tokens=None, seconds=60.0), (), tmp_path)


def test_what_is_finished_is_not_run_again_and_what_was_killed_is(tmp_path, monkeypatch):
    commands = []

    def train(command, **_):
        commands.append(command)
        folder = tmp_path / "run"
        assert not folder.exists()
        folder.mkdir()
        (folder / "metadata.json").write_text("{}")
        return Namespace(returncode=0, stderr="")

    monkeypatch.setattr(sweep.subprocess, "run", train)
    monkeypatch.setattr(sweep, "read_record", lambda path: path)
    (tmp_path / "run").mkdir()
    for _ in range(2):
        sweep.finished_run("pocket", ("seed=2",), tmp_path / "run")
    assert len(commands) == 1 and commands[0][-2:] == ["--set", "seed=2"]
    assert sweep.key_of("pocket", ("a=1",)) != sweep.key_of("pocket", ("a=2",))


def outcome(trial: int, seed: int, score: float) -> sweep.Outcome:
    return sweep.Outcome(trial, seed, score, 10.0 * seed, 100.0, 5, "train-x", "completed")


def test_tries_are_ranked_by_their_mean_and_a_failed_seed_puts_its_try_last():
    scores = {0: (2.2, 2.4), 1: (1.0, math.inf), 2: (2.0, 2.2)}
    places = sweep.ranking(
        [outcome(t, s + 1, v) for t, pair in scores.items() for s, v in enumerate(pair)]
    )
    assert [p.trial for p in places] == [2, 0, 1]
    assert places[0].bits_per_byte == pytest.approx(2.1) and places[0].stderr == pytest.approx(0.1)
    assert places[2].bits_per_byte == math.inf and places[0].train_s == 15.0


def seat(variant: str, step_s: float, peak: int) -> training.Seat:
    made = training.Seat(variant, [], {}, SHAPES["a"], 2, True)
    made.ready = [{"matrix_parameters": 1000, "built_bytes": 5, "warm_s": 1.0}]
    made.answers = [{"step_s": [step_s], "peak_bytes": peak, "fresh_bytes_per_step": 4096.0}]
    return made


def test_memory_is_theirs_over_ours_and_the_share_is_of_the_probed_rate():
    seats = {"ours": seat("ours", 0.5, 100), "litgpt": seat("litgpt", 1.0, 250)}
    per_step = SHAPES["a"].flops_per_step(1000)
    rates = {
        n: (SHAPES["a"].tokens_per_step / s.answers[0]["step_s"][0],) for n, s in seats.items()
    }
    found = training.figures(seats, rates, [(1.0, 4.0), (2.0, 8.0), (4.0, 16.0)])
    assert found["memory_ratio_litgpt"] == (2.5, "1") and "memory_ratio_ours" not in found
    assert found["probe_frac_ours"][0] == pytest.approx(per_step / 0.5 / 2e9)
    assert found["probe_frac_litgpt"][0] == pytest.approx(per_step / 1.0 / 2e9)
    assert (
        found["probe_chosen_frac_ours"][0] == pytest.approx(per_step / 0.5 / 8e9)
        and found["probe_chosen_max"][0] == 16.0
    )
    assert found["probe_min"] == (1.0, "GFLOP/s") and found["peak_bytes_litgpt"] == (250, "bytes")


def test_a_round_asks_a_process_and_one_that_is_not_kept_ends_after_it(monkeypatch):
    log = []

    class Fake:
        def __init__(self, command, env):
            log.append("open")
            self.ready = {"matrix_parameters": 1}

        def ask(self, steps):
            return {"step_s": [0.25, 0.5, 4.0], "peak_bytes": 1, "fresh_bytes_per_step": 0.0}

        def close(self):
            log.append("close")

    monkeypatch.setattr(training.child, "Child", Fake)
    for kept, expected in ((True, ["open"]), (False, ["open", "close", "open", "close"])):
        log.clear()
        chair = training.Seat("ours", [], {}, SHAPES["a"], 3, kept)
        assert [chair.once(), chair.once()] == [SHAPES["a"].tokens_per_step / 0.5] * 2
        assert log == expected
