"""Console output of a run: preflight table, progress, samples, verdicts, and suggested commands."""

import sys
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from stackproof.cli.output import MARKS, measured_text, stderr, table
from stackproof.contracts.gate import Verdict
from stackproof.evaluate.stopping import Decision
from stackproof.spec.gates import Gate
from stackproof.spec.records import Record
from stackproof.train.step import StepReport
from stackproof.train.trainer import Callback, RestartPoint, Sample, Trainer

PLAIN_LINE_EVERY_S = 10.0


class ProgressReporter(Callback):
    """Reports a run on stderr: a live bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self.rows: list[list[Any]] = []
        self.progress: Progress | None = None
        self.last_line_s = 0.0
        self.stage = ""
        self.last_bpb: float | None = None

    def on_phase(self, name: str) -> None:
        self.last_line_s = time.monotonic()
        stderr.print(f"· {name}", style="dim")

    def on_data(self, progress: Any) -> None:
        if progress.stage != self.stage:
            self.stage = progress.stage
            self.on_phase(progress.stage)

    def on_setup(self, cfg: Any, dataset: Any, n_params: int, run_dir: Path) -> None:
        stderr.print(
            f"[bold]{cfg.recipe}[/]: {n_params:,} parameters, {dataset.train.n_tokens:,} training "
            f"tokens of {cfg.data.corpus.kind}, {cfg.train.max_steps} steps of "
            f"{cfg.train.tokens_per_step:,} tokens → {run_dir}",
            soft_wrap=True,
        )

    def on_preflight(self, gate: Gate, verdict: Verdict, seconds: float) -> None:
        self.rows.append(
            [
                gate.id,
                MARKS[verdict.outcome],
                f"{seconds:.2f} s",
                verdict.message or measured_text(dict(verdict.measured)),
            ]
        )
        if time.monotonic() - self.last_line_s > PLAIN_LINE_EVERY_S:
            self.last_line_s = time.monotonic()
            stderr.print(
                f"  {len(self.rows)} gates checked, the last {gate.id}",
                style="dim",
                markup=False,
                soft_wrap=True,
            )

    def _show_preflight(self) -> None:
        if self.rows:
            stderr.print(table("Preflight", ["gate", "verdict", "took", "measured"], self.rows))
            self.rows = []

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        self._show_preflight()
        max_steps = trainer.cfg.train.max_steps
        if sys.stderr.isatty() and not self.quiet:
            self._bar(report, max_steps)
        elif (
            report.step in (1, max_steps)
            or time.monotonic() - self.last_line_s > PLAIN_LINE_EVERY_S
        ):
            self.last_line_s = time.monotonic()
            stderr.print(self._line(report, max_steps), markup=False, soft_wrap=True)

    def _line(self, report: StepReport, max_steps: int) -> str:
        width = len(str(max_steps))
        eta_s = (max_steps - report.step) * (report.tokens_seen / report.step) / report.tokens_per_s
        bpb = f"  val bits/byte {self.last_bpb:.3f}" if self.last_bpb is not None else ""
        return (
            f"step {report.step:0{width}d}/{max_steps}  loss {report.loss_nats:.3f}{bpb}  lr "
            f"{report.lr:.1e}  grad norm {report.grad_norm:.2f}  tok/s {report.tokens_per_s:.0f}  "
            f"ETA {eta_s:.0f} s"
        )

    def _bar(self, report: StepReport, max_steps: int) -> None:
        if self.progress is None:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TimeRemainingColumn(),
                console=stderr,
            )
            self.progress.start()
            self.progress.add_task("", total=max_steps)
        task = self.progress.tasks[0].id
        self.progress.update(
            task,
            completed=report.step,
            description=self._line(report, max_steps).rsplit("  ETA", 1)[0],
        )

    def on_evaluation(self, trainer: Trainer, report: StepReport, decision: Decision) -> None:
        result, self.last_bpb = report.evaluation, report.evaluation.bits_per_byte
        waited = f"  no significant gain for {decision.wait}" if decision.wait else ""
        loss = f"{result.loss_nats:.4f} ± {result.stderr_nats:.4f} nats/token"
        text = f"  eval @ {report.step}: {loss}, {result.bits_per_byte:.4f} bits/byte{waited}"
        stderr.print(text, markup=False, soft_wrap=True)

    def on_sample(self, trainer: Trainer, sample: Sample) -> None:
        shown = " ".join((sample.prompt + sample.text).split())
        head = f"sample @ {sample.step} (coherence {sample.coherence.score:.0f}/100)"
        stderr.print(f"  {head}: {shown[:160]}", style="cyan", markup=False, soft_wrap=True)

    def on_saved(self, trainer: Trainer, point: RestartPoint) -> None:
        stderr.print(f"  saved {point.folder}", style="dim", markup=False, soft_wrap=True)

    def on_message(self, text: str) -> None:
        stderr.print(f"  {text}", markup=False, soft_wrap=True)

    def on_close(self, record: Record, run_dir: Path) -> None:
        self._show_preflight()
        if self.progress is not None:
            self.progress.stop()
        rows = [
            [
                g.id,
                MARKS[g.verdict] + (" (waived)" if g.waiver else ""),
                g.checks,
                g.message or measured_text(dict(g.measured)),
            ]
            for g in record.gates
        ]
        stderr.print(table("Gates", ["gate", "verdict", "looks", "last measured"], rows))
        self._show_metrics(record)
        stderr.print(
            f"{record.status}: {record.end_reason}",
            style="bold green" if record.succeeded else "bold red",
            markup=False,
        )
        stderr.print(
            f"record {run_dir / 'metadata.json'}  ({record.id})", markup=False, soft_wrap=True
        )
        if record.succeeded:
            stderr.print("next", style="bold")
            for command in (
                f'stack sample {run_dir} --prompt "The function "',
                f"stack evaluate {run_dir}",
                f"stack inspect {run_dir}",
            ):
                stderr.print(f"  {command}", markup=False, soft_wrap=True)
        elif record.exit_code in (75, 130) and (run_dir / "checkpoints" / "latest").is_file():
            stderr.print(f"next  stack train --resume {run_dir}", markup=False)

    def _show_metrics(self, record: Record) -> None:
        wanted = (
            "val_loss_nats val_bits_per_byte baseline_bigram_bits_per_byte "
            "baseline_unigram_bits_per_byte random_loss_nats tokens_seen epochs tokens_per_s "
            "train_s gates_overhead_frac"
        ).split()
        rows = []
        for name in wanted:
            if metric := record.metrics.get(name):
                value = (
                    f"{metric.value:,.4f}"
                    if isinstance(metric.value, float)
                    else f"{metric.value:,}"
                )
                rows.append(
                    [
                        name,
                        value + (f" ± {metric.stderr:.4f}" if metric.stderr else ""),
                        metric.unit,
                    ]
                )
        stderr.print(table("Result", ["metric", "value", "unit"], rows))
