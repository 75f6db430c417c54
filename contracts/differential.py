"""The gate that holds the run's own model against the float64 oracle: B batch, T tokens, D d_model, V vocab."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from contracts.declared import chooses, drawn_weights, kind_of, kinds, parameter_shapes, silent_kinds
from contracts.gate import Verdict, decide, decides, failed
from contracts.model import device_of, in_eval, packing, table_error
from contracts.oracle import below, oracle_attention, oracle_reading

ORACLE_TOKENS, ORACLE_ROWS = 40, 4


@decides("model.reference-differential")
@torch.no_grad()
def reference_differential(
    limits: SimpleNamespace,
    *,
    model: nn.Module,
    build_model: Callable[[], nn.Module],
    attention_layers: Sequence[Callable[[Tensor, Tensor | None], Tensor]],
    weights: Mapping[str, Tensor],
    declared_architecture: Mapping[str, Any],
    rotary_tables: tuple[Tensor, Tensor] | None,
    vocab_size: int,
) -> Verdict:
    """Attention on activations of scale 3, and whole logits, equal an oracle written out in float64; tables do so at full length.

    `attention_layers` holds per layer (x_BTD, document_ids_BT or None) ↦ y_BTD of the run's own module; `weights` what a checkpoint
    of `model` holds, by plain name. Logits are judged under the run's own weights, and in a model from `build_model` under drawn ones:
    at step 0 biases are 0, gains are 1 and gates are even, so that much of a model does not show.
    """
    a, shapes = declared_architecture, parameter_shapes(declared_architecture, vocab_size)
    if odd := sorted({n for n, _ in shapes.items() ^ {(n, tuple(w.shape)) for n, w in weights.items()}}):
        return failed(f"names or shapes of weights are not the declared ones: {', '.join(odd)}", undeclared=len(odd))
    errors = [_attention_error(attend, weights, a, i) for i, attend in enumerate(attention_layers)]
    layer = max(range(len(errors)), key=errors.__getitem__)
    ids_BT = _distinct_ids(ORACLE_ROWS if chooses(a) else 2, min(ORACLE_TOKENS, a["max_seq_len"], vocab_size), vocab_size)
    own_error, own_judged = _logit_error(limits, model, ids_BT, weights, a)
    twin = build_model().eval()
    twin.load_state_dict(drawn_weights(shapes, torch.Generator().manual_seed(13)))
    drawn_error, drawn_judged = _logit_error(limits, twin, ids_BT, twin.state_dict(), a)
    effect, weakest = min((_effect(twin, ids_BT, kind, shapes), kind) for kind in kinds(shapes) if kind not in silent_kinds(a))
    tables_off, judged = table_error(rotary_tables, a), min(own_judged, drawn_judged)
    beyond = sum(_beyond_window(attend, a, device_of(model)) for attend in attention_layers)
    wrong = [
        text
        for ok, text in (
            (errors[layer] <= limits.rel_error_max, f"attention of layer {layer} differs from the float64 oracle"),
            (max(own_error, drawn_error) <= limits.rel_error_max, "logits differ from the float64 oracle"),
            (tables_off <= limits.table_abs_error_max, "rotary tables differ from the definition"),
            (not beyond, f"{beyond} layers do not see exactly the keys of their window"),
            (effect >= limits.effect_min, f"{weakest} hardly changes the logits"),
            (judged >= limits.judged_frac_min, "the choices of too many tokens are within rounding of a tie"),
        )
        if not ok
    ]
    return decide(
        not wrong,
        "; ".join(wrong),
        attention_rel_error=errors[layer],
        logit_rel_error=own_error,
        drawn_rel_error=drawn_error,
        table_abs_error=tables_off,
        weakest=weakest,
        weakest_effect=effect,
        judged_frac=judged,
    )


def _rel(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64."""
    got, expected = got.double().cpu(), expected.double().cpu()
    return float((got - expected).norm() / expected.norm())


def _distinct_ids(rows: int, length: int, vocab_size: int) -> Tensor:
    """No token twice in a row: a router that sees embeddings alone scores repeated tokens alike, and rounding would break the tie."""
    draw = torch.Generator().manual_seed(12)
    return torch.stack([torch.randperm(vocab_size, generator=draw)[:length] for _ in range(rows)])


def _attention_error(attend: Callable, weights: Mapping[str, Tensor], a: Mapping[str, Any], layer: int) -> float:
    """Worse of the errors on whole and on packed rows."""
    own, length = below(weights, f"layers.{layer}.attention."), min(ORACLE_TOKENS, a["max_seq_len"])
    x_BTD, device = 3 * torch.randn(2, length, a["d_model"], generator=torch.Generator().manual_seed(11)), own["q.weight"].device
    whole = _rel(attend(x_BTD.to(device), None), oracle_attention(x_BTD, own, a, layer))
    packed_BT = packing(length)
    return max(whole, _rel(attend(x_BTD.to(device), packed_BT.to(device)), oracle_attention(x_BTD, own, a, layer, packed_BT)))


def _beyond_window(attend: Callable, a: Mapping[str, Any], device: torch.device) -> bool:
    """Whether a window too wide for the oracle's rows is not kept: the first query past it sees the first key, or the last in it not."""
    window = a["attention"]["window"]
    if window is None or not ORACLE_TOKENS <= window < a["max_seq_len"]:
        return False
    x_BTD = 3 * torch.randn(1, window + 1, a["d_model"], generator=torch.Generator().manual_seed(15))
    other_BTD = torch.cat((-x_BTD[:, :1], x_BTD[:, 1:]), 1)
    before, after = (attend(x.to(device), None) for x in (x_BTD, other_BTD))
    return not torch.equal(before[:, window], after[:, window]) or torch.equal(before[:, window - 1], after[:, window - 1])


def _logit_error(
    limits: SimpleNamespace, model: nn.Module, ids_BT: Tensor, weights: Mapping[str, Tensor], a: Mapping[str, Any]
) -> tuple[float, float]:
    """(relative error of the logits of tokens that no choice within rounding of a tie has touched, share of these tokens)."""
    reading = oracle_reading(ids_BT, weights, a)
    clear_BT = reading.margin_BT >= limits.choice_margin_min
    got_BTV = in_eval(model, ids_BT.to(device_of(model))).cpu()
    return _rel(got_BTV[clear_BT], reading.logits_BTV[clear_BT]), float(clear_BT.double().mean())


def _effect(twin: nn.Module, ids_BT: Tensor, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """By how much of their norm logits change when every weight of one kind is drawn again."""
    live, ids_BT = twin.state_dict(), ids_BT[:2].to(device_of(twin))
    drawn = drawn_weights({n: s for n, s in shapes.items() if kind_of(n) == kind}, torch.Generator().manual_seed(14))
    kept, before = {n: live[n].clone() for n in drawn}, twin(ids_BT)
    _put(drawn, live)
    after = twin(ids_BT)
    _put(kept, live)
    return _rel(after, before)


def _put(values: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        live[name].copy_(value)
