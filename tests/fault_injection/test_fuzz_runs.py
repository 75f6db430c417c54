"""Documents of a run directory that are damaged and have right hashes: a resume and `stack inspect`
end with a documented error, or accept them.
"""

import json
import shutil
from types import SimpleNamespace

import pytest

from stackproof.cli import inspect
from stackproof.config import recorded_config
from stackproof.contracts.keeper import KEPT_MOMENTS
from stackproof.spec.canonical import canonical_json, sha256_bytes, sha256_json
from stackproof.spec.errors import StackproofError
from stackproof.spec.records import Code
from stackproof.train import checkpoint, start
from stackproof.train.restart import (
    former_processes,
    latest_checkpoint,
    marks_of,
    process_of,
    red_verdicts,
    state_processes,
)
from stackproof.train.run_dir import SEAL, RunDir
from stackproof.train.trainer import _last_loss
from tests.fault_injection.mutations import of_lines, of_value
from tests.fault_injection.nine_steps import resume
from tests.fault_injection.scale import SEED, chance, scaled

CODE = Code(commit="a" * 40, dirty=False)
pytestmark = pytest.mark.usefixtures("few_gates")
RESUMED = scaled(20, 5)  # of so many rounds one is resumed to the end


@pytest.fixture
def trainer(cfg, interrupted, tmp_path):
    """A trainer of the same configuration, into which checkpoints are restored."""
    directory = RunDir(tmp_path / "other")
    directory.create()
    return start.setup(cfg, (), directory)


def damaged(document: dict, random) -> dict:
    for _ in range(random.randint(1, 3)):
        document = of_value(document, random)
        if not isinstance(document, dict):
            return {}
    return document


def write_state(run, document: dict) -> None:
    """The state.json of the latest checkpoint, with the hashes that it needs to be read."""
    if isinstance(document.get("config"), dict):
        document = document | {"config_sha256": sha256_json(document["config"])}
    folder = checkpoint.find(run)
    data = canonical_json(document)
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"]["state.json"] |= {"bytes": len(data), "sha256": sha256_bytes(data)}
    (folder / "manifest.json").write_bytes(canonical_json(manifest))


def write_run(run, document: dict) -> None:
    """run.json with its hash, and its hash in the checkpoint."""
    content = {k: v for k, v in document.items() if k != SEAL}
    data = canonical_json(content | {SEAL: sha256_json(content)})
    (run / "run.json").write_bytes(data)
    state = json.loads((checkpoint.find(run) / "state.json").read_bytes())
    state["run"]["sha256"] = sha256_bytes(data)
    write_state(run, state)


def read(run, trainer) -> None:
    """What a resume and the inspection read, without training."""
    directory = RunDir(run)
    document = directory.read_run()
    cfg = recorded_config(document["config"])
    loaded = latest_checkpoint(directory, None)
    marks_of(directory, document, loaded)
    red_verdicts(directory, cfg)
    start._restore(trainer, loaded, KEPT_MOMENTS)
    record = SimpleNamespace(environment={}, code=CODE, not_covered=())
    here = process_of(record, document, loaded.state["step"])
    state_processes(record, document, [*former_processes(loaded), here])
    _last_loss(
        SimpleNamespace(report=None, state=trainer.state, output=SimpleNamespace(dir=directory))
    )
    inspect._described(checkpoint.find(run))


WRITERS = {"state.json": write_state, "run.json": write_run}


@pytest.mark.parametrize("name", WRITERS)
def test_a_document_with_right_hashes_and_wrong_values_is_a_documented_error(
    name, interrupted, trainer, tmp_path
):
    run, random = tmp_path / "damaged", chance(f"deep {name}")
    shutil.copytree(interrupted, run)
    at = run / name if name == "run.json" else checkpoint.find(run) / name
    honest = json.loads(at.read_bytes())
    accepted = refused = 0
    for number in range(scaled(60, 5_000)):
        document = damaged(honest, random)
        told = f"round {number} with SEED={SEED}: {name}"
        try:
            WRITERS[name](run, document)
        except (ValueError, TypeError):  # what canonical JSON cannot hold
            continue
        try:
            list(inspect._problems(run))
            read(run, trainer)
            accepted += 1
            if accepted % RESUMED == 1:
                whole = shutil.copytree(run, tmp_path / "resumed")
                resume(whole)
        except StackproofError:
            refused += 1
        except Exception as e:
            apart = {k: v for k, v in document.items() if honest.get(k) != v}
            raise AssertionError(f"{told}: {type(e).__name__}: {e}: {str(apart)[:2000]}") from e
        finally:
            shutil.rmtree(tmp_path / "resumed", ignore_errors=True)
    assert refused > 10
    print(f"{name}: {refused} refused, {accepted} accepted, each {RESUMED}th resumed")


@pytest.mark.parametrize("name", ["gates.jsonl", "metrics.jsonl"])
def test_a_damaged_log_is_a_documented_error(name, interrupted, trainer, tmp_path):
    run, random = tmp_path / "damaged", chance(f"deep {name}")
    shutil.copytree(interrupted, run)
    honest, refused = (run / name).read_bytes(), 0
    state = json.loads((checkpoint.find(run) / "state.json").read_bytes())
    for number in range(scaled(40, 1_000)):
        data = of_lines(honest, random)
        (run / name).write_bytes(data)
        # As somebody does who corrects the hash in the checkpoint.
        state["run"]["logs"][name] = {"bytes": len(data), "sha256": sha256_bytes(data)}
        write_state(run, state)
        try:
            read(run, trainer)
            if number % RESUMED == 1:
                resume(shutil.copytree(run, tmp_path / "resumed"))
        except StackproofError:
            refused += 1
        except Exception as e:
            told = f"round {number} with SEED={SEED}: {name}: {type(e).__name__}: {e}"
            raise AssertionError(f"{told}\n{data!r}"[:4000]) from e
        finally:
            shutil.rmtree(tmp_path / "resumed", ignore_errors=True)
    assert refused > 5
