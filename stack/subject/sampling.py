"""How a run generates text. Functions are looked up in their module when they are called."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stackproof.contracts.subject import Sampling
from stackproof.evaluate import bits_per_byte, sampling
from stackproof.model.forward_context import KVCache
from stackproof.subject.run import RunParts


class RunSampling(RunParts, Sampling):
    """Generation on the device of a run."""

    def logits(self, model: nn.Module, ids_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        with bits_per_byte.evaluating(model):
            return model(ids_BT.to(self.device), cache).cpu()

    def cache(self) -> KVCache:
        return KVCache(self.cfg.model, device=self.device)

    def token_probs(
        self,
        logits_V: Tensor,
        *,
        repetition_penalty: float = 1.0,
        seen: Sequence[int] = (),
        **filters: float,
    ) -> Tensor:
        logits_V = sampling.penalise_repetition(logits_V, seen, repetition_penalty)
        return sampling.filtered_probs(logits_V, **{"temperature": 1.0} | filters)

    def pick(self, probs_V: Tensor, uniforms_R: Tensor) -> Tensor:
        return sampling.pick(probs_V, uniforms_R)

    def generate(self, model: nn.Module, ids: Sequence[int], **options: Any) -> list[int]:
        return sampling.generate(model, ids, **options)
