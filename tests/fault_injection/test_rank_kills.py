"""A run on two ranks of which one is killed: all end, the launcher starts them again, and the run
ends as one that nothing disturbed.
"""

import shutil
from signal import SIGKILL

import pytest

from tests.fault_injection.rank_runs import Fault, arguments, launched, places, rows_of
from tests.fault_injection.runs import assert_same_end
from tests.fault_injection.scale import SEED, chance, scaled

# Settings of the runs that are killed: each layout of checkpoints is one line.
LAYOUTS = {"one file": ()}
PARTS = (
    "a save", "preflight", "an evaluation", "before a checkpoint", "before run.json", "a step",
)  # fmt: skip


@pytest.fixture(scope="module", params=LAYOUTS)
def straight(request, tmp_path_factory, text_file, cli_cache):
    """A run that nothing disturbs: its arguments, folder, calls of each rank, and layout."""
    folder = tmp_path_factory.mktemp("straight")
    command = arguments(text_file, LAYOUTS[request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STACKPROOF_CACHE", str(cli_cache))
        done = launched(*command, folder=folder)
    assert done.code == 0, done.said()
    return command, folder, [done.calls(rank) for rank in (0, 1)], request.param


@pytest.fixture(autouse=True)
def cache(monkeypatch, cli_cache):
    """All runs read the data that the first one prepared."""
    monkeypatch.setenv("STACKPROOF_CACHE", str(cli_cache))


def drawn_kills(calls, layout, n):
    """Kills of one rank at a call of rank 0 in each part in turn, or anywhere of either rank."""
    draw, by_part = chance(f"rank kills {layout}"), places(calls[0])
    for i in range(n):
        part = (*PARTS, "anywhere")[i % (len(PARTS) + 1)]
        of = draw.randrange(2) if part == "anywhere" else 0
        at = draw.choice(by_part.get(part) or range(1, len(calls[of]) + 1))
        # a save is cut in half by the end of rank 0 alone
        yield part, Fault(of, at, "SIGKILL", (draw.randrange(2) if i else 0,))


def test_a_killed_rank_is_started_again_and_the_run_ends_as_a_straight_one(straight, tmp_path):
    command, wanted, calls, layout = straight
    kills = list(drawn_kills(calls, layout, scaled(2, 50)))
    for n, (part, fault) in enumerate(kills):
        told = f"{fault} in {part} ({calls[fault.of][fault.at - 1]}), {layout}, SEED={SEED}"
        folder = tmp_path / f"kill-{n}"
        folder.mkdir()
        done = launched(*command, folder=folder, faults=[fault], restarts=1)
        assert done.code == 0, (told, done.said())
        (first, second), killed = done.codes, fault.to[0]
        assert first[killed] == -SIGKILL and first[1 - killed] != 0, (told, first)
        assert second == [0, 0], told
        assert_same_end(wanted / "run", folder / "run", told)
        assert rows_of(folder) == rows_of(wanted), told
        shutil.rmtree(folder)
        print(f"{n + 1} of {len(kills)}: {told}", flush=True)


def test_without_a_restart_a_killed_rank_ends_the_run_and_names_its_place(straight, tmp_path):
    command, wanted, calls, layout = straight
    at = chance(f"rank lost {layout}").choice(places(calls[0])["a step"])
    done = launched(*command, folder=tmp_path, faults=[Fault(0, at, "SIGKILL", (1,))])
    assert (done.code, done.codes) == (7, [[7, -SIGKILL]]), done.said()
    assert "without an answer: rank 1 at step " in done.attempts[0][0].err
    done = launched("train", "--resume", "run", folder=tmp_path)
    assert done.code == 0, done.said()
    assert_same_end(wanted / "run", tmp_path / "run", f"killed at call {at}, SEED={SEED}")
    assert rows_of(tmp_path) == rows_of(wanted)
