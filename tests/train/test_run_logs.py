"""The logs of a run are read line by line, within bounds."""

import tracemalloc
from types import SimpleNamespace

import pytest

from stackproof.contracts.conditions import ContractError
from stackproof.spec.canonical import canonical_lines
from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import FileRefused
from stackproof.subject import read_back
from stackproof.train import restart, run_dir, trainer
from stackproof.train.run_dir import RunDir

MAX_BYTES = 2**20  # of the lines in memory; all of them together take ten times as much
SETTINGS = SimpleNamespace(gates=SimpleNamespace(waive=()))
VERDICT = {"gate": "loss.first", "step": 7, "verdict": "pass", "message": "as it should be"}


@pytest.fixture
def directory(tmp_path):
    lines = [VERDICT | {"loss_nats": number / 7} for number in range(20_000)]
    for name in ("gates.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_bytes(canonical_lines(lines) + b'\n{"step":8,"loss')
    return RunDir(tmp_path)


def last_loss(directory, step=9):
    state, output = SimpleNamespace(step=step), SimpleNamespace(dir=directory)
    return trainer._last_loss(SimpleNamespace(report=None, state=state, output=output))


def trainer_of(directory):
    cfg = SimpleNamespace(train=SimpleNamespace(log_every=1), curriculum=SimpleNamespace())
    output = SimpleNamespace(dir=directory)
    loader = SimpleNamespace(sampler=SimpleNamespace(sources=()))
    state = SimpleNamespace(step=8, data_loader=loader)
    keeper = SimpleNamespace(states={})
    return SimpleNamespace(cfg=cfg, output=output, state=state, keeper=keeper, resumed=False)


def peak(read) -> int:
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "read",
    [
        lambda d: restart.red_verdicts(d, SETTINGS),
        lambda d: restart._refuse_lost(d),
        lambda d: last_loss(d),
        lambda d: sum(1 for _ in d.lines("gates.jsonl")),
        lambda d: read_back.logs_of(trainer_of(d)),
    ],
    ids=["red verdicts", "lost checkpoints", "last loss", "lines", "logs at the end"],
)
def test_a_resume_does_not_hold_a_log_in_memory(directory, read):
    read(directory)  # what is loaded once does not count
    assert peak(lambda: read(directory)) < MAX_BYTES
    assert peak(lambda: list(directory.lines("gates.jsonl"))) > 4 * MAX_BYTES


def test_the_last_loss_is_that_of_the_last_complete_line_up_to_a_step(directory):
    log = directory.path / "metrics.jsonl"
    assert last_loss(directory) == 19_999 / 7
    rows = [{"step": n, "loss_nats": loss} for n, loss in ((1, 3.5), (2, 2.0), (3, 1.5))]
    log.write_bytes(canonical_lines(rows) + b'\n{"step":3')
    assert [last_loss(directory, step) for step in (0, 1, 2, 9)] == [None, 3.5, 2, 1.5]
    log.write_bytes(b'[]\n{"step":1}\n')
    assert last_loss(directory) is None
    log.write_bytes(b'{"step":1,"loss_nats":2.5}\n{"step":\n\n')
    with pytest.raises(IntegrityError, match=r"metrics\.jsonl:2 is not strict JSON"):
        last_loss(directory)
    log.unlink()
    assert last_loss(directory) is None


def test_a_log_above_the_limit_is_refused(directory, monkeypatch):
    monkeypatch.setattr(run_dir, "MAX_SERIES_BYTES", 1000)
    with pytest.raises(FileRefused, match="holds more than the 1000 bytes"):
        list(directory.lines("gates.jsonl"))


def test_a_series_that_is_not_what_was_logged_is_named(tmp_path):
    """Whether a line was lost, changed, added, or counted twice."""
    own = RunDir(tmp_path)
    for step in (1, 2):
        own.log("metrics.jsonl", step=step)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    assert own.mismarked() == ()
    for wrong in (whole[:-1], whole.replace(b"2", b"3"), whole + b"{}\n", b""):
        (tmp_path / "metrics.jsonl").write_bytes(wrong)
        assert own.mismarked() == ("metrics.jsonl",)
    (tmp_path / "metrics.jsonl").unlink()
    assert own.mismarked() == ("metrics.jsonl",)
    assert RunDir(tmp_path).mismarked() == (), "a process judges what it has logged"


def test_a_log_that_is_cut_elsewhere_than_its_mark_is_a_bug(tmp_path, monkeypatch):
    own = RunDir(tmp_path)
    own.log("metrics.jsonl", step=1)
    marks = own.marks()
    own.log("metrics.jsonl", step=2)
    cut = own.restore_logs(marks)
    assert cut == len(b'{"step":2}\n') and own.marks() == marks
    own.log("metrics.jsonl", step=2)
    monkeypatch.setattr(run_dir.os, "truncate", lambda path, n_bytes: None)
    with pytest.raises(ContractError, match="each series ends where the checkpoint states"):
        own.restore_logs(marks)
