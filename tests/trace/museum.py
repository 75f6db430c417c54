"""What tracing names for each plant of the museum that acts on a model, its kernels, its precision
or its experts; or why it cannot.

The right side is the clean code, the other one the same weights under the plant: in which way,
`tests.trace.museum_sides` says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from stackproof.config import BiasBalance, MixtureOfExperts
from stackproof.museum.plant import Plant
from stackproof.trace.model_variant import ModelVariant
from tests.trace import models
from tests.trace import museum_sides as ways
from tests.trace.museum_sides import (
    EXPERTS,
    LAYERS,
    drawn,
    exported,
    imported,
    made,
    resumed,
    running,
    updated,
)

BIASED = {"ffn": MixtureOfExperts(n_experts=4, balance=BiasBalance(rate=1e-3))}
ROOMY = {"ffn": MixtureOfExperts(n_experts=4, capacity_factor=1.5)}
LONG = {"max_seq_len": 300}
DROPOUT = {"train": True, "dropout": 0.1, "around": ways.seeded}
ENDS = ("embedding", "final_norm", "logits")
Sides = Callable[[Plant], tuple[ModelVariant, ModelVariant]]


@dataclass(frozen=True)
class Found:
    """What tracing must name: `slot`, the first that errs.
    All that errs is it and `also`, in each of `layers` or where a whole name says.

    Bisection names the first and the last point of these, or what `bisected` says.
    `way` is how an attention kernel is said to err.
    """

    sides: Sides
    slot: str
    also: tuple[str, ...] = ()
    layers: tuple[int, ...] = tuple(range(LAYERS))
    bisected: tuple[str, ...] = ()
    ids: torch.Tensor | None = None
    way: str = ""

    @property
    def point(self) -> str:
        return self.named(self.slot)[0]

    def named(self, slot: str) -> list[str]:
        return (
            [slot]
            if slot in ENDS or slot.startswith("layers.")
            else [f"layers.{layer}.{slot}" for layer in self.layers]
        )

    @property
    def suspects(self) -> set[str]:
        return {name for slot in (self.slot, *self.also) for name in self.named(slot)}


@dataclass(frozen=True)
class Unseen:
    """Why two forwards are the same. `runs` says whether the planted line runs in them; `updated`
    are the sides after an update with it.
    """

    sides: Sides
    reason: str
    runs: bool = False
    updated: Sides | None = None


def both(*slots: str) -> tuple[str, ...]:
    """The same slot in the first and in the last layer."""
    return f"layers.0.{slots[0]}", f"layers.{LAYERS - 1}.{slots[-1]}"


IN_THE_LOSS = "it is in the loss, which comes after the logits"
IN_THE_UPDATE = "it is in the update of weights, and a forward only reads them"
EXACT_BELOW_256 = "positions below 256 are exact in bfloat16"
IN_THE_BACKWARD = "it is in the derivative, and the values of the forward are right"
EVERYTHING_ELSE = (
    *"k v q_rotated k_rotated scores entropy attention_mixed attention_out resid_mid".split(),
    *"ffn.gate ffn.up ffn.silu ffn.swiglu ffn.out resid_out logits".split(),
)
MIXED = {"slot": "attention_mixed"}
MASKED = {
    "slot": "scores",
    "also": ("entropy", "attention_mixed"),
    "bisected": both("attention_mixed"),
}
TURNED = {"slot": "q_rotated", "also": ("k_rotated",), "bisected": both("q_rotated", "k_rotated")}

EXHIBITS: dict[str, Found | Unseen] = {
    # ---- weights as they are drawn
    "model.head-init-wrong": Found(
        drawn, "attention_out", ("ffn.out",), bisected=both("attention_out", "ffn.out")
    ),
    "model.init-std-too-big": Found(drawn, "embedding"),
    "model.layers-drawn-alike": Found(
        drawn,
        "embedding",
        ("q", "k", "v", "attention_out", "ffn.gate", "ffn.up", "ffn.out", "logits"),
        bisected=("embedding", "logits"),
    ),
    "model.branches-drawn-wide": Found(
        drawn, "attention_out", ("ffn.out",), bisected=both("attention_out", "ffn.out")
    ),
    # ---- tables made with the model
    "model.norm-garbage-buffer": Found(made, **TURNED),
    "model.rope-bf16-table": Found(partial(made, **LONG), **TURNED, ids=models.ids(tokens=300)),
    "model.ffn-channels-apart": Found(made, "ffn.swiglu", layers=(1,)),
    # ---- the forward
    "model.logits-scaled": Found(running, "logits"),
    "model.causal-mask-off-by-one": Found(
        running, **MIXED, way="each query sees the key after its own"
    ),
    "model.missing-scale": Found(running, **MIXED, way="scores are not scaled"),
    "model.double-scale": Found(running, **MIXED, way="scores are scaled twice"),
    "model.rows-mixed": Found(
        running,
        "attention_norm",
        ("ffn_norm", "final_norm"),
        bisected=("layers.0.attention_norm", "final_norm"),
    ),
    "model.document-mask-lost": Found(partial(running, inputs=ways.documents), **MASKED),
    "model.document-mask-off-by-one": Found(partial(running, inputs=ways.documents), **MASKED),
    # the first token of a document sees itself alone, whatever its query is
    "model.positions-restart-late": Found(
        partial(running, inputs=ways.documents), **TURNED | {"bisected": both("k_rotated")}
    ),
    "model.gqa-head-order": Found(
        partial(running, inputs=ways.prompt),
        **MIXED,
        way="key heads are tiled where each should be repeated for its group",
    ),
    "model.attention-branch-lost": Found(running, "resid_mid"),
    "model.far-keys-unseen": Found(partial(running, **LONG), **MASKED, ids=models.ids(tokens=160)),
    # ---- the forward in training mode
    "model.dropout-unscaled": Found(
        partial(made, **DROPOUT),
        "resid_mid",
        ("resid_out",),
        bisected=both("resid_mid", "resid_out"),
    ),
    "model.dropout-on-one-branch": Found(partial(running, **DROPOUT), "resid_out"),
    "model.dropout-same-masks": Found(
        partial(running, **DROPOUT),
        "resid_mid",
        ("resid_out",),
        bisected=both("resid_mid", "resid_out"),
    ),
    "model.dropout-undeclared": Found(
        partial(running, train=True, around=ways.seeded), "embedding"
    ),
    "model.scaled-in-training": Found(partial(running, train=True), "logits"),
    # ---- experts
    "moe.weights-not-renormalised": Found(partial(running, **EXPERTS), "routing"),
    "moe.bias-in-the-weights": Found(partial(running, stir=ways.uneven, **BIASED), "routing"),
    "moe.router-reads-the-mean": Found(partial(running, **EXPERTS), "routing"),
    "moe.drops-uncounted": Found(partial(running, **EXPERTS), "ffn.out"),
    "moe.bias-per-micro-batch": Found(
        partial(running, train=True, **BIASED), "routing", ids=models.ids(rows=64, tokens=40)
    ),
    "moe.balance-left-out": Unseen(
        partial(running, **EXPERTS), IN_THE_LOSS, True, partial(updated, **EXPERTS)
    ),
    "moe.balance-insensitive": Unseen(
        partial(running, **EXPERTS), IN_THE_LOSS, True, partial(updated, **EXPERTS)
    ),
    "moe.balance-cheated": Unseen(
        partial(running, **EXPERTS), IN_THE_LOSS, True, partial(updated, **EXPERTS)
    ),
    "moe.bias-sign-flipped": Unseen(
        partial(running, stir=ways.uneven, **BIASED),
        IN_THE_UPDATE,
        False,
        partial(updated, **BIASED),
    ),
    "moe.drops-undeclared": Found(partial(running, **EXPERTS), "ffn.out"),
    "moe.room-of-a-quarter": Found(partial(running, train=True, **ROOMY), "ffn.out"),
    "moe.padding-routed": Unseen(
        partial(running, inputs=ways.documents, **EXPERTS), "these rows hold no padding", True
    ),
    "moe.padding-in-the-mean": Unseen(running, IN_THE_LOSS),
    # ---- precision
    "precision.norm-in-half": Found(
        partial(running, around=ways.autocast),
        "attention_norm",
        ("ffn_norm", "final_norm"),
        bisected=("layers.0.attention_norm", "final_norm"),
    ),
    "precision.half-undeclared": Found(
        partial(running, around=ways.declared),
        "q",
        EVERYTHING_ELSE,
        bisected=("layers.0.q", "logits"),  # norms are taken in float32
    ),
    "precision.rotation-lost-in-half": Found(partial(running, around=ways.autocast), **TURNED),
    "precision.labels-shifted-in-half": Unseen(partial(running, around=ways.autocast), IN_THE_LOSS),
    "precision.evaluation-in-half": Unseen(
        partial(running, around=ways.autocast), "it is in the evaluation, behind the logits"
    ),
    "precision.evaluation-in-float32": Unseen(
        partial(running, around=ways.autocast), "it is in the evaluation, around the model"
    ),
    "model.future-in-half": Found(
        partial(running, around=ways.autocast), **MIXED, way="each query sees all keys"
    ),
    "model.documents-mixed-in-half": Found(
        partial(running, inputs=ways.documents, around=ways.autocast),
        "q_rotated",
        ("k_rotated", "scores", "entropy", "attention_mixed"),
        bisected=both("q_rotated", "attention_mixed"),
    ),
    "model.packed-positions-in-half": Unseen(
        partial(running, inputs=ways.documents), EXACT_BELOW_256, True
    ),
    "model.positions-in-half-under-autocast": Unseen(
        partial(running, inputs=ways.documents, around=ways.autocast), EXACT_BELOW_256, True
    ),
    "model.documents-mixed-again": Unseen(
        partial(running, inputs=ways.documents), "it is in the forward of a backward pass", True
    ),
    "precision.loss-in-half": Unseen(partial(running, around=ways.autocast), IN_THE_LOSS),
    "precision.unscale-left-out": Unseen(
        running, IN_THE_UPDATE, False, partial(updated, dtype="float16")
    ),
    "runtime.weights-rounded-to-half": Unseen(running, IN_THE_UPDATE, False, updated),
    # ---- compilers and kernels of the loss
    "kernel.compiled-gradient-zero": Unseen(
        running,
        IN_THE_BACKWARD,
        False,
        partial(updated, compiled=True, around=ways.uncompiled),
    ),
    "kernel.compile-gives-up": Unseen(
        ways.compiled,
        "eager computes the same numbers as the graph that was asked for, only later",
        True,
    ),
    "kernel.row-twice-at-a-border": Unseen(
        running, IN_THE_LOSS, False, partial(updated, around=ways.small_chunks)
    ),
    "kernel.keys-lost-in-long-rows": Found(
        partial(running, around=ways.in_chunks, **LONG), **MIXED, ids=models.ids(tokens=160)
    ),
    "kernel.gradient-of-the-last-chunk": Unseen(
        partial(running, around=ways.in_chunks),
        IN_THE_BACKWARD,
        False,
        partial(updated, around=ways.in_chunks),
    ),
    "kernel.torch-gradient-too-small": Unseen(running, IN_THE_BACKWARD, False, updated),
    "model.labels-of-the-past": Unseen(running, IN_THE_LOSS, False, updated),
    "model.shared-gradient-clobbered": Unseen(running, IN_THE_BACKWARD, True, updated),
    # ---- other rooms that show the same failures
    "sampling.rotation-rounded": Found(
        partial(running, inputs=ways.prompt),
        "q_rotated",
        # the cache holds keys that were turned wrongly, so that later layers mix other ones
        ("k_rotated", "layers.1.attention_mixed", "layers.2.attention_mixed"),
        bisected=both("q_rotated", "attention_mixed"),
    ),
    "checkpoint.tables-not-computed": Unseen(running, "it is in the command that opens a run"),
    "loss.nan-gradient-made-zero": Unseen(running, IN_THE_UPDATE),
    "export.import-pairs-interleaved": Found(
        partial(imported, name="smollm2"), "q", ("k",), (0, 1), ("layers.0.q", "layers.1.k")
    ),
    "export.import-drops-a-head": Found(partial(imported, name="llama-3"), "logits"),
    "export.rotary-pairs-interleaved": Found(exported, "q", ("k",), bisected=both("q", "k")),
    "export.second-head": Found(partial(exported, tied_head=True), "logits"),
    "checkpoint.tie-broken-on-load": Unseen(
        resumed, IN_THE_UPDATE, True, partial(resumed, update=True)
    ),
    "loss.nan-made-zero": Unseen(
        running, "it is in the loss, and acts on features that are not finite alone"
    ),
    "loss.nan-micro-batch-skipped": Unseen(
        running, IN_THE_UPDATE, False, partial(updated, broken=True)
    ),
    "runtime.nan-masked": Unseen(running, IN_THE_UPDATE, False, updated),
    "runtime.infinite-activation": Unseen(running, IN_THE_LOSS, False, partial(updated, n=7)),
    "runtime.nan-in-a-weight": Unseen(running, IN_THE_UPDATE, False, partial(updated, n=7)),
}
