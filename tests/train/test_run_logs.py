"""The logs of a run are read line by line, within bounds."""

import tracemalloc
from types import SimpleNamespace

import pytest

from stackproof.spec.canonical import canonical_lines
from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import FileRefused
from stackproof.train import restart, run_dir
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
        lambda d: d.last_line("metrics.jsonl"),
        lambda d: sum(1 for _ in d.lines("gates.jsonl")),
    ],
    ids=["red verdicts", "lost checkpoints", "last loss", "lines"],
)
def test_a_resume_does_not_hold_a_log_in_memory(directory, read):
    read(directory)  # what is loaded once does not count
    assert peak(lambda: read(directory)) < MAX_BYTES
    assert peak(lambda: directory.read_lines("gates.jsonl")) > 4 * MAX_BYTES


def test_the_last_line_is_the_last_complete_one(directory):
    assert directory.last_line("metrics.jsonl") == directory.read_lines("metrics.jsonl")[-1]
    assert directory.last_line("metrics.jsonl")["loss_nats"] == 19_999 / 7
    assert directory.last_line("samples.jsonl") is None
    (directory.path / "samples.jsonl").write_bytes(b'{"step":1')
    assert directory.last_line("samples.jsonl") is None
    (directory.path / "samples.jsonl").write_bytes(b'{"step":1}\n{"step":\n\n')
    with pytest.raises(IntegrityError, match=r"samples\.jsonl:2 is not strict JSON"):
        directory.last_line("samples.jsonl")


def test_a_log_above_the_limit_is_refused(directory, monkeypatch):
    monkeypatch.setattr(run_dir, "MAX_SERIES_BYTES", 1000)
    for read in (directory.read_lines, directory.last_line):
        with pytest.raises(FileRefused, match="holds more than the 1000 bytes"):
            read("gates.jsonl")
