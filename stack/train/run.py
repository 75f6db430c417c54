"""A run while it goes on: what it holds, and the bookkeeping after each step, evaluation,
sample and save.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackproof.config import MixtureOfExperts, ModelConfig, RunConfig
from stackproof.contracts.coherence import coherence
from stackproof.contracts.data import Learned
from stackproof.contracts.events import (
    Evaluated,
    HeldOutRows,
    Looked,
    Recited,
    Recomputed,
    Sampled,
    Saved,
    StepTaken,
)
from stackproof.contracts.gate import Verdict
from stackproof.contracts.keeper import Gatekeeper
from stackproof.contracts.points import Traced
from stackproof.contracts.witness import ModeSeen
from stackproof.data.ingredients import found_in, passages_found
from stackproof.data.prepare import Dataset
from stackproof.data.reader import Batch, batch_hash
from stackproof.evaluate.bits_per_byte import Evaluation, evaluate_batches, evaluating, token_nats
from stackproof.evaluate.recitation import matched, passages
from stackproof.evaluate.sampling import generate
from stackproof.spec.building import RecordBuilder
from stackproof.spec.canonical import sha256_json
from stackproof.spec.records import Artefact
from stackproof.train import checkpoint
from stackproof.train.bundle import Recent, write_bundle
from stackproof.train.digest import gradient_crc32, live_crc32, trained_parts
from stackproof.train.listener import Listener
from stackproof.train.optimizer import peak_lrs
from stackproof.train.points import SHARE_MAX, points_lines, sparse_enough
from stackproof.train.randomness import generator
from stackproof.train.recompute import Computed
from stackproof.train.rundir import RunDir
from stackproof.train.state import TrainState
from stackproof.train.step import StepReport
from stackproof.train.writing import Behind, InLine

SEARCHED_ROWS = 8  # of the held-out rows, evenly spread
# of the training split, in which a suspicious sample is looked for
MAX_SEARCHED_TOKENS = 20_000_000


@dataclass
class Run:
    """Everything one run holds besides its TrainState."""

    cfg: RunConfig
    dir: RunDir
    device: torch.device
    dataset: Dataset
    keeper: Gatekeeper
    builder: RecordBuilder
    listener: Listener
    state: TrainState
    peak_flops: float
    flops_per_step: float
    writer: InLine | Behind
    held_out: list[Batch] = field(default_factory=list)
    n_eval_batches: int = 0  # as preflight found that the stop rule needs
    probes: dict[str, Batch] = field(default_factory=dict)
    random_loss_nats: float = 0.0
    line: dict[str, Any] = field(default_factory=dict)
    process_s: float = 0.0
    trace_s: float = 0.0  # of this process, spent on recording points
    recorded: int = 0  # times that points were, in this process
    inherited_s: float = 0.0  # of a child run, the seconds its parents had trained before
    last_val: Evaluation | None = None
    kept: list[Artefact] = field(default_factory=list)
    begun_at: Path | None = None  # the step folder that the run began from
    recent: Recent = field(default_factory=Recent)
    read: Sequence[Batch] = ()  # the micro-batches of the last step
    # kinds of looking that were held to leave no trace
    looked: set[str] = field(default_factory=set)

    def on_verdict(self, gate_id: str, step: int | None, verdict: Verdict) -> None:
        """Log a verdict; a red one of inside the run leaves a bundle with
        which it can be seen again.
        """
        said = {
            "verdict": verdict.outcome,
            "measured": dict(verdict.measured),
            "message": verdict.message,
        }
        self.dir.log("gates.jsonl", gate=gate_id, step=step, **said)
        if verdict.outcome == "fail" and self.keeper.seats[gate_id].gate.moment == "runtime":
            write_bundle(self, gate_id, step, verdict)

    def after_step(self, report: StepReport, batches: Sequence[Batch], wall_s: float) -> None:
        """Update running numbers, prepare the log line and show the step to the gates."""
        state, self.read = self.state, batches
        state.wall_s += wall_s
        state.update_ema(report.loss_nats)
        self.process_s += wall_s
        n_tokens = sum(b.input_ids.numel() for b in batches)
        self.line = {
            "step": report.step,
            "loss_nats": report.loss_nats,
            "ema_loss_nats": state.ema_loss_nats,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "clipped_grad_norm": report.clipped_grad_norm,
            "tokens_seen": state.tokens_seen,
            "tokens_per_s": n_tokens / wall_s,
            "epoch": batches[-1].epoch,
        }
        self._log_draws(batches)
        self.keeper.observe(Learned(report.step, report.sample_ids))
        resting = tuple(name for name, module in state.model.named_modules() if not module.training)
        self.keeper.observe(ModeSeen(step=report.step, phase="training", wrong=resting))
        self.listener.on_step(self.line, self.cfg.train.max_steps)
        self.keeper.observe(
            StepTaken(
                step=report.step,
                loss_nats=report.loss_nats,
                grad_norm=report.grad_norm,
                clipped_grad_norm=report.clipped_grad_norm,
                max_grad_norm=self.cfg.optim.max_grad_norm,
                lr=report.lr,
                group_lrs=report.group_lrs,
                n_valid_tokens=report.n_valid_tokens,
                n_expected_tokens=n_tokens,
                tokens_seen=state.tokens_seen,
                wall_s=wall_s,
                flops=self.flops_per_step,
                peak_flops=self.peak_flops,
                changed_tensor_frac=report.changed_tensor_frac,
                overflow_retries=report.overflow_retries,
                expert_shares=report.expert_shares,
            )
        )

    def record_points(self, batch: Batch) -> None:
        """Log what every point holds while the model reads a batch of the step to come, where that
        is due. No part of the step's time.
        """
        step, every, started = self.state.step + 1, self.cfg.trace.every, time.perf_counter()
        if every == 0 or step % every:
            return
        with self.looking("trace"):
            lines = points_lines(self.state, batch)
            for line in lines:
                self.dir.log("points.jsonl", step=step, **line)
        self.keeper.observe(Traced(step, {line["point"]: line["stats"] for line in lines}))
        spent = time.perf_counter() - started
        self.trace_s += spent
        # the first is slower: torch warms up, and it is held to leave no trace
        if self.line and self.recorded == 1:
            step_s = self.cfg.train.tokens_per_step / self.line["tokens_per_s"]
            if (enough := sparse_enough(every, spent, step_s)) > every:
                said = f"recording points takes {spent / (step_s * every):.1%} of the time of steps"
                self.listener.on_event(
                    f"{said}; trace.every = {enough} keeps it within {SHARE_MAX:.0%}"
                )
        self.recorded += 1

    def recompute_due(self) -> bool:
        """Whether the step to come is one of those that are computed twice.
        The last one always is.
        """
        step, cfg = self.state.step + 1, self.cfg.train
        return step % cfg.recompute_every == 0 or step == cfg.max_steps

    def compare(self, first: Computed) -> None:
        """Hold the step just taken against what it came to the first time,
        and show it to the gates.
        """
        started = time.perf_counter()
        again = gradient_crc32(self.state.model)
        differing = first.differing(again)
        self.keeper.charge("runtime.recomputed-step", first.seconds + time.perf_counter() - started)
        self.keeper.observe(
            Recomputed(step=self.state.step, n_compared=len(again), differing=differing)
        )

    def _log_draws(self, batches: Sequence[Batch]) -> None:
        """Enter into the data ledger how many rows of which source the step read."""
        names = [s.name for s in self.state.reader.order.sources]
        if len(names) > 1:
            drawn = Counter(names[s] for b in batches for s in b.sources)
            self.dir.log(
                "curriculum.jsonl",
                step=self.state.step,
                event="rows",
                rows=dict(sorted(drawn.items())),
            )

    @contextmanager
    def looking(self, at: str) -> Iterator[None]:
        """What is done inside is to leave the training state as it is;
        the first of each kind in a process is held to it.
        """
        if at in self.looked:
            yield
            return
        self.looked.add(at)
        started = time.perf_counter()
        before, spent = trained_parts(self.state), time.perf_counter() - started
        yield
        started = time.perf_counter()
        after = trained_parts(self.state)
        differing = tuple(
            sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
        )
        self.keeper.charge("evaluation.leaves-no-trace", spent + time.perf_counter() - started)
        self.keeper.observe(
            Looked(step=self.state.step, at=at, n_compared=len(after), differing=differing)
        )

    def evaluate(self) -> bool:
        """Held-out loss on the same batches as always. Returns whether the stop rule says stop."""
        with self.looking("evaluation"):
            return self._evaluate()

    def _evaluate(self) -> bool:
        state, result = self.state, self.measure()
        previous, state.last_val_nats = state.last_val_nats, result.loss_nats
        self.last_val = result
        decision = state.stopper.update(result.batch_nats)
        if result.loss_nats < state.best.get("val_loss_nats", float("inf")):
            state.best = {"step": state.step, "val_loss_nats": result.loss_nats}
        self.line |= {
            "val_loss_nats": result.loss_nats,
            "val_bits_per_byte": result.bits_per_byte,
            "val_stderr_nats": result.stderr_nats,
        }
        self.listener.on_evaluation(state.step, result, decision)
        self.keeper.observe(
            Evaluated(
                step=state.step,
                loss_nats=result.loss_nats,
                bits_per_byte=result.bits_per_byte,
                batch_nats=tuple(result.batch_nats),
                batch_hash=batch_hash(self.held_out),
                previous_loss_nats=previous,
                random_loss_nats=self.random_loss_nats,
                train_loss_nats=state.ema_loss_nats,
                pretrained=self.cfg.recipe == "imported",
                best_step=state.best.get("step"),
                best_loss_nats=state.best.get("val_loss_nats"),
                rows=self.held_out_rows,
            )
        )
        self.recite()
        return decision.stop

    def held_out_rows(self) -> HeldOutRows:
        """What the held-out batches are made of, held against the training split."""
        rows = [row for batch in self.held_out for row in batch.input_ids.tolist()]
        few = rows[:: max(1, len(rows) // SEARCHED_ROWS)]
        found = passages_found(few, self.dataset.train, 10 * MAX_SEARCHED_TOKENS)
        numbers = [n for batch in self.held_out for n in batch.sample_ids]
        reach = (max(numbers) - min(numbers) + 1) / self.dataset.validation.n_windows(
            self.cfg.model.max_seq_len
        )
        return HeldOutRows(len(rows), len({tuple(row) for row in rows}), found, reach)

    def recite(self) -> None:
        """Ask the model for the second half of passages it was trained on, log how many it knows by
        heart and show it to the gates.
        """
        read, unread = passages(self.read), passages(self.held_out)
        tokens = self._matched(read)
        asked = read.shape[1] - read.shape[1] // 2
        average = sum(tokens) / max(1, len(tokens))
        self.line |= {
            "passages": len(tokens),
            "recited": tokens.count(asked),
            "matched_tokens": average,
        }
        self.keeper.observe(
            Recited(
                step=self.state.step,
                n_windows=len(tokens),
                n_recited=tokens.count(asked),
                prefix_tokens=read.shape[1] // 2,
                matched_tokens=average,
                n_held_out=len(unread),
                held_out=lambda: self._matched(unread).count(asked),
            )
        )

    def _matched(self, ids_NW: Tensor) -> list[int]:
        return matched(self.state.model, ids_NW, device=self.device, autocast=self.state.autocast)

    def probe(self) -> None:
        """Measure the held-out loss of every source, end the bandit's turn with it,
        and log both.
        """
        sizes = self.dataset.tokenizer.token_bytes
        evaluated = {
            source: evaluate_batches(
                self.state.model, [batch], sizes, device=self.device, autocast=self.state.autocast
            ).loss_nats
            for source, batch in self.probes.items()
        }
        self.dir.log(
            "curriculum.jsonl",
            step=self.state.step,
            event="turn",
            **self.state.reader.order.reward(evaluated),
        )

    def measure(self) -> Evaluation:
        """Held-out loss, without telling anyone."""
        sizes = self.dataset.tokenizer.token_bytes
        return evaluate_batches(
            self.state.model, self.held_out, sizes, device=self.device, autocast=self.state.autocast
        )

    def sample(self) -> None:
        """Draw a text, score it, log it and show it to the gates."""
        with self.looking("sample"):
            self._sample()

    def _sample(self) -> None:
        cfg, step = self.cfg.sample, self.state.step
        tokenizer = self.dataset.tokenizer
        prompt_ids = [tokenizer.eos_id, *tokenizer.encode(cfg.prompt).ids]
        ids = generate(
            self.state.model,
            prompt_ids,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=1.0,
            repetition_penalty=1.0,
            generator=generator(self.cfg.seed, "sample", step),
            eos_id=None,
        )
        text, loss_nats = tokenizer.decode(ids), self.own_loss(prompt_ids, ids)
        score = coherence(text, cfg.language)
        line = {
            "text": text,
            "score": score.score,
            "loss_nats": loss_nats,
            "parts": dict(score.parts),
        }
        self.dir.log("samples.jsonl", step=step, prompt=cfg.prompt, **line)
        self.listener.on_sample(step, cfg.prompt, text, score.score)
        self.keeper.observe(
            Sampled(
                step=step,
                text=text,
                prompt=cfg.prompt,
                language=cfg.language,
                loss_nats=loss_nats,
                found_in_corpus=lambda: self.found_in_corpus(ids),
            )
        )

    def found_in_corpus(self, ids: Sequence[int]) -> float:
        """Share of a text's runs of about 60 bytes that stand in the training split."""
        return found_in(ids, self.dataset.train, MAX_SEARCHED_TOKENS)

    def own_loss(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> float:
        """Mean loss of the model on what it drew itself, nats per token, at temperature 1."""
        context = torch.tensor([*prompt_ids, *ids])[-self.cfg.model.max_seq_len - 1 :]
        n = min(len(ids), len(context) - 1)
        with evaluating(self.state.model), self.state.autocast():
            logits_TV = self.state.model(context[None, :-1].to(self.device))[0, -n:]
        return float(token_nats(logits_TV[None], context[None, -n:].to(self.device)).mean())

    def save(self) -> None:
        """Hand a checkpoint of this step to the writer, after the one before it is done."""
        self.writer.settle()
        with self.looking("save"):
            self._save()

    def _save(self) -> None:
        state = self.state
        document = checkpoint.state_document(
            state,
            tokenizer_sha256=self.dataset.tokenizer.sha256,
            vocab_size=self.dataset.tokenizer.vocab_size,
            gates=self.keeper.state_dict(),
            record=self.builder.id,
        )
        snapshot = checkpoint.capture(state, document, copied=self.writer.copied)
        is_best = state.best.get("step") == state.step
        self.writer.start(
            partial(self._write, snapshot, live_crc32(state), is_best),
            partial(self._written, state.step, self.plan(), document["gates"]),
        )
        self.keeper.observe(Saved(step=state.step, path=str(self.dir.checkpoints / snapshot.name)))

    def _write(self, snapshot: checkpoint.Snapshot, live: dict[str, int], is_best: bool) -> Path:
        """Write a checkpoint, let the artifact gates judge it, move the pointers.
        Touches nothing that a training step touches.
        """
        folder = checkpoint.write(self.dir.checkpoints, snapshot)
        self.keeper.artifact(
            {"checkpoint_dir": folder, "live_crc32": live, "expected_step": snapshot.step},
            step=snapshot.step,
        )
        if is_best:
            checkpoint.point(self.dir.checkpoints, "best", folder)
        return folder

    def _written(
        self, step: int, plan: dict[str, Any], gates: dict[str, Any], folder: Path
    ) -> None:
        """Delete what is no longer kept, and say that a run could go on from here."""
        checkpoint.retain(self.dir.checkpoints, self.cfg.checkpoint.keep)
        self.listener.on_saved(step, folder)
        self.recent.begin(folder, step, plan, gates, continued=True)

    def on_checkpoint_asked(self) -> None:
        every = self.cfg.checkpoint.signal_boundary
        self.listener.on_event(
            f"a checkpoint was asked for; it comes after a multiple of {every} steps, or with the "
            "last one"
        )

    def flush_line(self) -> None:
        """Write the step's line to metrics.jsonl, at the declared interval and
        whenever it holds an evaluation.
        """
        due = (
            self.state.step % self.cfg.train.log_every == 0
            or "val_loss_nats" in self.line
            or self.state.step == self.cfg.train.max_steps
        )
        if self.line and due:
            self.dir.log("metrics.jsonl", **self.line)

    def plan(self) -> dict[str, Any]:
        """What the run declares to its gates."""
        cfg, order = self.cfg, self.state.reader.order
        rows_per_step = cfg.train.tokens_per_step // cfg.model.max_seq_len
        return {
            "peak_lr": cfg.optim.lr,
            "peak_lrs": peak_lrs(cfg.optim),
            "schedule": cfg.schedule.model_dump(),
            "warmup_steps": cfg.schedule.warmup_steps,
            "max_steps": cfg.train.max_steps,
            "tokens_per_step": cfg.train.tokens_per_step,
            "tokens_seen": self.state.tokens_seen,
            "rows_per_step": rows_per_step,
            "cursor": self.state.reader.cursor,
            "sources": [
                {k: getattr(s, k) for k in ("name", "first", "n_windows", "cap", "floor")}
                for s in order.sources
            ],
            "order": sha256_json(
                [
                    cfg.seed,
                    cfg.model.max_seq_len,
                    self.dataset.manifest["splits"]["train"],
                    cfg.data.packing.kind,
                ]
            ),
            "drawn": order.counts(self.state.reader.cursor).tolist(),
            "warmup_rows": cfg.curriculum.warmup_steps * rows_per_step,
            "warmup_sources": list(cfg.curriculum.warmup_sources),
            "random_loss_nats": self.random_loss_nats,
            "n_eval_batches": self.n_eval_batches,
            "intervals": {
                "Evaluated": (cfg.eval.every, "eval.every"),
                "Sampled": (cfg.sample.every, "sample.every"),
                "Saved": (cfg.checkpoint.every, "checkpoint.every"),
                "Recomputed": (cfg.train.recompute_every, "train.recompute_every"),
            },
            **_experts(cfg.model),
        }


def _experts(model: ModelConfig) -> dict[str, int]:
    """What a mixture of experts declares to its gates; nothing for other models."""
    match model.ffn:
        case MixtureOfExperts(n_experts=n_experts, top_k=top_k):
            return {"expert_layers": model.n_layers, "n_experts": n_experts, "top_k": top_k}
    return {}
