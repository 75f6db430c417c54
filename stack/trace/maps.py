"""Name maps: the modules that hold the points of our Transformer, of Hugging Face models,
and of user models.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, assert_never

from torch import nn

from stackproof.config import ModelConfig
from stackproof.model import hugging_face
from stackproof.model.foreign import Kind
from stackproof.model.transformer import Transformer
from stackproof.spec.architecture import Seen, Value
from stackproof.spec.errors import UsageError
from stackproof.spec.resolved_model import block_values
from stackproof.trace.points import (
    Attention,
    Function,
    Input,
    NameMap,
    Output,
    Place,
    Routing,
    Silu,
)

OUR_ATTENTION = Function("stackproof.kernels.dispatch", "attention")
OUR_ROUTING = Routing(
    "ffn", scores=2, chosen=0, weights=1, function=("stackproof.model.moe", "route")
)
TORCH_ATTENTION = ("torch.nn.functional", "scaled_dot_product_attention")


def map_of(model: nn.Module, given: NameMap | Mapping[str, str | Place] | None = None) -> NameMap:
    """The name map of a model; or the `given` one, {"layers.{}.ffn.out": "blocks.{}.mlp"},
    where a path means its output.

    Raises UsageError for an unknown model without a map.
    """
    match given:
        case NameMap():
            return given
        case Mapping():
            return NameMap(
                "your map",
                {point: Output(p) if isinstance(p, str) else p for point, p in given.items()},
            )
    if isinstance(model, Transformer):
        return ours(model.cfg)
    for kind in hugging_face.KINDS:
        if type(model).__name__ == kind.architecture:
            return theirs(kind, model)
    raise UsageError(
        "there is no name map for this model",
        value=type(model).__name__,
        allowed=(
            f"Transformer, {', '.join(k.architecture for k in hugging_face.KINDS)}, or any module "
            "with a map"
        ),
        next_step=(
            "give a name map: {'layers.{}.ffn.out': 'path.of.layers.{}.mlp'}; {} stands for the "
            "layer's number"
        ),
    )


def ours(cfg: ModelConfig) -> NameMap:
    """The map of `stackproof.model.transformer.Transformer`, from the architecture table."""
    model = cfg.model_dump()
    places: dict[str, Place] = {"embedding": Input("layers.0")}
    for value in block_values(model, layer=0):
        if value.seen is not Seen.NOWHERE:
            module = ".".join(name for name in ("layers.{}", value.module) if name)
            places[f"layers.{{}}.{value.slot}"] = _place(value, module)
    places |= {"final_norm": Output("final_norm"), "logits": Output("")}
    family = f"Transformer ({cfg.attention.kind} attention, {cfg.ffn.kind})"
    return NameMap(family, places, "layers.{}", OUR_ATTENTION)


def _place(value: Value, module: str) -> Place:
    """Where tracing reads a value of the table, at a module's full path."""
    match value.seen:
        case Seen.OUTPUT:
            return Output(module, value.layout)
        case Seen.INPUT:
            return Input(module, value.layout)
        case Seen.SHARED_INPUT:
            return Input(module, value.layout, shared=True)
        case Seen.SILU:
            return Silu(module, value.layout)
        case Seen.KERNEL:
            return Attention(value.module, value.layout)
        case Seen.ROUTING:
            return replace(OUR_ROUTING, path=module)
        case other:
            assert_never(other)


def _attention(rotary: bool) -> dict[str, Place]:
    turned = {"q_rotated": Attention("q"), "k_rotated": Attention("k")} if rotary else {}
    figures = {w: Attention(w, "BTF") for w in ("scores", "entropy")}
    return turned | figures | {"attention_mixed": Attention("mixed")}


def theirs(kind: Kind, model: Any) -> NameMap:
    """The map of a transformers model, by the names of its kind in
    `stackproof.model.hugging_face`.

    Points inside attention exist only if the model calls torch's function;
    single experts have no points.
    """
    config, at = model.config, dict(kind.modules) | dict(kind.running)
    block, attention = _parent(at["layers.{}.attention_norm"]), _parent(at["layers.{}.attention.q"])
    mixed = "layers.{}.ffn.router" in kind.running
    gated = not mixed and "layers.{}.ffn.gate" in at
    q, k, v = (at[f"layers.{{}}.attention.{n}"] for n in "qkv")
    joint = q == k == v
    places: dict[str, Place] = {
        "embedding": Input(block.format(0)),
        "layers.{}.attention_norm": Output(at["layers.{}.attention_norm"]),
    }
    for i, (name, path) in enumerate({"q": q, "k": k, "v": v}.items()):
        places[f"layers.{{}}.{name}"] = Output(path, part=(i, 3) if joint else None)
    q_norm = at.get("layers.{}.attention.q_norm", "{}").format(0)
    if q_norm in dict(model.named_modules()):
        places |= {
            f"layers.{{}}.{n}_norm": Output(at[f"layers.{{}}.attention.{n}_norm"], "BTNH")
            for n in "qk"
        }
    inside = getattr(config, "_attn_implementation", "sdpa") == "sdpa"
    seen = _attention(rotary="positions" not in at)
    without = (
        {"experts": "transformers keeps all experts in one tensor and runs them in one module"}
        if mixed
        else {}
    )
    if inside:
        places |= {f"layers.{{}}.{slot}": place for slot, place in seen.items()}
    else:
        reason = (
            f"it computes attention by {config._attn_implementation!r}; load it with "
            "attn_implementation='sdpa' to see inside"
        )
        without |= dict.fromkeys(seen, reason)
    places |= {
        "layers.{}.attention_out": Output(attention),
        "layers.{}.resid_mid": Input(at["layers.{}.ffn_norm"], shared=True),
        "layers.{}.ffn_norm": Output(at["layers.{}.ffn_norm"]),
        **_their_ffn(at, mixed, gated),
        "layers.{}.resid_out": Output(block),
        "final_norm": Output(at["final_norm"]),
        "logits": Output(at["head"]),
    }
    n_heads = getattr(config, kind.sizes["n_heads"])
    n_kv_heads = getattr(config, kind.sizes.get("n_kv_heads", ""), None) or n_heads
    function = Function(*TORCH_ATTENTION, n_heads, n_kv_heads)
    return NameMap(
        f"{kind.architecture} of transformers", places, block, function if inside else None, without
    )


def _their_ffn(at: Mapping[str, str], mixed: bool, gated: bool) -> dict[str, Place]:
    if mixed:
        router = at["layers.{}.ffn.router"]
        return {
            "layers.{}.router": Output(router, "RF", flows=False),
            "layers.{}.routing": Routing(router, scores=0, chosen=2, weights=1),
            "layers.{}.ffn.out": Output(_parent(router)),
        }
    up, down = at["layers.{}.ffn.up"], at["layers.{}.ffn.down"]
    out = {"layers.{}.ffn.out": Output(_parent(up))}
    if not gated:
        return {"layers.{}.ffn.up": Output(up), "layers.{}.ffn.act": Input(down), **out}
    gate = at["layers.{}.ffn.gate"]
    inner = {
        "ffn.gate": Output(gate),
        "ffn.up": Output(up),
        "ffn.silu": Silu(gate),
        "ffn.swiglu": Input(down),
    }
    return {f"layers.{{}}.{slot}": place for slot, place in inner.items()} | out


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
