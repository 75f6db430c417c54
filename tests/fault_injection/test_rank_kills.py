"""A run on two ranks of which one is killed: all end, the launcher starts them again, and the run
ends as one that nothing disturbed.
"""

import json
import re
import shutil
from signal import SIGKILL

import pytest

from tests.fault_injection.rank_runs import Fault, launched, places
from tests.fault_injection.runs import assert_same_end
from tests.fault_injection.scale import SEED, STRESS, chance, scaled

pytestmark = pytest.mark.usefixtures("prepared")
PARTS = (
    "a save", "preflight", "an evaluation", "before a checkpoint", "before run.json", "a step",
    "anywhere",
)  # fmt: skip
# Parts in which a restart of torchrun differs from one of `launch`: the agent, and so the store of
# the first start, stays.
TORCHRUN = "before run.json", "before a checkpoint", "a save"


def drawn_kills(undisturbed, n):
    """Kills of one rank at a call of rank 0 in each part in turn, or anywhere of either rank."""
    draw = chance(f"rank kills {undisturbed.layout}")
    calls = [undisturbed.done.calls(rank) for rank in (0, 1)]
    by_part = places(calls[0])
    for i in range(n):
        part = PARTS[(SEED + i) % len(PARTS)]
        of = draw.randrange(2) if part == "anywhere" else 0
        at = draw.choice(by_part.get(part) or range(1, len(calls[of]) + 1))
        yield part, Fault(of, at, "SIGKILL", (draw.randrange(2),))


def test_a_killed_rank_is_started_again_and_the_run_ends_as_a_straight_one(undisturbed, tmp_path):
    kills = list(drawn_kills(undisturbed, scaled(2, 50)))
    for n, (part, fault) in enumerate(kills, start=1):
        told = f"{part}: {undisturbed.call(fault)}"
        folder = tmp_path / f"kill-{n}"
        folder.mkdir()
        done = launched(*undisturbed.command, folder=folder, fault=fault, restarts=1)
        assert done.code == 0, (told, done.said())
        (first, second), (killed,) = done.codes, fault.to
        assert first[killed] == -SIGKILL and first[1 - killed] not in (0, -SIGKILL), (told, first)
        assert second == [0, 0], told
        undisturbed.require_same(folder, told)
        shutil.rmtree(folder)
        print(f"{n} of {len(kills)} kills: {told}", flush=True)


def test_a_rank_that_is_lost_is_named_and_no_other_takes_a_further_step(undisturbed, tmp_path):
    at = chance(f"lost {undisturbed.layout}").choice(places(undisturbed.done.calls(0))["a step"])
    fault = Fault(0, at, "SIGKILL", (1,))
    told = undisturbed.call(fault)
    done = launched(*undisturbed.command, folder=tmp_path, fault=fault)
    assert (done.code, done.codes) == (7, [[7, -SIGKILL]]), (told, done.said())
    found = re.search(r"without an answer: rank 1 at step (\d+), ", done.output(0))
    assert found, (told, done.said())
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert int(found[1]) - 1 <= json.loads(lines[-1])["step"] <= int(found[1]), told
    undisturbed.require_continued(tmp_path, told)


@pytest.mark.parametrize("part", TORCHRUN if STRESS else TORCHRUN[-1:])
def test_torchrun_starts_a_killed_rank_again(undisturbed, tmp_path, part):
    at = chance(f"torchrun {part}").choice(places(undisturbed.done.calls(0))[part])
    fault = Fault(0, at, "SIGKILL", (0,))
    told = undisturbed.call(fault)
    options = {"fault": fault, "restarts": 1, "torchrun": True}
    done = launched(*undisturbed.command, folder=tmp_path, **options)
    assert (done.code, done.codes[1]) == (0, [0, 0]), (told, done.said())
    undisturbed.require_same(tmp_path, told)


@pytest.mark.skipif(not STRESS, reason="three runs")
def test_a_child_that_has_saved_nothing_begins_again(undisturbed, tmp_path):
    parent = undisturbed.folder / "run/checkpoints/step-00000006"
    child = ["train", "--fork", str(parent), "--set", "train.max_steps=12", "--run-dir", "run"]
    wanted, killed = tmp_path / "wanted", tmp_path / "killed"
    for folder in (wanted, killed):
        folder.mkdir()
    calls = launched(*child, folder=wanted).calls(0)
    at = next(n for n, call in enumerate(calls, start=1) if "writing-step" in call)
    fault = Fault(0, at, "SIGKILL", (0,))
    done = launched(*child, folder=killed, fault=fault, restarts=1)
    assert (done.code, done.codes[1]) == (0, [0, 0]), done.said()
    assert_same_end(wanted / "run", killed / "run", f"a child killed at {calls[at - 1]}")
