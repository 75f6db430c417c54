"""Replays a repro bundle: the state it holds, the rows it holds, the run's own steps,
and one gate that looks.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from stackproof.config import RunConfig, validate
from stackproof.contracts.events import Evaluated, HeldOutRows, Resumed, Sampled, Started
from stackproof.contracts.gate import Verdict
from stackproof.contracts.keeper import Gatekeeper
from stackproof.contracts.points import Traced
from stackproof.data.reader import Batch
from stackproof.data.tokenizer import load_tokenizer
from stackproof.evidence import repro
from stackproof.spec.canonical import to_jsonable
from stackproof.spec.errors import DataError, GateFailed, IntegrityError
from stackproof.spec.gates import load_spec
from stackproof.train import checkpoint, loop
from stackproof.train.kernels import kernels_of
from stackproof.train.listener import Listener
from stackproof.train.randomness import default_rng_state
from stackproof.train.run import Run
from stackproof.train.rundir import RunDir
from stackproof.train.session import resolve_device
from stackproof.train.state import TrainState, state_around
from stackproof.train.writing import InLine


class Recorded:
    """Stands in for the reader of a run: gives out rows of a bundle, in their order,
    each with the position after it.
    """

    def __init__(self, batches: list[tuple[Batch, int]], sources: list[dict], cursor: int):
        self.batches, self.cursor = list(batches), cursor
        names = [SimpleNamespace(**s) for s in sources]
        self.order = SimpleNamespace(sources=names, load_state_dict=lambda state: [])

    def draw(self) -> Batch:
        """The next rows. Raises DataError when there are none."""
        if not self.batches:
            raise DataError(
                "the bundle holds no further rows: this code draws more than the run did"
            )
        batch, self.cursor = self.batches.pop(0)
        return batch


@dataclass
class Replayed(Run):
    """A run of recorded rows. What stands in the corpus is taken from the bundle,
    which holds no corpus.
    """

    found_frac: float = 0.0
    found_in_training_frac: float = 0.0

    def found_in_corpus(self, ids: list[int]) -> float:
        return self.found_frac

    def record_points(self, batch: Batch) -> None:
        """Only where the gate looks at points: to record them changes nothing else."""
        if any(Traced in seat.watcher.events for seat in self.keeper.seats.values()):
            super().record_points(batch)

    def held_out_rows(self) -> HeldOutRows:
        rows = [tuple(row) for batch in self.held_out for row in batch.input_ids.tolist()]
        return HeldOutRows(len(rows), len(set(rows)), self.found_in_training_frac)


@dataclass(frozen=True)
class Outcome:
    """What a replay showed. `same` says that what was measured equals what the bundle holds,
    digit by digit.
    """

    reproduced: bool
    step: int | None
    verdict: Verdict | None
    same: bool
    same_random_state: bool | None


def replay(
    folder: Path, *, device: str | None = None, base: Path | None = None
) -> tuple[repro.Bundle, Outcome]:
    """Go from the bundle's state through its steps until its gate is red again,
    or its last step is over.

    Arguments and errors are those of `replaying`.
    """
    red: list[tuple[int, Verdict]] = []
    with replaying(
        folder,
        device=device,
        base=base,
        on_verdict=lambda gate, step, verdict: red.append((step, verdict)),
    ) as (bundle, run):
        return bundle, _play(folder, bundle, run, red)


@contextmanager
def replaying(
    folder: Path,
    *,
    device: str | None = None,
    base: Path | None = None,
    on_verdict: Callable = lambda *_: None,
) -> Iterator[tuple[repro.Bundle, Run]]:
    """A run that stands where the bundle's replay begins; `take_replayed_step` goes on from there.

    `base` is the step folder where the bundle only names one. Nothing outside the folder is read,
    nothing is written. On the bundle's kind of device its kernels are used, on another the default
    ones of that.
    Raises DataError if the bundle lacks what is needed, IntegrityError if it was changed,
    EnvironmentUnfit without its device.
    """
    bundle = repro.read_bundle(folder)
    _refuse_unreplayable(bundle, base)
    place, threads = resolve_device(device or bundle.device), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(bundle.threads)
    kernels = (
        kernels_of(validate(bundle.config), place, bundle.environment)
        if place.type == bundle.device
        else nullcontext()
    )
    try:
        with (
            kernels,
            torch.random.fork_rng(devices=[place] if place.type == "cuda" else []),
            tempfile.TemporaryDirectory() as scratch,
        ):
            tensors = safetensors.torch.load_file(folder / repro.TENSORS)
            run = _open(folder, bundle, tensors, place, RunDir(Path(scratch)), on_verdict)
            with suppress(GateFailed):
                _begin(
                    run,
                    bundle,
                    folder / repro.CHECKPOINT if bundle.base.kind == "checkpoint" else base,
                )
            yield bundle, run
    finally:
        torch.set_num_threads(threads)


def _refuse_unreplayable(bundle: repro.Bundle, base: Path | None) -> None:
    if bundle.gate not in load_spec().gates:
        raise IntegrityError(
            f"there is no gate {bundle.gate} any more",
            next_step=f"use the code of the bundle: {bundle.code.commit}",
        )
    if bundle.lacking and not (bundle.base.kind == "elsewhere" and base):
        raise DataError(
            f"the bundle does not suffice: {bundle.lacking}",
            value=bundle.base.path or None,
            allowed="a bundle that holds its state and all rows since",
            next_step=(
                "stack gates repro BUNDLE --base STEP_FOLDER, where only the state is lacking"
            ),
        )


def _play(folder: Path, bundle: repro.Bundle, run: Run, red: list[tuple[int, Verdict]]) -> Outcome:
    random_state = None
    try:
        for step in () if red else (s.step for s in bundle.steps):
            if step == bundle.step:
                tensors = safetensors.torch.load_file(folder / repro.TENSORS)
                random_state = all(
                    torch.equal(t, tensors[n])
                    for n, t in default_rng_state().items()
                    if n in tensors
                )
            take_replayed_step(run, bundle)
            if red:
                break
    except GateFailed:
        pass
    if not red:
        return Outcome(False, None, run.keeper.seats[bundle.gate].verdict, False, random_state)
    step, verdict = red[0]
    now, then = ({k: _plain(v) for k, v in m.items()} for m in (verdict.measured, bundle.measured))
    return Outcome(True, step, verdict, now == then and step == bundle.step, random_state)


def _plain(value: Any) -> Any:
    """As JSON gives it back; what is not finite is text in either form."""
    value = to_jsonable(value)
    return (
        {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(value, value)
        if isinstance(value, str)
        else value
    )


def _begin(run: Run, bundle: repro.Bundle, base: Path | None) -> None:
    """The state, and what the gate knew, where the replay begins."""
    if base is not None:
        with torch.no_grad():
            checkpoint.restore(run.state, checkpoint.load(base))
    if run.state.step != bundle.base.step:
        raise DataError(
            f"{base} is the state after step {run.state.step}",
            allowed=f"that after step {bundle.base.step}",
        )
    run.keeper.load_state_dict(bundle.gates)
    if bundle.continued:
        run.keeper.observe(
            Resumed(step=run.state.step, path=str(base), cursor=run.state.reader.cursor)
        )
    run.keeper.observe(Started(step=run.state.step, plan=bundle.plan))


def take_replayed_step(run: Run, bundle: repro.Bundle) -> None:
    """One step of the run, with the evaluation or sample after it where the gate watches
    them and the run had one.
    """
    loop.take_step(run)
    watched = run.keeper.seats[bundle.gate].watcher.events
    step, cfg = run.state.step, run.cfg
    for event, every, look in (
        (Evaluated, cfg.eval.every, run.evaluate),
        (Sampled, cfg.sample.every, run.sample),
    ):
        was_last = step == bundle.step and bundle.event == event.__name__
        if event in watched and (was_last or step % every == 0 or step == cfg.train.max_steps):
            look()


def _open(
    folder: Path,
    bundle: repro.Bundle,
    tensors: dict[str, Tensor],
    device: torch.device,
    directory: RunDir,
    on_verdict: Callable,
) -> Run:
    cfg, tokenizer = validate(bundle.config), load_tokenizer(folder / repro.TOKENIZER)
    keeper = Gatekeeper(
        load_spec(),
        kind="train",
        runner="resume",
        only=(bundle.gate,),
        config=bundle.config,
        on_verdict=on_verdict,
    )
    if bundle.gate not in keeper.seats:
        raise IntegrityError(
            f"gate {bundle.gate} is not asked in runs of this configuration", value=bundle.record
        )
    state = open_state(cfg, bundle, tensors, device)
    held_out = [_batch(tensors, f"held_out.{i}", _NOWHERE) for i in range(bundle.n_held_out)]
    return Replayed(
        cfg=cfg,
        dir=directory,
        device=device,
        dataset=SimpleNamespace(tokenizer=tokenizer),
        keeper=keeper,
        builder=None,
        listener=Listener(),
        state=state,
        peak_flops=bundle.peak_flops,
        flops_per_step=bundle.flops_per_step,
        writer=InLine(),
        held_out=held_out,
        random_loss_nats=bundle.plan["random_loss_nats"],
        found_frac=float(bundle.measured.get("found_frac") or 0.0),
        found_in_training_frac=float(bundle.measured.get("found_in_training_frac") or 0.0),
    )


def open_state(
    cfg: RunConfig, bundle: repro.Bundle, tensors: dict[str, Tensor], device: torch.device
) -> TrainState:
    """A fresh state that reads the bundle's rows."""
    rows = []
    for step in bundle.steps:
        after = [*(b.cursor_after for b in step.batches[:-1]), step.cursor]
        rows += [
            (_batch(tensors, f"step-{step.step:08d}.{i}", b), after[i])
            for i, b in enumerate(step.batches)
        ]
    return state_around(
        cfg,
        bundle.vocab_size,
        Recorded(rows, bundle.plan["sources"], bundle.plan["cursor"]),
        device,
    )


_NOWHERE = repro.MicroBatch(sample_ids=(), epoch=0, cursor_before=0, cursor_after=0)


def _batch(tensors: dict[str, Tensor], name: str, meta: repro.MicroBatch) -> Batch:
    rows = {part: tensors[f"{name}.{part}"].long() for part in ("input_ids", "labels")}
    documents = tensors.get(f"{name}.document_ids")
    return Batch(
        **rows, **dict(meta), document_ids=None if documents is None else documents.to(torch.int64)
    )
