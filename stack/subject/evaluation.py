"""How a run scores held-out text, and its stop rule."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import nn

from stackproof.config import RunConfig
from stackproof.contracts.stopping import PairedSpread
from stackproof.contracts.subject import (
    Evaluation,
    MicroBatch,
    StopDeclaration,
    Stopping,
    TextEncoder,
)
from stackproof.data.data_loader import Batch, eval_batches
from stackproof.data.prepare import Dataset
from stackproof.evaluate import bits_per_byte, stopping
from stackproof.evaluate.baselines import BASELINES
from stackproof.spec.errors import DataError
from stackproof.subject.run import RunParts
from stackproof.train.state import declared_autocast

MAX_SCORED_TOKENS = 48  # of a window, so that a short text takes several


class RunEvaluation(RunParts, Evaluation):
    """The evaluation of a run, on its device."""

    def score_text(
        self, model: nn.Module, tokenizer: TextEncoder, text: str
    ) -> bits_per_byte.TextEvaluation:
        seq_len = min(self.cfg.model.max_seq_len, MAX_SCORED_TOKENS)
        stride = max(1, seq_len // 3)
        return bits_per_byte.evaluate_text(
            model, tokenizer, [text], seq_len=seq_len, stride=stride, device=self.device
        )

    def score_batches(
        self, model: nn.Module, batches: Sequence[MicroBatch]
    ) -> bits_per_byte.Evaluation:
        return self._score(model, batches, nullcontext)

    def score_in_precision(
        self, model: nn.Module, batches: Sequence[MicroBatch]
    ) -> bits_per_byte.Evaluation:
        return self._score(model, batches, partial(declared_autocast, self.cfg, self.device))

    def _score(
        self, model: nn.Module, batches: Sequence[MicroBatch], autocast: bits_per_byte.Autocast
    ) -> bits_per_byte.Evaluation:
        token_bytes = self.dataset.tokenizer.token_bytes
        return bits_per_byte.evaluate_batches(
            model, batches, token_bytes, device=self.device, autocast=autocast
        )

    def baselines(self, train: Any, validation: Any, tokenizer: Any) -> dict[str, float]:
        return {name: bits(train, validation, tokenizer) for name, bits in BASELINES.items()}

    def held_out_batches(self, n_rows: int, n_max: int) -> list[Batch]:
        split, seq_len = self.dataset.validation, self.cfg.model.max_seq_len
        n = min(n_max, split.n_windows(seq_len) // n_rows)
        return eval_batches(split, seq_len, n_rows, n)


@dataclass(frozen=True)
class RunStopping(Stopping):
    """The stop rule of a run. `given` is the number of held-out batches of a resumed run."""

    cfg: RunConfig
    dataset: Dataset
    spread: PairedSpread
    given: int | None = None

    def rule(self) -> stopping.StopRule:
        return stopping.make_stop_rule(self.cfg.stop)

    @property
    def declared(self) -> StopDeclaration:
        return self.cfg.stop.model_dump()

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
        if self.given:
            return self.given
        if cfg.stop.kind != "patience":  # it waits for no gain
            return min(cfg.eval.batches, available)
        wanted = wanted_batches(cfg.stop, self.spread.std_nats)
        return min(max(cfg.eval.batches, wanted), available)


def wanted_batches(stop: Any, difference_std: float) -> int:
    """Held-out batches in which the smallest gain that a rule with patience waits for is above the
    noise; 1 for a spread that is not finite, which gates report.
    """
    if not math.isfinite(difference_std):
        return 1
    gains = (stop.expected_gain_nats, stop.min_delta_nats)
    return stopping.batches_needed(difference_std, min(x for x in gains if x > 0))
