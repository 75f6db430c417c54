"""Keys that were renamed: refused in new input, translated where a run was recorded before."""

import json
import shutil
from pathlib import Path

import pytest

from stackproof.config import load_config, recorded_config
from stackproof.recipes import recipe
from stackproof.spec.canonical import canonical_json, sha256_bytes
from stackproof.spec.errors import ConfigError, GateFailed
from stackproof.spec.records import Override, read_record
from stackproof.spec.renamed_keys import current_override, renamed_keys, translated
from stackproof.train import checkpoint, losses
from stackproof.train.loop import train
from stackproof.train.start import fresh, read_config, resume

ROOT = Path(__file__).parents[2]
# Documents of a run that was trained and recorded with the keys of spec 1.10.0.
BEFORE = ROOT / "tests/train/recorded_before_2_0"


@pytest.mark.parametrize("renamed", renamed_keys(), ids=lambda renamed: renamed.old)
def test_a_renamed_key_is_refused_in_new_input_with_its_new_name(renamed):
    value = next(iter(renamed.values), 7)
    with pytest.raises(ConfigError) as caught:
        load_config(recipe("pocket"), sets=(f"{renamed.old}={value}",))
    assert f"{renamed.old} is now called {renamed.new}" in caught.value.what
    assert f"--set {renamed.new}" in caught.value.next_step
    for new in renamed.values.values():
        assert json.dumps(new) in caught.value.allowed


def test_a_recorded_configuration_is_translated_and_stays_as_it_is():
    recorded = read_record(BEFORE / "metadata.json").config
    before = json.dumps(recorded)
    cfg = recorded_config(recorded)
    assert (cfg.train.sdc_check_every, cfg.stop.min_evaluations, cfg.checkpoint.async_save) == (
        4,
        4,
        True,
    )
    assert json.dumps(recorded) == before
    assert translated(cfg.to_dict()) == cfg.to_dict(), "today's keys are left alone"


def test_a_recorded_change_of_a_key_is_translated():
    changes = read_record(BEFORE / "metadata.json").overrides
    now = {o.key: o.value for o in map(current_override, changes)}
    assert now["checkpoint.async_save"] is True and now["train.sdc_check_every"] == 4
    other = Override(key="optim.lr", value=1e-3, source="--set")
    assert current_override(other) is other


@pytest.fixture
def run_before(tmp_path, monkeypatch):
    """A run folder at step 4 of 8 whose documents are those that were written before the renaming;
    its tensors are computed now, since weights do not belong into a repository.
    """
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    cfg = recorded_config(json.loads((BEFORE / "run.json").read_bytes())["config"])
    train(fresh(cfg, (), run, only=("runtime.finite",)))
    folder = run / "checkpoints/step-00000004"
    (run / "checkpoints/latest").write_text(folder.name)
    for name in ("metadata.json", "SHA256SUMS"):
        (run / name).unlink()
    shutil.copy(BEFORE / "run.json", run)
    shutil.copy(BEFORE / "state.json", folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    document = (BEFORE / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"sha256": sha256_bytes(document), "bytes": len(document)}
    manifest["schema"] = "stackproof/checkpoint/3"
    (folder / "manifest.json").write_bytes(canonical_json(manifest))
    return run


def test_a_run_folder_from_before_the_renaming_resumes(run_before):
    recorded = read_record(BEFORE / "metadata.json")
    record = train(resume(run_before, (), read_config(run_before)))
    assert record.status == "completed" and record.config["train"]["sdc_check_every"] == 4
    assert {o.key for o in record.overrides} >= {"stop.min_evaluations", "train.sdc_check_every"}
    # The same steps on perhaps another machine: float32 sums in another order differ by 1e-6.
    assert record.metric("val_loss_nats") == pytest.approx(
        recorded.metric("val_loss_nats"), rel=1e-4
    )


def test_a_resume_that_a_gate_halts_before_it_loads_leaves_a_record(run_before, monkeypatch):
    monkeypatch.setattr(losses, "linear_cross_entropy_sum", lambda *a: a[0].sum())
    with pytest.raises(GateFailed) as caught:
        train(resume(run_before, (), read_config(run_before)))
    assert read_record(run_before / "metadata.json").status == "halted"
    saved = checkpoint.load_document(checkpoint.find(run_before))
    assert caught.value.record.metric("steps") == saved["step"] > 0
