"""Figures of a record and of its log close with each other."""

import pytest

from tools.tampers.breaks import folder, found, metric, nothing, put, rechain, second_train


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("train", "epochs"),
        ("train", "tokens_per_parameter"),
        ("train", "random_loss_nats"),
        ("train", "n_params"),
        ("train", "val_bits_per_byte"),
        ("evaluate", "bits_per_byte"),
        ("evaluate", "bits_per_char"),
        ("evaluate", "loss_nats"),
    ],
)
@pytest.mark.parametrize("factor", [1 + 1e-9, 1 - 1e-9])
def test_a_figure_that_others_give_is_that(repo, kind, name, factor):
    def change(document):
        document["metrics"][name]["value"] *= factor

    rechain(repo, kind, change)
    assert "DERIVED" in found(repo)


@pytest.mark.parametrize(
    "change",
    [
        put("metrics", "val_loss_nats", "n", value=31),
        put("metrics", "val_bits_per_byte", "n", value=61),
    ],
)
def test_tokens_and_bytes_of_a_held_out_loss_close_with_its_bits(repo, change):
    rechain(repo, "train", change)
    assert "DERIVED" in found(repo)


@pytest.mark.parametrize(
    "series",
    [
        lambda lines: lines[1].update(loss_nats=2.2),
        lambda lines: lines[3].update(ema_loss_nats=lines[3]["ema_loss_nats"] + 1e-9),
        lambda lines: lines[2].update(tokens_seen=47),
    ],
    ids=["smoothed", "mean", "tokens"],
)
def test_a_logged_step_follows_from_those_before(repo, series):
    rechain(repo, "train", nothing, series=series)
    assert "LOG-ARITHMETIC" in found(repo)


@pytest.mark.parametrize("name", ["best_step", "val_bits_per_byte"])
def test_the_summary_has_the_best_and_the_last_evaluation(repo, name):
    rechain(repo, "train", nothing, series=lambda x: x[3].update(val_bits_per_byte=1.5))
    assert "METRIC-RECOMPUTE" in found(repo)
    rechain(repo, "train", metric(name, 2), series=lambda x: x[3].pop("val_bits_per_byte"))
    assert ("METRIC-RECOMPUTE" in found(repo)) == (name == "best_step")


@pytest.mark.parametrize(
    ("environment", "plausible"),
    [
        ({"device": "cpu", "cpu_count": 2}, False),
        ({"device": "cpu", "cpu_count": 256}, True),
        ({"device": "cpu"}, True),
        ({"device": "cuda:0", "cpu_count": 2}, True),
    ],
)
def test_a_device_is_as_fast_as_its_kind_can_be(repo, environment, plausible):
    """1e9 tokens per second of 4,000 operations: 4 TFLOP/s."""
    document = folder(repo, "train") / "metadata.json"
    assert document.is_file()

    def change(record):
        record["environment"].update(environment)
        record["metrics"]["tokens_per_s"]["value"] = 1e9
        record["metrics"]["train_s"]["value"] = 6.4e-8

    rechain(repo, "train", change)
    assert ("WALL" not in found(repo)) == plausible


def test_a_second_run_with_its_own_figures_is_fine(repo):
    second_train(repo, seed=7)
    codes = found(repo)
    assert not {"DERIVED", "LOG-ARITHMETIC", "METRIC-RECOMPUTE"} & codes


@pytest.mark.parametrize(("stated", "ok"), [("Infinity", True), (1.0, False)])
def test_a_loss_whose_perplexity_is_no_number_crashes_nothing(repo, stated, ok):
    def change(document):
        document["metrics"]["val_loss_nats"]["value"] = 710.0
        document["metrics"]["val_ppl"]["value"] = stated

    rechain(repo, "train", change)
    codes = found(repo)
    assert "INTERNAL" not in codes and ("PPL" not in codes) == ok


def test_a_last_line_without_its_loss_is_found(repo):
    rechain(repo, "train", nothing, series=lambda x: [x[3].pop("loss_nats")])
    assert "METRIC-RECOMPUTE" in found(repo)
