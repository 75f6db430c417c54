"""Whole runs on several ranks: stopped, resumed on another mesh, and from the command line."""

import json
import shutil

import pytest

from stackproof.cli import main, output
from stackproof.config import load_config
from stackproof.distributed.started import RESTARTS
from stackproof.evidence.file_lock import file_lock
from stackproof.replay.certificate import LOSS_REL_MAX
from stackproof.spec.canonical import canonical_json, sha256_json
from stackproof.spec.errors import ConfigError, UsageError
from stackproof.spec.rank_log import rank_table
from stackproof.spec.series import parse_series
from stackproof.train import checkpoint, restart
from stackproof.train.run_dir import SEAL, RunDir
from tests.distributed.rows import rows_of

STOPPED_AT = 6


@pytest.fixture(scope="module")
def stopped_run(run, cfg, tmp_path_factory):
    """A run on two ranks, of which one got a SIGTERM after a step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert run(cfg, folder, STOPPED_AT) == ["Stopped 75", "Stopped 75"]
    return folder


def tensors(folder):
    """Weights, moments and random state of the latest checkpoint of a run, whole."""
    loaded = checkpoint.load(checkpoint.find(folder))
    return loaded.model | loaded.tensors


def assert_same(found, wanted):
    assert wanted.keys() == found.keys()
    assert all(wanted[name].equal(found[name]) for name in wanted)


def table(folder):
    return rank_table(RunDir(folder).lines("ranks.jsonl"))


def losses(folder):
    lines = RunDir(folder).lines("metrics.jsonl")
    return {line["step"]: line["loss_nats"] for line in lines}


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(stopped_run):
    assert (stopped_run / "checkpoints" / "latest").read_text().strip().endswith(f"{STOPPED_AT}")
    record = json.loads((stopped_run / "metadata.json").read_text())
    assert record["status"] == "preempted" and record["exit_code"] == 75
    assert record["environment"]["world_size"] == 2 and record["environment"]["mesh_shard"] == 2


def test_a_resume_on_the_same_mesh_is_bitwise(run, cfg, whole_run, stopped_run, tmp_path):
    folder = shutil.copytree(stopped_run, tmp_path / "run")
    assert run(cfg, folder) == ["completed", None]
    assert_same(tensors(folder), tensors(whole_run))
    assert losses(folder) == losses(whole_run)


@pytest.mark.parametrize("n_ranks", [1, 4])
def test_a_resume_on_another_mesh_goes_on(run, cfg, whole_run, stopped_run, tmp_path, n_ranks):
    folder = shutil.copytree(stopped_run, tmp_path / "run")
    assert run(cfg, folder, n_ranks=n_ranks)[0] == "completed"
    wanted, found = losses(whole_run), losses(folder)
    assert found.keys() == wanted.keys()
    assert all(abs(found[s] - wanted[s]) <= LOSS_REL_MAX * wanted[s] for s in wanted)
    rows = [
        [line for line in RunDir(f).lines("curriculum.jsonl") if line["event"] == "rows"]
        for f in (folder, whole_run)
    ]
    assert rows[0] == rows[1]
    assert [facts["rank"] for facts in table(folder).ranks] == list(range(n_ranks))


def test_a_chain_of_meshes_draws_the_rows_of_one_process(run, cfg, stopped_run, tmp_path):
    folder, alone = shutil.copytree(stopped_run, tmp_path / "run"), tmp_path / "alone"
    shutil.copy(stopped_run.with_suffix(".rows"), folder.with_suffix(".rows"))
    assert run(cfg, folder, STOPPED_AT + 3, n_ranks=4) == ["Stopped 75"] * 4
    assert run(cfg, folder, n_ranks=1) == ["completed"]
    assert run(cfg, alone, n_ranks=1) == ["completed"]
    rows = rows_of(alone.with_suffix(".rows"))
    assert rows_of(folder.with_suffix(".rows")) == rows
    assert sorted(rows) == list(range(cfg.train.max_steps * cfg.rows_per_step))
    wanted, found = losses(alone), losses(folder)
    assert found.keys() == wanted.keys()
    assert all(abs(found[s] - wanted[s]) <= LOSS_REL_MAX * wanted[s] for s in wanted)


def test_only_rank_0_writes_the_record_and_each_rank_its_log(whole_run):
    assert sorted(p.name for p in (whole_run / "ranks").iterdir()) == ["00001"]
    assert not (whole_run / "ranks" / "00001" / "metadata.json").exists()
    assert losses(whole_run / "ranks" / "00001") == losses(whole_run)


def test_a_red_gate_on_rank_0_waits_for_no_rank(ranks, cfg, cache, tmp_path):
    found = ranks.run("tests.distributed.jobs:red_with_bundle", cfg, tmp_path / "run", cache)
    assert [(a.value, a.raised) for a in found] == [("completed", ""), (None, "")]
    (bundle,) = (tmp_path / "run" / "repro").glob("distributed.stragglers-step-*")
    assert "divided" in json.loads((bundle / "repro.json").read_text())["no_points"]


def test_one_rank_alone_finds_its_nonfinite_parts(ranks):
    found = ranks.run("tests.distributed.jobs:nonfinite_on_rank_0")
    assert [(a.value, a.raised) for a in found] == [(["final_norm.weight"], ""), ([], "")]


def test_the_ranks_and_their_communication_are_in_the_record(whole_run):
    record = json.loads((whole_run / "metadata.json").read_text())
    assert "ranks.jsonl" in [series["path"] for series in record["series"]]
    log = whole_run / "ranks.jsonl"
    lines = parse_series(log.read_bytes(), log.name, origin=str(log))
    steps = sum(line["n_steps"] for line in lines if line["event"] == "times")
    assert steps == record["metrics"]["steps"]["value"]
    found = table(whole_run)
    assert found.mesh == {"replicate": 1, "shard": 2, "tensor": 1}
    assert [(r["rank"], r["shard"], r["local_rank"]) for r in found.ranks] == [(0, 0, 0), (1, 1, 1)]
    assert all(facts["cpu_count"] >= 1 and facts["device"] == "cpu" for facts in found.ranks)
    figures = {n: m["value"] for n, m in record["metrics"].items() if n.startswith("ranks_")}
    assert record["metrics"]["ranks_slowest_ratio"]["n"] == found.n_profiled >= 1
    assert "trace_overhead_frac" not in record["metrics"], "a profiled step is not a traced one"
    assert 0 < figures["ranks_exposed_frac"] <= figures["ranks_communication_frac"] < 1
    assert figures["ranks_slowest_ratio"] == found.slowest_rank_ratio >= 1


def test_each_rank_logs_its_own_share_in_the_steps_that_are_profiled(whole_run):
    lines = {
        line["step"]: line["own_s"]
        for line in RunDir(whole_run).lines("ranks.jsonl")
        if line.get("own_s")
    }
    for folder in (whole_run, whole_run / "ranks" / "00001"):
        own = [
            line for line in RunDir(folder).lines("metrics.jsonl") if "communication_frac" in line
        ]
        assert [line["step"] for line in own] == list(lines)
        assert all(0 < line["exposed_communication_frac"] < 1 for line in own)


def test_inspect_shows_the_mesh_and_the_ranks(whole_run, capsys, monkeypatch):
    monkeypatch.setattr(output, "_emitted", False)
    with pytest.raises(SystemExit):
        main(["inspect", str(whole_run), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["mesh"] == {"replicate": 1, "shard": 2, "tensor": 1}
    assert shown["ranks"] == table(whole_run).rows() and shown["ranks"][1]["own_s"] > 0
    with pytest.raises(SystemExit):
        main(["inspect", str(whole_run)])
    text = capsys.readouterr().out
    assert "Mesh: replicate 1 × shard 2 × tensor 1" in text
    (row,) = [line for line in text.splitlines() if line.startswith("1     0, 1, 0")]
    own = shown["ranks"][1]
    assert row.split()[-2:] == [f"{own[n]:.3g}" for n in ("exposed_frac", "peak_memory_bytes")]
    assert own["peak_memory_bytes"] > 50e6, "torch alone takes more"
    assert "no step was profiled" not in text


def test_inspect_states_why_a_short_run_has_no_shares(whole_run, tmp_path, capsys):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    log = folder / "ranks.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(line for line in lines if b"own_s" not in line))
    with pytest.raises(SystemExit):
        main(["inspect", str(folder)])
    text = capsys.readouterr().out
    assert "no step was profiled" in text and "parallel.compare_every" in text


def test_a_restart_does_not_continue_the_run_of_another_command(
    whole_run, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    former = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setenv(RESTARTS, "1")
    with pytest.raises(SystemExit) as ended:
        main(["train", "pocket", "--set", "optim.lr=0.5", "--run-dir", str(folder)])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "keeps its configuration, which differs in" in told, told
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == former


def test_a_restart_continues_a_run_of_its_configuration_and_parent(cfg, whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    document = folder / "run.json"
    assert restart.is_begun(folder, cfg, None)
    assert restart.is_begun(folder, changed(cfg, "train.log_every", 7), None)
    with pytest.raises(ConfigError, match=r"differs in optim\.lr\n"):
        restart.is_begun(folder, changed(cfg, "optim.lr", 0.5), None)
    # The run is no child, so that a child's command has not begun it: it is left alone.
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ConfigError, match="another parent"):
        restart.is_begun(folder, cfg, whole_run)
    assert document.exists()


def test_a_child_without_a_checkpoint_begins_again(cfg, whole_run, tmp_path):
    parent = json.loads((whole_run / "run.json").read_text())["record"]
    saved, unsaved = (child_of(whole_run, parent, tmp_path / name) for name in ("saved", "unsaved"))
    shutil.rmtree(unsaved / "checkpoints")
    with pytest.raises(ConfigError, match=r"differs in optim\.lr\n"):
        restart.is_begun(unsaved, changed(cfg, "optim.lr", 0.5), whole_run)
    assert restart.is_begun(saved, cfg, whole_run)
    with pytest.raises(ConfigError, match="another parent"):
        restart.is_begun(saved, cfg, None)
    assert (saved / "run.json").exists() and (unsaved / "run.json").exists()
    with file_lock(unsaved, "run"), pytest.raises(UsageError, match="another run is writing"):
        restart.is_begun(unsaved, cfg, whole_run)
    red = {"gate": "runtime.finite", "verdict": "fail", "step": 5, "message": "the loss is NaN"}
    verdicts = unsaved / "gates.jsonl"
    verdicts.write_text(json.dumps(red) + "\n")
    with pytest.raises(ConfigError, match="halted this run at step 5"):
        restart.is_begun(unsaved, cfg, whole_run)
    assert verdicts.exists() and (unsaved / "run.json").exists()
    verdicts.unlink()
    assert not restart.is_begun(unsaved, cfg, whole_run) and not (unsaved / "run.json").exists()


def changed(cfg, key, value):
    return load_config(cfg, fixed={key: (value, "test")})[0]


def child_of(run_dir, parent, folder):
    """A copy of a run whose run.json names a parent."""
    shutil.copytree(run_dir, folder)
    document = json.loads((folder / "run.json").read_text()) | {"parents": [parent]}
    content = {k: v for k, v in document.items() if k != SEAL}
    (folder / "run.json").write_bytes(canonical_json(content | {SEAL: sha256_json(content)}))
    return folder


def test_inspect_refuses_times_of_other_ranks(whole_run, tmp_path, capsys):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    log = folder / "ranks.jsonl"
    log.write_bytes(log.read_bytes().partition(b"\n")[2])
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(folder)])
    assert ended.value.code == 6 and "ranks.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("mesh", [{"shard": 2}, {"tensor": 2}])
def test_tracing_leaves_a_divided_run_as_it_is(run, cfg, whole_run, tmp_path, mesh):
    """Points of each rank's own rows; the steps are those of the run that is not traced."""
    keys = {"trace.every": 6} | {f"parallel.{name}": n for name, n in mesh.items()}
    fixed = {key: (value, "test") for key, value in keys.items()}
    folder = tmp_path / "run"
    assert run(load_config(cfg, fixed=fixed)[0], folder) == ["completed", None]
    traced = [{line["step"] for line in points(f)} for f in (folder, folder / "ranks/00001")]
    assert traced == [{6, 12}, {6, 12}]
    if "shard" in mesh:
        assert losses(folder) == losses(whole_run)


def points(folder):
    return RunDir(folder).lines("points.jsonl")
