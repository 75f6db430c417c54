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
from tests.processes import NO_PREFLIGHT, Command

VARIANTS = {"in line": {}, "in background": {"checkpoint__async_save": "true"}}


@pytest.fixture(scope="module", params=VARIANTS)
def straight(request, tmp_path_factory, text_file, cli_cache):
    """A run without a fault: its arguments, its folder, and the calls that it made there."""
    folder = tmp_path_factory.mktemp("straight")
    arguments = training(text_file, **VARIANTS[request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STACKPROOF_CACHE", str(cli_cache))
        done = file_calls.run(*arguments, folder=folder, code=UNDER_FAULT)
    assert done.code == 0, done.err
    return arguments, folder / "run", file_calls.calls(done), request.param


@pytest.fixture(autouse=True)
def cache(monkeypatch, cli_cache):
    """All runs read the data that the first one prepared."""
    monkeypatch.setenv("STACKPROOF_CACHE", str(cli_cache))


def disturbed(straight, tmp_path, name, *faults):
    """A run that each fault in turn ends, and that then goes on to its end. Returns its folder and
    how many faults came: a resume may have fewer calls.
    """
    arguments, _, _, _ = straight
    folder = tmp_path / name
    folder.mkdir()
    came = 0
    for fault, at in faults:
        done = file_calls.run(
            *again(folder, arguments), folder=folder, fault=fault, at=at, code=UNDER_FAULT
        )
        came += file_calls.came(done, fault, at)
        if fault != "kill":
            assert_documented(done, f"{fault} at call {at}, SEED={SEED}")
    done = file_calls.run(*again(folder, arguments), folder=folder, code=UNDER_FAULT)
    assert done.code == 0, (faults, done.err[-2000:])
    return folder, came


def places(straight, name, short, long):
    """Numbers of calls: `short` in `make test`, `long` in `make stress`, at most all."""
    _, _, calls, variant = straight
    everywhere = range(1, len(calls) + 1)
    return chance(f"{name} {variant}").sample(everywhere, min(scaled(short, long), len(calls)))


def test_a_kill_at_any_call_and_a_resume_leave_the_record_of_a_straight_run(straight, tmp_path):
    _, run, calls, variant = straight
    chosen = places(straight, "kill", 3, 200)
    for n in chosen:
        told = f"killed at call {n} ({calls[n - 1]}), SEED={SEED}"
        folder, came = disturbed(straight, tmp_path, f"kill-{n}", ("kill", n))
        assert came == 1, told
        assert_same_end(run, folder / "run", told)
        shutil.rmtree(folder)
    print(f"{len(chosen)} kills {variant}, at {len(calls)} calls")


def test_three_kills_in_a_row_leave_the_record_of_a_straight_run(straight, tmp_path):
    _, run, calls, variant = straight
    draw, kills = chance(f"three {variant}"), 0
    for n in range(scaled(1, 20)):
        # A resume has fewer calls than the run it continues.
        at = [draw.randint(1, len(calls) // k) for k in (1, 3, 6)]
        folder, came = disturbed(straight, tmp_path, f"kills-{n}", *(("kill", k) for k in at))
        kills += came
        assert_same_end(run, folder / "run", f"killed at {at}, SEED={SEED}")
        shutil.rmtree(folder)
    assert kills >= scaled(1, 20)
    print(f"{kills} kills {variant}, up to three in a run")


def test_an_error_at_any_call_ends_documented_and_a_resume_completes(straight, tmp_path):
    _, run, calls, variant = straight
    draw, chosen = chance(f"kind of {variant}"), places(straight, "error", 2, len(calls))
    for n in chosen:
        fault = draw.choice(list(file_calls.FAULTS))
        told = f"{fault} at call {n} ({calls[n - 1]}), SEED={SEED}"
        folder, came = disturbed(straight, tmp_path, f"fault-{n}", (fault, n))
        assert came == 1, told
        assert_same_end(run, folder / "run", told)
        shutil.rmtree(folder)
    print(f"{len(chosen)} errors {variant}, at {len(calls)} calls")


def test_a_kill_in_a_run_with_preflight_leaves_the_record_of_a_straight_run(tmp_path, text_file):
    arguments = training(text_file)
    (tmp_path / "straight").mkdir()
    done = file_calls.run(*arguments, folder=tmp_path / "straight")
    assert done.code == 0, done.err
    calls, draw = file_calls.calls(done), chance("preflight")
    chosen = draw.sample(range(1, len(calls) + 1), scaled(1, 12))
    for n in chosen:
        folder = tmp_path / f"kill-{n}"
        folder.mkdir()
        told = f"killed at {n} ({calls[n - 1]}) with preflight, SEED={SEED}"
        done = file_calls.run(*arguments, folder=folder, fault="kill", at=n)
        assert file_calls.came(done, "kill", n), told
        done = file_calls.run(*again(folder, arguments), folder=folder)
        assert done.code == 0, done.err[-2000:]
        assert_same_end(tmp_path / "straight" / "run", folder / "run", told)
        shutil.rmtree(folder)
    print(f"{len(chosen)} kills with preflight")


def test_of_eight_resumes_at_once_one_goes_on_and_none_does_harm(straight, tmp_path):
    arguments, run, calls, variant = straight
    draw = chance(f"eight {variant}")
    for n in range(scaled(1, 20)):
        folder = tmp_path / f"eight-{n}"
        folder.mkdir()
        at = draw.randint(len(calls) // 3, len(calls))
        file_calls.run(*arguments, folder=folder, fault="kill", at=at, code=UNDER_FAULT)
        resumed = [
            Command(*again(folder, arguments), folder=folder, code=NO_PREFLIGHT) for _ in range(8)
        ]
        found = [command.wait() for command in resumed]
        assert {done.code for done in found} <= {0, 2} and 0 in {done.code for done in found}
        for done in found:
            assert done.code == 0 or "another run is writing" in done.err, done.err
        assert_same_end(run, folder / "run", f"eight at once after call {at}, SEED={SEED}")
        shutil.rmtree(folder)
