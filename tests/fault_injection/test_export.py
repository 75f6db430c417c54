"""Kills and errors in `stack export` and `stack import`: the next call completes, and nothing is
left beside the result.
"""

import shutil

import pytest

from tests.fault_injection import file_calls
from tests.fault_injection.runs import UNDER_FAULT, assert_documented, training
from tests.fault_injection.scale import SEED, chance, scaled

COMMANDS = {
    "export": ("export", "run", "--out", "out"),
    "import": ("import", "hf", "--out", "out"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, text_file, cli_cache):
    """A folder with a trained run and its export."""
    folder = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STACKPROOF_CACHE", str(cli_cache))
        # With a norm and heads that the other library has.
        shape = {"model__attention__qk_norm": "true"}
        done = file_calls.run(*training(text_file, **shape), folder=folder, code=UNDER_FAULT)
    assert done.code == 0, done.err
    done = file_calls.run("export", "run", "--out", "hf", folder=folder)
    assert done.code == 0, done.err
    return folder


def names(folder) -> list[str]:
    """What lies in a folder, without records in runs/, of which a failed command leaves one too."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    return sorted(n for n in found if not n.endswith(".lock") and not n.startswith("runs"))


@pytest.mark.slow
@pytest.mark.parametrize("verb", COMMANDS)
def test_a_fault_at_any_call_is_made_good_by_the_next(sources, tmp_path, verb):
    undisturbed = shutil.copytree(sources, tmp_path / "undisturbed")
    done = file_calls.run(*COMMANDS[verb], folder=undisturbed)
    assert done.code == 0, done.err
    calls, draw = file_calls.calls(done), chance(verb)
    weights = sorted(p.read_bytes() for p in (undisturbed / "out").rglob("*.safetensors"))
    for n in draw.sample(range(1, len(calls) + 1), min(scaled(1, 100), len(calls))):
        fault = draw.choice(["kill", "kill", *file_calls.FAULTS])
        folder, told = shutil.copytree(sources, tmp_path / str(n)), (fault, n, calls[n - 1], SEED)
        done = file_calls.run(*COMMANDS[verb], folder=folder, fault=fault, at=n)
        if fault != "kill":
            assert_documented(done, str(told))
        if done.code != 0:  # an error after the result is in place leaves it complete
            done = file_calls.run(*COMMANDS[verb], folder=folder)
            complete = "not an empty folder" in done.err
            assert done.code == 0 or complete, (told, done.err[-2000:])
        assert names(folder) == names(undisturbed), told
        assert sorted(p.read_bytes() for p in (folder / "out").rglob("*.safetensors")) == weights
        shutil.rmtree(folder)
