"""The architecture table: weights and values of every variant of every part of the decoder.

Imports no torch. An entry holds the weights of a variant, with symbolic shapes and initial laws,
and the values of its forward: their width, how many copies the backward keeps, and their trace
point. spec/resolved_model.py fills in the numbers of a configuration. Through it these files read
the table:

    spec/formulas.py         parameter count, FLOPs, kept activations
    contracts/declared.py    names, shapes and initial laws that gates require of a model
    stack/train/memory.py    predicted bytes, through spec/formulas.py
    stack/trace/maps.py      trace map of our Transformer

The model does not read this table: its modules state their own sizes, and stack/model/init.py
states its own laws. Gates and `build_model` compare the two, so an error in either one is found.
contracts/oracle.py computes logits from the papers and imports nothing from here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

Model = Mapping[str, Any]  # the resolved `model` section of a configuration
Layout = Literal["BTF", "BNTH", "RF"]  # batch, token, head, feature; rows of tokens for experts

# --- symbols ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dim:
    """A size in symbols: the product of the named sizes, divided by `over`."""

    names: tuple[str, ...] = ()
    over: int = 1

    def of(self, sizes: Mapping[str, int]) -> int:
        return math.prod(sizes[name] for name in self.names) // self.over


ONE, VOCAB, MAX_SEQ_LEN = Dim(), Dim(("vocab_size",)), Dim(("max_seq_len",))
D_MODEL, D_FF, N_EXPERTS = Dim(("d_model",)), Dim(("d_ff",)), Dim(("n_experts",))
Q_WIDTH, KV_WIDTH = Dim(("n_heads", "head_dim")), Dim(("n_kv_heads", "head_dim"))
HEAD_DIM, HALF_HEAD = Dim(("head_dim",)), Dim(("head_dim",), over=2)


@dataclass(frozen=True)
class Law:
    """Law of a weight at step 0: a constant, or normal with mean 0 and this standard deviation."""

    kind: Literal["constant", "normal"]
    value: Callable[[Model], float]

    def resolve(self, model: Model) -> tuple[str, float]:
        return self.kind, self.value(model)


ZERO, ONES = Law("constant", lambda m: 0.0), Law("constant", lambda m: 1.0)
HALF = Law("constant", lambda m: 0.5)
INPUT = Law("normal", lambda m: m["init_std"])
# The sum of all 2·n_layers branches has the standard deviation of the embedding (GPT-2, sec. 2.3).
BRANCH = Law("normal", lambda m: m["init_std"] / math.sqrt(2 * m["n_layers"]))
LAMBDA = Law("normal", lambda m: 0.1)  # arXiv:2410.05258


@dataclass(frozen=True)
class When:
    """A condition on the declared section: `key` has this value; without a value, it is set."""

    key: str
    value: str | None = None

    def holds(self, declared: Mapping[str, Any]) -> bool:
        found = declared.get(self.key)
        return bool(found) if self.value is None else found == self.value


# --- weights and values -----------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A named tensor of a checkpoint."""

    name: str
    shape: tuple[Dim, ...]
    law: Law
    when: When | None = None


class Matrix(Weight):
    """(out, in), multiplied with every token that reaches it: 2 FLOPs per entry and token,
    forward.
    """


class Lookup(Weight):
    """(rows, features); rows are selected by index, without a matrix product."""


class Vector(Weight):
    """A bias, a gain or a scalar; takes part in no matrix product."""


class Buffer(Weight):
    """A buffer: saved with the weights, without a gradient."""


class Seen(Enum):
    """Where tracing reads a value."""

    OUTPUT = "what the module returns"
    INPUT = "what the module receives"
    SHARED_INPUT = "what the module receives, and the residual sum too"
    SILU = "silu of what the module returns, computed beside the model"
    KERNEL = "a tensor of the attention kernel: q, k, mixed, scores or entropy"
    ROUTING = "the weight of each expert for each token"
    NOWHERE = "kept for the backward, without a trace point"


@dataclass(frozen=True)
class Value:
    """A value of the forward, per token: its trace point `slot`, and `kept` copies for the
    backward.

    `module` is a path below the part, or the name of the kernel's tensor. Slots of a feed-forward
    are below `ffn.` or `experts.{}.`, all others below the block.
    """

    slot: str
    seen: Seen
    module: str
    width: Dim
    kept: int = 1
    layout: Layout = "BTF"
    when: When | None = None


# --- parts and their variants -----------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One variant: its weights in the order of a checkpoint, its values in execution order."""

    weights: tuple[Weight, ...] = ()
    values: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Attention(Part):
    """`values` come before positions are applied, `kernel` after.

    `products_per_key` counts products of q_width entries per query and visible key.
    """

    kernel: tuple[Value, ...] = ()
    products_per_key: int = 2


@dataclass(frozen=True)
class Mixture(Part):
    """A router over `n_experts` copies of the declared expert; each token is sent to `top_k` of
    them.

    `expert_values` are computed by each expert that receives the token, in addition to the expert's
    own.
    """

    expert_values: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Gate(Part):
    """A gate of depth. `share_key` is the key of the share of tokens that the block reads;
    "": all.
    """

    share_key: str = ""


POSITIONS: dict[str, Part] = {
    "rotary": Part(
        values=(
            Value("q_rotated", Seen.KERNEL, "q", Q_WIDTH, 0, "BNTH"),
            Value("k_rotated", Seen.KERNEL, "k", KV_WIDTH, 0, "BNTH"),
        )
    ),
    "learned": Part((Lookup("weight", (MAX_SEQ_LEN, D_MODEL), INPUT),)),
}

_GAIN = Vector("weight", (D_MODEL,), ONES)
_NORMED = (Value("", Seen.OUTPUT, "", D_MODEL),)  # the slot is the norm's name in the block
NORM: dict[str, Part] = {
    "rmsnorm": Part((_GAIN,), _NORMED),
    "layernorm": Part((_GAIN, Vector("bias", (D_MODEL,), ZERO)), _NORMED),
}

_BIASED, _OUT_BIASED, _QK_NORM = When("qkv_bias"), When("out_bias"), When("qk_norm")
_PAPER, _SCALAR = When("form", "paper"), When("form", "scalar")
_PROJECTIONS = (
    Matrix("q.weight", (Q_WIDTH, D_MODEL), INPUT),
    Matrix("k.weight", (KV_WIDTH, D_MODEL), INPUT),
    Matrix("v.weight", (KV_WIDTH, D_MODEL), INPUT),
    Matrix("out.weight", (D_MODEL, Q_WIDTH), BRANCH),
    Vector("q.bias", (Q_WIDTH,), ZERO, _BIASED),
    Vector("k.bias", (KV_WIDTH,), ZERO, _BIASED),
    Vector("v.bias", (KV_WIDTH,), ZERO, _BIASED),
    Vector("out.bias", (D_MODEL,), ZERO, _OUT_BIASED),
)


def _attention(*own: Weight, norm_width: Dim, maps: int, products_per_key: int) -> Attention:
    """Attention with `maps` softmax maps per head: the kernel keeps q, k, v and output of each."""
    norms = (Vector(f"{name}.weight", (norm_width,), ONES, _QK_NORM) for name in _NORMS)
    projected = (
        Value("q", Seen.OUTPUT, "q", Q_WIDTH, maps),
        Value("k", Seen.OUTPUT, "k", KV_WIDTH, maps),
        Value("v", Seen.OUTPUT, "v", KV_WIDTH, maps),
        Value("q_norm", Seen.OUTPUT, "q_norm", Q_WIDTH, 1, "BNTH", _QK_NORM),
        Value("k_norm", Seen.OUTPUT, "k_norm", KV_WIDTH, 1, "BNTH", _QK_NORM),
    )
    kernel = (
        Value("scores", Seen.KERNEL, "scores", ONE, 0),
        Value("entropy", Seen.KERNEL, "entropy", ONE, 0),
        Value("attention_mixed", Seen.KERNEL, "mixed", Q_WIDTH, maps, "BNTH"),
    )
    return Attention((*_PROJECTIONS, *norms, *own), projected, kernel, products_per_key)


_NORMS = ("q_norm", "k_norm")
ATTENTION: dict[str, Part] = {
    "softmax": _attention(norm_width=HEAD_DIM, maps=1, products_per_key=2),
    "differential": _attention(
        Vector("lambda_q1", (HALF_HEAD,), LAMBDA, _PAPER),
        Vector("lambda_k1", (HALF_HEAD,), LAMBDA, _PAPER),
        Vector("lambda_q2", (HALF_HEAD,), LAMBDA, _PAPER),
        Vector("lambda_k2", (HALF_HEAD,), LAMBDA, _PAPER),
        Vector("head_norm.weight", (HEAD_DIM,), ONES, _PAPER),
        Vector("lambda_weight", (ONE,), HALF, _SCALAR),
        norm_width=HALF_HEAD,
        maps=2,
        products_per_key=3,  # two scores of half width, two mixtures of values
    ),
}

_UP = Matrix("up.weight", (D_FF, D_MODEL), INPUT)
_DOWN = Matrix("down.weight", (D_MODEL, D_FF), BRANCH)
FEED_FORWARD: dict[str, Part] = {
    "swiglu": Part(
        (Matrix("gate.weight", (D_FF, D_MODEL), INPUT), _UP, _DOWN),
        (
            Value("gate", Seen.OUTPUT, "gate", D_FF),
            Value("up", Seen.OUTPUT, "up", D_FF),
            Value("silu", Seen.SILU, "gate", D_FF, 0),
            Value("swiglu", Seen.INPUT, "down", D_FF),
        ),
    ),
    "gelu": Part(
        (
            _UP,
            _DOWN,
            Vector("up.bias", (D_FF,), ZERO, When("bias")),
            Vector("down.bias", (D_MODEL,), ZERO, When("bias")),
        ),
        (Value("up", Seen.OUTPUT, "up", D_FF), Value("act", Seen.INPUT, "down", D_FF)),
    ),
    "moe": Mixture(
        (Matrix("router.weight", (N_EXPERTS, D_MODEL), INPUT),),
        (
            Value("router", Seen.OUTPUT, "router", N_EXPERTS, 4, "RF"),
            Value("routing", Seen.ROUTING, "", N_EXPERTS, 0, "RF"),
        ),
        expert_values=(Value("out", Seen.OUTPUT, "", D_MODEL, 3),),
    ),
}

BALANCE: dict[str, Part] = {
    "auxiliary-loss": Part(),
    "selection-bias": Part((Buffer("selection_bias", (N_EXPERTS,), ZERO),)),
}

DEPTH: dict[str, Part] = {
    "full": Part(),
    "mixture-of-depths": Part(
        (Matrix("router.weight", (ONE, D_MODEL), INPUT), Vector("router.bias", (ONE,), ZERO)),
        (Value("", Seen.NOWHERE, "", D_MODEL, 3),),
    ),
}
DEPTH_GATE: dict[str, Part] = {"soft": Gate(), "hard": Gate(share_key="capacity_frac")}

# By key of the `model` section. Scaling of rotary positions has no entry, because it has no
# weights.
TABLE: dict[str, dict[str, Part]] = {
    "positions": POSITIONS,
    "norm": NORM,
    "attention": ATTENTION,
    "ffn": FEED_FORWARD,
    "ffn.expert": FEED_FORWARD,
    "ffn.balance": BALANCE,
    "depth": DEPTH,
    "depth.gate": DEPTH_GATE,
}
# A `model` section recorded before a part had variants means the first entry of that part.
FIRST_VARIANTS = {key: {"kind": next(iter(TABLE[key]))} for key in TABLE if "." not in key}

EMBEDDING = Lookup("embed.weight", (VOCAB, D_MODEL), INPUT)
HEAD = Matrix("head.weight", (VOCAB, D_MODEL), INPUT)  # if tied, the embedding takes its place
# The values of a block after its two branches.
AFTER_ATTENTION = (
    Value("attention_out", Seen.OUTPUT, "attention", D_MODEL, 0),
    Value("resid_mid", Seen.SHARED_INPUT, "ffn_norm", D_MODEL),
)
AFTER_FEED_FORWARD = (
    Value("ffn.out", Seen.OUTPUT, "ffn", D_MODEL, 0),
    Value("resid_out", Seen.OUTPUT, "", D_MODEL),
    Value("", Seen.NOWHERE, "", D_MODEL, when=When("dropout")),
)
