"""Console output of a run: preflight table, progress, samples, verdicts, and suggested commands."""

import sys
import time
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.text import Text

from stackproof.cli.output import MARKS, message_of, note, print_table, progress_bar, stderr
from stackproof.contracts.gate import Verdict
from stackproof.distributed.started import resume_command
from stackproof.evaluate.stopping import Decision
from stackproof.spec.gates import Gate
from stackproof.spec.records import Metric, Record
from stackproof.train.step import StepReport
from stackproof.train.trainer import Callback, RestartPoint, Sample, Trainer

PLAIN_LINE_EVERY_S = 10.0
RESULTS = """
    val_loss_nats val_bits_per_byte baseline_bigram_bits_per_byte baseline_unigram_bits_per_byte
    random_loss_nats tokens_seen epochs tokens_per_s train_s gates_overhead_frac
""".split()


class ProgressReporter(Callback):
    """Reports a run on stderr: a live bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, *, quiet: bool = False, next_later: bool = False):
        """With `next_later`, the suggested commands are printed by `show_next`, behind what the
        verb itself has to print.
        """
        self.quiet, self.next_later = quiet, next_later
        self.closed: tuple[Record, Path] | None = None
        self.rows: list[list[Any]] = []
        self.progress: Progress | None = None
        self.last_line_s = 0.0
        self.stage = ""
        self.last_bpb: float | None = None

    def on_phase(self, name: str) -> None:
        self.last_line_s = time.monotonic()
        note(f"· {name}", "dim")

    def on_data(self, progress: Any) -> None:
        if progress.stage != self.stage:
            self.stage = progress.stage
            self.on_phase(progress.stage)

    def on_setup(self, cfg: Any, dataset: Any, n_params: int, run_dir: Path) -> None:
        text = (
            f": {n_params:,} parameters, {dataset.train.n_tokens:,} training tokens of "
            f"{cfg.data.corpus.kind}, {cfg.train.max_steps} steps of "
            f"{cfg.train.tokens_per_step:,} tokens → {run_dir}"
        )
        note(Text.assemble((cfg.recipe, "bold"), text))

    def on_preflight(self, gate: Gate, verdict: Verdict, seconds: float) -> None:
        row = [gate.id, MARKS[verdict.outcome], f"{seconds:.2f} s", message_of(verdict)]
        self.rows.append(row)
        if self._is_due():
            gates = "1 gate" if len(self.rows) == 1 else f"{len(self.rows)} gates"
            note(f"  {gates} checked, the last {gate.id}", "dim")

    def _is_due(self, required: bool = False) -> bool:
        """Whether to print a line now: it is required, or the last one is ten seconds old."""
        now = time.monotonic()
        due = required or now - self.last_line_s > PLAIN_LINE_EVERY_S
        self.last_line_s = now if due else self.last_line_s
        return due

    def _show_preflight(self) -> None:
        if self.rows:
            print_table("Preflight", ["gate", "verdict", "took", "measured"], self.rows, stderr)
            self.rows = []

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        self._show_preflight()
        max_steps = trainer.cfg.train.max_steps
        if sys.stderr.isatty() and not self.quiet:
            self._bar(report, max_steps)
        elif self._is_due(required=report.step in (1, max_steps)):
            note(self._line(report, max_steps))

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
            self.progress = progress_bar()
            self.progress.start()
            self.progress.add_task("", total=max_steps)
        text = self._line(report, max_steps).rsplit("  ETA", 1)[0]
        self.progress.update(self.progress.tasks[0].id, completed=report.step, description=text)

    def on_evaluation(self, trainer: Trainer, report: StepReport, decision: Decision) -> None:
        result, self.last_bpb = report.evaluation, report.evaluation.bits_per_byte
        waited = f"  no significant gain for {decision.wait}" if decision.wait else ""
        loss = f"{result.loss_nats:.4f} ± {result.stderr_nats:.4f} nats/token"
        note(f"  eval @ {report.step}: {loss}, {result.bits_per_byte:.4f} bits/byte{waited}")

    def on_sample(self, trainer: Trainer, sample: Sample) -> None:
        shown = " ".join((sample.prompt + sample.text).split())
        head = f"sample @ {sample.step} (coherence {sample.coherence.score:.0f}/100)"
        note(f"  {head}: {shown[:160]}", "cyan")

    def on_saved(self, trainer: Trainer, point: RestartPoint) -> None:
        note(f"  saved {point.folder}", "dim")

    def on_message(self, text: str) -> None:
        note(f"  {text}")

    def on_close(self, record: Record, run_dir: Path) -> None:
        self._show_preflight()
        if self.progress is not None:
            self.progress.stop()
        rows = [
            [g.id, MARKS[g.verdict] + (" (waived)" if g.waiver else ""), g.checks, message_of(g)]
            for g in record.gates
        ]
        print_table("Gates", ["gate", "verdict", "looks", "last measured"], rows, stderr)
        shown = {name: m for name in RESULTS if (m := record.metrics.get(name))}
        rows = [[name, _value(m), m.unit] for name, m in shown.items()]
        print_table("Result", ["metric", "value", "unit"], rows, stderr)
        colour = "green" if record.succeeded else "red"
        note(f"{record.status}: {record.end_reason}", f"bold {colour}")
        note(f"record {run_dir / 'metadata.json'}  ({record.id})")
        self.closed = record, run_dir
        if not self.next_later:
            self.show_next()

    def show_next(self) -> None:
        """Suggest commands for the run that was closed."""
        if self.closed is None:
            return
        record, run_dir = self.closed
        if record.succeeded:
            note("next", "bold")
            note(f'  stack sample {run_dir} --prompt "The function "')
            note(f"  stack evaluate {run_dir}")
            note(f"  stack inspect {run_dir}")
        elif record.exit_code in (75, 130) and (run_dir / "checkpoints" / "latest").is_file():
            note(f"next  {resume_command(run_dir)}")


def _value(metric: Metric) -> str:
    value = f"{metric.value:,.4f}" if isinstance(metric.value, float) else f"{metric.value:,}"
    return value + (f" ± {metric.stderr:.4f}" if metric.stderr else "")
