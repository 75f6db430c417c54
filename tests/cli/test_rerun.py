"""How far two series of a trace lie apart: as a share of each figure,
where that means something.
"""

import json
import math
import os
import shlex
from functools import partial
from types import SimpleNamespace

import pytest

from stackproof.cli import evidence
from stackproof.cli.rerun import (
    REL_TOLERANCE,
    largest_difference,
    rerun_trace,
    series_of_run,
    trace_command,
)
from stackproof.spec.canonical import sha256_bytes
from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import MAX_TEXT_BYTES
from stackproof.spec.ledger import Ledger
from stackproof.spec.records import Series
from tools.tampers import archived


def line(**figures):
    stats = {
        "mean": 1e-9,
        "std": 2.0,
        "rms": 2.0,
        "kurtosis": 3.0,
        "argmax": [1, 2],
        "quantiles": {"0.5": 0.0},
    }
    return {
        "point": "layers.0.q",
        "robust_z": 1e-3,
        "note": "",
        "stats": stats | figures.pop("stats", {}),
    } | figures


def apart(now, before=None):
    series = (json.dumps(document).encode() for document in (before or line(), now))
    return largest_difference(*series, "points.jsonl")


def test_equal_series_are_not_apart():
    assert apart(line()) == (0.0, "all equal")


@pytest.mark.parametrize(
    ("now", "where", "share"),
    [
        (line(stats={"std": 2.02}), "stats.std", 0.02 / 2.02),
        (line(stats={"mean": 0.02}), "stats.mean", 0.01),
        # rounding of a mean that cancels is no difference
        (line(stats={"mean": -1.99e-7}), "stats.mean", 1e-7),
        (line(stats={"quantiles": {"0.5": 0.02}}), "stats.quantiles.0.5", 0.01),
        (line(stats={"kurtosis": 3.3}), "stats.kurtosis", 0.1 / 1.1),
        (line(stats={"argmax": [1, 4]}), "stats.argmax.1", 0.5),
        (line(robust_z=2e-3), "robust_z", 1e-3),
        (line(note="else"), "note", math.inf),
        (line(more=1), "more", math.inf),
        (line(stats={"mean": "NaN"}), "stats.mean", math.inf),
    ],
)
def test_the_worst_figure_is_named_with_its_share(now, where, share):
    found, place = apart(now)
    assert place == f"layers.0.q.{where}" and found == pytest.approx(share, rel=1e-6)
    assert (found > REL_TOLERANCE) is (share != 1e-7)


def test_a_share_is_not_taken_of_a_size_that_is_no_number():
    dead = line(stats={"rms": "NaN", "std": "NaN"})
    assert apart(dead, dead) == (0.0, "all equal")
    assert apart(line(stats={"rms": "NaN", "std": "NaN", "mean": 2e-9}), dead)[0] == pytest.approx(
        0.5
    )


# --- a record is data -----------------------------------------------------------------------------


def recorded(words):
    return SimpleNamespace(id="trace-1", command=tuple(shlex.split(words)))


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (
            "stack trace runs/a@bfloat16 --against runs/a --prompt 'T t' --run-dir runs/b",
            ["compare", "--against=runs/a", "--prompt=T t", "--", "runs/a@bfloat16"],
        ),
        ("stack trace runs/a --lens logit --json", ["lens", "--", "runs/a", "logit"]),
        (
            "stack trace stats M --points a --points b --backward --csv=/etc/x --csv y",
            ["stats", "--points=a", "--points=b", "--backward", "--", "M"],
        ),
        (
            "stack trace ablate M t1 t2 --from f --prompt --csv",
            ["ablate", "--from=f", "--prompt=--csv", "--", "M", "t1", "t2"],
        ),
        ("stack trace M -- --run-dir /x", ["stats", "--", "M", "--run-dir", "/x"]),
    ],
)
def test_a_trace_is_repeated_without_the_files_that_it_wrote(words, again):
    assert trace_command(recorded(words)) == again


@pytest.mark.parametrize(
    "words",
    [
        "stack trace bisect a --against b --check 'touch marker'",
        "stack trace a --bisect --against b --check='touch marker'",
        "stack train pocket --set data.filters=['a:b']",
        "stack evidence add x",
        "stack trace --help",
        "stack trace stats M --help",
        "stack trace M --plugin a:b",
        "stack trace M --run-dir",
        "sh trace M",
        "stack trace",
        "stack",
        "",
    ],
)
def test_a_command_that_is_no_trace_or_runs_a_program_is_refused(words):
    with pytest.raises(IntegrityError, match="is not repeated") as error:
        trace_command(recorded(words))
    assert error.value.exit_code == 6


def test_a_module_of_the_working_directory_is_not_imported(tmp_path, monkeypatch):
    """`python -m` puts the folder of the user first, which may be a folder of somebody else."""
    (tmp_path / "torch.py").write_text("open('marker', 'w')")
    (tmp_path / "json.py").write_text("open('marker', 'w')")
    monkeypatch.chdir(tmp_path)
    record = SimpleNamespace(
        id="trace-1", command=("stack", "trace", "gone"), series=(), kind="trace"
    )
    with pytest.raises(IntegrityError, match="fails here with exit code 2"):
        rerun_trace(record, partial(series_of_run, tmp_path), tmp_path / "again")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", ["as recorded", "changed", "pipe", "device", "folder", "large"])
def test_a_series_of_a_run_is_read_within_bounds(kind, tmp_path):
    data, path = b"{}\n", tmp_path / "points.jsonl"
    series = Series(path=path.name, sha256=sha256_bytes(data))
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case _:
            path.write_bytes(b"[]\n" if kind == "changed" else data)
    if kind == "large":
        os.truncate(path, MAX_TEXT_BYTES + 1)
    read = partial(series_of_run, tmp_path, SimpleNamespace(id="trace-1"))
    if kind == "as recorded":
        assert read(series) == data
    else:
        with pytest.raises(IntegrityError, match=r"points\.jsonl of record trace-1"):
            read(series)


def test_a_rerun_reads_the_series_of_a_record_and_nothing_else(tmp_path, monkeypatch):
    """From the tree and from history; other files of the folder are not touched."""
    names = archived.build(tmp_path / "repo")
    folder, scratch = tmp_path / "repo/evidence", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    (tmp_path / "other").write_bytes(b"other")
    (folder / names[0]).mkdir()
    seen = []

    def repeat(record, read, run_dir):
        seen.extend((read(record, series), os.listdir(scratch)) for series in record.series)
        return {"ok": True, "compared": []}

    monkeypatch.setattr("stackproof.cli.rerun.rerun_trace", repeat)
    for name in names:
        (folder / name / "zzz").symlink_to(tmp_path / "other")
        record = Ledger(folder).records()[name].model_copy(update={"kind": "trace"})
        monkeypatch.setattr("stackproof.evidence.ledgering.find", lambda *_, found=record: found)
        evidence.rerun(name, evidence=folder)
        (data, made), *more = seen
        assert sha256_bytes(data) == record.series[0].sha256 and not (made or more)
        seen.clear()
