"""Kills and faults in a training run: after a resume it ends as one that nothing disturbed."""

import shutil

import pytest

from tests.fault_injection import file_calls
from tests.fault_injection.runs import (
    UNDER_FAULT,
    again,
    assert_documented,
    assert_same_end,
    training,
)
from tests.fault_injection.scale import SEED, chance, scaled

VARIANTS = {"in line": {}, "in background": {"checkpoint__async_save": "true"}}


@pytest.fixture(params=VARIANTS)
def straight(request, tmp_path, text_file, monkeypatch, cli_cache):
    """A run without a fault: its arguments, its folder, and the calls that it made there."""
    monkeypatch.setenv("STACKPROOF_CACHE", str(cli_cache))
    folder = tmp_path / "straight"
    folder.mkdir()
    arguments = training(text_file, **VARIANTS[request.param])
    done = file_calls.run(*arguments, folder=folder, code=UNDER_FAULT)
    assert done.code == 0, done.err
    return arguments, folder / "run", file_calls.calls(done), request.param


def disturbed(straight, tmp_path, name, *faults):
    """A run that ends by each fault in turn, and then goes on to its end."""
    arguments, _, _, _ = straight
    folder = tmp_path / name
    folder.mkdir()
    for fault, at in faults:
        done = file_calls.run(
            *again(folder, arguments), folder=folder, fault=fault, at=at, code=UNDER_FAULT
        )
        if fault != "kill":
            assert_documented(done, f"{fault} at call {at}, SEED={SEED}")
    done = file_calls.run(*again(folder, arguments), folder=folder, code=UNDER_FAULT)
    assert done.code == 0, (faults, done.err[-2000:])
    return folder


def test_a_kill_at_any_call_and_a_resume_leave_the_record_of_a_straight_run(straight, tmp_path):
    _, run, calls, variant = straight
    draw = chance(variant)
    places = range(1, len(calls) + 1)
    for n in draw.sample(places, min(scaled(3, 250), len(calls))):
        folder = disturbed(straight, tmp_path, f"kill-{n}", ("kill", n))
        assert_same_end(run, folder / "run", f"killed at call {n} ({calls[n - 1]}), SEED={SEED}")
        shutil.rmtree(folder)


def test_three_kills_in_a_row_leave_the_record_of_a_straight_run(straight, tmp_path):
    _, run, calls, variant = straight
    draw = chance(f"three {variant}")
    for n in range(scaled(1, 40)):
        at = [draw.randint(1, len(calls)) for _ in range(3)]
        folder = disturbed(straight, tmp_path, f"kills-{n}", *(("kill", k) for k in at))
        assert_same_end(run, folder / "run", f"killed at {at}, SEED={SEED}")
        shutil.rmtree(folder)


def test_an_error_at_any_call_ends_documented_and_a_resume_completes(straight, tmp_path):
    _, run, calls, variant = straight
    draw = chance(f"faults {variant}")
    for n in draw.sample(range(1, len(calls) + 1), min(scaled(2, 250), len(calls))):
        fault = draw.choice(list(file_calls.FAULTS))
        folder = disturbed(straight, tmp_path, f"fault-{n}", (fault, n))
        told = f"{fault} at call {n} ({calls[n - 1]}), SEED={SEED}"
        assert_same_end(run, folder / "run", told)
        shutil.rmtree(folder)
