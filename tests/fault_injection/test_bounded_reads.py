"""A file that is larger than any that is written there is refused before it is read, and one of
another form with the line or field.
"""

import json
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stackproof import tensorfolder
from stackproof.contracts import backtest
from stackproof.contracts.callbacks import digest
from stackproof.contracts.callbacks.record import append_line
from stackproof.data import build, scale, stages
from stackproof.kernels import measured
from stackproof.spec.errors import CheckpointError, DataError, IntegrityError, UsageError
from stackproof.spec.files import FileRefused
from stackproof.spec.releases import read_releases
from stackproof.subject.checkpoints import FILES, WrittenCheckpoint
from stackproof.tensorfile import MAX_HEADER_BYTES

HUGE = 2**40  # takes no room on the disk, and does not fit into memory


def huge(path: Path, begin: bytes = b"", n_bytes: int = HUGE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        f.write(begin)
        f.truncate(n_bytes)
    return path


def job(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(work=folder, number=0)


READERS = {
    "digest of a checkpoint": ("stack_gates.json", digest.read, FileRefused),
    "receipt of a part": (
        "part-00000/receipt.json",
        lambda f: stages.filter_part(job(f)),
        FileRefused,
    ),
    "receipt of a chunk": (
        "encoded-00000.json",
        lambda f: stages.encode_chunk(job(f)),
        FileRefused,
    ),
    "part of a task": (
        "train-00000/part.json",
        lambda f: scale._part(f, "train", 0, 1),
        DataError,
    ),
    "counts of a task": ("stats/00000.json", lambda f: scale.drop_counts(f, 1), DataError),
    "plan of a data set": ("plan.json", lambda f: build._finished(f / "m.json", {}), UsageError),
    "log to replay": (
        "samples.jsonl",
        lambda f: backtest.replay("sampling.loops", f / "samples.jsonl"),
        DataError,
    ),
    "releases of the spec": ("spec/releases.jsonl", read_releases, FileRefused),
}


@pytest.mark.parametrize("what", READERS)
def test_a_huge_file_is_refused_before_it_is_read(what, tmp_path):
    name, read, error = READERS[what]
    if what == "part of a task":
        name = f"{scale.part_folder(Path(), 'train', 0)}/part.json"
    huge(tmp_path / name)
    with pytest.raises(error, match=r"more than the|another data set"):
        read(tmp_path)


def test_a_huge_manifest_of_a_data_set_is_refused(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"{}")
    with pytest.raises(FileRefused, match="more than the"):
        build._finished(huge(tmp_path / "manifest.json"), {})


def test_a_huge_comparison_of_kernels_counts_as_unreadable(tmp_path):
    huge(tmp_path / measured.FILE)
    assert measured.read(tmp_path, "cpu") is None


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_documents_that_grew_after_they_were_written_are_found(tmp_path, name):
    tensors = {"a.safetensors": {"weight": torch.ones(2)}}
    content = tensorfolder.Content("schema", tensors, {}, b"{}")
    manifest = tensorfolder.write(tmp_path, content)
    tensorfolder.compare(tmp_path, content, manifest)
    huge(tmp_path / name, (tmp_path / name).read_bytes())
    with pytest.raises(CheckpointError, match=f"{name} was written and read back otherwise"):
        tensorfolder.compare(tmp_path, content, manifest)


@pytest.mark.parametrize("name", ["state.json", "manifest.json", "latest"])
def test_a_saved_checkpoint_is_judged_within_bounds(tmp_path, name):
    folder = tmp_path / "checkpoints" / "step-1"
    folder.mkdir(parents=True)
    for each in FILES:
        (folder / each).write_bytes(struct.pack("<Q", 2) + b"{}")
    for each in ("state.json", "manifest.json"):
        (folder / each).write_bytes(b'{"files": {}}')
    huge(folder.parent / name if name == "latest" else folder / name)
    with pytest.raises(FileRefused, match="more than the"):
        _ = WrittenCheckpoint(folder, 1, False, {}).format_problems


def test_a_header_of_tensors_above_the_limit_is_refused(tmp_path):
    claim = struct.pack("<Q", MAX_HEADER_BYTES + 1)
    huge(tmp_path / FILES[0], claim, n_bytes=2 * MAX_HEADER_BYTES)
    with pytest.raises(FileRefused, match=f"claims a header of {MAX_HEADER_BYTES + 1} bytes"):
        _ = WrittenCheckpoint(tmp_path, 1, False, {}).reloaded_checksums


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "' + b"a" * backtest.MAX_LINE_BYTES + b'"}', "line 2 holds more than the"),
        (b"[" * 100_000, "recursion"),
        (b"[1]", "line 2: Input should be a valid dictionary"),
        (b'{"text": "\xff"}', "line 2: invalid unicode"),
        (b'{"text": "\\ud800"}', "line 2: .*hex escape"),
        (b'{"text": 5}', "line 2: field text: Input should be a valid string"),
        (
            b'{"text": "a", "language": [1]}',
            "line 2: field language: Input should be a valid string",
        ),
        (b'{"text": "a", "step": "x"}', "line 2: field step: Input should be a valid integer"),
        (b'{"text": "a", "step": 1.5}', "line 2: field step: Input should be a valid integer"),
        (b'{"text": "a", "step": NaN}', "line 2: field step: Input should be a valid integer"),
        (b'{"text": "a", "step": 1e16}', "line 2: field step: Input should be less than or equal"),
        (b'{"text": "a", "tokens_per_s": -1}', "line 2: field tokens_per_s: .* not negative"),
        (b'{"text": "a", "step": [1]}', "line 2: field step: Input should be a valid integer"),
    ],
)
def test_a_hostile_line_of_a_log_is_an_error_of_its_data(tmp_path, line, why):
    log = tmp_path / "samples.jsonl"
    log.write_bytes(b'{"text": "a", "step": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=f"(?i){why}"):
        backtest.replay("sampling.loops", log)


@pytest.mark.parametrize("name", ["loss_nats", "val_loss_nats", "tokens_per_s", "tokens_seen"])
@pytest.mark.parametrize("value", ['"x"', "[1]", "true", "1" * 401])
def test_a_figure_of_a_log_that_is_no_number_is_an_error_of_its_data(tmp_path, name, value):
    log = tmp_path / "metrics.jsonl"
    log.write_text(f'{{"step": 1, "loss_nats": 2}}\n{{"loss_nats": 3, "{name}": {value}}}\n')
    with pytest.raises(DataError, match=f"line 2: field {name}"):
        backtest.replay("runtime.loss-spike", log)


@pytest.mark.parametrize(
    ("gate", "losses"),
    [
        ("evaluation.divergence", [0, 1]),
        ("evaluation.overfit-onset", ["Infinity", "-Infinity"] * 9),
        ("evaluation.overfit-onset", [1e308] * 9),
    ],
)
def test_figures_that_a_gate_cannot_be_computed_from_are_an_error_of_the_data(
    tmp_path, gate, losses
):
    log = tmp_path / "metrics.jsonl"
    lines = ({"step": n, "val_loss_nats": x, "loss_nats": 1} for n, x in enumerate(losses))
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=f"{gate} cannot be computed at step"):
        backtest.replay(gate, log)


def test_a_digest_of_a_checkpoint_in_another_form_is_refused_with_its_field(tmp_path):
    history, path = digest.SaveHistory(), tmp_path / digest.FILE
    saved = history.saved({"step": 3, "group.0.lr": 0.5}, tmp_path)
    assert digest.read(tmp_path) == saved
    history.drawn(torch.ones(2, dtype=torch.int64), 0, 4)
    assert digest.read(tmp_path)["next"]["batch"]
    for text, why in (
        ("[" * 9999, "is not JSON"),
        ("[]", "Input should be"),
        (json.dumps(saved | {"parts": 5}), "field parts"),
        (json.dumps(saved | {"next": {"batch": 1, "random": ""}}), "field next.batch"),
        (json.dumps(saved | {"epoch_batches": None}), "field epoch_batches"),
    ):
        path.write_text(text)
        with pytest.raises(IntegrityError, match=why):
            digest.read(tmp_path)


def test_a_log_and_a_digest_are_not_written_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    for name in ("gates.jsonl", digest.FILE):
        (tmp_path / name).symlink_to(outside)
    with pytest.raises(FileRefused, match="is a link"):
        append_line(tmp_path / "gates.jsonl", {"step": 1})
    digest.SaveHistory().saved({"step": 3}, tmp_path)
    assert not outside.exists() and not (tmp_path / digest.FILE).is_symlink()


def test_lines_are_appended_to_a_log(tmp_path):
    for step in (1, 2):
        append_line(tmp_path / "made" / "gates.jsonl", {"step": step, "loss": float("nan")})
    lines = (tmp_path / "made" / "gates.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": n, "loss": "nan"} for n in (1, 2)]
