"""A run directory that was changed, damaged or made on purpose is refused by name, or goes on from
what is intact.
"""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from stackproof.cli import inspect
from stackproof.config import load_config
from stackproof.evidence.file_lock import LOCK
from stackproof.spec import checksums
from stackproof.spec.canonical import canonical_json, sha256_bytes, sha256_json
from stackproof.spec.errors import (
    CheckpointError,
    ConfigError,
    EnvironmentUnfit,
    IntegrityError,
    StackproofError,
    UsageError,
)
from stackproof.spec.records import Code, read_record
from stackproof.train import checkpoint, checkpoint_folders, loop, restart, start
from stackproof.train.run_dir import SEAL, RunDir
from stackproof.train.trainer import Callback
from tests.fault_injection.nine_steps import (
    environment_with,
    killed,
    resume,
    rewrite,
    waived,
)
from tests.fault_injection.runs import assert_same_end
from tests.fault_injection.scale import SEED, chance, scaled

pytestmark = pytest.mark.usefixtures("few_gates")


# --- what a resume believes -----------------------------------------------------------------------

CHANGES = {
    "lr": lambda d: d["config"]["optim"].update(lr=10 * d["config"]["optim"]["lr"]),
    "seed": lambda d: d["config"].update(seed=99),
    "warmup": lambda d: d["config"]["schedule"].update(warmup_steps=1),
    "steps": lambda d: d["config"]["train"].update(max_steps=12),
    "start": lambda d: d.update(started_at="2020-01-01T00:00:00.000Z"),
    "record": lambda d: d.update(record="train-20200101T000000Z-00000000"),
    "batches": lambda d: d.update(n_eval_batches=2),
    "environment": lambda d: d["environment"].update(cpu="a faster one"),
    "inherited": lambda d: d.update(inherited_s=100.0),
}


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_run_json_is_refused(interrupted, change, sealed):
    rewrite(interrupted, CHANGES[change], sealed=sealed)
    with pytest.raises(CheckpointError, match=r"run\.json") as error:
        resume(interrupted)
    assert "not of one run" in error.value.what or "was changed" in error.value.what
    assert not (interrupted / "metadata.json").exists()


def test_without_a_checkpoint_the_hash_of_run_json_is_required(cfg, tmp_path):
    run = killed(cfg, tmp_path / "run", 1)
    rewrite(run, lambda d: (d.pop(SEAL), CHANGES["lr"](d)), sealed=False)
    with pytest.raises(CheckpointError, match="lacks its hash"):
        resume(run)


def test_a_key_of_run_json_that_no_version_writes_is_refused(finished):
    path = finished / "run.json"
    path.write_bytes(path.read_bytes().replace(f'"{SEAL}":'.encode(), b'"shi256":'))
    with pytest.raises(CheckpointError, match="shi256"):
        start.read_config(finished)


def test_a_continued_run_takes_over_no_changed_history(interrupted, cfg, tmp_path):
    log = interrupted / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"step":3', b'"step":4', 1))
    changed, overrides = load_config(cfg, sets=["curriculum.probe_every=5"])
    child = start.fresh(changed, overrides, tmp_path / "child", parent=interrupted, continued=True)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is not the log"):
        loop.train(child)


def test_a_changed_tokenizer_is_refused_and_a_missing_one_written(straight, interrupted):
    path = interrupted / "tokenizer.json"
    honest = path.read_bytes()
    path.write_bytes(b'{"evil": true}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not the tokenizer of this run"):
        resume(interrupted)
    path.unlink()
    resume(interrupted)
    assert path.read_bytes() == honest == (straight / "tokenizer.json").read_bytes()


def test_a_torn_line_of_events_is_cut_off(interrupted):
    path = interrupted / "events.jsonl"
    whole = b'{"event":"resumed","step":3}\n'
    path.write_bytes(whole + b'{"event":"resu')
    resume(interrupted)
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[0] == whole and json.loads(lines[1])["event"] == "resumed"


def test_changed_events_of_before_the_checkpoint_are_refused(cfg, tmp_path):
    run = killed(None, killed(cfg, tmp_path / "run", 4), 8)
    path = run / "events.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step":3', b'"step":4', 1))
    with pytest.raises(CheckpointError, match=r"events\.jsonl is not the log"):
        resume(run)


def test_a_fork_reads_the_configuration_of_the_checkpoint(interrupted, cfg):
    rewrite(interrupted, CHANGES["lr"], sealed=True)
    assert start.parent_config(interrupted).optim == cfg.optim


DAMAGES = {
    "a line less": lambda data: data[: data[:-1].rfind(b"\n") + 1],
    "half a line less": lambda data: data[:-7],
    "the last line twice": lambda data: data + data[data[:-1].rfind(b"\n") + 1 :],
    "another digit": lambda data: data.replace(b'"step":3', b'"step":4', 1),
    "nothing left": lambda data: b"",
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "gates.jsonl"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_logs_that_lack_lines_of_the_checkpoint_are_refused_and_later_lines_are_cut(
    finished, straight, name, damage
):
    """The run is at its last step, so that all lines belong to its checkpoint."""
    (finished / "metadata.json").unlink()
    before = (finished / name).read_bytes()
    (finished / name).write_bytes(DAMAGES[damage](before))
    # The verdict on the last checkpoint comes after it, and is given again.
    later = name == "gates.jsonl" and damage.endswith("line less")
    if damage == "the last line twice" or later:
        resume(finished)
        assert_same_end(straight, finished, damage)
        return
    assert (finished / name).read_bytes() != before
    with pytest.raises(CheckpointError, match=f"{name} is not the log"):
        resume(finished)


def test_other_code_and_another_environment_are_stated_in_the_record(interrupted):
    with environment_with(threads=77):
        record = resume(interrupted)
    assert any(t.startswith("steps 1 to 6") and ", now 77" in t for t in record.not_covered)
    assert record.command == tuple(json.loads((interrupted / "run.json").read_text())["command"])


def test_each_process_of_a_run_is_stated_in_the_record(cfg, tmp_path):
    """The last one is like the first, so that only the checkpoints know the one between."""
    run = killed(cfg, tmp_path / "run", 4)
    with environment_with(threads=77):
        killed(None, run, 7)
    record = resume(run)
    threads = record.environment["threads"]
    told = f"steps 4 to 6 had another process: threads 77, now {threads}"
    assert told in record.not_covered
    assert not [t for t in record.not_covered if "steps 1" in t or "steps 7" in t]


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        (
            {"world_size": 2, "mesh_replicate": 1, "mesh_shard": 2, "mesh_tensor": 1},
            {"world_size": 1},
            "steps 1 to 4 were taken by 2 ranks, now 1: mesh_shard 2, now 1; world_size 2, now 1",
        ),
        (
            {"world_size": 1},
            {"world_size": 2, "mesh_replicate": 2, "mesh_shard": 1, "mesh_tensor": 1},
            "steps 1 to 4 were taken by 1 ranks, now 2: mesh_replicate 1, now 2; world_size 1, "
            "now 2",
        ),
    ],
)
def test_another_number_of_ranks_is_stated_in_the_record(then, now, told):
    """One process states no mesh."""
    code = {"dirty": False}
    document = {"environment": then, "code": code}
    record = SimpleNamespace(environment=now, code=SimpleNamespace(model_dump=lambda: code))
    record.not_covered = ()
    processes = [restart.process_of(record, document, 4)]
    assert restart.state_processes(record, document, processes) == (told,)


def test_unknown_processes_stay_unknown(interrupted):
    """A checkpoint of before processes were stated."""
    folder = checkpoint.find(interrupted)
    state = json.loads((folder / "state.json").read_bytes())
    corrected(folder, run={k: v for k, v in state["run"].items() if k != "processes"})
    killed(None, interrupted, 7)
    shutil.rmtree(interrupted / "checkpoints/step-00000009", ignore_errors=True)
    told = "which code and environment steps 1 to 6 had: it is not known"
    assert told in resume(interrupted).not_covered


@pytest.mark.parametrize("dirty_before", [True, False])
def test_uncommitted_code_of_any_process_makes_the_record_dirty(dirty_before):
    clean = Code(commit="a" * 40, dirty=False, lock_sha256="b" * 64)
    dirty = clean.model_copy(update={"dirty": True, "diff_sha256": "c" * 64})
    first = dirty if dirty_before else clean
    document = {"environment": {"threads": 1}, "code": first.model_dump()}
    record = SimpleNamespace(environment={"threads": 1}, code=clean, not_covered=("x",))
    processes = [restart.process_of(record, document, 4)]
    texts = restart.state_processes(record, document, processes)
    assert record.code == (dirty if dirty_before else clean)
    assert len(texts) == dirty_before == any("code.dirty True, now False" in t for t in texts)
    assert record.not_covered == ("x", *texts)
    # From the seed again: no step of the first process counts.
    record = SimpleNamespace(environment={"threads": 1}, code=clean, not_covered=())
    processes = [restart.process_of(record, document, 0)]
    assert restart.state_processes(record, document, processes) == () and not record.code.dirty


# --- what is damaged ------------------------------------------------------------------------------


def flip(path, at=-5):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


def test_a_damaged_latest_checkpoint_names_the_intact_step_and_at_takes_it(interrupted, straight):
    flip(interrupted / "checkpoints/step-00000006/model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as error:
        resume(interrupted)
    assert "step 3 is intact" in error.value.next_step and "--at 3" in error.value.next_step
    resume(interrupted, at=3)
    assert_same_end(straight, interrupted, "at step 3")


def test_later_checkpoints_stay_until_the_next_save_has_succeeded(interrupted, cfg):
    def folders():
        return [
            checkpoint_folders.step_of(p) for p in sorted(interrupted.glob("checkpoints/step-*"))
        ]

    found = []

    class Watching(Callback):
        def on_step(self, trainer, report):
            found.append((report.step, folders()))

    changed, overrides = load_config(start.read_config(interrupted))
    loop.train(start.resume(interrupted, overrides, changed, [Watching()], at=3))
    assert (4, [3, 6]) in found and folders() == [3, 6, 9]


def test_without_an_intact_checkpoint_the_run_begins_at_its_seed(interrupted, straight):
    for folder in interrupted.glob("checkpoints/step-*"):
        flip(folder / "state.safetensors")
    with pytest.raises(CheckpointError, match=r"state\.safetensors") as error:
        resume(interrupted)
    assert "no checkpoint is intact" in error.value.next_step and "--at 0" in error.value.next_step
    resume(interrupted, at=0)
    assert_same_end(straight, interrupted, "at the seed")


def test_a_step_that_is_not_there_is_refused_with_those_that_are(interrupted):
    with pytest.raises(CheckpointError, match="no checkpoint of step 5") as error:
        resume(interrupted, at=5)
    assert "3, 6" in error.value.allowed


@pytest.mark.parametrize("text", [b"../../x", b"/etc", b"step-3", b"\xff\xfe", b"", b"x" * 999])
def test_a_pointer_that_names_no_step_folder_is_refused(interrupted, text):
    (interrupted / "checkpoints/latest").write_bytes(text)
    with pytest.raises(CheckpointError, match="does not name a step folder") as error:
        resume(interrupted)
    assert "--at 6" in error.value.next_step


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b"null", b'"x"', b"\xff", b'{"files":7,"schema":"x"}', b"[" * 9999]
)
def test_a_document_of_another_type_is_a_checkpoint_error(interrupted, name, content):
    (interrupted / "checkpoints/step-00000006" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.load(interrupted / "checkpoints/step-00000006")


# Files that do not hide each other's damage, so that one verification finds a flip in each.
TOGETHER = {
    "checksums": lambda name: name == checksums.FILE,
    "documents": lambda name: name != checksums.FILE and Path(name).parent.name in DOCUMENTS,
    "manifests": lambda name: name.endswith("manifest.json"),
    "states": lambda name: name.endswith("state.json"),
    "weights": lambda name: name.endswith("model.safetensors"),
    "moments": lambda name: name.endswith("state.safetensors"),
}
DOCUMENTS = ("", "checkpoints")
OF_TENSORS = ("weights", "moments")


@pytest.mark.parametrize("group", TOGETHER)
def test_inspect_finds_every_flipped_bit_of_a_finished_run(finished, group):
    """In a long round every byte of the documents, and each 16th of the tensors."""
    assert list(inspect._problems(finished)) == []
    draw, folder = chance(f"flips {group}"), len(f"{finished}/")
    names = [str(p)[folder:] for p in sorted(finished.rglob("*")) if p.is_file() and p.name != LOCK]
    together = [
        n for n in names if TOGETHER[group](n) and (group == "checksums" or n != checksums.FILE)
    ]
    honest = {name: (finished / name).read_bytes() for name in together}
    longest = max(map(len, honest.values()))
    places = range(draw.randrange(16), longest, 16) if group in OF_TENSORS else range(longest)
    for at in draw.sample(places, min(scaled(8, longest), len(places))):
        spoilt = [name for name, data in honest.items() if at < len(data)]
        for name in spoilt:
            flipped = bytearray(honest[name])
            flipped[at] ^= 1 << draw.randrange(8)
            (finished / name).write_bytes(flipped)
        found = "\n".join(inspect._problems(finished))
        for name in spoilt:
            assert name in found or (group == "checksums" and found), (name, at, SEED, found)
            (finished / name).write_bytes(honest[name])
    assert list(inspect._problems(finished)) == []


def test_verification_of_a_finished_run_has_a_verdict_and_an_exit_code(finished, in_process):
    code, found = in_process("inspect", finished, "--verify")
    assert (code, found["ok"], found["ended"], found["problems"]) == (0, True, True, [])
    (finished / "samples.jsonl").write_bytes(b"")
    code, found = in_process("inspect", finished, "--verify")
    assert (code, found["ok"], found["ended"]) == (5, False, True)


def test_the_first_command_that_reads_a_flipped_file_of_a_finished_run_refuses_it(finished):
    draw = chance("first reader")
    reading = {
        "run.json": lambda: start.read_config(finished),
        "metadata.json": lambda: read_record(finished / "metadata.json"),
        "checkpoints/latest": lambda: checkpoint.load(checkpoint.find(finished)),
        "checkpoints/step-00000009/manifest.json": lambda: checkpoint.load(
            checkpoint.find(finished)
        ),
        "checkpoints/step-00000009/state.json": lambda: checkpoint.load(checkpoint.find(finished)),
    }
    for name, read in reading.items():
        data = (finished / name).read_bytes()
        for at in draw.sample(range(len(data)), min(len(data), scaled(20, 10**9))):
            flipped = bytearray(data)
            flipped[at] ^= 1 << draw.randrange(8)
            (finished / name).write_bytes(bytes(flipped))
            with pytest.raises(StackproofError):
                read()
                pytest.fail(f"{name} byte {at} was believed, SEED={SEED}")
        (finished / name).write_bytes(data)


def test_inspect_finds_added_and_missing_files(finished, in_process):
    (finished / "checkpoints/step-00000009/extra.bin").write_bytes(b"x")
    (finished / "samples.jsonl").unlink()
    code, found = in_process("inspect", finished, "--verify")
    text = " ".join(found["problems"])
    assert code == 5 and "extra.bin" in text and "samples.jsonl is missing" in text


ODD = {
    "link": lambda p: p.symlink_to("run.json"),
    "link to nothing": lambda p: p.symlink_to("nothing"),
    "pipe": os.mkfifo,
    "name": lambda p: p.with_name("a\nb").write_bytes(b""),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("folder", [".", "checkpoints", "repro"])
def test_inspect_finds_what_no_run_makes(finished, in_process, kind, folder):
    (finished / folder).mkdir(exist_ok=True)
    ODD[kind](finished / folder / "odd")
    code, found = in_process("inspect", finished, "--verify")
    assert code == 5 and "is no regular file with a printable name" in found["problems"][0]


def test_inspect_compares_the_tokenizer_of_a_run_without_checksums(interrupted, in_process):
    assert in_process("inspect", interrupted, "--verify")[0] == 0
    (interrupted / "tokenizer.json").write_bytes(b"{}")
    code, found = in_process("inspect", interrupted, "--verify")
    assert code == 5 and "tokenizer.json is not the tokenizer of" in found["problems"][0]


def test_inspect_finds_a_completed_run_without_checksums(finished, in_process):
    (finished / checksums.FILE).unlink()
    code, found = in_process("inspect", finished, "--verify")
    assert code == 5 and "SHA256SUMS is missing" in found["problems"][0]


def test_a_run_that_ended_before_step_1_is_as_it_was_written(finished, in_process):
    (finished / "run.json").unlink()
    shutil.rmtree(finished / "checkpoints")
    RunDir(finished).seal()
    assert in_process("inspect", finished, "--verify")[0] == 0


@pytest.mark.parametrize("data", [b"", b"{", b'{"record": 1}'])
def test_a_damaged_run_json_is_named_as_such(finished, data):
    (finished / "run.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged") as error:
        start.read_config(finished)
    assert "\n" not in error.value.what and "--fork" in error.value.next_step


def test_a_file_in_place_of_a_run_directory_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="is a file"):
        RunDir(tmp_path / "file").create()


DAMAGED = {
    "without its manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty": lambda folder: [p.unlink() for p in folder.iterdir()],
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("pointer", [True, False])
def test_a_damaged_latest_checkpoint_is_never_skipped(interrupted, damage, pointer):
    root = interrupted / "checkpoints"
    DAMAGED[damage](root / "step-00000006")
    if not pointer:
        (root / "latest").unlink()
    if damage == "gone" and not pointer:
        assert checkpoint.find(interrupted) == root / "step-00000003"
        return
    with pytest.raises(CheckpointError, match="step-00000006") as error:
        checkpoint.find(interrupted)
    assert "step-00000003 is intact" in error.value.next_step
    with pytest.raises(CheckpointError, match="step-00000006") as error:
        resume(interrupted)
    assert "--at 3" in error.value.next_step
    resume(interrupted, at=3)


def test_a_record_whose_checksums_lack_it_is_refused(finished):
    path = finished / checksums.FILE
    lines = [x for x in path.read_text().splitlines() if "metadata.json" not in x]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(IntegrityError, match="was changed after the run ended"):
        read_record(finished / "metadata.json")


@pytest.mark.parametrize("end", ["\x0b", "\x0c", "\x1c", "\r", "\u2028", ""])
def test_a_line_of_the_checksums_ends_with_a_newline_alone(tmp_path, end):
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    checksums.write_checksums(tmp_path, "abc")
    path = tmp_path / checksums.FILE
    assert list(checksums.changed(tmp_path, "abc")) == []
    honest = path.read_bytes()
    for at in (i for i, byte in enumerate(honest) if byte == ord("\n")):
        path.write_bytes(honest[:at] + end.encode() + honest[at + 1 :])
        try:
            assert list(checksums.changed(tmp_path, "abc")), at
        except IntegrityError as e:
            assert "is damaged" in e.what


# --- links, pipes and devices ---------------------------------------------------------------------


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "gates.jsonl", LOCK])
def test_a_resume_writes_and_deletes_nothing_through_a_link(interrupted, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (interrupted / name).rename(outside / name)
    (interrupted / name).symlink_to(outside / name)
    before = contents(outside)
    with pytest.raises((StackproofError, OSError), match="link"):
        resume(interrupted)
    assert contents(outside) == before


@pytest.mark.parametrize("name", ["run.json", "checkpoints/latest"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_in_place_of_a_file_is_refused_and_not_waited_for(
    interrupted, name, kind
):
    (interrupted / name).unlink()
    if kind == "pipe":
        os.mkfifo(interrupted / name)
    else:
        (interrupted / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"is a (pipe|device)"):
        resume(interrupted)


# --- what is gone, foreign or beside the run ------------------------------------------------------


def without_steps(run):
    for folder in run.glob("checkpoints/step-*"):
        shutil.rmtree(folder)


LOSSES = {
    "the step folders": without_steps,
    "all checkpoints": lambda run: shutil.rmtree(run / "checkpoints"),
}


@pytest.mark.parametrize("lost", LOSSES)
def test_a_run_that_lost_its_checkpoints_is_not_begun_again_in_silence(interrupted, straight, lost):
    LOSSES[lost](interrupted)
    before = (interrupted / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="are gone") as error:
        resume(interrupted)
    assert "--at 0" in error.value.next_step
    assert (interrupted / "metrics.jsonl").read_bytes() == before
    resume(interrupted, at=0)
    assert_same_end(straight, interrupted, lost)


def test_step_folders_that_became_links_are_not_followed(interrupted, tmp_path):
    for folder in list(interrupted.glob("checkpoints/step-*")):
        folder.rename(tmp_path / folder.name)
        folder.symlink_to(tmp_path / folder.name)
    (interrupted / "checkpoints/latest").unlink()
    with pytest.raises(CheckpointError, match="are gone"):
        resume(interrupted)


def test_a_refused_resume_leaves_the_checksums(finished):
    waiver = waived("runtime.finite").replace("2999", "2001")
    with pytest.raises(ConfigError, match="expired"):
        resume(finished, waiver, at=6)
    assert (finished / checksums.FILE).is_file()


@pytest.mark.parametrize("line", [b"[]", b'{"gate":["x"],"verdict":"fail"}', b'"x"', b"{}"])
def test_a_verdict_of_another_form_is_refused_with_its_line(interrupted, line):
    n = (interrupted / "gates.jsonl").read_bytes().count(b"\n")
    with open(interrupted / "gates.jsonl", "ab") as f:
        f.write(line + b"\n")
    with pytest.raises(CheckpointError, match=rf"gates\.jsonl:{n + 1} is not a verdict"):
        resume(interrupted)


def test_a_checkpoint_does_not_name_files_outside_of_its_run(interrupted):
    mark = {"bytes": 0, "sha256": "e3b0"}
    with pytest.raises(CheckpointError, match="states a log that no run has"):
        RunDir(interrupted).require_logs({"../../etc/hostname": mark})


def test_a_run_below_a_folder_of_any_name_is_sealed(finished, tmp_path):
    """A space that is not printable stands in the path of the run, not in it."""
    run = shutil.copytree(finished, tmp_path / "Meine\u00a0Runs" / "run")
    (run / checksums.FILE).unlink()
    RunDir(run).seal()
    assert (run / checksums.FILE).read_bytes() == (finished / checksums.FILE).read_bytes()
    assert RunDir(run).odd_entries() == [] and list(inspect._problems(run)) == []


def test_a_log_that_is_a_pipe_is_named(interrupted):
    (interrupted / "metrics.jsonl").unlink()
    os.mkfifo(interrupted / "metrics.jsonl")
    with pytest.raises(EnvironmentUnfit, match=r"metrics\.jsonl is a pipe"):
        resume(interrupted)


def test_a_linked_run_directory_is_not_locked(interrupted, tmp_path):
    (interrupted / LOCK).unlink()
    (tmp_path / "link").symlink_to(interrupted)
    with pytest.raises((StackproofError, OSError), match="is a link"):
        resume(tmp_path / "link")
    assert not (interrupted / LOCK).exists()


def corrected(folder, **values):
    """Change values of a state document, and its hash in the manifest, as another author would."""
    document = json.loads((folder / "state.json").read_bytes()) | values
    data = canonical_json(document)
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"]["state.json"] = {"sha256": sha256_bytes(data), "bytes": len(data)}
    (folder / "manifest.json").write_bytes(canonical_json(manifest))


WRONG = {
    "step": ["x", [1], -1, 1.5],
    "tokens_seen": ["x", {}],
    "cursor": ["x", None],
    "vocab_size": ["x", 0],
    "ema_loss_nats": ["x"],
    "best": [3, {"step": "x"}],
    "run": ["x", {}, {"logs": "x"}],
    "gates": [[], {"runtime.finite": {"checks": 1}}, {"runtime.finite": 3}],
    "stopper": [3, {}],
    "curriculum": [[], {}],
    "scaler": [[], {"scale": "x"}],
    "config": ["x", {}],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_state_document_with_values_of_another_type_is_refused(interrupted, key):
    folder = interrupted / "checkpoints/step-00000006"
    before = (folder / "state.json").read_bytes()
    for value in WRONG[key]:
        more = {"config_sha256": sha256_json(value)} if key == "config" else {}
        corrected(folder, **{key: value}, **more)
        if key == "curriculum" and value == {}:
            continue  # the order of a run without arms
        with pytest.raises((CheckpointError, ConfigError)):
            resume(interrupted)
            pytest.fail(f"{key} = {value!r} was believed")
        (folder / "state.json").write_bytes(before)


RUN_KEYS = "record config overrides device environment code command started_at inherited_s".split()


@pytest.mark.parametrize("key", RUN_KEYS)
def test_a_run_json_with_values_of_another_type_is_refused(interrupted, key):
    before = (interrupted / "run.json").read_bytes()
    for change in (
        lambda d: d.pop(key),
        lambda d: d.update({key: 3 if key != "inherited_s" else "x"}),
    ):
        rewrite(interrupted, change, sealed=True)
        with pytest.raises(CheckpointError, match=key):
            resume(interrupted)
        (interrupted / "run.json").write_bytes(before)
