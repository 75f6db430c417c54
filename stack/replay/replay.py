"""Replays a repro bundle: restores its state, runs the training steps on its rows, and checks the
failed gate.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from stackproof import tensorfile
from stackproof.config import RunConfig, recorded_config
from stackproof.contracts.events import (
    ActivationsTraced,
    Evaluated,
    HeldOutRows,
    Resumed,
    Sampled,
    Started,
)
from stackproof.contracts.gate import Verdict, not_run
from stackproof.contracts.keeper import Gatekeeper
from stackproof.data.data_loader import Batch
from stackproof.data.packing import IGNORE_INDEX
from stackproof.data.tokenizer import load_tokenizer
from stackproof.evidence import repro
from stackproof.spec.canonical import to_jsonable
from stackproof.spec.errors import DataError, GateFailed, IntegrityError
from stackproof.spec.gates import load_spec
from stackproof.train import checkpoint, checkpoint_writer, loop
from stackproof.train.callbacks import GateEvents, PointTracing, SdcCheck
from stackproof.train.device import kernels_of, resolve_device
from stackproof.train.memory import predict_bytes, require_free
from stackproof.train.rng import default_rng_state
from stackproof.train.run_dir import RunDir
from stackproof.train.start import restoring
from stackproof.train.state import TrainState, state_around
from stackproof.train.trainer import CallbackList, RunOutput, Trainer

PARTS = ("input_ids", "labels", "document_ids")
# Of one sample. Every other number of a bundle's configuration is bounded by its rows or by memory.
MAX_SAMPLE_TOKENS = 2**14


class RecordedRows:
    """Data loader of a replay: returns the rows of a bundle in order,
    each with the position after it.
    """

    def __init__(self, batches: list[tuple[Batch, int]], plan: repro.Plan):
        self.batches, self.cursor = list(batches), plan.cursor
        self.sampler = SimpleNamespace(sources=plan.sources, load_state_dict=lambda state: [])

    def next_batch(self) -> Batch:
        """The next rows. Raises DataError after the last ones."""
        if not self.batches:
            raise DataError(
                "the bundle has no more rows: this code draws more rows than the run did"
            )
        batch, self.cursor = self.batches.pop(0)
        return batch


@dataclass(frozen=True)
class RecordedText:
    """Results of reading the training split, as the bundle recorded them: a bundle holds no
    corpus.
    """

    found: float
    found_in_training: float
    compressed_bits: float

    def found_frac(self, ids: Sequence[int]) -> float:
        return self.found

    def held_out_rows(self, batches: Sequence[Batch]) -> HeldOutRows:
        rows = [tuple(row) for batch in batches for row in batch.input_ids.tolist()]
        return HeldOutRows(len(rows), len(set(rows)), self.found_in_training)

    def compressed(self, batches: Sequence[Batch]) -> float:
        return self.compressed_bits


@dataclass(frozen=True)
class Outcome:
    """Result of a replay. `same`: the measurements equal those in the bundle, digit by digit."""

    reproduced: bool
    step: int | None
    verdict: Verdict | None
    same: bool
    same_random_state: bool | None


def replay(
    folder: Path, *, device: str | None = None, base: Path | None = None
) -> tuple[repro.Bundle, Outcome]:
    """Replay the bundle's steps until its gate fails again, or the last step is over.

    Arguments and errors are those of `replaying`.
    """
    red: list[tuple[int, Verdict]] = []
    note = lambda gate, step, verdict: red.append((step, verdict))  # noqa: E731
    with replaying(folder, device=device, base=base, on_verdict=note) as (bundle, trainer):
        return bundle, _play(folder, bundle, trainer, red)


@contextmanager
def replaying(
    folder: Path,
    *,
    device: str | None = None,
    base: Path | None = None,
    on_verdict: Callable = lambda *_: None,
) -> Iterator[tuple[repro.Bundle, Trainer]]:
    """A trainer at the state where the bundle's replay begins;
    `take_replayed_step` continues from there.

    `base` is the step folder if the bundle only names one. Reads nothing outside the folder and
    writes nothing. Uses the kernels of the bundle on its kind of device, the default ones on
    another. Raises DataError if the bundle is not sufficient, IntegrityError if it was changed,
    EnvironmentUnfit if the device is not available.
    """
    bundle = repro.read_bundle(folder)
    _refuse_unreplayable(bundle, base)
    place, threads = resolve_device(device or bundle.device), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(bundle.threads)
    kernels = (
        kernels_of(recorded_config(bundle.config), place, bundle.environment)
        if place.type == bundle.device
        else nullcontext()
    )
    try:
        with (
            kernels,
            torch.random.fork_rng(devices=[place] if place.type == "cuda" else []),
            tempfile.TemporaryDirectory() as scratch,
        ):
            tensors = _tensors(folder / repro.TENSORS)
            trainer = _open(folder, bundle, tensors, place, RunDir(Path(scratch)), on_verdict)
            with suppress(GateFailed):
                _begin(
                    trainer,
                    bundle,
                    folder / repro.CHECKPOINT if bundle.base.kind == "checkpoint" else base,
                )
            yield bundle, trainer
    finally:
        torch.set_num_threads(threads)


def _refuse_unreplayable(bundle: repro.Bundle, base: Path | None) -> None:
    if bundle.gate not in load_spec().gates:
        raise IntegrityError(
            f"gate {bundle.gate} does not exist in this version",
            next_step=f"use the code of the bundle: {bundle.code.commit}",
        )
    if bundle.lacking and not (bundle.base.kind == "elsewhere" and base):
        raise DataError(
            f"the bundle is not sufficient: {bundle.lacking}",
            value=bundle.base.path or None,
            allowed="a bundle with its initial state and all rows since",
            next_step=("stack gates repro BUNDLE --base STEP_FOLDER, if only the state is missing"),
        )


def _play(
    folder: Path, bundle: repro.Bundle, trainer: Trainer, red: list[tuple[int, Verdict]]
) -> Outcome:
    random_state = None
    try:
        for step in () if red else (s.step for s in bundle.steps):
            if step == bundle.step:
                tensors = _tensors(folder / repro.TENSORS)
                random_state = all(
                    torch.equal(t, tensors[n])
                    for n, t in default_rng_state().items()
                    if n in tensors
                )
            take_replayed_step(trainer, bundle)
            if red:
                break
    except GateFailed:
        pass
    if not red:
        return Outcome(False, None, trainer.keeper.states[bundle.gate].verdict, False, random_state)
    step, verdict = red[0]
    now, then = ({k: _plain(v) for k, v in m.items()} for m in (verdict.measured, bundle.measured))
    return Outcome(True, step, verdict, now == then and step == bundle.step, random_state)


def _plain(value: Any) -> Any:
    """A value after a round trip through JSON; a non-finite number becomes text."""
    value = to_jsonable(value)
    return (
        {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(value, value)
        if isinstance(value, str)
        else value
    )


def _begin(trainer: Trainer, bundle: repro.Bundle, base: Path | None) -> None:
    """Load the state of the model and the gate at the start of the replay."""
    state, keeper = trainer.state, trainer.keeper
    if base is not None:
        loaded = checkpoint.load(base)
        with restoring(loaded), torch.no_grad():
            checkpoint.restore(state, loaded)
    if state.step != bundle.base.step:
        raise DataError(
            f"{base} is the state after step {state.step}",
            allowed=f"the state after step {bundle.base.step}",
        )
    gates = {name: gate.model_dump() for name, gate in bundle.gates.items()}
    keeper.load_state_dict(gates)
    _require_held_out(trainer, bundle)
    # The outcome of a replay shows what it measured itself, never the run's last verdict.
    keeper.states[bundle.gate].verdict = not_run("the check was not called")
    if bundle.continued:
        keeper.observe(Resumed(step=state.step, path=str(base), cursor=state.data_loader.cursor))
    keeper.observe(Started(step=state.step, plan=bundle.plan.model_dump()))


def _require_held_out(trainer: Trainer, bundle: repro.Bundle) -> None:
    """Raises IntegrityError unless a gate that judges evaluations has the held-out rows of the run
    before it.
    """
    if Evaluated not in trainer.keeper.states[bundle.gate].watcher.events:
        return
    stopper, wanted = trainer.state.stopper, bundle.plan.n_eval_batches
    if not wanted or bundle.n_held_out != wanted or not stopper.compares(wanted):
        raise IntegrityError(
            f"the bundle of {bundle.gate} has other held-out rows than its run",
            value=f"{bundle.n_held_out} batches",
            allowed=f"{wanted} of the plan, and as many in the evaluations before",
            next_step=repro.COPY_AGAIN,
        )


def take_replayed_step(trainer: Trainer, bundle: repro.Bundle) -> None:
    """One step, and the evaluation or sample after it if the gate checks them and the run had
    one.
    """
    loop.take_step(trainer)
    watched = trainer.keeper.states[bundle.gate].watcher.events
    step, cfg = trainer.state.step, trainer.cfg
    for event, every, phase in (
        (Evaluated, cfg.eval.every, loop.evaluate),
        (Sampled, cfg.sample.every, loop.sample),
    ):
        was_last = step == bundle.step and bundle.event == event.__name__
        if event in watched and (was_last or step % every == 0 or step == cfg.train.max_steps):
            phase(trainer)


def _open(
    folder: Path,
    bundle: repro.Bundle,
    tensors: dict[str, Tensor],
    device: torch.device,
    directory: RunDir,
    on_verdict: Callable,
) -> Trainer:
    cfg, tokenizer = recorded_config(bundle.config), load_tokenizer(folder / repro.TOKENIZER)
    if tokenizer.vocab_size != bundle.vocab_size:
        raise IntegrityError(
            f"{folder / repro.DOCUMENT}: field vocab_size is not that of {repro.TOKENIZER}",
            value=bundle.vocab_size,
            allowed=str(tokenizer.vocab_size),
            next_step=repro.COPY_AGAIN,
        )
    needed = predict_bytes(cfg, bundle.vocab_size)["peak"]
    require_free(needed, f"the replay of {folder}", device)
    only = (bundle.gate,)
    keeper = Gatekeeper(
        load_spec(),
        kind="train",
        only=only,
        config=bundle.config,
        on_verdict=on_verdict,
    )
    if bundle.gate not in keeper.states:
        raise IntegrityError(
            f"gate {bundle.gate} does not apply to runs of this configuration", value=bundle.record
        )
    samples = Sampled in keeper.states[bundle.gate].watcher.events
    if samples and cfg.sample.max_new_tokens > MAX_SAMPLE_TOKENS:
        raise IntegrityError(
            f"{folder / repro.DOCUMENT}: config.sample.max_new_tokens is above what a replay draws",
            value=cfg.sample.max_new_tokens,
            allowed=f"at most {MAX_SAMPLE_TOKENS}",
            next_step="repeat the run with fewer sample.max_new_tokens",
        )
    measured = [float(bundle.measured.get(k) or 0.0) for k in repro.FROM_CORPUS]
    callbacks = [GateEvents(RecordedText(*measured)), SdcCheck()]
    if any(ActivationsTraced in state.watcher.events for state in keeper.states.values()):
        callbacks.insert(0, PointTracing())
    return Trainer(
        state=open_state(cfg, bundle, tensors, device),
        dataset=SimpleNamespace(tokenizer=tokenizer),
        output=RunOutput(directory, record=None, writer=checkpoint_writer.SyncWriter()),
        keeper=keeper,
        callbacks=CallbackList(callbacks),
        peak_flops=bundle.peak_flops,
        flops_per_step=bundle.flops_per_step,
        held_out=[
            _batch(tensors, f"held_out.{i}", _NOWHERE, cfg, bundle.vocab_size)
            for i in range(bundle.n_held_out)
        ],
    )


def open_state(
    cfg: RunConfig, bundle: repro.Bundle, tensors: dict[str, Tensor], device: torch.device
) -> TrainState:
    """A fresh training state that draws the rows of the bundle."""
    rows = []
    for step in bundle.steps:
        after = [*(b.cursor_after for b in step.batches[:-1]), step.cursor]
        rows += [
            (_batch(tensors, f"step-{step.step:08d}.{i}", b, cfg, bundle.vocab_size), after[i])
            for i, b in enumerate(step.batches)
        ]
    return state_around(
        cfg,
        bundle.vocab_size,
        RecordedRows(rows, bundle.plan),
        device,
    )


_NOWHERE = repro.MicroBatch(sample_ids=(), epoch=0, cursor_before=0, cursor_after=0)


def _batch(
    tensors: dict[str, Tensor],
    name: str,
    meta: repro.MicroBatch,
    cfg: RunConfig,
    vocab_size: int,
) -> Batch:
    """The rows (R, T) of one micro-step. Raises IntegrityError for rows that no run draws."""
    rows = {part: t for part in PARTS if (t := tensors.get(f"{name}.{part}")) is not None}
    forms = {part: f"{str(t.dtype)[6:]} {tuple(t.shape)}" for part, t in rows.items()}
    ids, labels = rows.get("input_ids"), rows.get("labels")
    n_most = max(cfg.train.micro_batch_size, cfg.eval.batch_size)
    if (
        ids is None
        or labels is None
        or ids.dim() != 2
        or not ids.numel()
        or set(forms.values()) != {f"int32 {tuple(ids.shape)}"}
    ):
        wrong = f"are {forms}"
    elif len(ids) > n_most:
        wrong = f"are {len(ids)}, the configuration draws at most {n_most}"
    elif ids.shape[1] > cfg.model.max_seq_len:
        wrong = f"have {ids.shape[1]} tokens, the model takes {cfg.model.max_seq_len}"
    elif not (_within(ids, vocab_size) and _within(labels[labels != IGNORE_INDEX], vocab_size)):
        wrong = f"hold an id outside the vocabulary of {vocab_size}"
    elif {len(meta.sample_ids), len(meta.sources), len(meta.epochs)} - {0, len(ids)}:
        wrong = f"are {len(ids)}, the document describes another number"
    else:
        return Batch(**{part: t.long() for part, t in rows.items()}, **dict(meta))
    raise IntegrityError(
        f"the rows {name} of {repro.TENSORS} {wrong}",
        allowed="input_ids and labels, int32 (rows, tokens), and document_ids of the same shape",
        next_step=repro.COPY_AGAIN,
    )


def _within(ids: Tensor, vocab_size: int) -> bool:
    return bool(((ids >= 0) & (ids < vocab_size)).all())


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a bundle. Raises IntegrityError for a damaged file."""
    try:
        tensorfile.read_header(path)
        return safetensors.torch.load_file(path)
    except (OSError, tensorfile.BadTensorFile) as e:
        raise IntegrityError(f"cannot read {path}: {e}", next_step=repro.COPY_AGAIN) from e
