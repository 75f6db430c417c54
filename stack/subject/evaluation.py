"""How a run scores held-out text, and its stop rule."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from stackproof.contracts.subject import Evaluation, MicroBatch, Stopping
from stackproof.data.data_loader import Batch, eval_batches, model_inputs
from stackproof.evaluate import bits_per_byte, stopping
from stackproof.spec.errors import DataError
from stackproof.subject.run import RunParts, small_run
from stackproof.train import losses
from stackproof.train import step as steps
from stackproof.train.state import TrainState, build_state

MAX_SCORED_TOKENS = 48  # of a window, so that a short text takes several
PROBE_WINDOWS = 24


class RunEvaluation(RunParts, Evaluation):
    """The evaluation of a run, on its device."""

    def score_text(
        self, model: nn.Module, tokenizer: Any, text: str
    ) -> bits_per_byte.TextEvaluation:
        seq_len = min(self.cfg.model.max_seq_len, MAX_SCORED_TOKENS)
        stride = max(1, seq_len // 3)
        return bits_per_byte.evaluate_text(
            model, tokenizer, [text], seq_len=seq_len, stride=stride, device=self.device
        )

    def score_batches(
        self, model: nn.Module, batches: Sequence[MicroBatch]
    ) -> bits_per_byte.Evaluation:
        token_bytes = self.dataset.tokenizer.token_bytes
        return bits_per_byte.evaluate_batches(model, batches, token_bytes, device=self.device)


@dataclass(frozen=True)
class RunStopping(RunParts, Stopping):
    """The stop rule of a run. `held_out_batches` is None before their number is settled."""

    held_out_batches: int | None = None

    def rule(self) -> stopping.StopRule:
        return stopping.make_stop_rule(self.cfg.stop)

    @property
    def declared(self) -> Mapping[str, Any]:
        return self.cfg.stop.model_dump()

    @cached_property
    def paired_difference_std(self) -> float:
        """Measured around a few updates, on the run's own model at the start, where it is largest;
        per window, and scaled to the batch size.
        """
        state = build_state(small_run(self.cfg), self.dataset, self.device)
        validation, seq_len = self.dataset.validation, self.cfg.model.max_seq_len
        n_windows = min(PROBE_WINDOWS, validation.n_windows(seq_len))
        windows = eval_batches(validation, seq_len, 1, n_windows)
        rounds = []
        for _ in range(2):
            steps.train_step(state, state.next_batches())
            rounds.append(torch.tensor([_window_nats(state, window) for window in windows]))
        return float((rounds[1] - rounds[0]).std()) / self.cfg.eval.batch_size**0.5

    @cached_property
    def n_eval_batches(self) -> int:
        """As many as the stop rule needs, where the split has them.
        Raises DataError if the split has fewer than two.
        """
        cfg, n_windows = self.cfg, self.dataset.validation.n_windows(self.cfg.model.max_seq_len)
        available = n_windows // cfg.eval.batch_size
        if available < 2:
            raise DataError(
                "the held-out split is too short to evaluate on",
                value=f"{n_windows} windows of {cfg.model.max_seq_len} tokens",
                allowed=f"at least two batches of {cfg.eval.batch_size} (eval.batch_size)",
                next_step=(
                    "add text, raise data.split.validation_frac, or lower eval.batch_size or "
                    "model.max_seq_len"
                ),
            )
        if self.held_out_batches:
            return self.held_out_batches
        wanted = max(cfg.eval.batches, wanted_batches(cfg.stop, self.paired_difference_std))
        return min(wanted, available)


def wanted_batches(stop: Any, difference_std: float) -> int:
    """Held-out batches in which the smallest gain that the rule waits for stands out of the noise;
    1 for a rule that waits for none, or a spread that is not finite, which gates report.
    """
    if stop.kind != "patience" or not math.isfinite(difference_std):
        return 1
    gains = (stop.expected_gain_nats, stop.min_delta_nats)
    return stopping.batches_needed(difference_std, min(x for x in gains if x > 0))


@torch.no_grad()
def _window_nats(state: TrainState, window: Batch) -> float:
    state.model.eval()
    with state.autocast():
        x_BTD, _ = state.model.hidden_states(*model_inputs(window, state.device))
        labels = window.labels.to(state.device)
        nats = losses.linear_cross_entropy_sum(x_BTD, state.model.head_weight, labels)
    state.model.train()
    return float(nats) / losses.count_valid(window.labels)
