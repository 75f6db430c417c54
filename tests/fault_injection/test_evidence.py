"""Adding and archiving records under kills, errors of the file system, races and flipped bits: the
ledger and the folders agree again after the next call, and every changed byte is found.
"""

import os
import shutil
import subprocess
import sys
from multiprocessing import get_context

import pytest

from stackproof.evidence import archiving, ledgering
from stackproof.spec.canonical import canonical_lines, sha256_bytes
from stackproof.spec.errors import IntegrityError
from stackproof.spec.ledger import Ledger
from stackproof.spec.records import Record
from tests.fault_injection import file_calls
from tests.fault_injection.scale import SEED, chance, scaled
from tests.processes import ROOT, Command
from tools.tampers import archived, small_repo

PROCESSES = 8
RUNS = ("a", "b")
ADD_EACH = """
import sys
from tests.fault_injection import file_calls
file_calls.arm()
from stackproof.cli import main
worst = 0
for run in sys.argv[1:]:
    try:
        main(["evidence", "add", run, "--evidence", "evidence"])
    except SystemExit as e:
        worst = max(worst, e.code)
sys.exit(worst)
"""


def leave_run(folder, number: int) -> Record:
    """A run directory with a record of another spec, so that no gate is required, and a series."""
    log = canonical_lines({"step": step, "loss_nats": 7.0 - step} for step in range(3))
    record = Record.model_validate(
        {
            "schema": "stackproof/record/1",
            "id": f"train-20260110T120000Z-{number:08x}",
            "kind": "train",
            "status": "completed",
            "end_reason": "done",
            "exit_code": 0,
            "claim": "it ran",
            "not_covered": ["everything else"],
            "spec": {"version": "1.0.0", "sha256": "0" * 64},
            "code": {"commit": "1" * 40, "dirty": False},
            "command": ["stack", "train"],
            "config": {"seed": number},
            "config_sha256": "0" * 64,
            "environment": {"python": "3.11"},
            "compute": "real",
            "series": [{"path": "metrics.jsonl", "sha256": sha256_bytes(log)}],
            "started_at": "2026-01-10T12:00:00Z",
            "finished_at": "2026-01-10T12:00:30Z",
            "wall_s": 30.0,
            "device_s": 0.0,
        }
    )
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_bytes(record.to_bytes())
    (folder / "metrics.jsonl").write_bytes(log)
    return record


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run directories `a` and `b`."""
    folder = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(RUNS):
        leave_run(folder / name, number)
    return folder


def files_in(folder) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".git" not in path.parts
    }


def chosen(calls: list[str], name: str, n: int) -> list[int]:
    """Numbers of calls: all in a long round, `n` at random in a short one."""
    numbers = range(1, len(calls) + 1)
    return sorted(chance(name).sample(numbers, min(scaled(n, len(calls)), len(calls))))


def require_way_out(evidence) -> None:
    """The evidence holds, or each problem names the command that ends it; repair if it is named."""
    problems = ledgering.verify(evidence)
    for problem in problems:
        assert "stack evidence add" in problem or "stack evidence repair" in problem, problem
    if any("stack evidence repair" in problem for problem in problems):
        ledgering.repair(evidence)


@pytest.mark.parametrize("fault", ["kill", *file_calls.FAULTS])
def test_a_fault_at_any_call_of_two_adds_is_made_good_by_the_next(fault, runs, tmp_path):
    paths = [str(runs / name) for name in RUNS]
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    done = file_calls.run(*paths, folder=undisturbed, code=ADD_EACH, light=True)
    assert done.code == 0, done.err
    whole, calls = files_in(undisturbed / "evidence"), file_calls.calls(done)
    assert len(calls) > 20, calls
    for n in chosen(calls, f"add {fault}", 12 if fault == "kill" else 4):
        folder, said = tmp_path / str(n), f"{fault} at call {n}, {calls[n - 1]} (SEED={SEED})"
        folder.mkdir()
        done = file_calls.run(*paths, folder=folder, fault=fault, at=n, code=ADD_EACH, light=True)
        assert done.code == (-9 if fault == "kill" else 6), (said, done.err)
        assert "Traceback" not in done.err, (said, done.err)
        evidence = folder / "evidence"
        require_way_out(evidence)
        known = {entry.record for entry in Ledger(evidence).entries()}
        for run in RUNS:
            if ledgering.find(evidence, paths[RUNS.index(run)]).id not in known:
                ledgering.accept(runs / run, evidence)
        if files_in(evidence) != whole:
            # an error in the first addition and none in the second: the other order
            assert fault != "kill" and ledgering.verify(evidence) == [], said
            assert files_in(evidence).keys() == whole.keys(), said


def _add(run, evidence, barrier):
    barrier.wait()
    ledgering.accept(run, evidence)


def test_eight_processes_that_add_at_once_all_get_their_line(tmp_path):
    """Without the lock, lines of one position follow each other and the chain is broken."""
    context = get_context("fork")
    for n in range(PROCESSES):
        leave_run(tmp_path / f"run-{n}", n)
    for number in range(scaled(4, 60)):
        evidence, barrier = tmp_path / f"evidence-{number}", context.Barrier(PROCESSES)
        processes = [
            context.Process(target=_add, args=(tmp_path / f"run-{n}", evidence, barrier))
            for n in range(PROCESSES)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [p.exitcode for p in processes] == [0] * PROCESSES
        assert ledgering.verify(evidence) == []
        assert len(Ledger(evidence).entries()) == PROCESSES


def test_a_folder_without_a_line_is_taken_up_only_with_the_same_files(runs, tmp_path):
    record = ledgering.find(tmp_path, str(runs / "a"))
    shutil.copytree(runs / "a", tmp_path / record.id)
    (tmp_path / record.id / "metrics.jsonl").write_bytes(b"{}\n")
    with pytest.raises(IntegrityError, match="not the record of") as refused:
        ledgering.accept(runs / "a", tmp_path)
    assert f"remove {tmp_path / record.id}" in refused.value.next_step
    assert not (tmp_path / "ledger.jsonl").exists()
    shutil.copy(runs / "a" / "metrics.jsonl", tmp_path / record.id)
    ledgering.accept(runs / "a", tmp_path)
    assert ledgering.verify(tmp_path) == []
    with pytest.raises(IntegrityError, match="already in the ledger"):
        ledgering.accept(runs / "a", tmp_path)


def test_nothing_is_written_through_a_link(runs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "linked").symlink_to("mine")
    with pytest.raises(IntegrityError, match="is a link"):
        ledgering.accept(runs / "a", tmp_path / "linked")
    assert list((tmp_path / "mine").iterdir()) == []
    ledgering.accept(runs / "a", tmp_path / "evidence")
    (tmp_path / "evidence" / "ledger.jsonl").rename(tmp_path / "ledger")
    before = (tmp_path / "ledger").read_bytes()
    (tmp_path / "evidence" / "ledger.jsonl").symlink_to(tmp_path / "ledger")
    with pytest.raises(IntegrityError, match="is a link"):
        ledgering.accept(runs / "b", tmp_path / "evidence")
    with pytest.raises(IntegrityError, match="is a link"):
        ledgering.repair(tmp_path / "evidence")
    assert (tmp_path / "ledger").read_bytes() == before
    assert len(list((tmp_path / "evidence").glob("train-*"))) == 1


@pytest.mark.parametrize("kind", ["pipe", "folder", "large"])
def test_a_series_that_is_no_small_file_is_refused(kind, tmp_path):
    leave_run(tmp_path / "run", 0)
    series = tmp_path / "run" / "metrics.jsonl"
    series.unlink()
    match kind:
        case "pipe":
            os.mkfifo(series)
        case "folder":
            series.mkdir()
        case "large":
            with open(series, "wb") as f:
                f.truncate(ledgering.MAX_ARTEFACT_BYTES + 1)
    with pytest.raises(IntegrityError, match=r"series metrics\.jsonl") as refused:
        ledgering.accept(tmp_path / "run", tmp_path / "evidence")
    assert not (tmp_path / "evidence").exists()
    assert (kind == "large") == ("train.log_every" in (refused.value.next_step or ""))


@pytest.mark.parametrize("line", [b"half a li", b"[1]", b'{"step": "one"}'])
def test_a_series_of_another_form_is_refused(line, tmp_path):
    record = leave_run(tmp_path / "run", 0)
    (tmp_path / "run/metrics.jsonl").write_bytes(line + b"\n")
    stated = {"path": "metrics.jsonl", "sha256": sha256_bytes(line + b"\n")}
    changed = record.model_dump(mode="json", by_alias=True) | {"series": [stated]}
    (tmp_path / "run/metadata.json").write_bytes(Record.model_validate(changed).to_bytes())
    with pytest.raises(IntegrityError, match=r"metrics\.jsonl:1"):
        ledgering.accept(tmp_path / "run", tmp_path / "evidence")
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize("status", ["preempted", "interrupted"])
def test_the_record_of_a_stopped_run_is_refused_as_it_changes(status, tmp_path):
    record = leave_run(tmp_path / "run", 0)
    changed = record.model_copy(update={"status": status, "exit_code": 75})
    (tmp_path / "run/metadata.json").write_bytes(changed.to_bytes())
    with pytest.raises(IntegrityError, match="of a run that was stopped"):
        ledgering.accept(tmp_path / "run", tmp_path / "evidence")
    (tmp_path / "run/metadata.json").write_bytes(record.to_bytes())
    ledgering.accept(tmp_path / "run", tmp_path / "evidence")


def test_another_record_with_an_id_of_the_ledger_is_named_as_such(runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "run")
    record, _ = ledgering.accept(tmp_path / "run", tmp_path / "evidence")
    with pytest.raises(IntegrityError, match="already in the ledger") as error:
        ledgering.accept(tmp_path / "run", tmp_path / "evidence")
    assert "as another one" not in error.value.what
    changed = record.model_copy(update={"end_reason": "later"})
    (tmp_path / "run/metadata.json").write_bytes(changed.to_bytes())
    with pytest.raises(IntegrityError, match="already in the ledger, as another one") as error:
        ledgering.accept(tmp_path / "run", tmp_path / "evidence")
    assert "stack evidence rerun" in error.value.next_step


def test_what_was_hashed_is_what_is_copied(tmp_path, monkeypatch):
    """A series that changes after it was read does not get into the evidence."""
    leave_run(tmp_path / "run", 0)
    honest, series = ledgering._series, tmp_path / "run" / "metrics.jsonl"
    before = series.read_bytes()

    def changed_afterwards(run_dir, declared):
        data = honest(run_dir, declared)
        series.write_bytes(b"changed\n")
        return data

    monkeypatch.setattr(ledgering, "_series", changed_afterwards)
    record, _ = ledgering.accept(tmp_path / "run", tmp_path / "evidence")
    assert (tmp_path / "evidence" / record.id / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["ledger.jsonl", "archive.jsonl"])
def test_repair_removes_an_incomplete_line_and_nothing_else(name, runs, tmp_path):
    evidence = tmp_path / "evidence"
    ledgering.accept(runs / "a", evidence)
    whole = files_in(evidence)
    assert ledgering.repair(evidence) == {} and files_in(evidence) == whole
    with open(evidence / name, "ab") as f:
        f.write(b'{"prev":"12')
    assert "stack evidence repair" in ledgering.verify(evidence)[0]
    if name == "ledger.jsonl":
        with pytest.raises(IntegrityError, match="middle of a line"):
            ledgering.accept(runs / "b", evidence)
    done = Command("evidence", "repair", "--json", folder=tmp_path, light=True).wait()
    assert done.code == 0, done.err
    assert done.json["removed"] == [{"file": name, "bytes": 11, "line": '{"prev":"12'}]
    assert {n: data for n, data in files_in(evidence).items() if data} == {
        n: data for n, data in whole.items() if data
    }
    ledgering.accept(runs / "b", evidence)
    assert ledgering.verify(evidence) == []


@pytest.fixture(scope="module")
def to_archive(tmp_path_factory):
    """A repository of which two records leave the tree at the next archive."""
    root = tmp_path_factory.mktemp("to-archive") / "repo"
    small_repo.build(root)
    for minute in (10, 11, 12):
        archived.benchmark(root, minute)
    small_repo.commit_all(root)
    return root


@pytest.mark.parametrize("fault", ["kill", "broken"])
def test_a_fault_at_any_call_of_an_archive_is_made_good_by_the_next(fault, to_archive, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(to_archive, undisturbed)
    done = file_calls.run("evidence", "archive", folder=undisturbed, light=True)
    assert done.code == 0, done.err
    whole, calls = files_in(undisturbed), file_calls.calls(done)
    assert len(calls) >= 7, calls
    for n in chosen(calls, f"archive {fault}", 5):
        folder, said = tmp_path / str(n), f"{fault} at call {n}, {calls[n - 1]} (SEED={SEED})"
        shutil.copytree(to_archive, folder)
        done = file_calls.run("evidence", "archive", folder=folder, fault=fault, at=n, light=True)
        assert done.code == (-9 if fault == "kill" else 6), (said, done.err)
        assert "Traceback" not in done.err, (said, done.err)
        require_way_out(folder / "evidence")
        again = Command("evidence", "archive", folder=folder, light=True).wait()
        # Where the last call was the faulty one, nothing is left to do in a changed folder.
        finished = files_in(folder) == whole and "differs from its commit" in again.err
        assert again.code == 0 or finished, (said, again.err)
        assert files_in(folder) == whole, said
        for record in Ledger(folder / "evidence").archive.by_record:
            assert not (folder / "evidence" / record).exists(), said


def test_an_archived_file_that_differs_from_history_is_not_removed(to_archive, tmp_path):
    root = tmp_path / "repo"
    shutil.copytree(to_archive, root)
    made = archiving.archive(root / "evidence")
    gone = made.lines[0].record
    shutil.copytree(to_archive / "evidence" / gone, root / "evidence" / gone)
    (root / "evidence" / gone / "rounds.jsonl").write_bytes(b"other\n")
    with pytest.raises(IntegrityError, match="the file in the tree is another"):
        archiving.archive(root / "evidence")
    assert (root / "evidence" / gone / "rounds.jsonl").read_bytes() == b"other\n"


@pytest.mark.parametrize("link", ["folder", "file"])
def test_an_archive_removes_nothing_through_a_link(link, to_archive, tmp_path):
    """Neither what a killed call left, nor what is archived for the first time."""
    root, others = tmp_path / "repo", tmp_path / "others"
    shutil.copytree(to_archive, root)
    gone = archiving.plan(root / "evidence").lines[0].record

    def put_link() -> None:
        at = root / "evidence" / gone
        if link == "file":
            at.mkdir(exist_ok=True)
            (at / "rounds.jsonl").unlink(missing_ok=True)
            (at / "rounds.jsonl").symlink_to(others / "rounds.jsonl")
        else:
            shutil.rmtree(at, ignore_errors=True)
            at.symlink_to(others)

    shutil.copytree(root / "evidence" / gone, others)
    before = files_in(others)
    put_link()
    with pytest.raises(IntegrityError, match="differs from its commit"):
        archiving.archive(root / "evidence")
    shutil.rmtree(root)
    shutil.copytree(to_archive, root)
    archiving.archive(root / "evidence")
    put_link()
    for act in (archiving.plan, archiving.archive):
        with pytest.raises(IntegrityError, match=r"is a link|is another"):
            act(root / "evidence")
    assert files_in(others) == before


@pytest.fixture(scope="module")
def with_archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("with-archive") / "repo"
    archived.build(root)
    return root


def test_a_flipped_bit_in_any_byte_is_found_and_its_place_named(with_archive):
    evidence, random = with_archive / "evidence", chance("flips")
    assert ledgering.verify(evidence) == []
    for path in (p for p in sorted(evidence.rglob("*")) if p.is_file()):
        if path.name in (".lock", "registry.toml"):
            continue
        honest, place = path.read_bytes(), path.relative_to(evidence).parts[0]
        at = range(len(honest))
        for byte in at if len(at) < scaled(0, len(at) + 1) else random.sample(at, 8):
            bit = random.randrange(8)
            flipped = bytearray(honest)
            flipped[byte] ^= 1 << bit
            path.write_bytes(flipped)
            problems = ledgering.verify(evidence)
            path.write_bytes(honest)
            said = f"{path.name}, byte {byte}, bit {bit} (SEED={SEED})"
            assert problems, said
            assert any(place in problem for problem in problems), (said, problems)
    assert ledgering.verify(evidence) == []


def test_absent_evidence_is_a_usage_error(tmp_path):
    for verb in ("verify", "repair", "archive"):
        done = Command("evidence", verb, "--evidence", "absent", folder=tmp_path, light=True).wait()
        assert done.code == 2 and "names nothing" in done.err, done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", [["tools/check_integrity.py", "--list"], ["-m", "stackproof", "--help"]]
)
def test_a_reader_of_the_output_that_ends_first_sees_no_traceback(command):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=write, stderr=-1, text=True)
    os.close(write)
    assert done.stderr == ""
