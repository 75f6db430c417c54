"""The command of a job that a scheduler starts again, on two ranks: an occupied folder is refused
in every start of a launcher that has not begun its run, and continued with `--auto-resume`.
"""

import os
import shutil

import pytest
from torch.distributed import HashStore

from stackproof.distributed.started import RESTARTS
from stackproof.distributed.starts import Launcher
from tests.fault_injection.rank_runs import Fault, launched, places
from tests.fault_injection.runs import assert_same_training
from tests.fault_injection.scale import chance

pytestmark = pytest.mark.usefixtures("prepared")


@pytest.fixture(scope="module")
def preempted(undisturbed, tmp_path_factory):
    """The folder of a run whose ranks got SIGTERM."""
    folder = tmp_path_factory.mktemp("preempted")
    at = chance("preempted").choice(places(undisturbed.done.calls(0))["a step"])
    done = launched(*undisturbed.command, folder=folder, fault=Fault(0, at, "SIGTERM", (0, 1)))
    assert (done.code, done.codes) == (75, [[75, 75]]), done.said()
    return folder


def test_an_occupied_folder_is_refused_in_every_start_of_torchrun(undisturbed, preempted, tmp_path):
    folder = shutil.copytree(preempted, tmp_path / "again")
    before = (folder / "run/metrics.jsonl").read_bytes()
    done = launched(*undisturbed.command, folder=folder, restarts=1, torchrun=True)
    assert done.code == 1 and [first for first, _ in done.codes] == [2, 2], done.said()
    assert all("run already holds a run" in first.err for first, _ in done.attempts), done.said()
    assert (folder / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("torchrun", [True, False])
def test_the_same_command_continues_with_the_option(undisturbed, preempted, tmp_path, torchrun):
    folder = shutil.copytree(preempted, tmp_path / "again")
    command = *undisturbed.command, "--auto-resume"
    for _ in ("continued", "ended already"):
        done = launched(*command, folder=folder, torchrun=torchrun)
        assert (done.code, done.codes) == (0, [[0, 0]]), done.said()
    assert "nothing is left to do" in done.output(0)
    undisturbed.require_same(folder, "continued", assert_same_training)


def test_a_launcher_has_begun_a_run_if_one_of_its_starts_stated_it(monkeypatch):
    store = HashStore()
    assert not Launcher().has_begun() and not Launcher(store).has_begun()
    Launcher().note_begun()
    Launcher(store).note_begun()
    assert Launcher(store).has_begun() and not Launcher().has_begun()
    monkeypatch.setitem(os.environ, RESTARTS, "1")
    assert Launcher().has_begun()
